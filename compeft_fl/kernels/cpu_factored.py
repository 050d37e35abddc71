"""Low-rank signs for the CPU: the search for one term, and sums of terms.

The search runs on integers below 2^24 that float64 sums hold exactly, in any order: so every device
finds the same terms, whatever its libraries do (`torch_factored` is the same on torch tensors).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Floats

__all__ = [
    "MAX_FACTOR",
    "Term",
    "add_terms",
    "find_term",
    "quantised",
    "subtract",
    "to_integers",
]

MAX_FACTOR = 15  # of what is written: 5 bits; more bits keep no more energy
_BITS = 15  # of the integers that a tensor's values are rounded to for the search
_SWEEPS = 12  # at most; most searches end after 4 to 8
_SMALL = 1 << 16  # values; with more, matrix products of a library take less than loops

# Factors (S,), integers; the exponent of their step; where signs are negative (L,); the squared
# norm that the term takes off, in the search's units.
Term = tuple[NDArray[np.int16], int, NDArray[np.bool_], float]


def to_integers(values: Floats, lowest: int) -> tuple[Floats, int]:
    """Values in units of a power of two, as integers of at most 2^15; and the unit's exponent.

    ``lowest`` is the smallest exponent that there is.
    """
    largest = float(np.abs(values).max(initial=0.0))
    exponent = max(math.frexp(largest)[1] - _BITS, lowest) if largest else lowest
    scaled = np.rint(np.ldexp(values.astype(np.float64), -exponent))
    return scaled.astype(np.float32), exponent


def quantised(means: NDArray[np.float64]) -> tuple[NDArray[np.int16], int]:
    """A term's factors, float64, as integers of at most 15 and the exponent >= 0 of their step."""
    largest = float(np.abs(means).max())
    mantissa, exponent = math.frexp(largest / MAX_FACTOR)
    exponent = max(0, exponent - 1 if mantissa == 0.5 else exponent)
    return np.rint(np.ldexp(means, -exponent)).astype(np.int16), exponent


def find_term(left: Floats) -> Term | None:
    """The outer product of small integers and signs that takes most off what is left.

    Signs and factors in turn, each the best for the other, from the signs of the strongest row on.

    Parameters
    ----------
    left : ndarray of float32, shape (S, L)
        Integers below 2^24.

    Returns
    -------
    Term or None
        None where nothing is left that a term takes off.
    """
    exact = left.astype(np.float64)
    squares = (exact * exact).sum(axis=1)
    row = int(squares.argmax())
    if not squares[row]:
        return None
    negative = exact[row] < 0
    size, length = exact.shape
    if exact.size <= _SMALL:
        products, factors = np.empty(size), np.empty(size, np.int16)
        exponent = _sweep(left.astype(np.int32), negative, products, factors, _SWEEPS)
        return finished(products, factors, exponent, negative, length)
    for _ in range(_SWEEPS):
        products = exact @ np.where(negative, -1.0, 1.0)
        factors, exponent = quantised(products / length)
        better = factors.astype(np.float64) @ exact < 0
        if np.array_equal(better, negative):
            break
        negative = better
    else:
        products = exact @ np.where(negative, -1.0, 1.0)
    return finished(products, factors, exponent, negative, length)


@njit(nogil=True, cache=True)
def _sweep(left: Any, negative: Any, products: Any, factors: Any, sweeps: int) -> int:
    """`find_term`'s turns in one call, where calls would take longer than the sums in them.

    ``left`` (S, L) is integers; ``negative`` (L,) is changed, ``products`` and ``factors`` (S,) are
    filled. Returns the exponent of the factors' step.
    """
    size, length = left.shape
    sums = np.empty(length, np.int64)
    exponent = 0
    for _ in range(sweeps):
        largest = _multiply(left, negative, products)
        mantissa, exponent = math.frexp(largest / length / MAX_FACTOR)
        exponent = max(0, exponent - 1 if mantissa == 0.5 else exponent)
        sums[:] = 0
        for i in range(size):
            factor = int(np.rint(math.ldexp(products[i] / length, -exponent)))
            factors[i] = factor
            for j in range(length):
                sums[j] += factor * left[i, j]
        changed = False
        for j in range(length):
            better = sums[j] < 0
            changed |= better != negative[j]
            negative[j] = better
        if not changed:
            return exponent
    _multiply(left, negative, products)
    return exponent


@njit(nogil=True, cache=True)
def _multiply(left: Any, negative: Any, products: Any) -> float:
    """The products of rows and signs, and the largest magnitude of them."""
    largest = 0.0
    for i in range(left.shape[0]):
        total = 0
        for j in range(left.shape[1]):
            total += -left[i, j] if negative[j] else left[i, j]
        products[i] = total
        largest = max(largest, abs(products[i]))
    return largest


def finished(
    products: NDArray[np.float64], factors: NDArray[np.int16], exponent: int, negative: Any,
    length: int,
) -> Term | None:  # fmt: skip
    """A term with what it takes off; None where that is nothing."""
    steps = np.ldexp(factors.astype(np.float64), exponent)
    gain = float(2 * (steps @ products) - length * (steps @ steps))
    return (factors, exponent, negative, gain) if gain > 0 else None


def subtract(left: Floats, term: Term) -> None:
    """Take a term off what is left, in place."""
    factors, exponent, negative, _ = term
    steps = np.ldexp(factors.astype(np.float32), exponent)
    left -= np.multiply.outer(steps, np.where(negative, np.float32(-1), np.float32(1)))


@njit(nogil=True, cache=True)
def _add_terms(out: Any, steps: Any, signs: Any, by_line: bool) -> None:
    lines = signs.shape[1]
    size = steps.shape[1]
    if by_line:
        for line in range(lines):
            for term in range(signs.shape[0]):
                sign = signs[term, line]
                for j in range(size):
                    out[line, j] += sign * steps[term, j]
    else:
        for j in range(size):
            for term in range(signs.shape[0]):
                step = steps[term, j]
                for line in range(lines):
                    out[j, line] += signs[term, line] * step


def add_terms(out: Floats, steps: Floats, negative: NDArray[np.bool_], by_line: bool) -> None:
    """Add terms in their order to a matrix in place, each addition rounded to float32.

    Parameters
    ----------
    out : ndarray of float32
        Of shape (L, S) where ``by_line``, and else (S, L).
    steps : ndarray of float32, shape (T, S)
        The factors' values.
    negative : ndarray of bool, shape (T, L)
    """
    signs = np.where(negative, np.float32(-1), np.float32(1))
    _add_terms(out, steps, signs, by_line)
