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
    bit_count,
    chunk_sum,
    chunk_sum_kept,
    chunk_sum_squares,
    magnitude_mask,
    sign_mask,
    trailing_zeros,
)

Words = NDArray[np.uint64]
Floats = NDArray[np.float32]

INFINITY_BITS = 0x7F800000  # float32 magnitudes from here on are Inf or NaN
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
    cores = num_cores()
    units = -(-count // align)
    if count < _PARALLEL_FROM or cores < 2 or units < 2 * cores:
        return [function(0, count)]
    cuts = [min(count, align * (units * i // cores)) for i in range(cores + 1)]
    with ThreadPoolExecutor(cores - 1) as pool:
        rest = [pool.submit(function, a, b) for a, b in itertools.pairwise(cuts[1:])]
        return [function(cuts[0], cuts[1]), *(job.result() for job in rest)]


# --- top-k ------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _split_by_magnitude(
    bits: Any,
    low: Any,
    high: Any,
    start: int,
    stop: int,
    positive: Any,
    negative: Any,
    between: Any,
) -> Any:
    """Mark magnitudes >= high by sign, those in [low, high) in ``between``; count both."""
    count_high, count_between, finite = 0, 0, True
    for word in range(start, stop):
        marked = magnitude_mask(bits, word * LANES, low)
        above = np.uint64(0)
        if marked != np.uint64(0):
            above = magnitude_mask(bits, word * LANES, high)
            if above != np.uint64(0):
                signs = sign_mask(bits, word * LANES)
                positive[word] = above & ~signs
                negative[word] = above & signs
                count_high += bit_count(above)
                bad = magnitude_mask(bits, word * LANES, np.uint32(INFINITY_BITS))
                if bad != np.uint64(0):
                    finite = False
        between[word] = marked & ~above
        count_between += bit_count(marked & ~above)
    return count_high, count_between, finite


@njit(nogil=True, cache=True)
def _gather_magnitudes(bits: Any, between: Any, out: Any) -> None:
    """The magnitudes that ``between`` marks, as integers, in order."""
    n = 0
    for word in range(between.size):
        rest = between[word]
        while rest != np.uint64(0):
            out[n] = bits[word * LANES + trailing_zeros(rest)] & np.uint32(0x7FFFFFFF)
            n += 1
            rest &= rest - np.uint64(1)


@njit(nogil=True, cache=True)
def _admit(
    bits: Any, between: Any, threshold: Any, ties: int, positive: Any, negative: Any
) -> None:
    """Keep the marked magnitudes > threshold, and the first ``ties`` of those that equal it."""
    for word in range(between.size):
        rest = between[word]
        while rest != np.uint64(0):
            lane = trailing_zeros(rest)
            rest &= rest - np.uint64(1)
            value = bits[word * LANES + lane]
            magnitude = value & np.uint32(0x7FFFFFFF)
            if magnitude < threshold:
                continue
            if magnitude == threshold:
                if ties == 0:
                    continue
                ties -= 1
            bit = np.uint64(1) << np.uint64(lane)
            if value >> np.uint32(31):
                negative[word] |= bit
            else:
                positive[word] |= bit


@njit(nogil=True, cache=True)
def _kth_magnitude(bits: Any, k: int) -> Any:
    """The k-th largest magnitude as an integer, by two histograms of its bits."""
    upper = np.zeros(1 << 16, np.int64)
    for value in bits:
        upper[(value & np.uint32(0x7FFFFFFF)) >> np.uint32(15)] += 1
    bucket, left = (1 << 16) - 1, k
    while upper[bucket] < left:
        left -= upper[bucket]
        bucket -= 1
    lower = np.zeros(1 << 15, np.int64)
    for value in bits:
        if (value & np.uint32(0x7FFFFFFF)) >> np.uint32(15) == bucket:
            lower[value & np.uint32(0x7FFF)] += 1
    rest = (1 << 15) - 1
    while lower[rest] < left:
        left -= lower[rest]
        rest -= 1
    return (bucket << 15) | rest


def _bracket(bits: NDArray[np.uint32], k: int) -> tuple[int, int]:
    """Two magnitudes [low, high) between which the k-th largest lies, all but surely.

    From a sample: its order statistics 4.5 standard errors below and above the wanted rank.
    """
    step = max(1, bits.size // max(1 << 16, bits.size >> 9))
    sample = bits[step // 2 :: step] & np.uint32(0x7FFFFFFF)
    share = k / bits.size
    margin = 4.5 * math.sqrt(sample.size * share * (1 - share)) + 2
    low_rank = sample.size - 1 - math.ceil(share * sample.size + margin)
    high_rank = sample.size - 1 - math.floor(share * sample.size - margin)
    ranks = [max(0, low_rank), min(sample.size - 1, high_rank)]
    ordered = np.partition(sample, ranks)
    low = int(ordered[ranks[0]]) if low_rank >= 0 else 1
    high = int(ordered[ranks[1]]) + 1 if high_rank < sample.size else INFINITY_BITS
    return low, high


def _whole_words(values: Floats) -> NDArray[np.uint32]:
    """The bits of the values that fill whole words (a view)."""
    return values[: values.size // LANES * LANES].view(np.uint32)


def _last_word(values: Floats) -> NDArray[np.uint32]:
    """The bits of the values after the last whole word, padded with zeros to 64."""
    tail = np.zeros(LANES, np.float32)
    tail[: values.size % LANES] = values[values.size // LANES * LANES :]
    return tail.view(np.uint32)


def select_top_k(values: Floats, k: int) -> tuple[Words, Words] | None:
    """Masks of the k largest magnitudes, positive and negative; None where a value is not finite.

    Of equal magnitudes the lower index is kept; a zero never is, so there can be fewer than k.

    Parameters
    ----------
    values : ndarray of float32, shape (d,), contiguous
    k : int, 1 .. d
    """
    bits = values.view(np.uint32)
    words = num_words(bits.size)
    if bits.size <= 1 << 17:
        low = int(_kth_magnitude(bits, k))
        high = low + 1
    else:
        low, high = _bracket(bits, k)
    while True:
        low = max(low, 1)
        high = min(max(high, low), INFINITY_BITS)
        low = min(low, high)
        positive, negative = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
        between = np.zeros(words, np.uint64)
        parts = [(_whole_words(values), 0), (_last_word(values), words - 1)]
        counts: list[tuple[int, int, bool]] = []
        for source, first in parts if bits.size % LANES else parts[:1]:
            size = source.size // LANES
            views = [array[first : first + size] for array in (positive, negative, between)]

            def scan(a: int, b: int, source: Any = source, views: Any = views) -> Any:
                return _split_by_magnitude(source, np.uint32(low), np.uint32(high), a, b, *views)  # noqa: B023

            counts += in_threads(scan, size)
        num_high = sum(count[0] for count in counts)
        num_between = sum(count[1] for count in counts)
        if not all(count[2] for count in counts):
            return None
        if num_high <= k and (k <= num_high + num_between or low == 1):
            break
        low = int(_kth_magnitude(bits, k))  # the sample misled: now exactly
        high = low + 1
    if num_between == 0 or num_high == k:
        return positive, negative
    threshold, ties = low, k - num_high
    if high > low + 1:
        magnitudes = np.empty(num_between, np.uint32)
        _gather_magnitudes(bits, between, magnitudes)
        if ties >= num_between:
            threshold, ties = 0, 0
        else:
            rank = num_between - ties
            threshold = int(np.partition(magnitudes, rank)[rank])
            ties -= int(np.count_nonzero(magnitudes > threshold))
    _admit(bits, between, np.uint32(threshold), ties, positive, negative)
    return positive, negative


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


def _padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array's part after its last whole chunk of ``size``, padded with zeros to one."""
    last = np.zeros(size, array.dtype)
    tail = array[array.size // size * size :]
    last[: tail.size] = tail
    return last


def _sum(values: Floats, squares: bool) -> float:
    chunks = values.size // CHUNK
    out = np.empty(chunks + 1, np.float64)
    in_threads(lambda a, b: _chunk_sums(values, a, b, squares, out), chunks)
    _chunk_sums(_padded(values, CHUNK), 0, 1, squares, out[chunks:])
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
        _padded(values, CHUNK), _padded(positive, ROWS), _padded(negative, ROWS), 0, 1, out[chunks:]
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
