"""A real learning problem that is small: softmax regression in numpy, with hostile nodes.

The rows are shared out among the nodes by a Dirichlet distribution over the classes. Clients are
ordinary Flower clients behind CompressionMod; a hostile one is honest code whose Update is replaced
on its way, as a node that writes its own bytes would.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from local_grid import LocalGrid, answered, node_ids

from compeft_fl.exchange.records import find_update, update_record
from compeft_fl.mod import CompressionMod
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode, inspect

Rows = tuple[np.ndarray, np.ndarray]  # inputs (n, features), labels (n,)
Attack = Callable[[TernaryVector, np.random.Generator], TernaryVector]


class Problem:
    """Training rows, shared out among nodes, and a test set.

    alpha: of the Dirichlet distribution over nodes, for each class.
    """

    def __init__(
        self, train: Rows, test: Rows, nodes: int = 10, seed: int = 0, alpha: float = 0.5,
        rate: float = 0.1,
    ) -> None:  # fmt: skip
        inputs, labels = train
        self.test, self.seed, self.rate = test, seed, rate
        classes = int(labels.max()) + 1
        self.start = {
            "weight": np.zeros((inputs.shape[1], classes), np.float32),
            "bias": np.zeros(classes, np.float32),
        }
        rng = np.random.default_rng([seed, 2])
        shares = rng.dirichlet([alpha] * nodes, classes)
        owner = np.array([rng.choice(nodes, p=shares[label]) for label in labels])
        owner[: 10 * nodes] = np.arange(10 * nodes) % nodes  # everybody has some
        self.parts = [(inputs[owner == node], labels[owner == node]) for node in range(nodes)]

    def accuracy(self, arrays: ArrayRecord) -> float:
        weight, bias = (array.numpy() for array in arrays.values())
        inputs, labels = self.test
        return float(((inputs @ weight + bias).argmax(1) == labels).mean())

    def trained(self, state: dict[str, np.ndarray], node: int) -> dict[str, np.ndarray]:
        """What a node makes of an adapter: five steps on all of its rows."""
        inputs, labels = self.parts[node]
        weight, bias = state["weight"].copy(), state["bias"].copy()
        for _ in range(5):
            logits = inputs @ weight + bias
            chances = np.exp(logits - logits.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            chances[np.arange(len(labels)), labels] -= 1
            weight -= self.rate * (inputs.T @ chances / len(labels) + 1e-3 * weight)
            bias -= self.rate * chances.mean(0)
        return {"weight": weight, "bias": bias}

    def client_app(self) -> ClientApp:
        app = ClientApp(mods=[CompressionMod(density=0.1)])

        @app.train()
        def _train(message: Message, context: Context) -> Message:
            node = int(context.node_config["partition-id"])
            state = {name: array.numpy() for name, array in message.content["arrays"].items()}
            arrays = {name: Array(value) for name, value in self.trained(state, node).items()}
            metrics = MetricRecord({"num-examples": len(self.parts[node][1])})
            content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
            return Message(content, reply_to=message)

        return app

    def run(
        self, strategy: Strategy, attack: Attack | None = None, hostile: int = 2, rounds: int = 25
    ) -> float:
        """Federate; the test accuracy afterwards. The last ``hostile`` nodes attack."""
        nodes = node_ids(len(self.parts))
        rng = np.random.default_rng([self.seed, 1])

        def fault(node: int, reply: Message) -> list[Message]:
            if attack is None or node not in nodes[len(nodes) - hostile :]:
                return [reply]
            layout = Layout.of(self.start)
            reply = forged(reply, layout, lambda update: attack(update, rng))
            weight = getattr(attack, "weight", None)
            if weight is not None and "metrics" in reply.content:
                reply.content["metrics"]["num-examples"] = weight
            return [reply]

        arrays = ArrayRecord({name: Array(value) for name, value in self.start.items()})
        grid = LocalGrid(self.client_app(), len(self.parts), fault=fault)
        return self.accuracy(strategy.start(grid, arrays, num_rounds=rounds).arrays)


def synthetic(seed: int = 0, nodes: int = 10) -> Problem:
    """Ten classes in 40 dimensions, drawn around random means."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((10, 40))

    def draw(size: int) -> Rows:
        labels = rng.integers(0, 10, size)
        inputs = means[labels] + 1.8 * rng.standard_normal((size, 40))
        return inputs.astype(np.float32), labels

    return Problem(draw(200 * nodes), draw(2000), nodes, seed)


def forged(
    reply: Message, layout: Layout, change: Callable[[TernaryVector], TernaryVector | TaskVector]
) -> Message:
    """A reply with another Update, which any decoder takes."""
    found = find_update(reply.content) if reply.has_content() else None
    if found is None:
        return reply
    key, (blob,) = found
    update = change(decode(blob, layout=layout))
    codec = "golomb" if isinstance(update, TernaryVector) else "dense"
    version = inspect(blob, layout=layout).base_version
    blob = encode(update, codec, layout_by_id=True, base_version=version)
    content = RecordDict({**reply.content, key: update_record(blob, layout.num_parameters)})
    return Message(content, reply_to=answered(reply))


def flipped(update: TernaryVector, rng: np.random.Generator) -> TernaryVector:
    """The opposite of what was learned, four times as long."""
    return TernaryVector(update.layout, update.negative, update.positive, 4 * update.scales)


def noise(update: TernaryVector, rng: np.random.Generator) -> TernaryVector:
    """Random signs at random places, as many as before, four times as long."""
    values = np.zeros(update.num_parameters, np.float32)
    chosen = rng.choice(values.size, update.num_nonzeros, replace=False)
    values[chosen] = 4 * update.scales[0] * rng.choice([-1, 1], chosen.size)
    return TernaryVector.from_task_vector(TaskVector(update.layout, values))


def huge(update: TernaryVector, rng: np.random.Generator) -> TernaryVector:
    """What was learned, at a finite scale of 10^30."""
    return update.with_scales(1e30)


ATTACKS: dict[str, Attack] = {"flipped": flipped, "noise": noise, "huge": huge}


# Of one node of ten, with any finite values and the largest weight. Scales are without bounds: what
# counts of them is what the server makes of them.


class Hostile:
    """An attack that claims ``weight`` examples, and may remember what it has done."""

    def __init__(self, change: Attack, weight: float = 1e12) -> None:
        self._change, self.weight = change, weight

    def __call__(
        self, update: TernaryVector, rng: np.random.Generator
    ) -> TernaryVector | TaskVector:
        return self._change(update, rng)


def _flipped(update: TernaryVector, rng: np.random.Generator) -> TernaryVector:
    return TernaryVector(update.layout, update.negative, update.positive, 1e30)


def _one_way(update: TernaryVector, rng: np.random.Generator) -> TaskVector:
    """Always the same way, with all its might."""
    values = np.random.default_rng(7).choice([-1.0, 1.0], update.num_parameters)
    return TaskVector(update.layout, (3.4e38 * values).astype(np.float32))


def _tenth(update: TernaryVector, rng: np.random.Generator) -> TaskVector:
    """Honest signs in nine tenths, tiny; all of its norm against them in the others."""
    values = update.to_task_vector().values.copy()
    moved = np.flatnonzero(values)
    hidden = rng.choice(moved, max(1, len(moved) // 10), replace=False)
    tiny = values * np.float32(1e-6)
    tiny[hidden] = -values[hidden] * np.float32(len(moved) / len(hidden))
    return TaskVector(update.layout, tiny)


def _nothing(update: TernaryVector, rng: np.random.Generator) -> TaskVector:
    """Nothing at all, with all the weight."""
    return TaskVector(update.layout, np.zeros(update.num_parameters, np.float32))


def _noise(update: TernaryVector, rng: np.random.Generator) -> TernaryVector:
    return noise(update, rng).with_scales(1e30)


def _just_below(update: TernaryVector, rng: np.random.Generator) -> TernaryVector:
    """Against what was learned, a little longer than honest ones, and no absurd weight."""
    return TernaryVector(update.layout, update.negative, update.positive, 2 * update.scales)


def _class(update: TernaryVector, rng: np.random.Generator) -> TaskVector:
    """All rows to the first class."""
    values = np.zeros(update.num_parameters, np.float32)
    at = 0
    for tensor in update.layout.tensors:
        part = values[at : at + tensor.size].reshape(tensor.shape)
        if len(tensor.shape) == 1:
            part[0] = 1e30
        at += tensor.size
    return TaskVector(update.layout, values)


FINITE_ATTACKS: dict[str, Hostile] = {
    "huge": Hostile(lambda update, rng: update.with_scales(3.4e38)),
    "flipped": Hostile(_flipped),
    "one way": Hostile(_one_way),
    "a tenth flipped": Hostile(_tenth),
    "nothing": Hostile(_nothing),
    "noise": Hostile(_noise),
    "just below": Hostile(_just_below, weight=400),
    "one class": Hostile(_class),
}
