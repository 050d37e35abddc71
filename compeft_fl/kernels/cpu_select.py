"""The largest magnitudes of a vector for the CPU: the k largest, and the best support among them.

Masks are as in `compeft_fl.kernels.cpu`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Floats, Words, in_threads, num_words, padded
from compeft_fl.kernels.llvm import LANES, bit_count, magnitude_mask, sign_mask, trailing_zeros
from compeft_fl.kernels.support import (
    NUM_BUCKETS,
    REST_BITS,
    best_threshold,
    best_threshold_of_few,
)

INFINITY_BITS = 0x7F800000  # float32 magnitudes from here on are Inf or NaN
_FEW = 1 << 14  # values, that are sorted in less time than histograms of all magnitudes are cleared


# --- top-k ------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _count_word(bits: Any, word: int, kept: Any, tables: Any) -> None:
    """Count the kept magnitudes of a word by bucket, and sum what is below a bucket's bits."""
    while kept != np.uint64(0):
        magnitude = bits[word * LANES + trailing_zeros(kept)] & np.uint32(0x7FFFFFFF)
        kept &= kept - np.uint64(1)
        row = tables[magnitude >> np.uint32(REST_BITS)]
        row[0] += 1
        row[1] += magnitude & np.uint32((1 << REST_BITS) - 1)


class _Tables:
    """What `support` must know of the kept magnitudes, bucket by bucket, a table for each thread.

    Column 0: how many; column 1: the sum of their lower bits.
    """

    def __init__(self) -> None:
        self._tables: list[NDArray[np.int64]] = []

    def fresh(self) -> NDArray[np.int64]:
        """A table for one thread."""
        self._tables.append(np.zeros((NUM_BUCKETS, 2), np.int64))
        return self._tables[-1]

    def shared(self) -> NDArray[np.int64]:
        """A table for what is counted when all threads have ended."""
        return self._tables[-1] if self._tables else self.fresh()

    def clear(self) -> None:
        """Begin anew."""
        self._tables.clear()

    def add(self, magnitudes: NDArray[np.uint32]) -> None:
        """Count these too."""
        buckets = (magnitudes >> np.uint32(REST_BITS)).astype(np.intp)
        table = self.shared()
        np.add.at(table[:, 0], buckets, 1)
        np.add.at(table[:, 1], buckets, magnitudes & np.uint32((1 << REST_BITS) - 1))

    def sums(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Both columns, over all threads."""
        total = sum(self._tables[1:], self._tables[0])
        return total[:, 0], total[:, 1]


@njit(nogil=True, cache=True)
def _split_by_magnitude(
    bits: Any, low: Any, high: Any, start: int, stop: int, positive: Any, negative: Any,
    indices: Any, values: Any, tables: Any,
) -> Any:  # fmt: skip
    """Mark magnitudes >= high by sign, and list those in [low, high).

    Those marked are counted in ``tables``, unless it has no rows. Returns how many were marked and
    how many there were to list (only ``indices.size`` of them are listed), and whether all
    magnitudes are finite.
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
            if tables.shape[0]:
                _count_word(bits, word, above, tables)
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


def _kth_of_few(bits: NDArray[np.uint32], k: int) -> int:
    """`_kth_magnitude` where histograms are larger than what they are of."""
    return int(np.partition(bits & np.uint32(0x7FFFFFFF), bits.size - k)[bits.size - k])


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

    def __init__(
        self, values: Floats, low: int, high: int, capacity: int, tables: _Tables | None = None
    ) -> None:
        words, whole = num_words(values.size), values.size // LANES
        self.positive, self.negative = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
        self.tables = tables
        if tables is not None:
            tables.clear()
        bounds = np.uint32(low), np.uint32(high)

        def scan(
            bits: NDArray[np.uint32], start: int, stop: int, first_word: int,
            table: NDArray[np.int64],
        ) -> tuple[int, int, bool, NDArray[np.int64], NDArray[np.uint32]]:  # fmt: skip
            lists = np.empty(capacity, np.int64), np.empty(capacity, np.uint32)
            masks = self.positive[first_word:], self.negative[first_word:]
            counts = _split_by_magnitude(bits, *bounds, start, stop, *masks, *lists, table)
            listed = [each[: counts[1]] for each in lists]
            return *counts, listed[0] + first_word * LANES, listed[1]

        bits, none = values.view(np.uint32), np.empty((0, 2), np.int64)
        fresh = tables.fresh if tables is not None else lambda: none
        parts = in_threads(lambda a, b: scan(bits, a, b, 0, fresh()), whole)
        if values.size % LANES:  # the last word, padded with zeros
            table = none if tables is None else tables.shared()
            parts.append(scan(padded(bits, LANES), 0, 1, whole, table))
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
        if self.tables is not None:
            magnitudes = self.values & np.uint32(0x7FFFFFFF)
            self.tables.add(magnitudes[magnitudes > threshold])
            self.tables.add(np.full(ties, threshold, np.uint32))
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
    return _select(values, k)


def _select(values: Floats, k: int, tables: _Tables | None = None) -> tuple[Words, Words] | None:
    """See `select_top_k`; what is kept is counted in the tables, where there are any."""
    bits = values.view(np.uint32)
    if bits.size > 1 << 17:
        low, high = _bracket(bits, k)
        high = min(max(high, 1), INFINITY_BITS)
        low = min(max(low, 1), high)
        split = _Split(values, low, high, capacity=bits.size // 32, tables=tables)
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
    threshold = _kth_of_few(bits, k) if bits.size <= _FEW else int(_kth_magnitude(bits, k))
    low, high = max(threshold, 1), min(threshold + 1, INFINITY_BITS)
    low = min(low, high)
    split = _Split(values, low, high, capacity=0, tables=tables)
    if not split.finite:
        return None
    ties = k - split.num_high
    if threshold == 0 or ties == 0:
        return split.positive, split.negative
    split = _Split(values, low, high, capacity=min(bits.size, split.num_between), tables=tables)
    return split.admit(threshold, ties)


# --- the best support -----------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _list_kept(
    bits: Any, positive: Any, negative: Any, start: int, stop: int, low: Any, high: Any, out: Any
) -> Any:
    """List the kept magnitudes in [low, high); how many there are."""
    count = 0
    for word in range(start, stop):
        kept = positive[word] | negative[word]
        if kept != np.uint64(0):
            kept &= magnitude_mask(bits, word * LANES, low)
            kept &= ~magnitude_mask(bits, word * LANES, high)
        while kept != np.uint64(0):
            index = word * LANES + trailing_zeros(kept)
            out[count] = bits[index] & np.uint32(0x7FFFFFFF)
            count += 1
            kept &= kept - np.uint64(1)
    return count


@njit(nogil=True, cache=True)
def _drop_below(
    bits: Any, positive: Any, negative: Any, start: int, stop: int, threshold: Any
) -> None:
    """Clear the bits of magnitudes < threshold."""
    for word in range(start, stop):
        if positive[word] | negative[word]:
            enough = magnitude_mask(bits, word * LANES, threshold)
            positive[word] &= enough
            negative[word] &= enough


def select_best(values: Floats, k: int) -> tuple[Words, Words] | None:
    """Of the k largest magnitudes those that keep most energy (`support`), as `select_top_k`."""
    if values.size <= _FEW:
        return _best_of_few(values, k)
    tables = _Tables()
    masks = _select(values, k, tables)
    if masks is None:
        return None
    bits, whole = values.view(np.uint32), values.size // LANES
    last = padded(bits, LANES)
    counts, rests = tables.sums()

    def members(wanted: NDArray[np.bool_]) -> NDArray[np.uint32]:
        found = np.flatnonzero(wanted)
        low, high = np.uint32(found[0] << REST_BITS), np.uint32((found[-1] + 1) << REST_BITS)
        out = np.empty(int(counts[found[0] : found[-1] + 1].sum()), np.uint32)
        count = _list_kept(bits, *masks, 0, whole, low, high, out)
        if values.size % LANES:
            _list_kept(last, masks[0][whole:], masks[1][whole:], 0, 1, low, high, out[count:])
        found_there: NDArray[np.uint32] = out[wanted[out >> np.uint32(REST_BITS)]]
        return found_there

    threshold = np.uint32(best_threshold(counts, rests, members))
    if threshold:
        in_threads(lambda a, b: _drop_below(bits, *masks, a, b, threshold), whole)
        if values.size % LANES:
            _drop_below(last, masks[0][whole:], masks[1][whole:], 0, 1, threshold)
    return masks


def _best_of_few(values: Floats, k: int) -> tuple[Words, Words] | None:
    """`select_best` without tables, which are larger than so few values."""
    masks = _select(values, k)
    if masks is None:
        return None
    bits = np.zeros(masks[0].size * LANES, np.uint32)
    bits[: values.size] = values.view(np.uint32)
    both = (masks[0] | masks[1]).view(np.uint8)
    kept = np.unpackbits(both, bitorder="little").view(np.bool_)
    threshold = np.uint32(best_threshold_of_few(bits[kept] & np.uint32(0x7FFFFFFF)))
    if threshold:
        _drop_below(bits, *masks, 0, masks[0].size, threshold)
    return masks
