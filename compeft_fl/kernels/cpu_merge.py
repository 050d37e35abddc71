"""The hot loops of merging for the CPU: many ternary updates at once, 64 parameters at a time.

Up to ``Pending.CAPACITY`` updates wait as bit masks, two bits a parameter each. They are then
tallied word by word, in sums that stay in the first cache, and only each word's total goes to
memory. Added one by one, every nonzero of every update would cost a trip to memory of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Floats, Words, in_threads, num_words
from compeft_fl.kernels.llvm import LANES, trailing_zeros

Sums = NDArray[np.float64]


class Pending:
    """Ternary updates that wait to be tallied.

    Parameters
    ----------
    num_parameters : int
    bounds : ndarray of int64, shape (tensors + 1,)
        Where each tensor starts, and where the last ends.
    """

    CAPACITY = 32  # as masks, these take as much memory as two float32 vectors

    def __init__(self, num_parameters: int, bounds: NDArray[np.int64]) -> None:
        words, tensors = num_words(num_parameters), bounds.size - 1
        self.num_parameters, self.bounds = num_parameters, bounds
        self.positive = np.empty((self.CAPACITY, words), np.uint64)  # touched only as it fills
        self.negative = np.empty((self.CAPACITY, words), np.uint64)
        self.masses = np.empty((self.CAPACITY, tensors), np.float64)
        self.weights = np.empty(self.CAPACITY, np.float64)
        self.count = 0

    @property
    def full(self) -> bool:
        """Is there no room for one more?"""
        return self.count == self.CAPACITY

    def add(self, positive: Words, negative: Words, scales: Floats, weight: float) -> None:
        """Take one more; ``scales`` are one, or one per tensor."""
        self.positive[self.count], self.negative[self.count] = positive, negative
        self.masses[self.count] = scales.astype(np.float64) * weight
        self.weights[self.count] = weight
        self.count += 1

    def arrays(self) -> tuple[Words, Words, Sums, Sums, NDArray[np.int64]]:
        """What the kernels take."""
        n = self.count
        return self.positive[:n], self.negative[:n], self.masses[:n], self.weights[:n], self.bounds


@njit(nogil=True, cache=True)
def _tensor_of(bounds: Any, parameter: int) -> Any:
    """The last tensor that starts at or before the parameter."""
    return np.searchsorted(bounds, parameter, side="right") - 1


@njit(nogil=True, cache=True)
def _tally(
    positive: Any, negative: Any, masses: Any, weights: Any, bounds: Any, word: int, tensor: int,
    tallies: Any,
) -> None:  # fmt: skip
    """Per parameter of a word, in columns: + mass, weight behind it, - mass, weight behind it."""
    tallies[:] = 0.0
    for update in range(weights.size):
        minus = negative[update, word]
        rest = positive[update, word] | minus
        at = tensor
        while rest != np.uint64(0):
            lane = trailing_zeros(rest)
            rest &= rest - np.uint64(1)
            while word * LANES + lane >= bounds[at + 1]:
                at += 1
            mass = masses[update, at]
            if mass > 0:  # an entry of scale 0 votes for nothing
                column = np.int64((minus >> np.uint64(lane)) & np.uint64(1)) * 2
                tallies[lane, column] += mass
                tallies[lane, column + 1] += weights[update]


@njit(nogil=True, cache=True)
def _fold(
    positive: Any, negative: Any, masses: Any, weights: Any, bounds: Any, start: int, stop: int,
    sums: Any,
) -> None:  # fmt: skip
    """Add the tallies to ``sums``, shape (d, 4) by sign, or shape (d, 1): + minus -."""
    tallies = np.zeros((LANES, 4), np.float64)
    for word in range(start, stop):
        first = word * LANES
        tensor = _tensor_of(bounds, first)
        _tally(positive, negative, masses, weights, bounds, word, tensor, tallies)
        for i in range(first, min(first + LANES, sums.shape[0])):
            if sums.shape[1] == 1:
                sums[i, 0] += tallies[i - first, 0] - tallies[i - first, 2]
            else:
                for column in range(4):
                    sums[i, column] += tallies[i - first, column]


def fold(pending: Pending, sums: Sums) -> None:
    """Add what waits to ``sums``, shape (d, 4) or (d, 1), and forget it."""
    arrays = pending.arrays()
    in_threads(lambda a, b: _fold(*arrays, a, b, sums), num_words(pending.num_parameters))
    pending.count = 0


@njit(nogil=True, cache=True)
def _total(
    positive: Any, negative: Any, masses: Any, weights: Any, bounds: Any, start: int, stop: int,
    sums: Any, factor: float, out: Any,
) -> None:  # fmt: skip
    tallies = np.zeros((LANES, 4), np.float64)
    for word in range(start, stop):
        first = word * LANES
        tensor = _tensor_of(bounds, first)
        _tally(positive, negative, masses, weights, bounds, word, tensor, tallies)
        for i in range(first, min(first + LANES, out.size)):
            total = tallies[i - first, 0] - tallies[i - first, 2]
            if sums.size:
                total += sums[i, 0]
            out[i] = factor * total


def total(pending: Pending, sums: Sums | None, factor: float) -> Floats:
    """``factor`` times the weighted sum, shape (d,), of ``sums`` (d, 1) and of what waits."""
    arrays, out = pending.arrays(), np.empty(pending.num_parameters, np.float32)
    held = np.empty((0, 1)) if sums is None else sums
    in_threads(
        lambda a, b: _total(*arrays, a, b, held, factor, out), num_words(pending.num_parameters)
    )
    return out


@njit(nogil=True, cache=True)
def _elect(
    positive: Any, negative: Any, masses: Any, weights: Any, bounds: Any, start: int, stop: int,
    sums: Any, scaling: float, tie_sign: int, out: Any,
) -> int:  # fmt: skip
    """Elect signs and average those that agree; how many more parameters elect + than -."""
    tallies = np.zeros((LANES, 4), np.float64)
    balance = 0
    for word in range(start, stop):
        first = word * LANES
        tensor = _tensor_of(bounds, first)
        _tally(positive, negative, masses, weights, bounds, word, tensor, tallies)
        for i in range(first, min(first + LANES, out.size)):
            lane = i - first
            if sums.size:
                for column in range(4):
                    tallies[lane, column] += sums[i, column]
            plus, minus = tallies[lane, 0], tallies[lane, 2]
            sign = tie_sign
            if plus > minus:
                sign, balance = 1, balance + 1
            elif plus < minus:
                sign, balance = -1, balance - 1
            if sign > 0 and plus > 0:
                out[i] = scaling * (plus / tallies[lane, 1])
            elif sign < 0 and minus > 0:
                out[i] = -scaling * (minus / tallies[lane, 3])
            else:
                out[i] = 0.0
    return balance


def elect(pending: Pending, sums: Sums | None, scaling: float, tie: str) -> Floats:
    """TIES of ``sums`` (d, 4) and of what waits, shape (d,); ``tie`` as in `compeft_fl.Ties`."""
    arrays, out = pending.arrays(), np.empty(pending.num_parameters, np.float32)
    held = np.empty((0, 4)) if sums is None else sums

    def run(tie_sign: int) -> int:
        parts = in_threads(
            lambda a, b: _elect(*arrays, a, b, held, scaling, tie_sign, out),
            num_words(pending.num_parameters),
        )
        return int(sum(parts))

    balance = run(1 if tie == "positive" else 0)
    if tie == "majority" and balance:
        run(1 if balance > 0 else -1)
    return out
