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
from compeft_fl.client.mod import CompressionMod
from compeft_fl.exchange.records import to_arrays, to_state

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compeft_fl.app.tasks.data import TextData
    from compeft_fl.app.tasks.model import Classifier

__all__ = ["app", "compression"]


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
        link_mbps=config.link_mbps,
        initial_adapter=_initial_adapter,
    )
    return mod(message, context, call_next)


app = ClientApp(mods=[compression])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fine-tune the received adapter on the node's rows and return it."""
    from compeft_fl.app.tasks import training
    from compeft_fl.app.tasks.data import node_rows

    config = AppConfig.from_run_config(context.run_config)
    prepared = _prepare(config)
    rows = node_rows(prepared.data, context.node_config, config)
    _load(prepared.classifier, message)
    seed = training.round_seed(
        config, _server_round(message), int(context.node_config["partition-id"])
    )
    result = training.train(prepared.classifier, rows, config, seed)
    metrics = MetricRecord(
        {
            "num-examples": result.num_examples,
            "loss": result.loss,
            "steps": result.steps,
            "seconds": result.seconds,
        }
    )
    arrays = to_arrays(
        {name: tensor.numpy() for name, tensor in prepared.classifier.adapter_state().items()}
    )
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received adapter on the node's own rows."""
    from compeft_fl.app.tasks import training
    from compeft_fl.app.tasks.data import node_rows

    config = AppConfig.from_run_config(context.run_config)
    prepared = _prepare(config)
    rows = node_rows(prepared.data, context.node_config, config)
    _load(prepared.classifier, message)
    score = training.evaluate(prepared.classifier, rows, config)
    metrics = MetricRecord(
        {"num-examples": score.num_examples, "accuracy": score.accuracy, "loss": score.loss}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@dataclass(frozen=True)
class _Prepared:
    """What a process keeps between messages: it is the same for every node of the run."""

    config: AppConfig
    data: TextData
    classifier: Classifier
    start: Mapping[str, NDArray[Any]]  # the adapter that the seed gives


_prepared: list[_Prepared] = []


def _prepare(config: AppConfig) -> _Prepared:
    """Return data and model of this configuration, built by the process's first message."""
    if not _prepared or _prepared[0].config != config:
        from compeft_fl.app.tasks import data, model

        loaded = data.load(config)
        classifier = model.build(config, loaded)
        start = {name: tensor.numpy() for name, tensor in classifier.adapter_state().items()}
        _prepared[:] = [_Prepared(config, loaded, classifier, start)]
    return _prepared[0]


def _initial_adapter(context: Context) -> Mapping[str, NDArray[Any]]:
    """Return the adapter that this node makes of the seed, as the server does."""
    return _prepare(AppConfig.from_run_config(context.run_config)).start


def _load(classifier: Classifier, message: Message) -> None:
    """Give the classifier the adapter that a message brings."""
    import torch

    arrays: ArrayRecord = message.content.array_records["arrays"]
    state = {name: torch.from_numpy(value.copy()) for name, value in to_state(arrays).items()}
    classifier.load_adapter_state(state)


def _server_round(message: Message) -> int:
    value = message.content.config_records["config"]["server-round"]
    assert isinstance(value, int)
    return value
