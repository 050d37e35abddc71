"""The node's end of the downlink: its copy of theta_shared, and what brings it to a version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import VersionError, WireError
from compeft_fl.factored import FactoredVector
from compeft_fl.parts.ranks import Cut
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, inspect
from compeft_fl.wire.opening import MAX_PARTS, open_update

__all__ = [
    "DIGEST_BYTES",
    "MAX_DELTAS",
    "Replica",
    "Shipment",
    "add_in_place",
    "checked_delta",
    "digest_of",
    "on_cpu",
    "start_parts",
]

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
    kind : "nothing", "deltas", "catchup", "start" or "snapshot"
    blobs : tuple of bytes
        Updates: one per version; the parts of one catch-up from the version that they name; the
        parts of the start, and then those of a catch-up from it; the parts of one dense adapter.
    """

    kind: str
    blobs: tuple[bytes, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The payload."""
        return sum(len(blob) for blob in self.blobs)


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
        # Dense values take as many bytes as they are, so that they need no bound.
        if not opened.codec.startswith("dense"):
            raise WireError("expected a dense snapshot, found another update")
        return cls(opened.layout, on_cpu(opened.decode().to_task_vector()), opened.base_version)

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
            add_in_place(values, checked_delta(delta))
        return Replica(self.layout, values, version)

    def catch_up(self, blobs: Sequence[bytes], version: int) -> Replica:
        """The adapter after the sum of all deltas to ``version``; this one is left as it is.

        Raises
        ------
        WireError
            Bytes that a decoder rejects, a sum from another version, or no steps.
        """
        opened = open_update(blobs, layout=self.layout, base_version=self.version)
        if opened.codec != "steps":
            raise WireError(f"expected steps to catch up by, found a body of codec {opened.codec}")
        with np.errstate(over="ignore", invalid="ignore"):  # the digest tells
            moved = on_cpu(opened.decode().to_task_vector())
            values = np.add(self.values, moved, out=moved)
        return Replica(self.layout, values, version)

    @classmethod
    def from_start(cls, blobs: Sequence[bytes], version: int) -> Replica:
        """The adapter of a start and, if more follows, of a catch-up from it.

        Raises
        ------
        WireError
            Bytes that a decoder rejects.
        """
        count = start_parts(blobs)[1]
        opened = open_update(blobs[:count])
        if opened.codec != "steps":
            raise WireError(f"expected a start in steps, found a body of codec {opened.codec}")
        values = on_cpu(opened.decode().to_task_vector())
        start = cls(opened.layout, values, opened.base_version)
        return start.catch_up(blobs[count:], version) if blobs[count:] else start

    def cut(self, cut: Cut) -> Replica:
        """The part of a lower rank."""
        return Replica(cut.layout, cut.values(self.values), self.version)

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the values."""
        return digest_of(self.values)


def start_parts(blobs: Sequence[bytes]) -> tuple[Layout | None, int]:
    """The layout of a shipment of kind "start", and how many of its parts are the start's.

    Raises
    ------
    WireError
        Bytes that a decoder rejects; too many parts.
    """
    if len(blobs) > 2 * MAX_PARTS:  # each is looked at twice
        raise WireError(f"expected at most {2 * MAX_PARTS} parts, found {len(blobs)}")
    layout, covered, count = None, 0, 0
    while count < len(blobs) and (layout is None or covered < layout.num_parameters):
        header = inspect(blobs[count], layout=layout)
        layout = layout or header.layout
        covered += header.num_parameters
        count += 1
    return layout, count


def checked_delta(delta: TernaryVector | TaskVector) -> TernaryVector | FactoredVector:
    """A delta of one version.

    Raises
    ------
    WireError
        A dense update.
    """
    if not isinstance(delta, TernaryVector | FactoredVector):
        raise WireError("expected a ternary or factored delta, found a dense update")
    return delta


def add_in_place(values: NDArray[np.float32], delta: TernaryVector | FactoredVector) -> None:
    """Add a delta in place; the same float32 operations on the server and on every node."""
    from compeft_fl.kernels import cpu

    if isinstance(delta, FactoredVector):
        for where, piece in delta.pieces():
            values[where] += piece
        return
    cpu.add_ternary(values, delta.positive, delta.negative, delta.scales, delta.bounds)


def on_cpu(adapter: TaskVector) -> NDArray[np.float32]:
    """A flat adapter's values, float32, shape (d,), on the CPU."""
    values: Any = adapter.values
    array: NDArray[np.float32] = values.cpu().numpy() if is_torch(values) else values
    return array
