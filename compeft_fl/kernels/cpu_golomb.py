"""Golomb-Rice streams from and to bit masks, for the CPU (proto/FORMAT.md, "Golomb-Rice body").

Encoding costs every block size and every Rice parameter exactly, in one pass over the nonzeros:
the cost of a block of 2^(l+1) parameters is that of its two halves, but for the one gap that
crosses the middle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Words, in_threads, num_words
from compeft_fl.kernels.llvm import LANES, add_shifted, bit_count, trailing_zeros

MIN_LEVEL, MAX_LEVEL = 8, 24  # blocks of 2^8 .. 2^24 parameters; b is 0 .. 24


class Plan(NamedTuple):
    """How one block size would code the nonzeros: per block, and in total."""

    level: int  # blocks have 2^level parameters
    nonzeros: NDArray[np.int32]  # per block
    rice: NDArray[np.uint8]  # the best b per block
    quotient_bits: NDArray[np.int64]  # per block, the final ones included
    total_bytes: int  # of the serialised body, without scales and signs


class Streams(NamedTuple):
    """The three streams, as bytes, and the tables that go with them."""

    plan: Plan
    quotients: bytes
    remainders: bytes
    signs: bytes


@njit(nogil=True, cache=True)
def _smallest_blocks(
    positive: Any, negative: Any, start: int, stop: int, counts: Any, firsts: Any, lasts: Any,
    sums: Any,
) -> None:  # fmt: skip
    """For blocks of 256: nonzeros, first and last position, and sums of gap >> b for b = 0 .. 7."""
    words_per_block = (1 << MIN_LEVEL) // LANES
    for block in range(start, stop):
        count, previous = 0, -1
        for w in range(words_per_block):
            word = block * words_per_block + w
            if word >= positive.size:
                break
            rest = positive[word] | negative[word]
            while rest != np.uint64(0):
                position = w * LANES + trailing_zeros(rest)
                rest &= rest - np.uint64(1)
                gap = np.int32(position - previous - 1)
                if previous < 0:
                    firsts[block] = position
                previous = position
                count += 1
                add_shifted(sums, np.int64(block * MIN_LEVEL), gap)
        counts[block] = count
        lasts[block] = previous


@njit(nogil=True, cache=True)
def _double_blocks(
    level: int, counts: Any, firsts: Any, lasts: Any, sums: Any,
    counts2: Any, firsts2: Any, lasts2: Any, sums2: Any,
) -> None:  # fmt: skip
    """From blocks of 2^level to blocks of twice the size."""
    half = 1 << level
    for block in range(counts2.size):
        left, right = 2 * block, 2 * block + 1
        n_right = counts[right] if right < counts.size else 0
        if n_right == 0:
            counts2[block] = counts[left]
            firsts2[block] = firsts[left]
            lasts2[block] = lasts[left]
            for b in range(sums.shape[1]):
                sums2[block, b] = sums[left, b]
            continue
        old = firsts[right]  # the right half's first gap, as long as it began a block
        new = old + (half - 1 - lasts[left] if counts[left] else half)
        counts2[block] = counts[left] + n_right
        firsts2[block] = firsts[left] if counts[left] else half + old
        lasts2[block] = half + lasts[right]
        for b in range(sums2.shape[1]):
            total = (new >> b) - (old >> b)
            if b < sums.shape[1]:
                total += sums[left, b] + sums[right, b]
            sums2[block, b] = total


@njit(nogil=True, cache=True)
def _varint_size(value: int) -> int:
    size = 1
    while value >= 128:
        value >>= 7
        size += 1
    return size


@njit(nogil=True, cache=True)
def _best_parameters(counts: Any, sums: Any, rice: Any, quotient_bits: Any) -> int:
    """Choose each block's b (of equal costs the smaller); return the size of body in bytes."""
    quotients, remainders, varints = np.int64(0), np.int64(0), 0
    for block in range(counts.size):
        n = np.int64(counts[block])
        best, cost = 0, np.int64(sums[block, 0])
        for b in range(1, sums.shape[1]):
            other = sums[block, b] + n * b
            if other < cost:
                best, cost = b, other
        rice[block] = best
        quotient_bits[block] = sums[block, best] + n
        quotients += quotient_bits[block]
        remainders += n * best
        varints += _varint_size(n)
    total = 0
    for size in ((quotients + 7) >> 3, (remainders + 7) >> 3, varints, np.int64(counts.size)):
        if size:
            total += 1 + _varint_size(size) + size
    return total


def plan_blocks(positive: Words, negative: Words, num_parameters: int) -> Plan:
    """The block size with the fewest bytes (of equal ones the smaller), and each block's b."""
    level = MIN_LEVEL
    blocks = -(-num_parameters // (1 << level))
    counts, firsts, lasts = (np.zeros(blocks, np.int32) for _ in range(3))
    sums = np.zeros((blocks, level), np.int32)  # gaps are < 2^level: gap >> level is 0
    in_threads(
        lambda a, b: _smallest_blocks(positive, negative, a, b, counts, firsts, lasts, sums), blocks
    )
    best: Plan | None = None
    while True:
        rice, quotient_bits = np.zeros(blocks, np.uint8), np.zeros(blocks, np.int64)
        size = _best_parameters(counts, sums, rice, quotient_bits) + _varint_size(1 << level)
        if best is None or size < best.total_bytes:
            best = Plan(level, counts, rice, quotient_bits, size)
        if blocks == 1 or level == MAX_LEVEL:
            return best
        blocks = -(-blocks // 2)
        larger = [np.zeros(blocks, np.int32) for _ in range(3)]
        larger_sums = np.zeros((blocks, level + 1), np.int32)
        _double_blocks(level, counts, firsts, lasts, sums, *larger, larger_sums)
        counts, firsts, lasts = larger
        sums = larger_sums
        level += 1


@njit(nogil=True, cache=True)
def _put(stream: Any, shared: Any, which: int, first: int, index: int, word: Any) -> None:
    """Store a finished word; a part's first word is shared with the part before it."""
    if index == first:
        shared[which] = word
    else:
        stream[index] = word


@njit(nogil=True, cache=True)
def _write_streams(
    positive: Any, negative: Any, level: int, rice: Any, start: int, stop: int,
    at: Any, quotients: Any, remainders: Any, signs: Any, shared: Any,
) -> None:  # fmt: skip
    """Write the streams of blocks start .. stop from the bit positions ``at``."""
    words_per_block = (1 << level) // LANES
    q_at, r_at, s_at = at[0], at[1], at[2]
    q_first, r_first, s_first = q_at >> 6, r_at >> 6, s_at >> 6
    q_index, q_word = q_first, np.uint64(0)
    r_word, s_word = np.uint64(0), np.uint64(0)
    for block in range(start, stop):
        b = np.int64(rice[block])
        low = (np.int64(1) << b) - 1
        previous = np.int64(-1)
        for w in range(words_per_block):
            word = block * words_per_block + w
            if word >= positive.size:
                break
            minus = negative[word]
            rest = positive[word] | minus
            while rest != np.uint64(0):
                lane = trailing_zeros(rest)
                rest &= rest - np.uint64(1)
                position = w * LANES + lane
                gap = position - previous - 1
                previous = position

                q_at += gap >> b
                if q_at >> 6 != q_index:
                    _put(quotients, shared, 0, q_first, q_index, q_word)
                    q_index, q_word = q_at >> 6, np.uint64(0)
                q_word |= np.uint64(1) << np.uint64(q_at & 63)
                q_at += 1

                if b:
                    shift = r_at & 63
                    remainder = np.uint64(gap & low)
                    r_word |= remainder << np.uint64(shift)
                    r_at += b
                    if shift + b >= 64:
                        _put(remainders, shared, 1, r_first, (r_at >> 6) - 1, r_word)
                        used = 64 - shift
                        r_word = remainder >> np.uint64(used) if used < b else np.uint64(0)

                s_word |= ((minus >> np.uint64(lane)) & np.uint64(1)) << np.uint64(s_at & 63)
                s_at += 1
                if s_at & 63 == 0:
                    _put(signs, shared, 2, s_first, (s_at >> 6) - 1, s_word)
                    s_word = np.uint64(0)
    _put(quotients, shared, 0, q_first, q_index, q_word)
    if r_at & 63:
        _put(remainders, shared, 1, r_first, r_at >> 6, r_word)
    if s_at & 63:
        _put(signs, shared, 2, s_first, s_at >> 6, s_word)


def write_streams(positive: Words, negative: Words, plan: Plan) -> Streams:
    """The three streams of a pair of masks."""
    counts = plan.nonzeros.astype(np.int64)
    bits = np.stack([plan.quotient_bits, counts * plan.rice, counts])  # per block
    ends = bits.sum(axis=1)
    streams = [np.zeros((int(end) >> 6) + 1, np.uint64) for end in ends]
    words_per_block = (1 << plan.level) // LANES

    def write(first_word: int, last_word: int) -> tuple[NDArray[np.int64], Words]:
        start, stop = first_word // words_per_block, -(-last_word // words_per_block)
        at, shared = bits[:, :start].sum(axis=1), np.zeros(3, np.uint64)
        _write_streams(positive, negative, plan.level, plan.rice, start, stop, at, *streams, shared)
        return at, shared

    for at, shared in in_threads(write, positive.size, align=words_per_block):
        for stream, bit, word in zip(streams, at, shared, strict=True):
            stream[bit >> 6] |= word
    return Streams(
        plan,
        *(
            stream.view(np.uint8)[: (int(end) + 7) >> 3].tobytes()
            for stream, end in zip(streams, ends, strict=True)
        ),
    )


@njit(nogil=True, cache=True)
def _count_ones(words: Any) -> int:
    total = 0
    for word in words:
        total += bit_count(word)
    return total


@njit(nogil=True, cache=True)
def find_one(words: Any, rank: int) -> int:
    """The bit position of the one with ``rank`` ones before it."""
    index = 0
    while index < words.size:
        ones = bit_count(words[index])
        if rank < ones:
            break
        rank -= ones
        index += 1
    if index == words.size:
        return index * 64
    word = words[index]
    for _ in range(rank):
        word &= word - np.uint64(1)
    lowest: int = trailing_zeros(word)
    return index * 64 + lowest


@njit(nogil=True, cache=True)
def _read_streams(
    num_parameters: int, level: int, counts: Any, rice: Any, start: int, stop: int,
    at: Any, quotients: Any, remainders: Any, signs: Any, positive: Any, negative: Any,
) -> Any:  # fmt: skip
    """Set the masks' bits of blocks start .. stop; the first block that is overrun, or -1."""
    q_previous, r_at, s_at = at[0] - 1, at[1], at[2]  # the last one of the part before
    q_index = at[0] >> 6
    q_word = np.uint64(0)
    if q_index < quotients.size:
        q_word = quotients[q_index] & (~np.uint64(0) << np.uint64(at[0] & 63))
    for block in range(start, stop):
        b = np.int64(rice[block])
        low = (np.uint64(1) << np.uint64(b)) - np.uint64(1)
        size = min(np.int64(1) << level, num_parameters - (block << level))
        first_word = (block << level) >> 6
        previous = np.int64(-1)
        for _ in range(counts[block]):
            while q_word == np.uint64(0):
                q_index += 1
                q_word = quotients[q_index]
            q_at = q_index * 64 + trailing_zeros(q_word)
            q_word &= q_word - np.uint64(1)
            gap = (q_at - q_previous - 1) << b
            q_previous = q_at
            if b:
                shift = np.uint64(r_at & 63)
                remainder = remainders[r_at >> 6] >> shift
                if np.int64(shift) + b > 64:
                    remainder |= remainders[(r_at >> 6) + 1] << (np.uint64(64) - shift)
                gap |= np.int64(remainder & low)
                r_at += b
            previous += gap + 1
            if previous >= size:
                return block
            sign = (signs[s_at >> 6] >> np.uint64(s_at & 63)) & np.uint64(1)
            s_at += 1
            bit = np.uint64(1) << np.uint64(previous & 63)
            word = first_word + (previous >> 6)
            minus = np.uint64(0) - sign
            positive[word] |= bit & ~minus
            negative[word] |= bit & minus
    return -1


def words_of(stream: bytes) -> Words:
    """A stream of bits as words, with at least one word of zeros after it."""
    words = np.zeros((len(stream) >> 3) + 2, np.uint64)
    words.view(np.uint8)[: len(stream)] = np.frombuffer(stream, np.uint8)
    return words


def count_ones(stream: bytes, rank: int) -> tuple[int, int]:
    """How many ones a stream has, and the bit after the rank-th of them (0 for rank 0).

    Where there are fewer, the second number means nothing.
    """
    words = words_of(stream)
    return int(_count_ones(words)), int(find_one(words, rank - 1)) + 1 if rank else 0


def read_streams(
    num_parameters: int,
    level: int,
    counts: NDArray[np.int64],
    rice: NDArray[np.uint8],
    quotients: bytes,
    remainders: bytes,
    signs: bytes,
) -> tuple[Words, Words, int]:
    """Masks (positive, negative) of the streams, and the first block that is overrun (-1: none).

    The caller has checked each stream's length against the tables, and that ``quotients`` has as
    many ones as there are nonzeros.
    """
    streams = [words_of(stream) for stream in (quotients, remainders, signs)]
    return read_words(num_parameters, level, counts, rice, *streams)


def read_words(
    num_parameters: int,
    level: int,
    counts: NDArray[np.int64],
    rice: NDArray[np.uint8],
    *streams: Words,
) -> tuple[Words, Words, int]:
    """`read_streams`, of streams that are words already, with a word of zeros after each."""
    words = num_words(num_parameters)
    positive, negative = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
    bits = np.stack([counts * rice, counts])
    words_per_block = (1 << level) // LANES

    def read(first_word: int, last_word: int) -> int:
        start, stop = first_word // words_per_block, -(-last_word // words_per_block)
        before = bits[:, :start].sum(axis=1)
        ones = int(before[1])
        q_at = int(find_one(streams[0], ones - 1)) + 1 if ones else 0
        at = np.array([q_at, before[0], before[1]], np.int64)
        return int(
            _read_streams(
                num_parameters, level, counts, rice, start, stop, at, *streams, positive, negative
            )
        )

    overrun = [block for block in in_threads(read, words, align=words_per_block) if block >= 0]
    return positive, negative, overrun[0] if overrun else -1
