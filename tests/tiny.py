"""A tiny federation for tests: an adapter of four tensors, and clients that move it as known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local_grid import node_ids

from compeft_fl.task_vector import Layout

SHAPES = {"q.lora_A": (4, 24), "q.lora_B": (24, 4), "scalar": (), "head.bias": (7,)}
Train = Callable[[dict[str, np.ndarray], Context], dict[str, np.ndarray]]


def adapter(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Sixteenths: what a coarse start holds exactly, so that nodes start from just this."""
    rng = np.random.default_rng(seed)
    drawn = {name: np.rint(16 * rng.standard_normal(s)) / 16 for name, s in SHAPES.items()}
    return {name: np.asarray(value, dtype) for name, value in drawn.items()}


def arrays(state: dict[str, np.ndarray] | None = None) -> ArrayRecord:
    state = adapter() if state is None else state
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in state.items()})


def layout(state: dict[str, np.ndarray] | None = None) -> Layout:
    return Layout.of(adapter() if state is None else state)


def state_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def flat(state: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(value, np.float64).ravel() for value in state.values()])


def step(node_id: int, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What this node's training adds: fixed by the node and by where it starts."""
    rng = np.random.default_rng([node_id, abs(int(1e6 * float(flat(state)[0])))])
    return {
        name: (0.1 * np.asarray(rng.standard_normal(value.shape))).astype(value.dtype)
        for name, value in state.items()
    }


def train_step(state: dict[str, np.ndarray], context: Context) -> dict[str, np.ndarray]:
    change = step(context.node_id, state)
    return {name: np.asarray(value + change[name], value.dtype) for name, value in state.items()}


def num_examples(node_id: int) -> int:
    return 10 * (node_id - node_ids(1)[0] + 1)


def reply_with(
    message: Message,
    state: dict[str, np.ndarray] | ArrayRecord,
    node_id: int,
    **metrics: float | list[float],
) -> Message:
    record = state if isinstance(state, ArrayRecord) else arrays(state)
    values = {"num-examples": num_examples(node_id), "loss": 1.0 / num_examples(node_id)} | metrics
    content = RecordDict({"arrays": record, "metrics": MetricRecord(values)})
    return Message(content, reply_to=message)


def client_app(*mods: Any, train: Train = train_step) -> ClientApp:
    """An ordinary Flower client: it knows nothing of compression."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        state = state_of(message.content["arrays"])
        return reply_with(message, train(state, context), context.node_id)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        total = float(flat(state_of(message.content["arrays"])).sum())
        metrics = MetricRecord({"num-examples": num_examples(context.node_id), "sum": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app
