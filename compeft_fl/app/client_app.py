"""The ClientApp: an ordinary Flower client that fine-tunes an adapter, and the mod around it.

``train`` takes an ArrayRecord of adapter weights and returns one, and knows nothing of compression.
torch, transformers and peft are imported when the first message needs them; model and tokenised
rows stay in the process for the next message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from compeft_fl.app.config import AppConfig
from compeft_fl.app.node_keys import link_of, of_rank, rank_of, same_run, tensor_rules
from compeft_fl.client.mod import CompressionMod
from compeft_fl.codecs.auto import AUTO
from compeft_fl.disk.arrays import on_disk, release
from compeft_fl.exchange.records import to_arrays, to_state

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compeft_fl.app.tasks.base import Task

__all__ = ["BASE_KEY", "app", "compression", "keep"]

BASE_KEY = "base"  # in the server's configuration: the digest of its base model


def compression(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Compress this node's updates as the run's configuration says (a Flower mod)."""
    config = AppConfig.from_run_config(context.run_config)
    if not config.compressed:
        return call_next(message, context)
    mod = CompressionMod(
        density=config.density,
        energy=config.energy,
        scale=config.scale,
        support=config.support,
        error_feedback=config.error_feedback,
        residual_decay=config.residual_decay,
        codec=config.codec,
        link_mbps=_link(config, context),
        initial_adapter=_initial_adapter,
        tensors=tensor_rules(config),
        rank=rank_of(config, context.node_config) or None,
    )
    return mod(message, context, call_next)


app = ClientApp(mods=[compression])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fine-tune the received adapter on the node's rows and return it."""
    from compeft_fl.app.tasks.base import round_seed

    config = AppConfig.from_run_config(context.run_config)
    prepared = _prepare(of_rank(config, rank_of(config, context.node_config)))
    task = prepared.task
    for array in prepared.start.values():  # the first contact has read it
        release(array)
    task.check_base(_told(message, BASE_KEY))
    rows = task.node_rows(context.node_config)
    _load(task, message)
    server_round = _server_round(message)
    seed = round_seed(config, server_round, int(context.node_config["partition-id"]))
    result = task.train(rows, server_round, seed)
    metrics = MetricRecord(
        {
            "num-examples": result.num_examples,
            "loss": result.loss,
            "steps": result.steps,
            "seconds": result.seconds,
        }
    )
    arrays = to_arrays(task.adapter_state(copy=False))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received adapter on the node's own rows."""
    config = AppConfig.from_run_config(context.run_config)
    task = _prepare(of_rank(config, rank_of(config, context.node_config))).task
    task.check_base(_told(message, BASE_KEY))
    rows = task.node_rows(context.node_config)
    _load(task, message)
    score = task.evaluate(rows)
    metrics = MetricRecord(
        {
            "num-examples": score.num_examples,
            "accuracy": score.accuracy,
            "loss": score.loss,
            **score.more,
        }
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@dataclass(frozen=True)
class _Prepared:
    """What a process keeps between messages: it is the same for every node of a rank."""

    config: AppConfig
    task: Task
    start: Mapping[str, NDArray[Any]]  # the adapter that the seed gives


_prepared: list[_Prepared] = []  # of one run, by rank
_starts: list[tuple[AppConfig, Mapping[str, NDArray[Any]]]] = []  # of one run with several ranks


def _prepare(config: AppConfig) -> _Prepared:
    """Return the task of this configuration, built by the first message that needs it."""
    if _prepared and not same_run(_prepared[0].config, config):
        _prepared.clear()
    found = next((each for each in _prepared if each.config == config), None)
    if found is None:
        found = _build(config)
        _prepared.append(found)
    return found


def _build(config: AppConfig) -> _Prepared:
    from compeft_fl.app import tasks

    return _of(config, tasks.prepare(config))


def _of(config: AppConfig, task: Task) -> _Prepared:
    """What is kept of a task whose adapter is at the start."""
    return _Prepared(config, task, on_disk(task.adapter_state(copy=False)))


def keep(config: AppConfig, task: Task) -> None:
    """Answer the messages of a run with this task, its adapter at the start."""
    _prepared[:] = [_of(config, task)]


def _initial_adapter(context: Context) -> Mapping[str, NDArray[Any]]:
    """Return the adapter that this node makes of the seed, as the server does: all ranks of it."""
    config = AppConfig.from_run_config(context.run_config)
    if of_rank(config, rank_of(config, context.node_config)) == config:
        return _prepare(config).start
    if not _starts or _starts[0][0] != config:  # of a model that this node will not need again
        _starts[:] = [(config, _build(config).start)]
    return _starts[0][1]


def _link(config: AppConfig, context: Context) -> float | None:
    """Return the speed of this node's link, as far as the run says it."""
    link = link_of(config, context.node_config)
    return config.link_mbps if link is None and config.codec == AUTO else link


def _load(task: Task, message: Message) -> None:
    """Give the task the adapter that a message brings, and let go of the message's."""
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    task.load_adapter_state(to_state(arrays, copy=False))
    del message.content["arrays"]


def _server_round(message: Message) -> int:
    value = _told(message, "server-round")
    assert isinstance(value, int)
    return value


def _told(message: Message, key: str) -> object:
    """What the server says under a key of its configuration; None: nothing."""
    return message.content.config_records["config"].get(key)
