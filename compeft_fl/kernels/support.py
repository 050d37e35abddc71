"""The best support among kept magnitudes: what every device decides alike.

Of the largest k' <= k magnitudes, those are kept whose ternary vector has the greatest cosine to
the whole: the k' that maximises (sum of the k' largest)^2 / k', the energy that signs and one scale
can keep. Along equal magnitudes that is convex in k', so the best k' ends where a magnitude ends,
or at k.

Magnitudes are float32 as integers, the exponent above the mantissa. A bucket is all that agree in
the exponent and in the upper 8 bits of the mantissa: within it all have one unit, so that sums are
exact in integers, in any order. A device counts buckets, and lists the members of the few in which
the best k' can lie; the float64 arithmetic is here, in one order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUM_BUCKETS", "REST_BITS", "best_threshold", "best_threshold_of_few"]

REST_BITS = 15  # of a magnitude, below its bucket's number
NUM_BUCKETS = 1 << 16
_MANTISSA_BITS = 23
_SLACK = 1e-9  # far above what rounding does to a bound, far below what a bucket's width does

Members = Callable[[NDArray[np.bool_]], NDArray[np.uint32]]


def best_threshold(counts: NDArray[np.int64], rests: NDArray[np.int64], members: Members) -> int:
    """The smallest magnitude, as an integer, of the best support; 0: all of what is kept.

    Parameters
    ----------
    counts : ndarray of int64, shape (NUM_BUCKETS,)
        How many kept magnitudes are in each bucket.
    rests : ndarray of int64, shape (NUM_BUCKETS,)
        The sum of their lower `REST_BITS` bits.
    members : callable
        Takes which buckets are wanted, shape (NUM_BUCKETS,), gives their magnitudes in any order.
    """
    buckets = np.flatnonzero(counts)[::-1]

    def inside(chosen: NDArray[np.intp]) -> NDArray[np.uint32]:
        wanted = np.zeros(NUM_BUCKETS, np.bool_)
        wanted[buckets[chosen]] = True
        return members(wanted)

    return _best(buckets, counts[buckets], rests[buckets], inside)


def best_threshold_of_few(magnitudes: NDArray[np.uint32]) -> int:
    """`best_threshold` of magnitudes that are few enough to be sorted.

    Parameters
    ----------
    magnitudes : ndarray of uint32, shape (n,)
        What is kept, in any order.
    """
    ordered = np.sort(magnitudes)[::-1]
    of_each = ordered >> REST_BITS
    starts = np.flatnonzero(np.diff(of_each, prepend=np.uint32(NUM_BUCKETS)))
    sizes = np.diff(starts, append=ordered.size)
    rests = (ordered & np.uint32((1 << REST_BITS) - 1)).astype(np.int64)
    sums = np.add.reduceat(rests, starts) if starts.size else rests

    def inside(chosen: NDArray[np.intp]) -> NDArray[np.uint32]:
        wanted = np.zeros(starts.size, np.bool_)
        wanted[chosen] = True
        found: NDArray[np.uint32] = ordered[np.repeat(wanted, sizes)]
        return found

    return _best(of_each[starts].astype(np.int64), sizes, sums, inside)


def _best(
    buckets: NDArray[np.int64], sizes: NDArray[np.int64], rests: NDArray[np.int64],
    members: Callable[[NDArray[np.intp]], NDArray[np.uint32]],
) -> int:  # fmt: skip
    """`best_threshold` from the buckets that have any, the largest first."""
    if not buckets.size:
        return 0
    exponents = buckets >> (_MANTISSA_BITS - REST_BITS)
    bases = (buckets << REST_BITS) & ((1 << _MANTISSA_BITS) - 1)
    bases += np.where(exponents > 0, 1 << _MANTISSA_BITS, 0)
    units = np.ldexp(1.0, np.maximum(exponents, 1) - 150)

    sums = (sizes * bases + rests) * units
    number, total = np.cumsum(sizes), np.cumsum(sums)
    number_before, total_before = number - sizes, np.concatenate([[0.0], total[:-1]])
    at_end = total * total / number
    best = int(np.argmax(at_end))

    # Inside a bucket, j more magnitudes add at most min(j * most, sum - (size - j) * least): two
    # lines, on each of which the energy is convex, so that it is greatest where they meet.
    least, most = bases * units, (bases + (1 << REST_BITS) - 1) * units
    meet = (sums - sizes * least) / (most - least)
    bound = (total_before + meet * most) ** 2 / np.maximum(number_before + meet, 1e-9)
    inside = np.flatnonzero((sizes > 1) & (bound * (1 + _SLACK) > at_end[best]))
    if inside.size:
        magnitudes = np.sort(members(inside))[::-1]
        which = np.searchsorted(-buckets, -(magnitudes >> REST_BITS).astype(np.int64))
        mantissas = bases[which] + (magnitudes & np.uint32((1 << REST_BITS) - 1))
        sums_along = np.cumsum(mantissas)
        starts = np.searchsorted(which, which)  # where each one's bucket begins
        along = sums_along - (sums_along[starts] - mantissas[starts])
        energy = (total_before[which] + along * units[which]) ** 2
        energy /= number_before[which] + np.arange(1, magnitudes.size + 1) - starts
        energy[:-1][magnitudes[:-1] == magnitudes[1:]] = 0.0  # equal magnitudes go together
        found = int(np.argmax(energy))
        before_best = which[found] <= best
        if energy[found] > at_end[best] or (energy[found] == at_end[best] and before_best):
            return int(magnitudes[found])
    return 0 if best == buckets.size - 1 else int(buckets[best]) << REST_BITS
