"""Streams of bits, most significant first, and Elias gamma codes: what STC and QSGD write.

The loops are compiled by numba. A stream starts as zeros, so zeros are written by moving on.
"""

from __future__ import annotations

from typing import Any

from numba import njit

__all__ = ["gamma_bits", "get_bits", "get_gamma", "get_unary", "put_bits", "put_gamma", "put_unary"]


@njit(cache=True, nogil=True, inline="always")
def put_bits(stream: Any, at: int, value: int, width: int) -> int:
    """Write the low ``width`` bits of a value at bit ``at``; returns the next bit's place."""
    for bit in range(width - 1, -1, -1):
        if (value >> bit) & 1:
            stream[at >> 3] |= 128 >> (at & 7)
        at += 1
    return at


@njit(cache=True, nogil=True, inline="always")
def get_bits(stream: Any, at: int, end: int, width: int) -> tuple[int, int]:
    """``width`` bits as a number, and the next bit's place: -1 where the stream ends before."""
    if at < 0 or at + width > end:
        return 0, -1
    value = 0
    for _ in range(width):
        value = (value << 1) | ((stream[at >> 3] >> (7 - (at & 7))) & 1)
        at += 1
    return value, at


@njit(cache=True, nogil=True, inline="always")
def put_unary(stream: Any, at: int, value: int) -> int:
    """``value`` ones and a zero."""
    for _ in range(value):
        stream[at >> 3] |= 128 >> (at & 7)
        at += 1
    return at + 1


@njit(cache=True, nogil=True, inline="always")
def get_unary(stream: Any, at: int, end: int) -> tuple[int, int]:
    """A number of `put_unary`, and the next bit's place: -1 where the stream ends before."""
    value = 0
    while 0 <= at < end and stream[at >> 3] & (128 >> (at & 7)):
        value += 1
        at += 1
    if at < 0 or at >= end:
        return 0, -1
    return value, at + 1


@njit(cache=True, nogil=True, inline="always")
def gamma_bits(value: int) -> int:
    """How many bits `put_gamma` takes for a number >= 1: 2 floor(log2 value) + 1."""
    length = 0
    while value >> length:
        length += 1
    return 2 * length - 1


@njit(cache=True, nogil=True, inline="always")
def put_gamma(stream: Any, at: int, value: int) -> int:
    """Elias gamma: as many zeros as binary digits follow the first one, then the digits."""
    width = (gamma_bits(value) + 1) >> 1
    at = put_bits(stream, at + width - 1, value, width)
    return at


@njit(cache=True, nogil=True, inline="always")
def get_gamma(stream: Any, at: int, end: int) -> tuple[int, int]:
    """A number of `put_gamma`, and the next bit's place: -1 where there is none."""
    zeros = 0
    while 0 <= at < end and not stream[at >> 3] & (128 >> (at & 7)):
        zeros += 1
        at += 1
    if zeros > 40:
        return 0, -1
    value, at = get_bits(stream, at, end, zeros + 1)
    return value, at
