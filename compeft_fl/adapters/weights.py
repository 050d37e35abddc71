"""Tensors of a safetensors file, read piece by piece and never all at once.

The file is checked by safetensors and then read by plain reads: a memory map would count each page
that was touched as memory of the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import AdapterError
from compeft_fl.printable import one_line, quoted
from compeft_fl.task_vector import is_torch

__all__ = [
    "PIECE",
    "STORED_SIZES",
    "StoredTensor",
    "StoredTensors",
    "float32_pieces",
    "require_torch",
]

PIECE: Final = 1 << 20  # parameters that are read at once

# numpy's types by safetensors' names; bfloat16 is read as the 16 bits that it is.
_NUMPY: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
STORED_SIZES: Final = {name: np.dtype(dtype).itemsize for name, dtype in _NUMPY.items()}
"""Bytes of a value, by safetensors' names of data types."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, and what it is: all of a tensor but its values.

    Attributes
    ----------
    name : str
    stored_dtype : str
        As safetensors has it: ``"F32"``, ``"BF16"``, ``"I64"``.
    shape : tuple of int
    offset : int
        In bytes from the start of the file.
    """

    name: str
    stored_dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> str:
        """The data type's name as numpy and torch have it: ``"float32"``, ``"bfloat16"``."""
        if self.stored_dtype == "BF16":
            return "bfloat16"
        return str(np.dtype(_NUMPY[self.stored_dtype]))

    @property
    def size(self) -> int:
        """How many values the tensor has."""
        return int(np.prod([int(length) for length in self.shape], dtype=object))


class StoredTensors(Mapping[str, Any]):
    """The tensors of a safetensors file, by name and in the order of names; read when asked for.

    Parameters
    ----------
    file : Path

    Raises
    ------
    AdapterError
        Bytes that are no safetensors, or a data type that numpy and torch don't share.
    """

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="np") as checked:
                names = sorted(checked.keys())
        except (SafetensorError, ValueError, OverflowError) as error:
            raise AdapterError(
                f"{file}: expected safetensors, found other bytes: {one_line(error, 200)}"
            ) from None
        self._path = file
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        self.tensors: dict[str, StoredTensor] = {}
        for name in names:
            entry = header[name]
            if entry["dtype"] not in _NUMPY:
                raise AdapterError(
                    f"{file}: expected floats of 16, 32 or 64 bits, integers or Booleans, found "
                    f"{entry['dtype']} in tensor {name!r}"
                )
            shape = tuple(entry["shape"])
            _check_shape(file, name, shape)
            offset = 8 + length + entry["data_offsets"][0]
            self.tensors[name] = StoredTensor(name, entry["dtype"], shape, offset)

    def __getitem__(self, name: str) -> Any:
        tensor = self.tensors[name]
        values = self._read(tensor, 0, tensor.size).reshape(tensor.shape)
        if tensor.stored_dtype != "BF16":
            return values
        require_torch(f"{self._path}: bfloat16 tensors")
        import torch

        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def pieces(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """A tensor's values as float32, piece by piece, each with where it starts."""
        tensor = self.tensors[name]
        for start in range(0, tensor.size, PIECE):
            values = self._read(tensor, start, min(tensor.size, start + PIECE))
            if tensor.stored_dtype == "BF16":
                values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
            yield start, values.astype(np.float32, copy=False)

    def raw(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """A tensor's bytes as they are stored, from value ``start`` on, ``size`` at a time."""
        tensor = self.tensors[name]
        step = max(1, size // STORED_SIZES[tensor.stored_dtype])
        for at in range(start, tensor.size, step):
            yield self._read(tensor, at, min(tensor.size, at + step)).tobytes()

    def _read(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[Any]:
        dtype = np.dtype(_NUMPY[tensor.stored_dtype])
        values = np.empty(stop - start, dtype)
        with self._path.open("rb") as file:
            file.seek(tensor.offset + start * dtype.itemsize)
            read = file.readinto(values.data.cast("B")) if values.size else 0
        if read != values.nbytes:
            raise AdapterError(f"{self._path}: expected {tensor.name!r} in full, found its end")
        return values


def _check_shape(file: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise AdapterError for a shape that numpy's arrays cannot have, 100 dimensions, say."""
    try:
        np.empty(0, np.uint8).reshape(shape if 0 in shape else (0, *shape[1:]))
    except (ValueError, OverflowError) as error:
        raise AdapterError(
            f"{file}: expected safetensors, found other bytes: {one_line(error, 200)} in tensor "
            f"{quoted(name)}"
        ) from None


def float32_pieces(
    state: Mapping[str, Any], name: str
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A tensor of any state as flat float32 pieces, each with where it starts."""
    if isinstance(state, StoredTensors):
        yield from state.pieces(name)
        return
    tensor = state[name]
    if is_torch(tensor):
        tensor = tensor.detach().cpu().float().numpy()
    yield 0, np.asarray(tensor, dtype=np.float32).reshape(-1)


def require_torch(what: str) -> None:
    """Raise AdapterError where torch is not installed; ``what`` needs it."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise AdapterError(
            f"{what} need torch, which is not installed: pip install torch"
        ) from None
