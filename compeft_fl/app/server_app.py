"""The ServerApp: samples nodes, merges their updates, scores the global adapter, reports."""

from __future__ import annotations

import contextlib
import inspect
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp, strategy
from flwr.serverapp.strategy import Strategy

from compeft_fl import strategies
from compeft_fl.app import tasks
from compeft_fl.app.baseline import ObservedFedAvg
from compeft_fl.app.client_app import BASE_KEY
from compeft_fl.app.config import AppConfig, suggestion
from compeft_fl.app.exchange_keys import COMPRESSED_PREFIX
from compeft_fl.app.node_keys import ranks_of, tensor_rules, tiers_of
from compeft_fl.errors import ConfigError, NoUsableReplyError, StateError
from compeft_fl.exchange.records import LOGGER, to_arrays, to_state
from compeft_fl.parts.tensor_policy import LEFT, TensorPolicy
from compeft_fl.results.journal import PROGRESS_FILE, Journal
from compeft_fl.results.report import TASK_MARK
from compeft_fl.results.trackers import Trackers, check_installed
from compeft_fl.server.checkpoint import alone_in
from compeft_fl.server.downlink_options import DENSITY, FEW

if TYPE_CHECKING:
    from compeft_fl.app.evaluation import Harness
    from compeft_fl.app.tasks.base import Task
    from compeft_fl.experts.publishing import Publisher

__all__ = ["app", "build_strategy", "run_folder"]

CHECKPOINTS: Final = "checkpoints"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the configuration describes, and leave its results in a folder."""
    config = AppConfig.from_run_config(context.run_config)
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        if not config.resume and (folder / PROGRESS_FILE).exists():
            raise StateError(
                f"expected a folder without a run in it, found {PROGRESS_FILE} in {folder}: go on "
                "with that run (resume=true), or give another run-dir"
            )
        journal = Journal(folder, config.scenario, config.rounds, config.to_run_config())
        try:
            _run(grid, config, journal)
        except BaseException as error:
            journal.error(f"{type(error).__name__}: {error}")
            raise
        journal.end()


def _run(grid: Grid, config: AppConfig, journal: Journal) -> None:
    """Build, federate and report."""
    rule = build_strategy(config, journal)  # what is wrong with it shows before anything is loaded
    check_installed(config.trackers())
    asked = _Asked(config)

    from compeft_fl.results import report

    random.seed(config.seed)  # Flower samples nodes with it
    task = tasks.prepare(config)
    task.check()
    asked.check(task)
    state = task.adapter_state()
    policy = TensorPolicy(tensor_rules(config))
    trained = [name for name in state if policy.rule(name) != LEFT]
    journal.begin(sum(state[name].size for name in trained))
    LOGGER.info("results go to %s", journal.folder)

    trackers = Trackers(config.trackers(), journal.folder, config.to_run_config())
    publisher = _publisher(config, lambda folder: task.save(folder, journal.record()))

    def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        task.load_adapter_state(to_state(arrays))
        found = task.evaluate(task.test_rows)
        more = {**found.more, **asked.score(task, server_round)}
        journal.on_score(server_round, found.accuracy, found.loss, more)
        trackers.write(server_round, journal.record().rounds[server_round], journal.ledger)
        figures: dict[str, Any] = {"accuracy": found.accuracy, "loss": found.loss, **more}
        if publisher is not None:
            publisher.offer(server_round, figures)
        return MetricRecord(figures)

    initial = to_arrays(state)
    options: dict[str, Any] = {}
    if config.compressed:
        options["checkpointing"] = strategies.Checkpointing(
            strategies.CheckpointFolder(journal.folder / CHECKPOINTS),
            resume=config.resume,
            extra=journal.state,
            restored=journal.restore,
        )
    failure: NoUsableReplyError | None = None
    with publisher or contextlib.nullcontext():
        try:
            rule.start(
                grid=grid,
                initial_arrays=initial,
                num_rounds=config.rounds,
                timeout=config.timeout,
                evaluate_fn=score,
                train_config=ConfigRecord({BASE_KEY: task.base_digest}),
                evaluate_config=ConfigRecord({BASE_KEY: task.base_digest}),
                **options,
            )
        except NoUsableReplyError as error:  # raised below, when the report is written
            failure = error
    record = journal.record()
    task.save(journal.folder / "adapter", record)  # it holds what was scored last
    for rank in sorted({*ranks_of(config)}):  # and what nodes of each rank have of it
        _save_of_rank(journal.folder, rank)
    trackers.close()
    report.write(journal.folder, record)
    if failure is not None:
        raise failure
    if config.rounds and config.fraction_train and not any(r.replies for r in record.rounds):
        reason = journal.reasons[0] if journal.reasons else "no node answered"
        raise NoUsableReplyError(f"no reply of any node could be used; the first: {reason}")


class _Asked:
    """lm-eval's tasks that a run's configuration names, loaded before anything else is."""

    def __init__(self, config: AppConfig) -> None:
        self.config = config
        self.harness: Harness | None = None
        if config.evaluate_tasks.strip():
            from compeft_fl.app.evaluation import Harness

            self.harness = Harness(config.evaluate_tasks, limit=config.evaluate_limit)

    def check(self, task: Task) -> None:
        """Raise ConfigError where the run's task has no language model to put them to."""
        if self.harness is not None:
            task.answering()

    def score(self, task: Task, server_round: int) -> dict[str, float]:
        """Return ``TASK/METRIC`` after the start, every so many rounds, and the last one."""
        last = server_round == self.config.rounds
        if self.harness is None or (server_round % self.config.evaluate_every and not last):
            return {}
        scores = self.harness.score(*task.answering())
        return {
            f"{name}{TASK_MARK}{metric}": figure.value
            for name, metrics in scores.items()
            for metric, figure in metrics.items()
        }


def _publisher(config: AppConfig, save: Callable[[Path], object]) -> Publisher | None:
    """What pushes the adapter's versions, where the key says where to."""
    if not config.push:
        return None
    from compeft_fl.experts.publishing import Publisher

    return Publisher(
        config.push, config.push_name or config.scenario, config.push_every, config.rounds, save,
        logger=LOGGER,
    )  # fmt: skip


def build_strategy(config: AppConfig, observer: strategies.RoundObserver) -> Strategy:
    """Return the Flower strategy of a configuration.

    Raises
    ------
    ConfigError
        Where ``compressed:NAME`` names no strategy of Flower's, or an option does not fit it.
    """
    sampling = {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": config.min_nodes,
    }
    if config.strategy == "fedavg":
        return ObservedFedAvg(observer=observer, **sampling)
    downlink = strategies.DownlinkOptions(
        codec=config.downlink_codec if config.downlink == "compressed" else "dense",
        link_mbps=config.link_mbps,
        density=config.downlink_density or _usual_density(config),
        energy=config.downlink_energy,
        scale=config.downlink_scale,
        support=config.downlink_support,
        result=None if config.result == "auto" else config.result,
        first_contact="seed" if config.downlink == "compressed" else "snapshot",
    )
    if config.strategy.startswith(COMPRESSED_PREFIX):
        inner = _inner(config, sampling)
        return strategies.Compressed(
            inner, observer=observer, downlink=downlink, **_node_options(config)
        )
    options: dict[str, Any] = {
        **sampling,
        "observer": observer,
        "downlink": downlink,
        "server_learning_rate": config.server_learning_rate,
        "server_momentum": config.server_momentum,
        **_node_options(config),
    }
    if config.strategy == "task-arithmetic":
        return strategies.ComPEFTTaskArithmetic(scaling=config.scaling, **options)
    if config.strategy == "ties":
        return strategies.ComPEFTTies(scaling=config.scaling, tie=config.tie, **options)
    return strategies.ComPEFTAverage(**options)


def _usual_density(config: AppConfig) -> float | None:
    """The density on the way down where none is set; None: as the strategies choose for few."""
    return DENSITY if config.fraction_train >= FEW else None


def _node_options(config: AppConfig) -> dict[str, Any]:
    """Return the keywords of a strategy by which nodes differ."""
    found: dict[str, Any] = {"tensors": tensor_rules(config)}
    if ranks := ranks_of(config):
        found["ranks"] = strategies.MixedRanks(ranks, config.rank_merge)
    if config.upload_seconds:
        tiers = tiers_of(config)
        given: dict[str, Any] = {"tiers": tiers} if tiers else {}
        if isinstance(config.density, float):  # and not "auto"
            given["start"] = config.density
        found["upload"] = strategies.UploadBudget(config.upload_seconds, **given)
    return found


def _save_of_rank(folder: Path, rank: int) -> None:
    """Write the adapter of a node of a rank, and the head beside it."""
    from compeft_fl.adapters import cut_folder

    whole, part = folder / "adapter", folder / "adapters" / f"rank-{rank}"
    cut_folder(whole, rank, part, force=True)
    for file in whole.glob("head.*"):
        shutil.copyfile(file, part / file.name)


def _inner(config: AppConfig, sampling: dict[str, Any]) -> Strategy:
    """Return Flower's own strategy behind ``compressed:NAME``."""
    name = config.strategy.removeprefix(COMPRESSED_PREFIX)
    choices = {
        known: kind
        for known in strategy.__all__
        if isinstance(kind := getattr(strategy, known), type)
        and issubclass(kind, Strategy)
        and "fraction_train" in inspect.signature(kind).parameters
    }
    if name not in choices:
        raise ConfigError(
            f'strategy: Flower has no strategy "{name}" that runs here{suggestion(name, choices)}'
        )
    options = config.further_strategy_options()
    known = set(inspect.signature(choices[name]).parameters) - set(sampling)
    for option in options:
        if option not in known:
            near = suggestion(option, sorted(known))
            raise ConfigError(f"strategy-options: {name} has no such option: {option}{near}")
    try:
        built: Strategy = choices[name](**sampling, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy-options: {name} does not take them: {error}") from error
    return built


def run_folder(config: AppConfig) -> Path:
    """Return the run's folder: the configured one, or a new name under ``out``."""
    if config.run_dir:
        return Path(config.run_dir)
    name = f"{config.scenario}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.out).absolute() / name
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder
