"""What was read of an index's rows, kept in memory.

Whoever searches is shown versions that others were shown before. A version never changes, and an
index gives the number of a row to no other while it is open: what was read of it once, parsed and
written into a message, need not be read again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

__all__ = ["Kept"]

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by the numbers of their rows, within some bytes of memory; the oldest ones go.

    Parameters
    ----------
    read : callable
        Reads the values of some rows: pairs of a row's number and its value, without those that
        are gone.
    size : callable
        About how many bytes a value takes.
    max_bytes : int
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Iterable[tuple[int, Value]]],
        size: Callable[[Value], int],
        max_bytes: int,
    ) -> None:
        self._read, self._size, self._max_bytes = read, size, max_bytes
        self._kept: dict[int, Value] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def values(self, rows: Sequence[int]) -> dict[int, Value]:
        """The values of some rows; without those that are gone."""
        found = {row: value for row in rows if (value := self._kept.get(row)) is not None}
        missing = [row for row in rows if row not in found]
        if missing:
            read = dict(self._read(missing))
            found |= read
            with self._lock:
                for row, value in read.items():
                    if row not in self._kept:
                        self._kept[row] = value
                        self._bytes += self._size(value)
                while self._bytes > self._max_bytes:
                    self._bytes -= self._size(self._kept.pop(next(iter(self._kept))))
        return found
