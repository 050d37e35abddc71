"""Context coding of bit masks for the CPU (proto/FORMAT.md, "Context body").

One binary range coder, and two online logistic regressions that tell it what to expect: whether a
parameter is nonzero, and its sign, from the nonzeros before it in the same row and from what held
in the rows before. All arithmetic is on integers, so the bytes are the same on every machine, and
one function both writes and reads, so that the two cannot learn differently.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Words, num_words

# Logits have 24 bits after the point, probabilities 16, counters 28.
LIMIT: Final = 12 << 24  # logits are cut off at +-12 where they become probabilities
MAX_WEIGHT: Final = 8 << 24
WINDOW: Final = 16  # so many nonzeros before a parameter are looked at
PAIRS: Final = 256  # pair weights are kept by index modulo 256
START_WEIGHT: Final = 150 << 16  # two nonzeros of one row are more likely than one
CELLS: Final = 16  # the count table has 16 x 16 cells
LOW_TOP: Final = 1 << 24  # the range's lowest value, and what a code ends on a multiple of

# 65536 / (1 + e^-x) at x = -12, -11.75 .. 12
SQUASH: Final = np.array(
    [round(65536 / (1 + math.exp(-k / 4))) for k in range(-48, 49)], dtype=np.int64
)
RECIPROCAL: Final = np.array([65536 // (n + 8) for n in range(256)], dtype=np.int64)
PAIR_SHARE: Final = np.array([2048 // (m + 8) for m in range(WINDOW + 1)], dtype=np.int64)
SIGN_SHARE: Final = np.array([7168 // (m + 28) for m in range(WINDOW + 1)], dtype=np.int64)


@njit(forceinline=True)
def _squash(z: Any) -> Any:
    """A logit's probability."""
    if z < -LIMIT:
        z = np.int64(-LIMIT)
    elif z >= LIMIT:
        z = np.int64(LIMIT - 1)
    z += LIMIT
    k = np.uint64(z >> 22)  # unsigned: numba does not ask whether it is below 0
    low = SQUASH[k]
    return low + (((SQUASH[k + np.uint64(1)] - low) * (z & 0x3FFFFF)) >> 22)


@njit(forceinline=True)
def _bounded(weight: Any) -> Any:
    return min(max(weight, np.int64(-MAX_WEIGHT)), np.int64(MAX_WEIGHT))


@njit(forceinline=True)
def _next_byte(value: Any, stream: Any, at: Any) -> Any:
    """The range coder's value with the next byte; after the stream's end there are zeros."""
    byte = np.uint64(stream[at]) if at < stream.size else np.uint64(0)
    return (value << np.uint64(8)) | byte


@njit(nogil=True, cache=True)
def _emit(stream: Any, low: Any, cache: Any, pending: Any, at: Any) -> Any:
    """Shift the top byte out of low: kept back while a carry may still change it.

    ``cache`` is the last byte that is not 255 (-1: none yet), ``pending`` how many 255 follow it.
    """
    if low >= np.uint64(0xFF000000) and low < np.uint64(1 << 32):
        pending += 1
    else:
        carry = np.int64(low >> np.uint64(32))
        if cache >= 0:
            if at < stream.size:
                stream[at] = cache + carry
            at += 1
        for _ in range(pending):
            if at < stream.size:
                stream[at] = (255 + carry) & 255
            at += 1
        pending = 0
        cache = np.int64((low >> np.uint64(24)) & np.uint64(255))
    return (low & np.uint64(0x00FFFFFF)) << np.uint64(8), cache, pending, at


@njit(nogil=True, cache=True)
def _code(
    decoding: bool, flat: bool, positive: Any, negative: Any, tensors: Any, num_nonzeros: int,
    start_logit: int, stream: Any,
) -> Any:  # fmt: skip
    """Write the stream of a pair of masks, or read it into masks of zeros.

    Tensors are (rows, columns) in order; their parameters follow each other. Returns the position
    in the stream (beyond its end where it was too short to write to), the number of nonzeros
    coded, and, of a stream that was read, the range coder's value: how far it is above low.
    """
    width = 1
    for t in range(tensors.shape[0]):
        width = max(width, min(tensors[t, 0], tensors[t, 1]))
    pairs = min(width, PAIRS)
    weights = np.zeros((pairs, pairs), np.int32)
    sign_weights = np.zeros((pairs, pairs), np.int32)
    column = np.zeros(width, np.int64)
    cell = np.zeros(width, np.int64)
    table = np.zeros(CELLS * CELLS, np.int64)
    refined = np.empty(96, np.int64)
    refined_count = np.zeros(96, np.int64)
    for b in range(96):
        refined[b] = _squash(np.int64((2 * b - 95) << 21)) << 12
    agreed = np.empty(32, np.int64)
    agreed_count = np.zeros(32, np.int64)
    for b in range(32):
        agreed[b] = _squash(np.int64((2 * b + 1) << 22)) << 12
    recent = np.zeros(WINDOW, np.int64)
    recent_sign = np.zeros(WINDOW, np.int64)

    low, span = np.uint64(0), np.uint64(1 << 32)
    cache, pending, at = np.int64(-1), 0, 0
    value = np.uint64(0)
    if decoding:
        for _ in range(4):
            value = _next_byte(value, stream, at)
            at += 1

    left = num_nonzeros
    first, last_width = 0, -1
    for t in range(tensors.shape[0]):
        rows, columns = tensors[t, 0], tensors[t, 1]
        wide = columns > rows
        length, short = max(rows, columns), min(rows, columns)
        step, row_step = (length, 1) if wide else (1, short)
        kept = min(short, PAIRS)
        if short == last_width:
            for i in range(kept):
                for j in range(kept):
                    weights[i, j] = START_WEIGHT + ((weights[i, j] - START_WEIGHT) >> 2)
                    sign_weights[i, j] >>= 2
        else:
            for i in range(kept):
                for j in range(kept):
                    weights[i, j] = START_WEIGHT
                    sign_weights[i, j] = 0
        last_width = short
        for j in range(short):
            column[j] = 0
            cell[j] = j if short <= CELLS else j * CELLS // short
        for row in range(length):
            if left == 0:
                break
            pair_rate = max(36, 668_400 // (row + 400))
            sign_rate = max(1156, 1_267_266 // (row + 182))
            column_rate = max(82, 93_388 // (row + 76))
            index = first + row * row_step
            n = 0
            for j in range(short):
                if left == 0:
                    break
                seen = min(n, WINDOW)
                mine = weights[j & (PAIRS - 1)]
                spot = min(n, CELLS - 1) * CELLS + cell[j]
                z = start_logit + column[j] + table[spot]
                for a in range(seen):
                    z += mine[recent[a]]
                guess = _squash(z)
                bucket = min(max((z >> 22) + 48, 0), 95)
                p = (guess + (refined[bucket] >> 12)) >> 1
                p = min(max(p, 1), 65535)
                if flat:
                    p = np.int64(32768)

                word, bit_at = index >> 6, np.uint64(index & 63)
                bound = (span * np.uint64(p)) >> np.uint64(16)
                if decoding:
                    bit = np.int64(value < bound)
                else:
                    bit = np.int64(((positive[word] | negative[word]) >> bit_at) & np.uint64(1))
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

                if not flat:
                    error = (bit << 16) - guess
                    column[j] = _bounded(column[j] + ((error * column_rate) >> 4))
                    table[spot] = _bounded(table[spot] + (error << 4))
                    change = (error * ((pair_rate * PAIR_SHARE[seen]) >> 8)) >> 4
                    for a in range(seen):
                        mine[recent[a]] = _bounded(mine[recent[a]] + change)
                    count = refined_count[bucket]
                    refined[bucket] += (((bit << 28) - refined[bucket]) * RECIPROCAL[count]) >> 16
                    refined_count[bucket] = min(count + 1, 255)
                if bit == 0:
                    index += step
                    continue

                mine = sign_weights[j & (PAIRS - 1)]
                z = np.int64(0)
                for a in range(seen):
                    z += mine[recent[a]] * recent_sign[a]
                bucket = min(abs(z) >> 23, 31)
                p = np.int64(32768)
                if z != 0 and not flat:
                    p = min(max(agreed[bucket] >> 12, 1), 65535)
                bound = (span * np.uint64(p)) >> np.uint64(16)
                expected = np.int64(1) if z < 0 else np.int64(0)  # 1: negative
                if decoding:
                    agrees = np.int64(value < bound)
                    minus = expected ^ (1 - agrees)
                    if minus:
                        negative[word] |= np.uint64(1) << bit_at
                    else:
                        positive[word] |= np.uint64(1) << bit_at
                else:
                    minus = np.int64((negative[word] >> bit_at) & np.uint64(1))
                    agrees = 1 - (expected ^ minus)
                if agrees:
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
                if not flat:
                    if z != 0:
                        count = agreed_count[bucket]
                        agreed[bucket] += (
                            ((agrees << 28) - agreed[bucket]) * RECIPROCAL[count]
                        ) >> 16
                        agreed_count[bucket] = min(count + 1, 255)
                    error = ((1 - minus) << 16) - _squash(z)
                    change = (error * ((sign_rate * SIGN_SHARE[seen]) >> 8)) >> 4
                    for a in range(seen):
                        mine[recent[a]] = _bounded(mine[recent[a]] + change * recent_sign[a])
                recent[n & (WINDOW - 1)] = j & (PAIRS - 1)
                recent_sign[n & (WINDOW - 1)] = 1 - 2 * minus
                n += 1
                left -= 1
                index += step
        first += rows * columns
    if decoding:
        return at, num_nonzeros - left, value
    # The multiple of 2^24 at or above low: zeros follow it, and the zeros at its end are left out.
    low = (low + np.uint64(LOW_TOP - 1)) & ~np.uint64(LOW_TOP - 1)
    for _ in range(2):
        low, cache, pending, at = _emit(stream, low, cache, pending, at)
    return at, num_nonzeros - left, value


def squash(z: int) -> int:
    """The probability, in 65536ths, of a logit with 24 bits after the point."""
    return int(_squash_once(z))


@njit(cache=True)
def _squash_once(z: int) -> Any:
    return _squash(np.int64(z))


def start_logit(num_nonzeros: int, num_parameters: int) -> int:
    """The smallest multiple of 1/16 whose probability is not below the density."""
    wanted = (num_nonzeros << 16) // max(1, num_parameters)
    below, above = -192, 192
    while below < above:
        middle = (below + above) // 2
        if squash(middle << 20) < wanted:
            below = middle + 1
        else:
            above = middle
    return above << 20


def write_code(
    positive: Words, negative: Words, tensors: NDArray[np.int64], num_nonzeros: int, flat: bool
) -> bytes | None:
    """The code of a pair of masks; None where it takes more than 1 bit a decision.

    Parameters
    ----------
    positive, negative : ndarray of uint64
    tensors : ndarray of int64, shape (n, 2)
        Rows and columns of each tensor, none of them 0.
    num_nonzeros : int
    flat : bool
        All decisions take one bit, and nothing is learned.
    """
    d = int((tensors[:, 0] * tensors[:, 1]).sum())
    enough = (d + num_nonzeros + 7) // 8
    stream = np.zeros(enough + 8, np.uint8)
    start = start_logit(num_nonzeros, d)
    at = int(_code(False, flat, positive, negative, tensors, num_nonzeros, start, stream)[0])
    code = stream[: min(at, stream.size)].tobytes().rstrip(b"\0")
    return None if not flat and (at > stream.size or len(code) > enough) else code


def read_code(
    code: bytes, tensors: NDArray[np.int64], num_nonzeros: int, flat: bool
) -> tuple[Words, Words, int, int, int]:
    """The masks of a code; how many bytes it may have, its nonzeros, and its value at the end."""
    d = int((tensors[:, 0] * tensors[:, 1]).sum())
    masks = [np.zeros(num_words(d), np.uint64) for _ in range(2)]
    stream = np.frombuffer(code, np.uint8).copy()  # the kernel takes arrays that can be written
    start = start_logit(num_nonzeros, d)
    at, found, value = _code(True, flat, *masks, tensors, num_nonzeros, start, stream)
    return masks[0], masks[1], int(at) - 3, int(found), int(value)
