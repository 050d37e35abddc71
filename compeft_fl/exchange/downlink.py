"""The downlink: the global adapter in versions, each a compressed delta to the one before.

The server holds theta, the true global adapter, and theta_shared, which every node at the same
version can reconstruct bit for bit. A new version sends C(theta - theta_shared) and adds to
theta_shared what was sent; what was not sent stays in the difference, which is error feedback in
the other direction. A node gets the deltas since its version, or a snapshot where that is fewer
bytes, and nothing where it is up to date.

Source: Sattler et al., "STC", https://arxiv.org/abs/1903.02891, section V-B (partial sums of
updates); Tang et al., "DoubleSqueeze", https://arxiv.org/abs/1905.05957.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.compeft import check_density, check_scale, check_support, compress
from compeft_fl.errors import LayoutMismatchError, ParameterError, VersionError, WireError
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, decode_parts, encode, encode_parts
from compeft_fl.wire.opening import open_update

__all__ = ["DIGEST_BYTES", "Downlink", "Replica", "Shipment", "digest_of", "distance"]

DIGEST_BYTES = 16
MAX_DELTAS = 1024  # in a shipment: each costs the node a pass over its adapter


def digest_of(values: NDArray[np.float32]) -> bytes:
    """16 bytes that stand for a flat adapter: BLAKE2b-128 of its little-endian float32 values."""
    data = np.ascontiguousarray(values, "<f4")
    return hashlib.blake2b(data.data, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Shipment:
    """What brings a node to the current version.

    Attributes
    ----------
    kind : "nothing", "deltas" or "snapshot"
    blobs : tuple of bytes
        Updates: one per version, or the parts of one dense adapter.
    """

    kind: str
    blobs: tuple[bytes, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The payload."""
        return sum(len(blob) for blob in self.blobs)


class Downlink:
    """The server's end: theta_shared, its version, and the deltas that led there.

    Parameters
    ----------
    adapter : TaskVector
        The adapter that the federation starts from: version 0, on the CPU.
    density, scale, codec, support
        Of the deltas, see `compeft_fl.compress` and `compeft_fl.encode`. A dense codec sends the
        whole adapter in each version.
    link_mbps
        The speed of a node's link in Mbit/s, for codec "auto" alone.

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
    >>> downlink.advance(TaskVector.from_dict({"w": np.arange(8, dtype="f4")}))
    >>> downlink.version, downlink.shared
    (1, array([0. , 0. , 0. , 0. , 0. , 0. , 6.5, 6.5], dtype=float32))
    """

    def __init__(
        self,
        adapter: TaskVector,
        *,
        density: float = 0.2,
        scale: str | float = "mean",
        codec: str = "golomb",
        link_mbps: float | None = None,
        support: str = "best",
    ) -> None:
        from compeft_fl import codecs
        from compeft_fl.codecs import auto
        from compeft_fl.codecs.dense import Dense

        check_density(density)
        check_scale(scale)
        check_support(support)
        adapter.check_finite()
        auto.check(codec, link_mbps)
        self.density, self.scale, self.codec, self.link_mbps = density, scale, codec, link_mbps
        self.support = support
        self._dense = codec != auto.AUTO and isinstance(codecs.get(codec), Dense)
        self.layout = adapter.layout
        self.version = 0
        self.shared: NDArray[np.float32] = _host(adapter).copy()
        self._log: OrderedDict[int, bytes] = OrderedDict()  # version -> the delta that made it
        self._digest: bytes | None = None
        self._snapshot: Shipment | None = None

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for theta_shared."""
        if self._digest is None:
            self._digest = digest_of(self.shared)
        return self._digest

    def advance(self, adapter: TaskVector) -> None:
        """Make the version that brings theta_shared towards ``adapter``; none where it is there.

        Raises
        ------
        LayoutMismatchError, NonFiniteError
            Another layout; NaN or Inf.
        """
        if adapter.layout != self.layout:
            raise LayoutMismatchError(f"expected {self.layout!r}, found {adapter.layout!r}")
        target = _host(adapter)
        if np.array_equal(target, self.shared):
            return
        TaskVector(self.layout, target).check_finite()
        if self._dense:
            blobs = encode_parts(TaskVector(self.layout, target), self.codec)
            shared: Any = decode_parts(blobs).to_task_vector().values
            self.shared = shared
            self._log.clear()
        else:
            difference = TaskVector(self.layout, _difference(target, self.shared))
            delta = compress(difference, self.density, self.scale, self.support)
            if not delta.num_nonzeros or not delta.scales[0]:
                return
            blob = encode(
                delta,
                self.codec,
                link_mbps=self.link_mbps,
                layout_by_id=True,
                base_version=self.version,
            )
            self.shared = self.shared.copy()  # the old one may be in use
            _add(self.shared, delta)
            self._log[self.version + 1] = blob
            if not np.isfinite(self.shared).all():  # a step that float32 cannot make: all of it
                self.shared = target.copy()
                self._log.clear()
        self.version += 1
        self._digest, self._snapshot = None, None
        self._forget_what_a_snapshot_beats()

    def lacking(self, version: int | None) -> Shipment:
        """What a node at ``version`` needs; None: a node that has nothing of this federation."""
        if version == self.version:
            return Shipment("nothing")
        if version is not None and 0 <= version < self.version:
            wanted = range(version + 1, self.version + 1)
            if all(each in self._log for each in wanted):
                deltas = Shipment("deltas", tuple(self._log[each] for each in wanted))
                if deltas.num_bytes < self._snapshot_bytes():
                    return deltas
        return self.snapshot()

    def snapshot(self) -> Shipment:
        """theta_shared itself, lossless, in as many parts as its size asks for."""
        if self._snapshot is None:
            codec = self.codec if self._dense and self.version else "dense"
            adapter = TaskVector(self.layout, self.shared)
            blobs = encode_parts(adapter, codec, base_version=self.version)
            self._snapshot = Shipment("snapshot", tuple(blobs))
        return self._snapshot

    def _snapshot_bytes(self) -> int:
        return 4 * self.layout.num_parameters

    def _forget_what_a_snapshot_beats(self) -> None:
        total = sum(len(blob) for blob in self._log.values())
        while self._log and (total >= self._snapshot_bytes() or len(self._log) > MAX_DELTAS):
            total -= len(self._log.popitem(last=False)[1])

    # What a checkpoint keeps.

    def state(self) -> dict[str, Any]:
        """Version, theta_shared and log, for `restore`."""
        return {"version": self.version, "shared": self.shared, "log": dict(self._log)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        ParameterError
            A state of another layout.
        """
        shared = np.asarray(state["shared"], np.float32)
        if shared.shape != self.shared.shape:
            raise ParameterError(
                f"expected {self.layout.num_parameters} values, found {shared.shape}"
            )
        self.version, self.shared = int(state["version"]), shared.copy()
        self._log = OrderedDict(sorted(state["log"].items()))
        self._digest, self._snapshot = None, None


class Replica:
    """A node's end: theta_shared as it was last reconstructed, and its version.

    Parameters
    ----------
    layout : Layout
    values : ndarray of float32, shape (d,)
    version : int
    """

    def __init__(self, layout: Layout, values: NDArray[np.float32], version: int) -> None:
        self.layout, self.values, self.version = layout, values, version

    @classmethod
    def from_snapshot(cls, blobs: Sequence[bytes]) -> Replica:
        """The adapter that a snapshot brings.

        Raises
        ------
        WireError
            Bytes that a decoder rejects, or no dense adapter.
        """
        opened = open_update(blobs)
        if not opened.dense:  # it takes as many bytes as it has values, so they need no bound
            raise WireError("expected a dense snapshot, found a ternary update")
        return cls(opened.layout, _host(opened.decode().to_task_vector()), opened.base_version)

    def advance(self, blobs: Sequence[bytes], version: int) -> Replica:
        """The adapter after the deltas from this version to ``version``; this one is left as it is.

        Raises
        ------
        VersionError
            The deltas start or end at other versions.
        WireError
            Bytes that a decoder rejects.
        """
        if self.version + len(blobs) != version:
            raise VersionError(
                f"expected {version - self.version} deltas from version {self.version} to "
                f"{version}, found {len(blobs)}"
            )
        if len(blobs) > MAX_DELTAS:
            raise WireError(f"expected at most {MAX_DELTAS} deltas, found {len(blobs)}")
        values = self.values.copy()
        for i, blob in enumerate(blobs):
            delta = decode(blob, layout=self.layout, base_version=self.version + i)
            if not isinstance(delta, TernaryVector):
                raise WireError("expected a ternary delta, found a dense update")
            _add(values, delta)
        return Replica(self.layout, values, version)

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the values."""
        return digest_of(self.values)


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

    return math.sqrt(cpu.sum_squares(_difference(_host(one), _host(other))))


def _add(values: NDArray[np.float32], delta: TernaryVector) -> None:
    """Add a delta in place; the same float32 operations on the server and on every node."""
    from compeft_fl.kernels import cpu

    cpu.add_ternary(values, delta.positive, delta.negative, delta.scales, delta.bounds)


def _host(adapter: TaskVector) -> NDArray[np.float32]:
    values: Any = adapter.values
    array: NDArray[np.float32] = values.cpu().numpy() if is_torch(values) else values
    return array
