"""What goes down to a node of a lower rank: its part of what goes to all others.

Every step of the way down is entry by entry, so the part of a shipment brings the part of an
adapter to the part of the next version, bit for bit. It is cut from the whole one and encoded
anew, once for each rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.exchange.replica import Shipment, digest_of, start_parts
from compeft_fl.parts.ranks import Cut
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode, encode_parts, inspect
from compeft_fl.wire.opening import open_update, parse
from compeft_fl.wire.v1 import update_pb2

__all__ = ["CutShipments", "cut_shipment"]


def cut_shipment(shipment: Shipment, cut: Cut) -> Shipment:
    """The part of a shipment that a node of a lower rank needs; see `Cut`.

    Raises
    ------
    WireError
        Bytes that no `Downlink` has made.
    """
    blobs = shipment.blobs
    if shipment.kind == "deltas":
        return _deltas(blobs, cut)
    if shipment.kind == "catchup":
        return Shipment("catchup", _steps(blobs, cut))
    if shipment.kind == "start":
        count = start_parts(blobs)[1]
        return Shipment("start", _start(blobs[:count], cut) + _steps(blobs[count:], cut))
    if shipment.kind == "snapshot":
        opened = open_update(blobs, layout=cut.whole)
        part, codec, version = cut.of(opened.decode()), _dense_codec(blobs), opened.base_version
        return Shipment("snapshot", tuple(encode_parts(part, codec, base_version=version)))
    return shipment


def _dense_codec(blobs: tuple[bytes, ...]) -> str:
    """The codec that wrote a snapshot: one of those for dense values, by their data type."""
    dtype = parse(blobs[0], None)[0].dense.dtype
    known = {update_pb2.DTYPE_F16: "dense-fp16", update_pb2.DTYPE_BF16: "dense-bf16"}
    return known.get(dtype, "dense")


def _deltas(blobs: tuple[bytes, ...], cut: Cut) -> Shipment:
    """Delta by delta where they are ternary; else their sum, which is exact on the grid."""
    headers = [inspect(blob, layout=cut.whole) for blob in blobs]
    deltas = [decode(blob, layout=cut.whole) for blob in blobs]
    if all(isinstance(delta, TernaryVector) for delta in deltas):
        parts = [
            encode(cut.of(delta), h.codec, layout_by_id=True, base_version=h.base_version)
            for delta, h in zip(deltas, headers, strict=True)
        ]
        return Shipment("deltas", tuple(parts))
    moved: Any = sum(delta.to_task_vector().values for delta in deltas)
    change, version = TaskVector(cut.layout, cut.values(moved)), headers[0].base_version
    steps = encode_parts(change, "steps", layout_by_id=True, base_version=version)
    return Shipment("catchup", tuple(steps))


def _steps(blobs: tuple[bytes, ...], cut: Cut) -> tuple[bytes, ...]:
    if not blobs:
        return ()
    opened = open_update(blobs, layout=cut.whole)
    part = cut.of(opened.decode())
    return tuple(encode_parts(part, "steps", layout_by_id=True, base_version=opened.base_version))


def _start(blobs: tuple[bytes, ...], cut: Cut) -> tuple[bytes, ...]:
    """A start, cut at the same tensors as the whole one: each piece has a step of its own."""
    offsets = {inspect(blob, layout=cut.whole).offset for blob in blobs}
    borders = zip(cut.whole.offsets.tolist(), cut.layout.offsets.tolist(), strict=True)
    cuts = sorted({here for there, here in borders if there in offsets and here})
    opened = open_update(blobs, layout=cut.whole)
    part, version = cut.of(opened.decode()), opened.base_version
    return tuple(encode_parts(part, "steps", base_version=version, cuts=cuts))


class CutShipments:
    """Shipments and digests of one version of the global adapter, by rank.

    Parameters
    ----------
    cuts : mapping of int to Cut
        By rank, of the ranks that nodes may have; None stands for the whole.
    """

    def __init__(self, cuts: dict[int, Cut | None]) -> None:
        self._cuts = cuts
        self._version = -1
        self._made: dict[tuple[int, int], tuple[Shipment, Shipment]] = {}
        self._digests: dict[int, bytes] = {}

    def of(self, version: int) -> CutShipments:
        """Those of a version; what was made of another is forgotten."""
        if version != self._version:
            self._version = version
            self._made.clear()
            self._digests.clear()
        return self

    def shipment(self, rank: int, whole: Shipment) -> Shipment:
        """A node's part of what one of the highest rank would be sent, the same object each time.

        Parameters
        ----------
        rank : int
            0: none was stated, and the node is sent the whole.
        whole : Shipment
        """
        cut = self._cuts.get(rank)
        if cut is None or not whole.blobs:
            return whole
        # The whole one stays referenced, so that no other gets its id.
        key = id(whole), rank
        if key not in self._made:
            self._made[key] = whole, cut_shipment(whole, cut)
        return self._made[key][1]

    def digest(self, rank: int, whole: bytes, shared: NDArray[np.float32]) -> bytes:
        """16 bytes that stand for a node's part of theta_shared; the whole's own are given."""
        cut = self._cuts.get(rank)
        if cut is None:
            return whole
        if rank not in self._digests:
            values: Any = cut.values(shared)
            self._digests[rank] = digest_of(values)
        return self._digests[rank]

    def size(self, rank: int, whole: int) -> int:
        """How many parameters a node's part has; the whole's are given."""
        cut = self._cuts.get(rank)
        return whole if cut is None else cut.layout.num_parameters
