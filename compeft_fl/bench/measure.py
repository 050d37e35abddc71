"""Seconds and memory of one call."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

__all__ = ["best_seconds", "measure", "peak_memory"]

T = TypeVar("T")

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")


def best_seconds(
    function: Callable[[], T], budget: float = 1.0, repeats: int = 5
) -> tuple[T, float]:
    """The result and the seconds of the fastest of some runs: other work disturbs it least.

    Runs at least once and at most ``repeats`` times, and starts none after ``budget`` seconds.
    """
    started = time.perf_counter()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - started > budget:
            break
    return result, best


def measure(
    function: Callable[[], T], budget: float = 1.0, repeats: int = 5
) -> tuple[T, float, int | None]:
    """The result, the seconds of the fastest run, and the peak memory of the first."""

    def timed() -> tuple[T, float]:
        start = time.perf_counter()
        result = function()
        return result, time.perf_counter() - start

    (result, first), peak = peak_memory(timed)
    if first > budget:
        return result, first, peak
    del result
    result, best = best_seconds(function, budget, repeats)
    return result, min(first, best), peak


def peak_memory(function: Callable[[], T]) -> tuple[T, int | None]:
    """The result, and by how many bytes the resident set grew at most: None but on Linux.

    The kernel's high-water mark is set back before the call (proc(5), clear_refs).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that memory freed before counts when it is used again
        _RESET.write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return function(), None
    result = function()
    return result, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
