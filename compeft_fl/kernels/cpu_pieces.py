"""The largest magnitudes of a vector that is never in memory: counted piece by piece.

The same choice as `compeft_fl.kernels.cpu_select` makes of a whole vector. Magnitudes are float32
as integers, the exponent above the mantissa; `compeft_fl.kernels.support` says what a bucket is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Floats, Words, num_words
from compeft_fl.kernels.cpu_select import INFINITY_BITS
from compeft_fl.kernels.support import NUM_BUCKETS, REST_BITS, best_threshold

__all__ = ["Choice", "Choosing", "choose", "magnitudes", "masks"]

_REST = (1 << REST_BITS) - 1
Pieces = Callable[[], Iterable[Floats]]


@dataclass
class Choice:
    """Which magnitudes are kept: all above a threshold, and the first of those that equal it.

    Attributes
    ----------
    threshold : int
        As an integer.
    ties : int
        How many of those that equal it, by index.
    count : int
        How many are kept in all.
    sum_magnitudes : float
        Of those.
    """

    threshold: int
    ties: int
    count: int
    sum_magnitudes: float


class Choosing:
    """Counts of a vector's magnitudes, bucket by bucket; sums of its values and their squares."""

    def __init__(self) -> None:
        self.table = np.zeros((NUM_BUCKETS, 2), np.int64)
        self.sum_values = 0.0
        self.sum_squares = 0.0
        self.num_parameters = 0

    def add(self, values: Floats) -> bool:
        """Take the next piece; False: it holds a value that is not finite."""
        wide = values.astype(np.float64)
        self.num_parameters += values.size
        self.sum_values += float(wide.sum())
        self.sum_squares += float(wide @ wide)
        largest = _count(values.view(np.uint32), self.table)
        return bool(largest < INFINITY_BITS)


def magnitudes(values: Floats) -> NDArray[np.uint32]:
    """Magnitudes as integers."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def choose(seen: Choosing, pieces: Pieces, k: int, best: bool) -> Choice:
    """The k largest magnitudes (of equal ones the lower index; no zero), or their best support.

    Parameters
    ----------
    seen : Choosing
        It has taken all pieces.
    pieces : callable
        Gives all of them once more: called once, and a second time for ``best``.
    k : int
        At least 1.
    best : bool
    """
    counts, rests = seen.table[:, 0].copy(), seen.table[:, 1].copy()
    above = np.cumsum(counts[::-1])[::-1]  # of this bucket and those over it
    if not above[0]:
        return Choice(1, 0, 0, 0.0)
    k = min(k, int(above[0]))
    bucket = int(np.flatnonzero(above >= k)[-1])
    left = k - int(above[bucket] - counts[bucket])  # to take of this bucket
    lower = np.zeros(1 << REST_BITS, np.int64)
    for piece in pieces():
        found = magnitudes(piece)
        inside = found[found >> np.uint32(REST_BITS) == bucket] & np.uint32(_REST)
        lower += np.bincount(inside, minlength=1 << REST_BITS)
    over = np.cumsum(lower[::-1])[::-1]
    rest = int(np.flatnonzero(over >= left)[-1])
    ties = left - int(over[rest] - lower[rest])
    lower[:rest] = 0
    lower[rest] = ties
    counts[:bucket] = rests[:bucket] = 0
    counts[bucket], rests[bucket] = left, int(lower @ np.arange(lower.size))
    choice = Choice((bucket << REST_BITS) | rest, ties, k, 0.0)
    if best:

        def members(wanted: NDArray[np.bool_]) -> NDArray[np.uint32]:
            parts, ties_left = [], choice.ties
            for piece in pieces():
                found = magnitudes(piece)
                found = found[wanted[found >> np.uint32(REST_BITS)]]
                equal = np.flatnonzero(found == choice.threshold)
                keep = found >= choice.threshold
                keep[equal[ties_left:]] = False
                ties_left -= min(ties_left, equal.size)
                parts.append(found[keep])
            return np.concatenate(parts)

        threshold = best_threshold(counts, rests, members)
        if threshold > choice.threshold:
            return _from(threshold, counts, rests, members)
    choice.sum_magnitudes = _sum(counts, rests)
    return choice


def _from(threshold: int, counts: Any, rests: Any, members: Any) -> Choice:
    """All kept magnitudes from a higher threshold on, equal ones included."""
    bucket = threshold >> REST_BITS
    wanted = np.zeros(NUM_BUCKETS, np.bool_)
    wanted[bucket] = True
    found = members(wanted)
    found = found[found >= threshold]
    counts[:bucket] = rests[:bucket] = 0
    counts[bucket] = found.size
    rests[bucket] = int((found & np.uint32(_REST)).astype(np.int64).sum())
    ties = int((found == threshold).sum())
    return Choice(threshold, ties, int(counts.sum()), _sum(counts, rests))


def _sum(counts: NDArray[np.int64], rests: NDArray[np.int64]) -> float:
    """The sum of the magnitudes that are counted: exact within a bucket."""
    buckets = np.flatnonzero(counts)
    firsts = (buckets << REST_BITS).astype(np.uint32)
    exponents = np.maximum(buckets >> (23 - REST_BITS), 1)
    units = np.ldexp(1.0, exponents - 150)  # of the last bit of the mantissa
    starts = firsts.view(np.float32).astype(np.float64)
    return float((counts[buckets] * starts + rests[buckets] * units).sum())


def masks(values: Floats, choice: Choice, ties: int) -> tuple[Words, Words, int]:
    """The masks of what is kept of a piece, and how many ties are left for the next ones.

    Parameters
    ----------
    values : ndarray of float32, shape (n,)
    choice : Choice
    ties : int
        Of equal magnitudes, still to be kept.

    Returns
    -------
    positive, negative : ndarray of uint64, shape (ceil(n / 64),)
    ties : int
    """
    found = magnitudes(values)
    keep = found > choice.threshold
    if ties:
        equal = np.flatnonzero(found == choice.threshold)[:ties]
        keep[equal] = True
        ties -= equal.size
    negative = np.signbit(values)
    return _packed(keep & ~negative), _packed(keep & negative), ties


def _packed(bits: NDArray[np.bool_]) -> Words:
    words = np.zeros(8 * num_words(bits.size), np.uint8)
    packed = np.packbits(bits, bitorder="little")
    words[: packed.size] = packed
    return words.view(np.uint64)


@njit(nogil=True, cache=True)
def _count(bits: Any, table: Any) -> Any:
    """Count magnitudes but zeros by bucket, and sum their lower bits; returns the largest."""
    largest = np.uint32(0)
    for value in bits:
        magnitude = value & np.uint32(0x7FFFFFFF)
        if magnitude != 0:
            table[magnitude >> np.uint32(REST_BITS), 0] += 1
            table[magnitude >> np.uint32(REST_BITS), 1] += magnitude & np.uint32(_REST)
        largest = max(largest, magnitude)
    return largest
