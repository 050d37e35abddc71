"""A federation in one process, over any codec: what `compeft-fl bench learning` runs.

The app's model, data and training, the library's compression, merging and exchange; no Flower, so
that codecs that are not of the update format can stand in the same place. A test holds it against
the strategies and the client mod: the same bytes, the same adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compeft_fl import codecs, merging
from compeft_fl.app.imports import at_once, import_peft
from compeft_fl.app.tasks.tables import check_file
from compeft_fl.codecs.auto import codec_of
from compeft_fl.codecs.dense import Dense
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.node_state import NOTHING, NodeState
from compeft_fl.exchange.protocol import UNKNOWN, Offer, follow
from compeft_fl.exchange.replica import Replica, Shipment
from compeft_fl.exchange.uplink import RESIDUAL_DECAY, ErrorFeedback
from compeft_fl.reduction.rules import ENERGY, Reduction
from compeft_fl.server.server_step import ServerStep
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode

if TYPE_CHECKING:
    from compeft_fl.app.config import AppConfig

__all__ = ["Federation", "RoundScore", "Setting", "Update"]

Update = TernaryVector | TaskVector

_DOWN_SEEDS = 1 << 24  # of codecs that round at random: apart from those of the way up
_DRAWS = 0xD4A3  # of the nodes of a round: apart from the seeds of their training
LONG_ABSENCE = 10  # versions


@dataclass(frozen=True)
class Setting:
    """What is compared: a codec for each direction, and a merge rule.

    Parameters
    ----------
    name : str
        The key of its results.
    up, down : str
        Codecs: of `compeft_fl.codecs`, or of `compeft_fl.bench.peers`.
    density, down_density : float or "auto"
        Of the ternary codecs: the part of the parameters that is sent.
    energy : float
        Of density "auto": the share of an update's energy that is sent.
    strategy : "average", "ties" or "task-arithmetic"
    scaling : float
        Lambda of ties and task-arithmetic.
    support : "best" or "fixed"
        Of the ternary codecs, both ways: see `compeft_fl.compress`.
    decay : float
        Of the residuals on the nodes: see `compeft_fl.exchange.uplink.ErrorFeedback`.
    nodes_a_round : int
        So many are drawn for each round; 0: all take part. Settings with one seed draw alike.
    coarse_start : bool
        Nodes cannot make the start and are sent it, as to an app with the two lines alone; else
        they make it from the seed.
    server_learning_rate, server_momentum : float
        See `compeft_fl.server.server_step.ServerStep`.
    score_every : int
        Rounds from one score to the next.
    on_top : int
        The rank of an adapter on the base model's embedding, see `compeft_fl.bench.frozen`; 0: the
        app's adapter.
    """

    name: str
    up: str
    down: str
    density: float | str = 1.0
    down_density: float | str = 1.0
    strategy: str = "average"
    scaling: float = 0.4
    support: str = "best"
    decay: float = RESIDUAL_DECAY
    nodes_a_round: int = 0
    coarse_start: bool = False
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0
    score_every: int = 1
    on_top: int = 0
    energy: float = ENERGY


@dataclass
class RoundScore:
    """One round: the global adapter's accuracy (0 to 1) and loss after it, and the bytes in it.

    Attributes
    ----------
    accuracy, loss : float or None
        None where the round was not scored.
    shared_accuracy, shared_loss : float or None
        Of what the nodes have of it (theta_shared), where few of them take part in a round.
    up, down : int
    chain : int
        Down, were each node sent every delta that it lacks, or all anew where that is less.
    long_absence, joiner : int
        What a node that missed `LONG_ABSENCE` versions would be sent in this round, and one of
        which nothing is known; 0 where there is no such node.
    updates : list of (str, int, bytes)
        The ternary Updates, each with how many nodes it went to or came from, so that other codecs
        can be measured on them.
    """

    accuracy: float | None
    loss: float | None
    up: int = 0
    down: int = 0
    chain: int = 0
    long_absence: int = 0
    joiner: int = 0
    shared_accuracy: float | None = None
    shared_loss: float | None = None
    updates: list[tuple[str, int, bytes]] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """All but the updates."""
        return {key: value for key, value in asdict(self).items() if key != "updates"}


class Uplink(Protocol):
    """The way up of all nodes."""

    def send(self, node: int, tau: TaskVector, version: int) -> tuple[bytes, Update]:
        """The bytes that a node sends for a task vector, and what the server reads in them."""


class Down(Protocol):
    """The way down: theta_shared, which all nodes of a round have."""

    @property
    def shared(self) -> NDArray[np.float32]:
        """Its values."""

    @property
    def version(self) -> int:
        """How often it has changed."""

    def advance(self, adapter: TaskVector) -> None:
        """Make the next version."""

    def send(self, nodes: Sequence[int], score: RoundScore) -> None:
        """Bring nodes to this version, and add the bytes of that to a round's."""


class _OwnUplink:
    """As `compeft_fl.mod.CompressionMod` sends."""

    def __init__(self, setting: Setting) -> None:
        self._codec = setting.up
        self._dense = isinstance(codecs.get(setting.up), Dense)
        self._reduction = Reduction(
            setting.density, "mean", setting.support, setting.up == "factored", setting.energy
        )
        self._decay = setting.decay
        self._nodes: dict[int, ErrorFeedback] = {}
        self._versions: dict[int, int] = {}  # that nodes had when they last trained

    def send(self, node: int, tau: TaskVector, version: int) -> tuple[bytes, Update]:
        update: Update = tau
        if not self._dense:
            feedback = self._nodes.setdefault(node, ErrorFeedback(decay=self._decay))
            absence = version - self._versions.get(node, NOTHING)
            feedback.reduction = self._reduction.after(version, absence)
            self._versions[node] = version
            update = feedback.compress(tau)
        codec = codec_of(update, self._codec)
        blob = encode(update, codec, layout_by_id=True, base_version=version)
        return blob, decode(blob, layout=tau.layout, base_version=version)


class _OwnDown:
    """As `compeft_fl.strategies` broadcast; each node's replica follows, and must agree."""

    def __init__(self, setting: Setting, adapter: TaskVector) -> None:
        self._downlink = Downlink(
            adapter,
            density=setting.down_density,
            scale="mean",
            codec=setting.down,
            support=setting.support,
            coarse_start=setting.coarse_start,
            seeded=not setting.coarse_start,
        )
        self._dense = isinstance(codecs.get(setting.down), Dense)
        self._whole = 4 * adapter.num_parameters
        self._initial = None if setting.coarse_start else lambda: adapter
        self._replicas: dict[int, Replica] = {}
        self._deltas: list[int] = []  # bytes of each version's

    @property
    def shared(self) -> NDArray[np.float32]:
        return self._downlink.shared

    @property
    def version(self) -> int:
        return self._downlink.version

    def advance(self, adapter: TaskVector) -> None:
        before = self.version
        self._downlink.advance(adapter)
        if self.version > before:
            self._deltas.append(self._downlink.lacking(before).num_bytes)

    def send(self, nodes: Sequence[int], score: RoundScore) -> None:
        sent: dict[int, tuple[Shipment, int]] = {}
        for node in nodes:
            shipment = self._downlink.lacking(self._version_of(node))
            # A dense way down sends the adapter in the first round too, as FedAvg does.
            score.down += shipment.num_bytes or (self._whole if self._dense else 0)
            score.chain += self._chain(node)
            if shipment.kind == "deltas":
                sent[id(shipment)] = shipment, sent.get(id(shipment), (shipment, 0))[1] + 1
            self._replicas[node] = self._followed(node, shipment)
        for shipment, count in sent.values():
            score.updates += [("down", count, blob) for blob in shipment.blobs]
        if not self._dense:
            joining = self._downlink.lacking(self._start)
            score.joiner = joining.num_bytes
            if self.version >= LONG_ABSENCE:
                missed = self._downlink.lacking(self.version - LONG_ABSENCE)
                score.long_absence = missed.num_bytes

    @property
    def _start(self) -> int | None:
        """What a node has of which nothing is known."""
        return None if self._initial is None else 0

    def _version_of(self, node: int) -> int | None:
        return self._replicas[node].version if node in self._replicas else self._start

    def _chain(self, node: int) -> int:
        version = self._version_of(node)
        if version is None or self._dense:
            return self._whole
        return min(sum(self._deltas[version:]), self._whole)

    def _followed(self, node: int, shipment: Shipment) -> Replica:
        down = self._downlink
        if self._dense and not shipment.blobs:  # the first round's, made by no codec
            return Replica(down.layout, down.shared, down.version)
        state = NodeState(down.layout, self._replicas.get(node))
        offer = Offer("", down.version, down.digest, UNKNOWN)
        return follow(state, offer, shipment, self._initial)


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

        self._peer = peers.get(setting.down)
        self._layout = adapter.layout
        start: Any = adapter.values
        self.shared: NDArray[np.float32] = start.copy()
        self._deltas: list[int] = []  # bytes of each version's
        self._versions: dict[int, int] = {}  # of nodes

    @property
    def version(self) -> int:
        return len(self._deltas)

    def advance(self, adapter: TaskVector) -> None:
        target: Any = adapter.values
        blob = self._peer.encode(target - self.shared, self._layout, _DOWN_SEEDS + self.version)
        self.shared = self.shared + self._peer.decode(blob, self._layout)
        self._deltas.append(len(blob))

    def send(self, nodes: Sequence[int], score: RoundScore) -> None:
        for node in nodes:
            score.down += sum(self._deltas[self._versions.get(node, 0) :])
            self._versions[node] = self.version
        score.chain = score.down


class Federation:
    """One run of a setting.

    Parameters
    ----------
    setting : Setting
    config : AppConfig
        Model, data, training, rounds and seed; what it says of compression is not read.
    num_nodes : int
        Of which the setting says how many train in a round.
    kept : Path, optional
        A file for the embeddings of texts, see `Setting`.
    """

    def __init__(
        self, setting: Setting, config: AppConfig, num_nodes: int, kept: Path | None = None
    ) -> None:
        check_file(config)
        with at_once():
            from compeft_fl.app.tasks import data, model
            from compeft_fl.bench.frozen import keep_below_adapter, put_on_top

            import_peft()
        self.setting, self.config, self.num_nodes = setting, config, num_nodes
        self._rows = data.load(config)
        self._classifier = model.build(config, self._rows)
        if setting.on_top:
            texts = [*self._rows.train.texts, *self._rows.test.texts]
            put_on_top(self._classifier, setting.on_top, config.seed, texts, kept)
        else:
            keep_below_adapter(self._classifier.network)
        self._shards = [
            data.node_rows(self._rows, {"partition-id": node, "num-partitions": num_nodes}, config)
            for node in range(num_nodes)
        ]
        self.adapter = TaskVector.from_dict(self._state())
        self._uplink: Uplink = _OwnUplink(setting) if _own(setting.up) else _PeerUplink(setting)
        way_down = _OwnDown if _own(setting.down) else _PeerDown
        self._down: Down = way_down(setting, self.adapter)
        self._step = ServerStep(setting.server_learning_rate, setting.server_momentum)

    def run(self) -> Iterator[RoundScore]:
        """Score the start, then each round after it; all bytes of the rounds are counted.

        A dense way down sends the adapter in the first round too, as FedAvg does. Over the others
        nodes make the start from the seed, and the first round sends nothing down.
        """
        yield RoundScore(*self._scored(self._down.shared))
        for server_round in range(1, self.config.rounds + 1):
            score = RoundScore(None, None)
            nodes = self._drawn(server_round)
            self._down.send(nodes, score)
            change = self._step.next(self._train(server_round, nodes, score))
            self._step.accept()
            self.adapter = TaskVector.from_dict(change.apply(self.adapter.to_dict()))
            self._down.advance(self.adapter)  # the last version goes nowhere
            if server_round % self.setting.score_every == 0:
                score.accuracy, score.loss = self._scored(self.adapter.values)
                if self.setting.nodes_a_round:
                    shared: Any = self._down.shared
                    same = np.array_equal(shared, self.adapter.values)
                    score.shared_accuracy, score.shared_loss = (
                        (score.accuracy, score.loss) if same else self._scored(shared)
                    )
            yield score

    def _drawn(self, server_round: int) -> list[int]:
        """The nodes of a round; each seed has its own, whatever the setting."""
        count = self.setting.nodes_a_round or self.num_nodes
        if count == self.num_nodes:
            return list(range(self.num_nodes))
        rng = np.random.default_rng([self.config.seed, _DRAWS, server_round])
        return sorted(rng.choice(self.num_nodes, count, replace=False).tolist())

    def _train(self, server_round: int, nodes: Sequence[int], score: RoundScore) -> TaskVector:
        """The merge of these nodes' training; adds the bytes up."""
        from compeft_fl.app.tasks import training

        accumulator = _accumulator(self.setting)
        start = TaskVector(self.adapter.layout, self._down.shared).to_dict()
        for node in nodes:
            rows = self._shards[node]
            self._load(start)
            seed = training.round_seed(self.config, server_round, node)
            result = training.train(self._classifier, rows, self.config, seed)
            tau = TaskVector.between(start, self._state())
            blob, update = self._uplink.send(node, tau, self._down.version)
            if isinstance(update, TernaryVector):
                score.updates.append(("up", 1, blob))
            score.up += len(blob)
            weight = 1.0 if self.setting.strategy == "task-arithmetic" else result.num_examples
            accumulator.add(update, weight)
        return accumulator.result()

    def _scored(self, values: Any) -> tuple[float, float]:
        """Accuracy and loss."""
        from compeft_fl.app.tasks import training

        self._load(TaskVector(self.adapter.layout, values).to_dict())
        found = training.evaluate(self._classifier, self._rows.test, self.config)
        return found.accuracy, found.loss

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
