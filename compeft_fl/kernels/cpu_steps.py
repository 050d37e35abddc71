"""Entropy coding of small integers for the CPU (proto/FORMAT.md, "Steps body").

The range coder and the logistic model of `cpu_context`, for integers in place of signs: whether one
is 0 is told by its column, by the integers beside it and by how many of its line are not; its sign
by the signs before it in the line; its magnitude, step by step, by counters. All arithmetic is on
integers, so the bytes are the same on every machine, and one function both writes and reads.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu_context import (
    LOW_TOP,
    RECIPROCAL,
    _bounded,
    _emit,
    _next_byte,
    _squash,
    start_logit,
)
from compeft_fl.kernels.llvm import trailing_zeros

Floats = NDArray[np.float32]

CODE_END: Final = LOW_TOP  # the range coder's value at the end of a code is below
MAX_MAGNITUDE: Final = (1 << 24) - 1  # float32 holds it times a power of two
UNARY: Final = 14  # so many steps of a magnitude have counters of their own
OCTAVES: Final = 24  # beyond them, so many doublings
TURNS: Final = 64  # the signs of so many columns have weights
SIGNS: Final = 16  # of so many nonzeros before in the line
TURN_SHARE: Final = np.array([448 // (m + 28) for m in range(SIGNS + 1)], dtype=np.int64)


@njit(forceinline=True)
def _decide(
    decoding: Any, bit: Any, p: Any, low: Any, span: Any, value: Any, cache: Any, pending: Any,
    stream: Any, at: Any,
) -> Any:  # fmt: skip
    """Code one decision of probability p, in 65536ths, that it is 1."""
    bound = (span * np.uint64(p)) >> np.uint64(16)
    if decoding:
        bit = np.int64(value < bound)
    if bit:
        span = bound
    else:
        if decoding:
            value -= bound
        else:
            low += bound
        span -= bound
    while span < np.uint64(LOW_TOP):
        span <<= np.uint64(8)
        if decoding:
            value = _next_byte(value, stream, at)
            at += 1
        else:
            low, cache, pending, at = _emit(stream, low, cache, pending, at)
    return bit, low, span, value, cache, pending, at


@njit(forceinline=True)
def _move(counters: Any, counts: Any, i: Any, hit: Any) -> None:
    """Take a counter of 28 bits towards what came."""
    counters[i] += (((hit << 28) - counters[i]) * RECIPROCAL[np.uint64(counts[i])]) >> 16
    counts[i] = min(counts[i] + 1, 255)


@njit(forceinline=True)
def _code(
    decoding: Any, values: Any, factor: Any, tensors: Any, num_nonzeros: Any, z0: Any, stream: Any
) -> Any:
    """Write the stream of integers, which are values x factor, or read factor x integers into 0.0.

    Tensors are (rows, columns) in order; their parameters follow each other. Returns the position
    in the stream (beyond its end where it was too short to write to), the number of nonzeros
    coded, the largest magnitude, and, of a stream that was read, the range coder's value: how far
    it is above low. Indices are unsigned where numba would ask whether they are below 0.
    """
    width = 1
    for t in range(tensors.shape[0]):
        width = max(width, min(tensors[t, 0], tensors[t, 1]))
    column = np.zeros(width, np.int64)
    above = np.zeros(width, np.int64)  # magnitudes of the line before
    near, near_count = np.zeros(128, np.int64), np.zeros(128, np.int64)
    refined, refined_count = np.empty(96, np.int64), np.zeros(96, np.int64)
    for b in range(96):
        refined[b] = _squash(np.int64((2 * b - 95) << 21)) << 12
    agreed, agreed_count = np.empty(32, np.int64), np.zeros(32, np.int64)
    for b in range(32):
        agreed[b] = _squash(np.int64((2 * b + 1) << 22)) << 12
    kept = min(width, TURNS)
    turn = np.zeros((kept, kept), np.int64)
    more, more_count = np.full(128, np.int64(1 << 27)), np.zeros(128, np.int64)
    octave, octave_count = np.full(32, np.int64(1 << 27)), np.zeros(32, np.int64)
    # Of the columns among the first nonzeros of a line: -1 there, else 0; -1 where it is negative.
    seen, minus_seen = np.zeros(kept, np.int64), np.zeros(kept, np.int64)

    low, span, value = np.uint64(0), np.uint64(1 << 32), np.uint64(0)
    cache, pending, at = np.int64(-1), 0, 0
    if decoding:
        for _ in range(4):
            value = _next_byte(value, stream, at)
            at += 1

    left, largest = num_nonzeros, np.int64(0)
    first, last_width = 0, -1
    for t in range(tensors.shape[0]):
        rows, columns = tensors[t, 0], tensors[t, 1]
        wide = columns > rows
        length, short = max(rows, columns), min(rows, columns)
        step, row_step = (length, 1) if wide else (1, short)
        kept = min(short, TURNS)
        for a in range(kept):
            for b in range(kept):
                turn[a, b] = turn[a, b] >> 2 if short == last_width else 0
        last_width = short
        column[:short] = 0
        above[:short] = 0
        full = np.int64(0)  # 1: at least half of the line before was not 0
        for line in range(length):
            if left == 0:
                break
            column_rate = max(100, 93_388 // (line + 40))
            sign_rate = max(400, 300_000 // (line + 182))
            index = first + line * row_step
            n, beside = 0, np.int64(0)
            seen[:kept] = 0
            for j in range(short):
                if left == 0:
                    break
                up, back = min(above[j], np.int64(3)), min(beside, np.int64(3))
                share = np.int64(0)  # quarters of the line so far that are not 0
                if j > 0:
                    share = np.int64(4 * n >= j) + np.int64(2 * n >= j) + np.int64(4 * n >= 3 * j)
                spot = np.uint64(up * 32 + back * 8 + share * 2 + full)
                z = z0 + column[j] + near[spot]
                guess = _squash(z)
                bucket = np.uint64(min(max((z >> 22) + 48, 0), 95))
                p = min(max((guess + (refined[bucket] >> 12)) >> 1, 1), 65535)
                q = np.int64(0)
                if not decoding:
                    q = np.int64(values[index] * factor)
                bit, low, span, value, cache, pending, at = _decide(
                    decoding, np.int64(q != 0), p, low, span, value, cache, pending, stream, at
                )
                error = (bit << 16) - guess
                column[j] = _bounded(column[j] + ((error * column_rate) >> 4))
                rate = max(RECIPROCAL[np.uint64(near_count[spot])], 512)
                near[spot] = _bounded(near[spot] + ((error * rate) >> 7))
                near_count[spot] = min(near_count[spot] + 1, 255)
                _move(refined, refined_count, bucket, bit)
                if bit == 0:
                    above[j] = beside = np.int64(0)
                    index += step
                    continue

                z = np.int64(0)
                if j < TURNS:
                    for a in range(kept):
                        z += ((turn[j, a] ^ minus_seen[a]) - minus_seen[a]) & seen[a]
                bucket = np.uint64(min(abs(z) >> 23, 31))
                p = min(max(agreed[bucket] >> 12, 1), 65535) if z != 0 else np.int64(32768)
                expected = np.int64(z < 0)  # 1: negative
                hit, low, span, value, cache, pending, at = _decide(
                    decoding, np.int64((q < 0) == expected), p, low, span, value, cache, pending,
                    stream, at,
                )  # fmt: skip
                minus = expected ^ (1 - hit)
                if z != 0:
                    _move(agreed, agreed_count, bucket, hit)
                error = ((1 - minus) << 16) - _squash(z)
                if j < TURNS:
                    change = (error * sign_rate * TURN_SHARE[min(n, SIGNS)]) >> 12
                    for a in range(kept):
                        signed = ((change ^ minus_seen[a]) - minus_seen[a]) & seen[a]
                        turn[j, a] = _bounded(turn[j, a] + signed)
                    if n < SIGNS:
                        seen[j], minus_seen[j] = -1, -minus

                most = max(up, back)
                spot = np.uint64((2 * most + np.int64(up + back > 3)) * 16)
                size, m = abs(q), np.int64(1)
                while m <= UNARY:
                    at_m = spot + np.uint64(m)
                    p = min(max(more[at_m] >> 12, 32), 65504)
                    hit, low, span, value, cache, pending, at = _decide(
                        decoding, np.int64(size > m), p, low, span, value, cache, pending, stream,
                        at,
                    )  # fmt: skip
                    _move(more, more_count, at_m, hit)
                    if hit == 0:
                        break
                    m += 1
                if m > UNARY:
                    rest, bits = size - UNARY, 0
                    while bits < OCTAVES:
                        p = min(max(octave[bits] >> 12, 32), 65504)
                        hit, low, span, value, cache, pending, at = _decide(
                            decoding, np.int64(rest >> (bits + 1) != 0), p, low, span, value, cache,
                            pending, stream, at,
                        )  # fmt: skip
                        _move(octave, octave_count, bits, hit)
                        if hit == 0:
                            break
                        bits += 1
                    m = np.int64(1)
                    for b in range(bits):
                        one, low, span, value, cache, pending, at = _decide(
                            decoding, (rest >> (bits - 1 - b)) & 1, np.int64(32768), low, span,
                            value, cache, pending, stream, at,
                        )  # fmt: skip
                        m = 2 * m + one
                    m += UNARY
                if decoding:
                    values[index] = np.float32(factor * (-m if minus else m))
                largest = max(largest, m)
                above[j] = beside = m
                n += 1
                left -= 1
                index += step
            full = np.int64(2 * n >= short)
        first += rows * columns
    if decoding:
        return at, num_nonzeros - left, largest, value
    # As in `cpu_context`: the multiple of 2^24 at or above low, without the zeros at its end.
    low = (low + np.uint64(LOW_TOP - 1)) & ~np.uint64(LOW_TOP - 1)
    for _ in range(2):
        low, cache, pending, at = _emit(stream, low, cache, pending, at)
    return at, num_nonzeros - left, largest, value


@njit(nogil=True, cache=True)
def _write(
    values: Any, factor: float, tensors: Any, num_nonzeros: int, z0: int, stream: Any
) -> Any:
    """See `_code`; a function of its own, in which nothing asks which way it goes."""
    return _code(False, values, factor, tensors, num_nonzeros, z0, stream)


@njit(nogil=True, cache=True)
def _read(values: Any, factor: float, tensors: Any, num_nonzeros: int, z0: int, stream: Any) -> Any:
    """See `_code`."""
    return _code(True, values, factor, tensors, num_nonzeros, z0, stream)


@njit(nogil=True, cache=True)
def _bits_used(bits: Any) -> Any:
    """The exponents of the lowest and highest bit set in any value; None where one is no number."""
    lowest, highest = np.int64(1000), np.int64(-1000)
    for each in bits:
        magnitude = each & np.uint32(0x7FFFFFFF)
        if magnitude == 0:
            continue
        field = np.int64(magnitude >> np.uint32(23))
        if field == 255:
            return np.int64(-1000), np.int64(1000)
        mantissa = np.uint64(magnitude & np.uint32(0x7FFFFF))
        if field:
            mantissa |= np.uint64(1 << 23)
        exponent = max(field, np.int64(1)) - 150
        lowest = min(lowest, exponent + np.int64(trailing_zeros(mantissa)))
        highest = max(highest, exponent + 23)
    return lowest, highest


def common_exponent(values: NDArray[np.float32]) -> int | None:
    """The largest e such that all values are multiples of 2^e, below 2^24 of it.

    0 where all values are 0; None where there is none.
    """
    lowest, highest = _bits_used(np.ascontiguousarray(values).view(np.uint32))
    if lowest > highest:
        return 0
    return int(lowest) if highest - lowest < 24 else None


def write_code(
    values: Floats, exponent: int, tensors: NDArray[np.int64], num_nonzeros: int
) -> bytes | None:
    """The code of values; None where it takes over 32 bits each.

    Parameters
    ----------
    values : ndarray of float32, shape (d,)
        Integers of at most `MAX_MAGNITUDE`, times 2^exponent.
    exponent : int
    tensors : ndarray of int64, shape (n, 2)
        Rows and columns of each tensor, none of them 0.
    num_nonzeros : int
    """
    d = values.size
    stream = np.zeros(4 * d + 8, np.uint8)
    start, factor = start_logit(num_nonzeros, d), math.ldexp(1.0, -exponent)
    at = int(_write(values, factor, tensors, num_nonzeros, start, stream)[0])
    return None if at > stream.size else stream[:at].tobytes().rstrip(b"\0")


def read_code(
    code: bytes, exponent: int, tensors: NDArray[np.int64], num_nonzeros: int
) -> tuple[Floats, int, int, int, int]:
    """A code's values; how many bytes it may have, its nonzeros, the largest integer, its end.

    A hostile code can give magnitudes beyond `MAX_MAGNITUDE`, up to 2^25. Its end is the range
    coder's value there.
    """
    d = int((tensors[:, 0] * tensors[:, 1]).sum())
    values = np.zeros(d, np.float32)
    stream = np.frombuffer(code, np.uint8).copy()  # the kernel takes arrays that can be written
    start, factor = start_logit(num_nonzeros, d), math.ldexp(1.0, exponent)
    at, found, largest, end = _read(values, factor, tensors, num_nonzeros, start, stream)
    return values, int(at) - 3, int(found), int(largest), int(end)
