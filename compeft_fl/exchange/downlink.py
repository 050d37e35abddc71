"""The downlink: the global adapter in versions, each a compressed delta to the one before.

The server holds theta, the true global adapter, and theta_shared, which every node at the same
version can reconstruct bit for bit. A new version sends C(theta - theta_shared) and adds to
theta_shared what was sent; what was not sent stays in the difference, which is error feedback in
the other direction. All steps lie on a grid (`compeft_fl.exchange.grid`), so whatever a node has
missed adds up to one vector of small integers: it gets the delta since its version, or that sum, or
a snapshot where that is fewer bytes, and nothing where it is up to date.

Source: Sattler et al., "STC", https://arxiv.org/abs/1903.02891, section V-B (partial sums of
updates); Tang et al., "DoubleSqueeze", https://arxiv.org/abs/1905.05957.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.auto import codec_of
from compeft_fl.errors import (
    LayoutMismatchError,
    ParameterError,
    StateError,
)
from compeft_fl.exchange.grid import AUTO_BITS, Grid, start_bits, step_near
from compeft_fl.exchange.replica import (
    MAX_DELTAS,
    Shipment,
    add_in_place,
    checked_delta,
    digest_of,
    on_cpu,
)
from compeft_fl.factored import FactoredVector
from compeft_fl.reduction.rules import AUTO, ENERGY, Reduction
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, decode_parts, encode, encode_parts

__all__ = ["Downlink", "distance"]


_INSTEAD = 0.2  # the density of a ternary delta, where a factored one would leave the grid
_NOTHING = Shipment("nothing")


class Downlink:
    """The server's end: theta_shared on its grid, its version, and the deltas that led there.

    Parameters
    ----------
    adapter : TaskVector
        The adapter that the federation starts from, on the CPU. Version 0 is what of it lies on the
        grid; the rest stays in theta - theta_shared.
    density, scale, codec, support
        Of the deltas, see `compeft_fl.compress` and `compeft_fl.encode`; the scale is rounded to a
        power of two. A dense codec sends the whole adapter in each version, and knows no grid.
    link_mbps
        The speed of a node's link in Mbit/s, for codec "auto" alone.
    coarse_start : bool
        Version 0 is the start in 11 bits or fewer a parameter, 9 with density "auto", 7 where a
        quarter of it or more is in tensors of zeros (a LoRA before training), for nodes that cannot
        make it.
    seeded : bool
        Nodes can make the start: one that has missed more than the log holds makes it anew, and is
        sent all that came after it.

    Raises
    ------
    ParameterError
        A setting out of its range.
    NonFiniteError
        NaN or Inf in the adapter.

    Examples
    --------
    >>> start = TaskVector.from_dict({"w": np.zeros(8, "f4")})
    >>> downlink = Downlink(start, density=0.25)
    >>> downlink.advance(TaskVector.from_dict({"w": np.arange(8, dtype="f4") / 4}))
    >>> downlink.version, downlink.shared
    (1, array([0., 0., 0., 0., 0., 0., 2., 2.], dtype=float32))
    """

    def __init__(
        self,
        adapter: TaskVector,
        *,
        density: float | str = 0.2,
        scale: str | float = "mean",
        codec: str = "golomb",
        link_mbps: float | None = None,
        support: str = "best",
        coarse_start: bool = False,
        energy: float = ENERGY,
        seeded: bool = False,
    ) -> None:
        from compeft_fl import codecs
        from compeft_fl.codecs import auto
        from compeft_fl.codecs.dense import Dense

        # Sums of low-rank signs are vectors of many different integers: catch-ups for nodes that
        # are asked seldom would be large, so that they are sent only where the codec says so.
        factored = codec == "factored"
        self.reduction = Reduction(density, scale, support, factored, energy, low_rank=factored)
        adapter.check_finite()
        auto.check(codec, link_mbps)
        self.codec, self.link_mbps = codec, link_mbps
        self._dense = codec != auto.AUTO and isinstance(codecs.get(codec), Dense)
        self.layout = adapter.layout
        self.version = 0
        self._coarse, self._seeded = coarse_start, seeded
        self.shared: NDArray[np.float32]  # theta_shared
        self._begin(on_cpu(adapter), 0)
        self._log: OrderedDict[int, bytes] = OrderedDict()  # version -> the delta that made it
        # Of this version, made when they are asked for:
        self._digest: bytes | None = None
        self._snapshot: Shipment | None = None
        self._made: dict[int, Shipment] = {}  # by the version that a node has
        self._sum: tuple[int, NDArray[np.float32]] | None = None  # of the deltas after a version

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for theta_shared."""
        if self._digest is None:
            self._digest = digest_of(self.shared)
        return self._digest

    def advance(self, adapter: TaskVector) -> None:
        """Make the version that brings theta_shared towards ``adapter``; none where it is there.

        A parameter that would be further off than it is stays. Where values have outgrown the grid,
        the version is another start, which every node is sent.

        Raises
        ------
        LayoutMismatchError, NonFiniteError
            Another layout; NaN or Inf.
        """
        if adapter.layout != self.layout:
            raise LayoutMismatchError(f"expected {self.layout!r}, found {adapter.layout!r}")
        target = on_cpu(adapter)
        if np.array_equal(target, self.shared):
            return
        TaskVector(self.layout, target).check_finite()
        if self._dense:
            blobs = encode_parts(TaskVector(self.layout, target), self.codec)
            shared: Any = decode_parts(blobs).to_task_vector().values
            self.shared = shared
            self._log.clear()
        elif float(np.abs(target).max(initial=0.0)) >= self.grid.limit / 2:
            self._begin(target, self.version + 1)
            self._log.clear()
        else:
            delta = self._delta(_difference(target, self.shared))
            if isinstance(delta, TernaryVector) and not delta.num_nonzeros:
                return
            blob = encode(
                delta,
                codec_of(delta, self.codec),
                link_mbps=self.link_mbps,
                layout_by_id=True,
                base_version=self.version,
            )
            self.shared = self.shared.copy()  # the old one may be in use
            add_in_place(self.shared, delta)
            self._log[self.version + 1] = blob
        self.version += 1
        self._forget_what_was_made()
        self._forget_what_a_snapshot_beats()

    def _begin(self, adapter: NDArray[np.float32], version: int) -> None:
        """Lay a grid around an adapter: at the start, and anew where values have outgrown it."""
        self.grid = Grid.of_start(adapter)
        self._cuts: list[int] = []  # of a coarse start
        self.shared = adapter.copy() if self._dense else self.grid.nearest(adapter)
        if self._coarse and not self._dense:
            bits = start_bits(adapter, self.layout)
            if self.reduction.density == AUTO:
                bits = min(bits, AUTO_BITS)
            self.shared, self._cuts = self.grid.coarse(adapter, self.layout, bits)
        self._start, self._started = self.shared, version

    def _delta(self, difference: NDArray[np.float32]) -> TernaryVector | FactoredVector:
        """The vector on the grid that theta_shared moves by."""
        tau = TaskVector(self.layout, difference)
        delta = self.reduction.after(self.version)(tau, self.grid.exponent)
        if isinstance(delta, FactoredVector):
            values: Any = delta.values
            reached = np.abs(self.shared + values).max(initial=0.0)
            if (delta.num_terms or delta.rest is not None) and reached < self.grid.limit:
                return delta
            delta = replace(self.reduction, density=_INSTEAD, factored=False)(tau)
        assert isinstance(delta, TernaryVector)  # no bits are asked for here
        scale = float(delta.scales[0]) if delta.scales.size else 0.0
        if not delta.num_nonzeros or not scale:
            return delta
        # The target is within half of the limit, so that no such step can leave it.
        step = np.float32(min(step_near(scale, self.grid.unit), self.grid.limit / 4))
        bits = np.packbits(np.abs(difference) > step / 2, bitorder="little")
        words = np.zeros(delta.positive.size * 8, np.uint8)
        words[: bits.size] = bits
        mask = words.view(np.uint64)
        scales = np.array([step], np.float32)
        return TernaryVector(self.layout, delta.positive & mask, delta.negative & mask, scales)

    def lacking(self, version: int | None) -> Shipment:
        """What a node at ``version`` needs; None: a node that has nothing of this federation.

        Version 0 is every node's that can make the start, at any time. One object for each answer,
        as long as the version stands.
        """
        if version == self.version:
            return _NOTHING
        if version is None:
            return self.snapshot()
        if not 0 <= version < self.version or self._dense:
            return self.snapshot()
        if version not in self._made:
            self._made[version] = self._catch_up(version)
        return self._made[version]

    def prepare(self, versions: Iterable[int | None]) -> None:
        """Make what nodes at these versions need, each delta being read once for all of them."""
        known = {version for version in versions if version is not None}
        for version in sorted(known, reverse=True):
            self.lacking(version)
        self._sum = None

    def _catch_up(self, version: int) -> Shipment:
        """What is fewest bytes: the deltas one by one, their sum, or all anew."""
        wanted = range(version + 1, self.version + 1)
        chain = None
        if all(each in self._log for each in wanted):
            chain = Shipment("deltas", tuple(self._log[each] for each in wanted))
            if len(wanted) == 1:
                return chain
            moved = self._moved_since(version)
        elif version == self._started:
            self._sum = None  # not two vectors at a time
            moved = self.shared - self._start
        elif self._seeded and not self._started:
            return self.lacking(0)
        else:
            return self.snapshot()
        found = Shipment("catchup", self._steps(moved, version))
        if chain is not None and chain.num_bytes <= found.num_bytes:
            return chain
        return found if found.num_bytes < self._snapshot_bytes() else self.snapshot()

    def _moved_since(self, version: int) -> NDArray[np.float32]:
        """The sum of the deltas after a version; exact, and kept for the next one further back."""
        reached, moved = self._sum or (self.version, np.zeros_like(self.shared))
        if reached < version:
            reached, moved = self.version, np.zeros_like(self.shared)
        for each in range(reached, version, -1):
            add_in_place(moved, checked_delta(decode(self._log[each], layout=self.layout)))
        self._sum = (version, moved)
        return moved

    def _steps(self, moved: NDArray[np.float32], version: int) -> tuple[bytes, ...]:
        change = TaskVector(self.layout, moved)
        return tuple(encode_parts(change, "steps", layout_by_id=True, base_version=version))

    def snapshot(self) -> Shipment:
        """All of theta_shared: a coarse start and what came after it, or lossless and dense."""
        if self._snapshot is None:
            self._snapshot = self._coarse_snapshot() or self._dense_snapshot()
        return self._snapshot

    def _coarse_snapshot(self) -> Shipment | None:
        if not self._coarse or self._dense:
            return None
        start, version = TaskVector(self.layout, self._start), self._started
        blobs = tuple(encode_parts(start, "steps", base_version=version, cuts=self._cuts))
        if self.version > version:
            blobs += self._steps(self.shared - self._start, version)
        found = Shipment("start", blobs)
        return found if found.num_bytes < self._snapshot_bytes() else None

    def _dense_snapshot(self) -> Shipment:
        codec = self.codec if self._dense and self.version else "dense"
        adapter = TaskVector(self.layout, self.shared)
        return Shipment("snapshot", tuple(encode_parts(adapter, codec, base_version=self.version)))

    def _snapshot_bytes(self) -> int:
        return 4 * self.layout.num_parameters

    def _forget_what_was_made(self) -> None:
        self._digest = self._snapshot = self._sum = None
        self._made = {}

    def _forget_what_a_snapshot_beats(self) -> None:
        total = sum(len(blob) for blob in self._log.values())
        while self._log and (total >= self._snapshot_bytes() or len(self._log) > MAX_DELTAS):
            total -= len(self._log.popitem(last=False)[1])

    # What a checkpoint keeps.

    def state(self) -> dict[str, Any]:
        """Version, theta_shared, start and log, for `restore`."""
        return {
            "version": self.version,
            "shared": self.shared,
            "start": self._start,
            "started": self._started,
            "cuts": self._cuts,
            "grid": self.grid.exponent,
            "log": dict(self._log),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        ParameterError
            A state of another layout.
        StateError
            A state of before the grid.
        """
        if "grid" not in state:
            raise StateError(
                "expected a checkpoint whose adapter lies on a grid, found one that an earlier "
                "version of compeft-fl wrote: begin again from the adapter that it led to"
            )
        shared, start = (np.asarray(state[name], np.float32) for name in ("shared", "start"))
        if not shared.shape == start.shape == self.shared.shape:
            raise ParameterError(
                f"expected {self.layout.num_parameters} values, found {shared.shape}"
            )
        self.version, self.shared = int(state["version"]), shared.copy()
        self._start, self._started = start.copy(), int(state["started"])
        self.grid, self._cuts = Grid(int(state["grid"])), [int(cut) for cut in state["cuts"]]
        self._log = OrderedDict(sorted(state["log"].items()))
        self._forget_what_was_made()


def _difference(target: NDArray[np.float32], shared: NDArray[np.float32]) -> NDArray[np.float32]:
    """The target less what is shared; at most float32's largest value, in either direction."""
    with np.errstate(over="ignore"):
        difference = target - shared
    largest = np.finfo(np.float32).max
    # An infinite difference of finite values is one that float32 cannot hold.
    return np.clip(difference, -largest, largest, out=difference)


def distance(one: TaskVector, other: TaskVector) -> float:
    """The Euclidean distance of two adapters."""
    from compeft_fl.kernels import cpu

    return math.sqrt(cpu.sum_squares(_difference(on_cpu(one), on_cpu(other))))
