"""The hot loops over values and masks for the CPU, compiled by numba.

Masks are arrays of uint64: bit ``i & 63`` of word ``i >> 6`` belongs to parameter ``i``; bits past
the last parameter are 0. Every kernel releases the GIL and works on a range of words, so
``in_threads`` can give each core a part. Results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.llvm import (
    CHUNK,
    LANES,
    ROWS,
    chunk_sum,
    chunk_sum_kept,
    chunk_sum_squares,
    trailing_zeros,
)

Words = NDArray[np.uint64]
Floats = NDArray[np.float32]

_PARALLEL_FROM = 1 << 15  # words; below, a thread costs more than it saves


def num_words(num_parameters: int) -> int:
    """How many uint64 words a mask over ``num_parameters`` bits takes."""
    return (num_parameters + 63) >> 6


def num_cores() -> int:
    """How many threads the kernels use: the cores that this process may run on, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def in_threads(function: Callable[[int, int], Any], count: int, align: int = 1) -> list[Any]:
    """Call ``function(start, stop)`` on parts of ``range(count)``, one per core; results in order.

    Parts start at multiples of ``align``.
    """
    if count < _PARALLEL_FROM:
        return [function(0, count)]
    cores, units = num_cores(), -(-count // align)
    if cores < 2 or units < 2 * cores:
        return [function(0, count)]
    cuts = [min(count, align * (units * i // cores)) for i in range(cores + 1)]
    with ThreadPoolExecutor(cores - 1) as pool:
        rest = [pool.submit(function, a, b) for a, b in itertools.pairwise(cuts[1:])]
        return [function(cuts[0], cuts[1]), *(job.result() for job in rest)]


# --- sums whose order is fixed (kernels/llvm.py) -------------------------------------------------


@njit(nogil=True, cache=True)
def _chunk_sums(values: Any, start: int, stop: int, squares: bool, out: Any) -> None:
    for chunk in range(start, stop):
        if squares:
            out[chunk] = chunk_sum_squares(values, chunk * CHUNK)
        else:
            out[chunk] = chunk_sum(values, chunk * CHUNK)


@njit(nogil=True, cache=True)
def _chunk_sums_kept(
    values: Any, positive: Any, negative: Any, start: int, stop: int, out: Any
) -> None:
    for chunk in range(start, stop):
        out[chunk] = chunk_sum_kept(values, chunk * CHUNK, positive, negative, chunk * ROWS)


def padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array's part after its last whole chunk of ``size``, padded with zeros to one."""
    last = np.zeros(size, array.dtype)
    tail = array[array.size // size * size :]
    last[: tail.size] = tail
    return last


def _sum(values: Floats, squares: bool) -> float:
    chunks = values.size // CHUNK
    out = np.empty(chunks + 1, np.float64)
    in_threads(lambda a, b: _chunk_sums(values, a, b, squares, out), chunks)
    _chunk_sums(padded(values, CHUNK), 0, 1, squares, out[chunks:])
    return math.fsum(out)


def sum_values(values: Floats) -> float:
    """Sum of the values, in float64."""
    return _sum(values, squares=False)


def sum_squares(values: Floats) -> float:
    """Sum of the values' squares, in float64."""
    return _sum(values, squares=True)


def sum_kept(values: Floats, positive: Words, negative: Words) -> float:
    """Sum of the magnitudes that the masks keep, in float64."""
    chunks = values.size // CHUNK
    out = np.empty(chunks + 1, np.float64)
    in_threads(lambda a, b: _chunk_sums_kept(values, positive, negative, a, b, out), chunks)
    _chunk_sums_kept(
        padded(values, CHUNK), padded(positive, ROWS), padded(negative, ROWS), 0, 1, out[chunks:]
    )
    return math.fsum(out)


# --- masks and dense vectors -------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _add_ternary(
    out: Any,
    positive: Any,
    negative: Any,
    scales: Any,
    bounds: Any,
    factor: Any,
    start: int,
    stop: int,
) -> None:
    tensor = 0
    for word in range(start, stop):
        minus = negative[word]
        rest = positive[word] | minus
        while rest != np.uint64(0):
            lane = trailing_zeros(rest)
            rest &= rest - np.uint64(1)
            i = word * LANES + lane
            while i >= bounds[tensor + 1]:
                tensor += 1
            value = factor * scales[tensor]
            out[i] += -value if (minus >> np.uint64(lane)) & np.uint64(1) else value


def add_ternary(
    out: NDArray[Any],
    positive: Words,
    negative: Words,
    scales: Floats,
    bounds: NDArray[np.int64],
    factor: float = 1.0,
) -> None:
    """Add ``factor`` times a ternary vector to ``out``, shape (d,), in place, in out's precision.

    Parameters ``bounds[t] .. bounds[t + 1]`` have the value +-``scales[t]``.
    """
    typed, scales = out.dtype.type(factor), scales.astype(out.dtype)
    in_threads(
        lambda a, b: _add_ternary(out, positive, negative, scales, bounds, typed, a, b),
        positive.size,
    )
