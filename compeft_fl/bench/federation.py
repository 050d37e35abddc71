"""A federation in one process, over any codec: what `compeft-fl bench learning` runs.

The app's model, data and training, the library's compression, merging and exchange; no Flower, so
that codecs that are not of the update format can stand in the same place. A test holds it against
the strategies and the client mod: the same bytes, the same adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compeft_fl import codecs, merging
from compeft_fl.codecs.dense import Dense
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.replica import Replica
from compeft_fl.exchange.uplink import RESIDUAL_DECAY, ErrorFeedback
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode

if TYPE_CHECKING:
    from compeft_fl.app.config import AppConfig

__all__ = ["Federation", "RoundScore", "Setting", "Update"]

Update = TernaryVector | TaskVector

_DOWN_SEEDS = 1 << 24  # of codecs that round at random: apart from those of the way up


@dataclass(frozen=True)
class Setting:
    """What is compared: a codec for each direction, and a merge rule.

    Parameters
    ----------
    name : str
        The key of its results.
    up, down : str
        Codecs: of `compeft_fl.codecs`, or of `compeft_fl.bench.peers`.
    density, down_density : float
        Of the ternary codecs: the part of the parameters that is sent.
    strategy : "average", "ties" or "task-arithmetic"
    scaling : float
        Lambda of ties and task-arithmetic.
    support : "best" or "fixed"
        Of the ternary codecs, both ways: see `compeft_fl.compress`.
    decay : float
        Of the residuals on the nodes: see `compeft_fl.exchange.uplink.ErrorFeedback`.
    """

    name: str
    up: str
    down: str
    density: float = 1.0
    down_density: float = 1.0
    strategy: str = "average"
    scaling: float = 0.4
    support: str = "best"
    decay: float = RESIDUAL_DECAY


@dataclass
class RoundScore:
    """One round: the global adapter's accuracy (0 to 1) and loss after it, and the bytes in it.

    ``updates`` holds the ternary Updates, each with how many nodes it went to or came from, so that
    other codecs can be measured on them.
    """

    accuracy: float
    loss: float
    up: int = 0
    down: int = 0
    updates: list[tuple[str, int, bytes]] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """All but the updates."""
        return {key: value for key, value in asdict(self).items() if key != "updates"}


class Uplink(Protocol):
    """The way up of all nodes."""

    def send(self, node: int, tau: TaskVector, version: int) -> tuple[bytes, Update]:
        """The bytes that a node sends for a task vector, and what the server reads in them."""


class Down(Protocol):
    """The way down: theta_shared, which all nodes have."""

    dense: bool  # sends all of the adapter, in the first round too

    @property
    def shared(self) -> NDArray[np.float32]:
        """Its values."""

    @property
    def version(self) -> int:
        """How often it has changed."""

    def advance(self, adapter: TaskVector) -> bytes:
        """Make the next version; the bytes that each node is sent for it."""


class _OwnUplink:
    """As `compeft_fl.mod.CompressionMod` sends."""

    def __init__(self, setting: Setting) -> None:
        self._codec = setting.up
        self._dense = isinstance(codecs.get(setting.up), Dense)
        self._setting = setting
        self._nodes: dict[int, ErrorFeedback] = {}

    def send(self, node: int, tau: TaskVector, version: int) -> tuple[bytes, Update]:
        update: Update = tau
        if not self._dense:
            if node not in self._nodes:
                of = self._setting
                self._nodes[node] = ErrorFeedback(
                    of.density, "mean", support=of.support, decay=of.decay
                )
            update = self._nodes[node].compress(tau)
        blob = encode(update, self._codec, layout_by_id=True, base_version=version)
        return blob, decode(blob, layout=tau.layout, base_version=version)


class _OwnDown:
    """As `compeft_fl.strategies` broadcast; a node's replica follows, and must agree."""

    def __init__(self, setting: Setting, adapter: TaskVector) -> None:
        self._downlink = Downlink(
            adapter,
            density=setting.down_density,
            scale="mean",
            codec=setting.down,
            support=setting.support,
        )
        self._replica = Replica(adapter.layout, self._downlink.shared.copy(), 0)
        self.dense = isinstance(codecs.get(setting.down), Dense)

    @property
    def shared(self) -> NDArray[np.float32]:
        return self._replica.values

    @property
    def version(self) -> int:
        return self._replica.version

    def advance(self, adapter: TaskVector) -> bytes:
        self._downlink.advance(adapter)
        shipment = self._downlink.lacking(self._replica.version)
        if shipment.kind == "snapshot":
            self._replica = Replica.from_snapshot(shipment.blobs)
        elif shipment.blobs:
            self._replica = self._replica.advance(shipment.blobs, self._downlink.version)
        if self._replica.digest != self._downlink.digest:
            raise ParameterError("a node's copy of the adapter is not the server's")
        return b"".join(shipment.blobs)


class _PeerUplink:
    """A peer's codec over task vectors, with error feedback where it is biased."""

    def __init__(self, setting: Setting) -> None:
        from compeft_fl.bench import peers

        self._peer = peers.get(setting.up)
        self._left: dict[int, NDArray[np.float32]] = {}
        self._sent = 0

    def send(self, node: int, tau: TaskVector, version: int) -> tuple[bytes, Update]:
        values: Any = tau.values
        total = values + self._left[node] if node in self._left else values
        self._sent += 1
        blob = self._peer.encode(total, tau.layout, self._sent)
        read = self._peer.decode(blob, tau.layout)
        if self._peer.biased:
            self._left[node] = total - read
        return blob, TaskVector(tau.layout, read)


class _PeerDown:
    """A peer's codec over the change of the global adapter; what it misses stays in the change."""

    def __init__(self, setting: Setting, adapter: TaskVector) -> None:
        from compeft_fl.bench import peers

        self.dense = False
        self._peer = peers.get(setting.down)
        self._layout = adapter.layout
        start: Any = adapter.values
        self.shared: NDArray[np.float32] = start.copy()
        self.version = 0

    def advance(self, adapter: TaskVector) -> bytes:
        target: Any = adapter.values
        blob = self._peer.encode(target - self.shared, self._layout, _DOWN_SEEDS + self.version)
        self.shared = self.shared + self._peer.decode(blob, self._layout)
        self.version += 1
        return blob


class Federation:
    """One run of a setting.

    Parameters
    ----------
    setting : Setting
    config : AppConfig
        Model, data, training, rounds and seed; what it says of compression is not read.
    num_nodes : int
        All of them train in each round.
    """

    def __init__(self, setting: Setting, config: AppConfig, num_nodes: int) -> None:
        from compeft_fl.app.tasks import data, model

        self.setting, self.config, self.num_nodes = setting, config, num_nodes
        self._rows = data.load(config)
        self._classifier = model.build(config, self._rows)
        self._shards = [
            data.node_rows(self._rows, {"partition-id": node, "num-partitions": num_nodes}, config)
            for node in range(num_nodes)
        ]
        self.adapter = TaskVector.from_dict(self._state())
        self._uplink: Uplink = _OwnUplink(setting) if _own(setting.up) else _PeerUplink(setting)
        way_down = _OwnDown if _own(setting.down) else _PeerDown
        self._down: Down = way_down(setting, self.adapter)

    def run(self) -> Iterator[RoundScore]:
        """Score the start, then each round after it; all bytes of the rounds are counted.

        A dense way down sends the adapter in the first round too, as FedAvg does. Over the others
        nodes make the start from the seed, and the first round sends nothing down.
        """
        yield self._score(self._down.shared)
        down = 4 * self.adapter.num_parameters * self.num_nodes if self._down.dense else 0
        updates: list[tuple[str, int, bytes]] = []
        for server_round in range(1, self.config.rounds + 1):
            up, merged = self._train(server_round, updates)
            self.adapter = TaskVector.from_dict(merged.apply(self.adapter.to_dict()))
            score = self._score(self.adapter.values)
            score.up, score.down, score.updates = up, down, updates
            yield score
            if server_round < self.config.rounds:  # the last version goes nowhere
                updates = []
                blob = self._down.advance(self.adapter)
                down = len(blob) * self.num_nodes
                if _own(self.setting.down) and not self._down.dense:
                    updates.append(("down", self.num_nodes, blob))

    def _train(
        self, server_round: int, updates: list[tuple[str, int, bytes]]
    ) -> tuple[int, TaskVector]:
        """All nodes' training; the bytes up, and the merge."""
        from compeft_fl.app.tasks import training

        accumulator = _accumulator(self.setting)
        start = TaskVector(self.adapter.layout, self._down.shared).to_dict()
        up = 0
        for node, rows in enumerate(self._shards):
            self._load(start)
            seed = training.round_seed(self.config, server_round, node)
            result = training.train(self._classifier, rows, self.config, seed)
            tau = TaskVector.between(start, self._state())
            blob, update = self._uplink.send(node, tau, self._down.version)
            if isinstance(update, TernaryVector):
                updates.append(("up", 1, blob))
            up += len(blob)
            weight = 1.0 if self.setting.strategy == "task-arithmetic" else result.num_examples
            accumulator.add(update, weight)
        return up, accumulator.result()

    def _score(self, values: Any) -> RoundScore:
        from compeft_fl.app.tasks import training

        self._load(TaskVector(self.adapter.layout, values).to_dict())
        found = training.evaluate(self._classifier, self._rows.test, self.config)
        return RoundScore(found.accuracy, found.loss)

    def _state(self) -> dict[str, NDArray[Any]]:
        return {
            name: tensor.numpy().copy() for name, tensor in self._classifier.adapter_state().items()
        }

    def _load(self, state: dict[str, NDArray[Any]]) -> None:
        import torch

        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        self._classifier.load_adapter_state(tensors)


def _own(codec: str) -> bool:
    return codec in codecs.names()


def _accumulator(setting: Setting) -> merging.Accumulator:
    make: dict[str, Callable[[], merging.Accumulator]] = {
        "average": merging.Average,
        "ties": lambda: merging.Ties(setting.scaling),
        "task-arithmetic": lambda: merging.TaskArithmetic(setting.scaling),
    }
    return make[setting.strategy]()


def timed(rounds: Iterator[RoundScore]) -> Iterator[tuple[RoundScore, float]]:
    """Each round with the CPU seconds that it took."""
    before = time.process_time()
    for score in rounds:
        now = time.process_time()
        yield score, now - before
        before = now
