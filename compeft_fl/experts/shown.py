"""Versions as searches show them, kept in memory.

Whoever searches is shown versions that others were shown before. A version never changes, and an
index gives the number of a row to no other while it is open: what was read once need not be
read, parsed and written into a message again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from compeft_fl.experts.expert import Expert

__all__ = ["Shown"]

_BYTES: Final = 64 << 20
_EACH: Final = 3 << 10  # bytes of a version and its message, without what its pusher may write


class Shown:
    """Versions by the numbers of their rows, within some bytes of memory; the oldest ones go.

    Parameters
    ----------
    read : callable
        Reads the versions of some rows: pairs of a row's number and a version, without those that
        are gone.
    max_bytes : int
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Iterable[tuple[int, Expert]]],
        max_bytes: int = _BYTES,
    ) -> None:
        self._read, self._max_bytes = read, max_bytes
        self._kept: dict[int, Expert] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def experts(self, rows: Sequence[int]) -> dict[int, Expert]:
        """The versions of some rows; without those that are gone."""
        found = {row: expert for row in rows if (expert := self._kept.get(row)) is not None}
        missing = [row for row in rows if row not in found]
        if missing:
            read = dict(self._read(missing))
            found |= read
            with self._lock:
                for row, expert in read.items():
                    if row not in self._kept:
                        self._kept[row] = expert
                        self._bytes += _size(expert)
                while self._bytes > self._max_bytes:
                    self._bytes -= _size(self._kept.pop(next(iter(self._kept))))
        return found


def _size(expert: Expert) -> int:
    """About how many bytes a version and its message take."""
    texts = [*expert.tags, *expert.tags.values(), *expert.metrics]
    texts += [expert.base_model, expert.base_digest, expert.start]
    return _EACH + sum(100 + 4 * len(text) for text in texts)
