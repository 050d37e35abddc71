"""Arrays that lie in a file without a name, and take memory while they are read."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGE_BYTES", "give_back", "on_disk", "pieces", "release"]

LARGE_BYTES: Final = 16 << 20  # of all arrays; fewer stay in memory
_PIECE_BYTES: Final = 8 << 20


def on_disk(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return copies of arrays that cannot be written, in a temporary file where they are large.

    The file has no name, and is gone with the last of the arrays.

    Examples
    --------
    >>> on_disk({"w": np.arange(3)})["w"]
    array([0, 1, 2])
    """
    if os.name != "posix" or sum(array.nbytes for array in arrays.values()) < LARGE_BYTES:
        return {name: array.copy() for name, array in arrays.items()}
    with tempfile.TemporaryFile() as file:
        places = {}
        for name, array in arrays.items():
            places[name] = file.tell()
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        return {
            name: np.memmap(file, array.dtype, "r", places[name], array.shape)
            if array.size
            else array.copy()
            for name, array in arrays.items()
        }


def pieces(array: NDArray[Any]) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous array, some megabytes at a time."""
    data = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]


def release(array: NDArray[Any] | None) -> None:
    """Let go of the memory of an array that is a file's; it comes back from there when needed."""
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and os.name == "posix":
        pages.madvise(mmap.MADV_DONTNEED)


def give_back() -> None:
    """Let the C library give freed memory back to the system; it keeps what may be asked for again.

    Where it is not glibc, nothing happens.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c_library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no such thing on Windows
        return None
