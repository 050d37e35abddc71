"""Counting votes on signs in bit planes, 64 parameters at a time: no number per parameter.

A counter holds word w's votes in the row ``counter[w]``: bit i of ``counter[w, p]`` is bit p of the
count of parameter 64 w + i. Adding a mask is a ripple of carries, which mostly ends after a plane
or two. Comparing two counters goes plane by plane, for 64 parameters at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from compeft_fl.kernels.cpu import Words, in_threads

_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@njit(nogil=True, cache=True)
def _add(mask: Any, start: int, stop: int, counter: Any) -> None:
    for word in range(start, stop):
        carry, plane = mask[word], 0
        while carry != np.uint64(0) and plane < counter.shape[1]:
            held = counter[word, plane]
            counter[word, plane] = held ^ carry
            carry &= held
            plane += 1


@njit(nogil=True, cache=True)
def _remove(mask: Any, start: int, stop: int, counter: Any) -> None:
    for word in range(start, stop):
        borrow, plane = mask[word], 0
        while borrow != np.uint64(0) and plane < counter.shape[1]:
            held = counter[word, plane]
            counter[word, plane] = held ^ borrow
            borrow &= ~held
            plane += 1


def add(counter: Words, mask: Words) -> None:
    """One vote more where ``mask`` is set; ``counter`` (words, planes) has room for it."""
    in_threads(lambda a, b: _add(mask, a, b, counter), mask.size)


def remove(counter: Words, mask: Words) -> None:
    """One vote less where ``mask`` is set; it was added before."""
    in_threads(lambda a, b: _remove(mask, a, b, counter), mask.size)


@njit(nogil=True, cache=True)
def _leads(a: Any, b: Any, start: int, stop: int, by_one: Any, by_two: Any) -> None:
    for word in range(start, stop):
        more, much_more, carry = np.uint64(0), np.uint64(0), _ALL
        for plane in range(a.shape[1]):
            mine, theirs = a[word, plane], b[word, plane]
            more = (mine & ~theirs) | (more & ~(mine ^ theirs))
            one_more = theirs ^ carry  # this plane of their count + 1
            carry &= theirs
            much_more = (mine & ~one_more) | (much_more & ~(mine ^ one_more))
        by_one[word], by_two[word] = more, much_more & ~carry


def leads(a: Words, b: Words) -> tuple[Words, Words]:
    """Where counter ``a`` is ahead of ``b``: by 1 or more, and by 2 or more."""
    by_one, by_two = np.empty(a.shape[0], np.uint64), np.empty(a.shape[0], np.uint64)
    in_threads(lambda i, j: _leads(a, b, i, j, by_one, by_two), a.shape[0])
    return by_one, by_two
