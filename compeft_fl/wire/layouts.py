"""Layouts as protobuf messages, the ids that stand for them, and where two of them differ."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from compeft_fl.errors import DTypeError, LayoutError, MalformedError
from compeft_fl.printable import quoted
from compeft_fl.task_vector import MAX_DIMENSIONS, Layout, TensorSpec
from compeft_fl.wire.v1 import update_pb2

__all__ = ["ID_BYTES", "difference", "layout_id", "layout_message", "part_layout", "read_layout"]

ID_BYTES: Final = 16

_DTYPES = {
    "f32": update_pb2.DTYPE_F32,
    "f16": update_pb2.DTYPE_F16,
    "bf16": update_pb2.DTYPE_BF16,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}


def layout_message(layout: Layout) -> Any:
    """A layout as the protobuf message ``Layout``."""
    message = update_pb2.Layout()
    for tensor in layout.tensors:
        message.tensors.add(name=tensor.name, shape=tensor.shape, dtype=_DTYPES[tensor.dtype])
    return message


@functools.lru_cache(maxsize=64)
def layout_id(layout: Layout) -> bytes:
    """The 16 bytes that stand for a layout: BLAKE2b-128 of its deterministic serialisation."""
    serialised = layout_message(layout).SerializeToString(deterministic=True)
    return hashlib.blake2b(serialised, digest_size=ID_BYTES).digest()


def part_layout(layout: Layout, start: int, stop: int) -> Layout:
    """The parameters ``start .. stop`` of a layout as tensors of their own, for a codec to write.

    A tensor that is covered in part is one column, as the codecs read it.
    """
    offsets = layout.offsets
    first = max(0, int(np.searchsorted(offsets, start, side="right")) - 1)
    found = []
    for index in range(first, len(layout.tensors)):
        begin, end = int(offsets[index]), int(offsets[index + 1])
        if begin >= stop:
            break
        tensor, covered = layout.tensors[index], min(end, stop) - max(begin, start)
        shape = tensor.shape if covered == tensor.size else (covered, 1)
        found.append(TensorSpec(tensor.name, shape, tensor.dtype))
    return Layout(found)


def read_layout(message: Any) -> Layout:
    """The layout of a protobuf message; its first fault ends the reading.

    Raises
    ------
    DTypeError, MalformedError
    """
    try:
        return Layout(_specs(message))
    except LayoutError as error:
        raise MalformedError(f"expected a layout, found an impossible one: {error}") from None


def _specs(message: Any) -> Iterator[TensorSpec]:
    for tensor in message.tensors:
        if tensor.dtype not in _DTYPE_NAMES:
            raise DTypeError(
                f"expected a data type 1, 2 or 3, found {tensor.dtype} in tensor "
                f"{quoted(tensor.name)}"
            )
        if len(tensor.shape) > MAX_DIMENSIONS:  # before there is a tuple of a million numbers
            raise LayoutError(
                f"expected at most {MAX_DIMENSIONS} dimensions, found {len(tensor.shape)} "
                f"in {quoted(tensor.name)}"
            )
        yield TensorSpec(tensor.name, tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype])


def difference(expected: Layout, found: Layout) -> str:
    """Where two layouts first differ."""
    for index, pair in enumerate(zip(expected.tensors, found.tensors, strict=False)):
        if pair[0] != pair[1]:
            return f"expected tensor {index} to be {_shown(pair[0])}, found {_shown(pair[1])}"
    return f"expected {len(expected.tensors)} tensors, found {len(found.tensors)}"


def _shown(tensor: TensorSpec) -> str:
    return f"{quoted(tensor.name)} {tensor.shape} {tensor.dtype}"
