"""Arrays that lie in a file without a name, and take memory while they are read."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGE_BYTES", "on_disk", "release"]

LARGE_BYTES: Final = 16 << 20  # of all arrays; fewer stay in memory


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


def release(array: NDArray[Any] | None) -> None:
    """Let go of the memory of an array that is a file's; it comes back from there when needed."""
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and os.name == "posix":
        pages.madvise(mmap.MADV_DONTNEED)
