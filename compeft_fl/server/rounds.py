"""The loop over rounds: Flower's, which also goes on from a checkpoint."""

from __future__ import annotations

import functools
import io
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from compeft_fl.client.node_memory import forget_federation
from compeft_fl.exchange.records import LOGGER
from compeft_fl.server.checkpoint import Checkpoint, CheckpointFolder
from compeft_fl.server.outcomes import Outcomes
from compeft_fl.server.streaming_grid import StreamingGrid

__all__ = ["Checkpointing", "Remembering", "log_result", "run_rounds"]

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]
_P = ParamSpec("_P")


@dataclass
class Checkpointing:
    """Where a federation keeps its checkpoints, and whether it begins from one.

    Parameters
    ----------
    folder : CheckpointFolder or None
        None: no checkpoints. A folder is one federation's: there must be none in it unless this
        resumes, and no other server that works in it.
    resume : bool
        Begin from the newest whole checkpoint, where there is one.
    extra : callable, optional
        Gives what the caller wants kept with each checkpoint; plain values, as JSON has them.
    restored : callable, optional
        Takes it back on resuming, before the first round.
    """

    folder: CheckpointFolder | None = None
    resume: bool = False
    extra: Callable[[], Any] | None = None
    restored: Callable[[Any], None] | None = None


class Remembering(Protocol):
    """A strategy with a state of its own."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: names to arrays, dicts of arrays, and plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


def _in_its_folder(run: Callable[_P, Result]) -> Callable[_P, Result]:
    """A run that holds the folder of its ``checkpointing`` from its first step to its last."""

    @functools.wraps(run)
    def holding(*args: _P.args, **kwargs: _P.kwargs) -> Result:
        kept = kwargs.get("checkpointing")
        has_folder = isinstance(kept, Checkpointing) and kept.folder is not None
        with kept.folder.held(resume=kept.resume) if has_folder else nullcontext():  # type: ignore[attr-defined]
            return run(*args, **kwargs)

    return holding


@_in_its_folder
def run_rounds(
    strategy: Strategy, memory: Remembering, outcomes: Outcomes,
    grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, timeout: float = 3600,
    train_config: ConfigRecord | None = None, evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFunction | None = None, *, checkpointing: Checkpointing | None = None,
    keep_replies: bool = False,
) -> Result:  # fmt: skip
    """Run a federation as `flwr.serverapp.strategy.Strategy.start` does, in a streaming grid.

    A checkpoint is written when a round's replies have been merged, before anything of the new
    version goes out: whatever a node has seen, the server remembers.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        Its own steps of a round are called.
    memory : Remembering
        The strategy's state.
    outcomes : Outcomes
    grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        As Flower's.
    checkpointing : Checkpointing, optional
    keep_replies : bool
        May the strategy look at replies that have been merged? See `Replies`.

    Returns
    -------
    flwr.serverapp.strategy.Result
        Its arrays, and what ``evaluate_fn`` gets, are the server's own adapter or what nodes have
        of it: `DownlinkOptions.result`.

    Raises
    ------
    NoUsableReplyError
        At the end, where no reply of any round was of use.
    LayoutError, NonFiniteError
        Initial arrays that are no adapter's.
    StateError
        Checkpoints that are for another adapter, or none of which is whole; a folder that is
        another federation's, or in which another server works.
    """
    started = time.time()
    grid = StreamingGrid.around(grid)
    outcomes.begin()
    broadcaster = outcomes.broadcaster
    train_config, evaluate_config = (
        train_config or ConfigRecord(),
        evaluate_config or ConfigRecord(),
    )
    kept = checkpointing or Checkpointing()
    result = Result(arrays=initial_arrays)
    arrays, first_round, begun = initial_arrays, 1, None
    if kept.resume and kept.folder is not None:
        begun = kept.folder.load()
    if begun is not None:
        arrays = _restore(begun, kept, memory, outcomes, result, initial_arrays)
        first_round = begun.server_round + 1
    else:
        broadcaster.base(arrays)  # errors now, and not after waiting for nodes

    LOGGER.info("Starting %s strategy:", type(strategy).__name__)
    strategy.summary()
    if begun is not None:
        LOGGER.info("Going on after round %d, from %s", begun.server_round, begun.path)
        _finish_round(
            strategy, outcomes, grid, result, begun.server_round, arrays, evaluate_config,
            timeout, evaluate_fn, keep_replies,
        )  # fmt: skip
    elif evaluate_fn:
        _note(result.evaluate_metrics_serverapp, 0, evaluate_fn(0, arrays), "initial evaluation")

    for server_round in range(first_round, num_rounds + 1):
        LOGGER.info("")
        LOGGER.info("[ROUND %s/%s]", server_round, num_rounds)
        messages = strategy.configure_train(server_round, arrays, train_config, grid)
        replies = outcomes.send(
            grid, "train", server_round, messages, timeout, keep=keep_replies
        )  # fmt: skip
        del messages
        merged, metrics = strategy.aggregate_train(server_round, replies)
        outcomes.close()
        if merged is not None:
            result.arrays = arrays = merged
        _note(result.train_metrics_clientapp, server_round, metrics, "aggregated metrics")
        if kept.folder is not None:
            broadcaster.base(arrays)
            kept.folder.save(_checkpoint(server_round, arrays, memory, outcomes, result, kept))
        broadcaster.ending = kept.folder is None and server_round == num_rounds
        _finish_round(
            strategy, outcomes, grid, result, server_round, arrays, evaluate_config, timeout,
            evaluate_fn, keep_replies,
        )  # fmt: skip
    if kept.folder is None:  # else more rounds can go on from where this run ends
        forget_federation(broadcaster.federation)
    result.arrays = _given(outcomes, result.arrays)
    log_result(result, time.time() - started)
    outcomes.check(result)
    return result


def log_result(result: Result, seconds: float) -> None:
    """The closing lines of `flwr.serverapp.strategy.Strategy.start`."""
    LOGGER.info("")
    LOGGER.info("Strategy execution finished in %.2fs", seconds)
    LOGGER.info("")
    LOGGER.info("Final results:")
    LOGGER.info("")
    for line in io.StringIO(str(result)):
        LOGGER.info("\t%s", line.strip("\n"))
    LOGGER.info("")


def _finish_round(
    strategy: Strategy, outcomes: Outcomes, grid: StreamingGrid, result: Result,
    server_round: int, arrays: ArrayRecord, config: ConfigRecord, timeout: float,
    evaluate_fn: EvaluateFunction | None, keep_replies: bool,
) -> None:  # fmt: skip
    """Evaluation, by the nodes and by the server."""
    messages = strategy.configure_evaluate(server_round, arrays, config, grid)
    replies = outcomes.send(grid, "evaluate", server_round, messages, timeout, keep=keep_replies)
    del messages
    metrics = strategy.aggregate_evaluate(server_round, replies)
    outcomes.close()
    _note(result.evaluate_metrics_clientapp, server_round, metrics, "aggregated metrics")
    if evaluate_fn:
        metrics = evaluate_fn(server_round, _given(outcomes, arrays))
        _note(result.evaluate_metrics_serverapp, server_round, metrics, "global evaluation")


def _given(outcomes: Outcomes, arrays: ArrayRecord) -> ArrayRecord:
    """What a run gives of the global adapter: the server's own, or what nodes have of it."""
    if outcomes.broadcaster.options.result != "nodes":
        return arrays
    return outcomes.broadcaster.base(arrays).of_nodes()


def _note(
    history: dict[int, MetricRecord], server_round: int, metrics: MetricRecord | None, what: str
) -> None:
    if metrics is not None:
        LOGGER.info("\t└──> %s: %s", what, metrics)
        history[server_round] = metrics


def _checkpoint(
    server_round: int, arrays: ArrayRecord, memory: Remembering, outcomes: Outcomes,
    result: Result, kept: Checkpointing,
) -> Checkpoint:  # fmt: skip
    histories = {name: getattr(result, name) for name in _HISTORIES}
    return Checkpoint(
        server_round=server_round,
        arrays=arrays,
        exchange=outcomes.broadcaster.state(),
        strategy=memory.state(),
        history={
            name: {str(each): dict(metrics) for each, metrics in history.items()}
            for name, history in histories.items()
        },
        random_state=random.getstate(),
        extra=kept.extra() if kept.extra else None,
    )


def _restore(
    begun: Checkpoint, kept: Checkpointing, memory: Remembering, outcomes: Outcomes,
    result: Result, initial_arrays: ArrayRecord,
) -> ArrayRecord:  # fmt: skip
    begun.check_like(initial_arrays)
    outcomes.broadcaster.restore(begun.arrays, begun.exchange)
    memory.restore(begun.strategy)
    for name in _HISTORIES:
        history = getattr(result, name)
        for server_round, metrics in begun.history.get(name, {}).items():
            history[int(server_round)] = MetricRecord(metrics)
    random.setstate(begun.random_state)
    if kept.restored:
        kept.restored(begun.extra)
    result.arrays = begun.arrays
    return begun.arrays


_HISTORIES = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
