"""Top-k with the values kept: indices and values, and the sparse COO form of FL4Health."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.compeft import keep_top_k
from compeft_fl.errors import MalformedError, ParameterError, PositionError, StreamLengthError
from compeft_fl.task_vector import Layout, TaskVector

__all__ = ["TopKCoo", "TopKFloat16"]


def _top_k(values: Floats, layout: Layout, density: float) -> NDArray[np.int64]:
    """The positions of the largest magnitudes, ascending."""
    kept = keep_top_k(TaskVector(layout, values), density)
    bits = np.unpackbits((kept.positive | kept.negative).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


class TopKFloat16(PeerCodec):
    """uint32 k, k indices of 32 bits, k values in float16: 6 bytes for each that is sent."""

    family = "topk-fp16"
    source = "https://arxiv.org/abs/1809.07599"
    biased = True
    densities = (0.05, 0.2)

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        at = _top_k(values, layout, self.density)
        if values.size > 1 << 32:
            raise ParameterError(f"expected at most 2^32 parameters, found {values.size}")
        with np.errstate(over="ignore"):
            kept = values[at].astype("<f2")
        if not np.isfinite(kept).all():
            raise ParameterError("expected magnitudes that float16 holds (<= 65504), found more")
        return np.array(at.size, "<u4").tobytes() + at.astype("<u4").tobytes() + kept.tobytes()

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        reader = Reader(blob)
        count = int(reader.array("<u4", 1)[0])
        at, kept = reader.array("<u4", count), reader.array("<f2", count)
        reader.end()
        _check_ascending(at, layout.num_parameters)
        values = np.zeros(layout.num_parameters, np.float32)
        values[at] = kept
        return values


class TopKCoo(PeerCodec):
    """What FL4Health's SparseCooParameterPacker makes Flower send, with all that it sends.

    Of each tensor the nonzero values in float32, their indices as int64, one per dimension, and its
    shape; then the names: arrays in NumPy's own format, one after the other. In a matrix that is 20
    bytes for each parameter that is sent.
    """

    family = "topk-coo"
    source = "https://github.com/VectorInstitute/FL4Health"
    biased = True
    densities = (0.05,)

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        at = _top_k(values, layout, self.density)
        cuts = np.searchsorted(at, layout.offsets)
        kept, indices, shapes = [], [], []
        for number, (tensor, where) in enumerate(layout.slices()):
            inside = at[cuts[number] : cuts[number + 1]]
            kept.append(values[inside])
            places = np.zeros((inside.size, len(tensor.shape)), np.int64)
            for axis, along in enumerate(np.unravel_index(inside - where.start, tensor.shape)):
                places[:, axis] = along
            indices.append(places)
            shapes.append(np.array(tensor.shape, np.int64))
        names = np.array([tensor.name for tensor in layout.tensors])
        file = io.BytesIO()
        arrays: list[NDArray[Any]] = [*kept, *indices, *shapes, names]
        for array in arrays:
            np.save(file, array, allow_pickle=False)
        return file.getvalue()

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        file, arrays = io.BytesIO(blob), []
        count = len(layout.tensors)
        try:
            for _ in range(3 * count + 1):
                arrays.append(np.load(file, allow_pickle=False))
        except Exception as error:  # a header is parsed as Python, and fails in as many ways
            raise MalformedError(f"expected {3 * count + 1} arrays: {error}") from None
        if file.read(1):
            raise StreamLengthError(f"expected {3 * count + 1} arrays, found more bytes")
        if arrays[-1].tolist() != [tensor.name for tensor in layout.tensors]:
            raise MalformedError("expected the names of the layout, found others")
        values = np.zeros(layout.num_parameters, np.float32)
        for number, (tensor, where) in enumerate(layout.slices()):
            kept, indices, shape = arrays[number::count][:3]
            if kept.dtype != np.float32 or indices.dtype != np.int64 or kept.ndim != 1:
                raise MalformedError(f"expected float32 and int64 arrays in {tensor.name!r}")
            if tuple(shape.tolist()) != tensor.shape:
                raise MalformedError(f"expected shape {tensor.shape}, found {shape.tolist()}")
            if indices.shape != (kept.size, len(tensor.shape)):
                raise StreamLengthError(f"expected {kept.size} indices, found {indices.shape}")
            if kept.size:
                if (indices < 0).any() or (indices >= shape).any():
                    raise PositionError(f"expected indices inside {tensor.shape}, found others")
                places = np.ravel_multi_index(tuple(indices.T), tensor.shape)
                _check_ascending(places, tensor.size)
                values[where][places] = kept
        return values


def _check_ascending(at: NDArray[np.integer], size: int) -> None:
    """Raise PositionError unless the positions ascend and end before ``size``."""
    if at.size and (int(at[-1]) >= size or (at[1:] <= at[:-1]).any()):
        raise PositionError(f"expected ascending positions below {size}, found others")
