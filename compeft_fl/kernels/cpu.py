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
    bits: Any, low: Any, high: Any, start: int, stop: int, positive: Any, negative: Any,
    indices: Any, values: Any,
) -> Any:  # fmt: skip
    """Mark magnitudes >= high by sign, and list those in [low, high).

    Returns how many were marked and how many there were to list (only ``indices.size`` of them are
    listed), and whether all magnitudes are finite.
    """
    num_high, num_between, finite = 0, 0, True
    for word in range(start, stop):
        rest = magnitude_mask(bits, word * LANES, low)
        if rest == np.uint64(0):
            continue
        above = magnitude_mask(bits, word * LANES, high)
        if above != np.uint64(0):
            signs = sign_mask(bits, word * LANES)
            positive[word] = above & ~signs
            negative[word] = above & signs
            num_high += bit_count(above)
            if magnitude_mask(bits, word * LANES, np.uint32(INFINITY_BITS)) != np.uint64(0):
                finite = False
        rest &= ~above
        while rest != np.uint64(0):
            if num_between < indices.size:
                index = word * LANES + trailing_zeros(rest)
                indices[num_between] = index
                values[num_between] = bits[index]
            num_between += 1
            rest &= rest - np.uint64(1)
    return num_high, num_between, finite


@njit(nogil=True, cache=True)
def _admit(
    indices: Any, values: Any, threshold: Any, ties: int, positive: Any, negative: Any
) -> None:
    """Mark those listed whose magnitude is > threshold, and the first ``ties`` that equal it."""
    for i, value in zip(indices, values):  # noqa: B905 (numba's zip has no strict)
        magnitude = value & np.uint32(0x7FFFFFFF)
        if magnitude < threshold:
            continue
        if magnitude == threshold:
            if ties == 0:
                continue
            ties -= 1
        if value >> np.uint32(31):
            negative[i >> 6] |= np.uint64(1) << np.uint64(i & 63)
        else:
            positive[i >> 6] |= np.uint64(1) << np.uint64(i & 63)


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


class _Split:
    """The parameters cut in two at magnitudes: those kept for sure, and those to choose among.

    Of the latter each thread lists up to ``capacity``; ``complete`` says whether that was enough.
    """

    def __init__(self, values: Floats, low: int, high: int, capacity: int) -> None:
        words, whole = num_words(values.size), values.size // LANES
        self.positive, self.negative = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
        bounds = np.uint32(low), np.uint32(high)

        def scan(
            bits: NDArray[np.uint32], start: int, stop: int, first_word: int = 0
        ) -> tuple[int, int, bool, NDArray[np.int64], NDArray[np.uint32]]:
            lists = np.empty(capacity, np.int64), np.empty(capacity, np.uint32)
            masks = self.positive[first_word:], self.negative[first_word:]
            counts = _split_by_magnitude(bits, *bounds, start, stop, *masks, *lists)
            listed = [each[: counts[1]] for each in lists]
            return *counts, listed[0] + first_word * LANES, listed[1]

        bits = values.view(np.uint32)
        parts = in_threads(lambda a, b: scan(bits, a, b), whole)
        if values.size % LANES:  # the last word, padded with zeros
            last = np.zeros(LANES, np.uint32)
            last[: values.size % LANES] = bits[whole * LANES :]
            parts.append(scan(last, 0, 1, whole))
        self.num_high = sum(part[0] for part in parts)
        self.num_between = sum(part[1] for part in parts)
        self.finite = all(part[2] for part in parts)
        self.indices = np.concatenate([part[3] for part in parts])
        self.values = np.concatenate([part[4] for part in parts])
        self.complete = self.num_between == self.indices.size

    def admit(self, threshold: int, ties: int) -> tuple[Words, Words]:
        """The masks, with those listed above the threshold and the first ``ties`` equal to it."""
        masks = self.positive, self.negative
        _admit(self.indices, self.values, np.uint32(threshold), ties, *masks)
        return masks


def select_top_k(values: Floats, k: int) -> tuple[Words, Words] | None:
    """Masks of the k largest magnitudes, positive and negative; None where a value is not finite.

    Of equal magnitudes the lower index is kept; a zero never is, so there can be fewer than k.
    A sample gives two magnitudes between which the k-th lies; one pass marks what is above and
    lists what is between, where the k-th is then found. Where the sample misled, or the k-th has
    very many equals, histograms find it exactly and a second pass takes the first of its equals.

    Parameters
    ----------
    values : ndarray of float32, shape (d,), contiguous
    k : int, 1 .. d
    """
    bits = values.view(np.uint32)
    if bits.size > 1 << 17:
        low, high = _bracket(bits, k)
        high = min(max(high, 1), INFINITY_BITS)
        low = min(max(low, 1), high)
        split = _Split(values, low, high, capacity=bits.size // 32)
        if not split.finite:
            return None
        wanted = k - split.num_high
        if split.complete and 0 <= wanted <= split.num_between:
            if wanted == 0:
                return split.positive, split.negative
            magnitudes = split.values & np.uint32(0x7FFFFFFF)
            rank = magnitudes.size - wanted
            threshold = int(np.partition(magnitudes, rank)[rank])
            above = int(np.count_nonzero(magnitudes > threshold))
            return split.admit(threshold, wanted - above)
    threshold = int(_kth_magnitude(bits, k))
    low, high = max(threshold, 1), min(threshold + 1, INFINITY_BITS)
    low = min(low, high)
    split = _Split(values, low, high, capacity=0)
    if not split.finite:
        return None
    ties = k - split.num_high
    if threshold == 0 or ties == 0:
        return split.positive, split.negative
    split = _Split(values, low, high, capacity=min(bits.size, split.num_between))
    return split.admit(threshold, ties)


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
