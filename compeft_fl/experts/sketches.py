"""Sketches of signs: which experts, of thousands, are like a given one.

Each nonzero of an expert adds its sign, turned by a coin, to one of 2,048 counters that its place
chooses: a count sketch (Charikar, Chen and Farach-Colton, 2002). The cosine of two sketches is that
of the two vectors of signs, give or take 0.02 (1 / sqrt(2048)), at 2 KiB an expert. Of thousands,
those are compared so whose counters have signs that differ least.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.base import Update
from compeft_fl.compeft import compress
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = ["SIZE", "bits", "cosines", "distances", "sketch", "ternary"]

SIZE: Final = 2048  # counters; a power of two
_DENSE_DENSITY: Final = 0.05  # of the signs that stand for an update with a value everywhere
_PIECE: Final = 1 << 20  # parameters at a time; a multiple of 8
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)


def ternary(update: Update) -> TernaryVector:
    """An update's signs: those of its largest values where it has one everywhere."""
    if isinstance(update, TernaryVector):
        return update.with_scales([1.0])
    values: Any = update.to_task_vector().values
    return compress(TaskVector(update.layout, values), _DENSE_DENSITY).with_scales([1.0])


def sketch(signs: TernaryVector) -> NDArray[np.int8]:
    """The sketch of a vector of signs, shape (2048,), scaled to its largest counter."""
    counters = np.zeros(SIZE)
    masks = [mask.view(np.uint8) for mask in (signs.positive, signs.negative)]
    for start in range(0, signs.num_parameters, _PIECE):
        for mask, sign in zip(masks, (1.0, -1.0), strict=True):
            bits = np.unpackbits(mask[start >> 3 : (start + _PIECE) >> 3], bitorder="little")
            places = np.flatnonzero(bits).astype(np.uint64) + np.uint64(start)
            mixed = _mixed(places)
            coins = np.where(mixed >> np.uint64(63), sign, -sign)
            where = ((mixed >> np.uint64(20)) % np.uint64(SIZE)).astype(np.int64)
            counters += np.bincount(where, weights=coins, minlength=SIZE)
    largest = np.abs(counters).max()
    return np.rint(counters * (127 / largest if largest else 0)).astype(np.int8)


def _mixed(places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well-mixed 64 bits for each place (splitmix64, Steele, Lea and Flood, 2014)."""
    z = (places + np.uint64(1)) * _ODD
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(sketch: NDArray[np.int8]) -> NDArray[np.uint64]:
    """The signs of a sketch's counters, shape (32,): they differ in more places the less alike."""
    return np.packbits(sketch > 0, bitorder="little").view(np.uint64)


def distances(one: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """In how many places some signs differ from each of others, shape (n, 32)."""
    counts = np.bitwise_count(others ^ one)
    found: NDArray[np.uint16] = np.einsum("ij->i", counts, dtype=np.uint16, casting="unsafe")
    return found  # of 16 bits: such are sorted by their digits


def cosines(one: NDArray[np.int8], others: NDArray[np.int8]) -> NDArray[np.float64]:
    """The cosine of a sketch and each of others, shape (n, 2048); 0 where one is empty."""
    a, b = one.astype(np.float32), others.astype(np.float32)
    norms = np.linalg.norm(a) * np.linalg.norm(b, axis=1)
    products = (b @ a).astype(np.float64)
    found: NDArray[np.float64] = np.zeros(len(b))
    np.divide(products, norms, out=found, where=norms > 0)
    return found
