"""Ternary vectors straight into the tensors of a model, for the CPU: no dense vector between.

A flat vector's tensors lie anywhere in memory, so the kernels take their addresses. What a nonzero
becomes is the same for all of a tensor, but for its sign: two patterns of bits, in the tensor's own
data type, which the caller has rounded. Only where a start differs from place to place are floats
added, and those are float32.

64 parameters, a word of each mask, are written at once, zeros and all: memory is passed over once,
and no branch depends on where the nonzeros are. Streams are read into masks of a few thousand
parameters at a time, which stay in the core's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Words, in_threads, num_words
from compeft_fl.kernels.cpu_golomb import Streams, find_one, words_of
from compeft_fl.kernels.llvm import LANES, trailing_zeros

__all__ = ["PackedStreams", "Target", "write_masks", "write_streams"]

WIDE, NARROW, ADDED = 0, 1, 2  # 32 bits are stored, 16 bits are stored, a float32 is added
_WINDOW = 256  # words of masks that streams are read into


@dataclass(frozen=True)
class Target:
    """Where a flat vector's tensors lie, and what a nonzero of each becomes.

    Attributes
    ----------
    bounds : ndarray of int64, shape (tensors + 1,)
        Where each tensor starts in the flat vector, and where the last ends.
    addresses : ndarray of uint64, shape (tensors,)
        Of the first element of each; contiguous, row-major.
    kinds : ndarray of uint8, shape (tensors,)
        `WIDE`, `NARROW` or `ADDED`.
    starts : ndarray of uint64, shape (tensors,)
        The bits of the start; of `ADDED`, the address of as many float32, contiguous.
    plus, minus : ndarray of uint32, shape (tensors,)
        The bits that are stored, or those of the float32 that is added.
    """

    bounds: NDArray[np.int64]
    addresses: NDArray[np.uint64]
    kinds: NDArray[np.uint8]
    starts: NDArray[np.uint64]
    plus: NDArray[np.uint32]
    minus: NDArray[np.uint32]


@dataclass(frozen=True)
class PackedStreams:
    """A ternary vector as its Golomb-Rice streams, ready to be read: what it takes as bytes.

    Attributes
    ----------
    level : int
        Blocks have 2^level parameters.
    nonzeros : ndarray of uint16 or uint32
        Per block.
    rice : ndarray of uint8
        Per block.
    quotients, remainders, signs : ndarray of uint64
        The streams, with a word of zeros after each.
    """

    level: int
    nonzeros: NDArray[Any]
    rice: NDArray[np.uint8]
    quotients: Words
    remainders: Words
    signs: Words

    @classmethod
    def of(cls, streams: Streams) -> PackedStreams:
        """From what `cpu_golomb.write_streams` gives."""
        plan = streams.plan
        counts = plan.nonzeros.astype(np.uint16 if plan.level < 16 else np.uint32)
        words = (words_of(each) for each in (streams.quotients, streams.remainders, streams.signs))
        return cls(plan.level, counts, plan.rice, *words)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        arrays = (self.nonzeros, self.rice, self.quotients, self.remainders, self.signs)
        return sum(array.nbytes for array in arrays)


@intrinsic
def _store(typing_context: Any, address: Any, index: Any, kind: Any, bits: Any) -> Any:
    """Put ``bits`` at an index of the tensor at an address, as its kind says."""
    signature = types.void(types.uint64, types.int64, types.uint8, types.uint32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, index, kind, bits = args
        i16, i32, f32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
        wide = builder.gep(builder.inttoptr(address, i32.as_pointer()), [index])
        is_kind = [builder.icmp_unsigned("==", kind, ir.Constant(kind.type, k)) for k in range(2)]
        with builder.if_else(is_kind[WIDE]) as (then, otherwise):
            with then:
                builder.store(bits, wide, align=4)
            with otherwise, builder.if_else(is_kind[NARROW]) as (narrow, added):
                with narrow:
                    place = builder.gep(builder.inttoptr(address, i16.as_pointer()), [index])
                    builder.store(builder.trunc(bits, i16), place, align=2)
                with added:
                    place = builder.bitcast(wide, f32.as_pointer())
                    total = builder.fadd(builder.load(place, align=4), builder.bitcast(bits, f32))
                    builder.store(total, place, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _lanes(builder: Any, value: Any, lane: Any) -> Any:
    """64 times an integer's lowest bits, as a vector."""
    vector = ir.VectorType(lane, LANES)
    value = builder.trunc(value, lane) if value.type.width > lane.width else value
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _place(builder: Any, address: Any, index: Any, lane: Any) -> Any:
    """A pointer to 64 elements of the tensor at an address."""
    pointer = builder.gep(builder.inttoptr(address, lane.as_pointer()), [index])
    return builder.bitcast(pointer, ir.VectorType(lane, LANES).as_pointer())


def _storing(width: int) -> Any:
    """The intrinsic that stores one of three patterns of so many bits in each of 64 places."""

    @intrinsic
    def store(
        typing_context: Any, address: Any, index: Any, positive: Any, negative: Any, plus: Any,
        minus: Any, start: Any,
    ) -> Any:  # fmt: skip
        u64, u32 = types.uint64, types.uint32
        signature = types.void(u64, types.int64, u64, u64, u32, u32, u32)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lane, masks = ir.IntType(width), ir.VectorType(ir.IntType(1), LANES)
            plus, minus, start = (_lanes(builder, each, lane) for each in args[4:])
            value = builder.select(builder.bitcast(args[3], masks), minus, start)
            value = builder.select(builder.bitcast(args[2], masks), plus, value)
            builder.store(value, _place(builder, args[0], args[1], lane), align=width // 8)
            return context.get_dummy_value()

        return signature, codegen

    return store


_store_64_narrow, _store_64_wide = _storing(16), _storing(32)


@intrinsic
def _store_64_added(
    typing_context: Any, address: Any, index: Any, positive: Any, negative: Any, plus: Any,
    minus: Any, source: Any,
) -> Any:  # fmt: skip
    """Put 64 float32 of a source there, with one of two added where a mask says so."""
    u64, u32 = types.uint64, types.uint32
    signature = types.void(u64, types.int64, u64, u64, u32, u32, u64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane, masks = ir.IntType(32), ir.VectorType(ir.IntType(1), LANES)
        floats = ir.VectorType(ir.FloatType(), LANES)
        first = builder.load(_place(builder, args[6], args[1], lane), align=4)
        positive, negative = (builder.bitcast(each, masks) for each in args[2:4])
        plus, minus = (
            builder.fadd(
                builder.bitcast(first, floats), builder.bitcast(_lanes(builder, each, lane), floats)
            )
            for each in args[4:6]
        )
        # Where nothing is added the source's bits stay as they are: -0 + 0 would be 0.
        value = builder.select(negative, minus, builder.bitcast(first, floats))
        value = builder.bitcast(builder.select(positive, plus, value), first.type)
        builder.store(value, _place(builder, args[0], args[1], lane), align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _load(typing_context: Any, address: Any, index: Any) -> Any:
    """The 32 bits at an index of the tensor at an address."""
    signature = types.uint32(types.uint64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]), align=4)

    return signature, codegen


@njit(nogil=True, cache=True)
def _write_words(
    positive: Any, negative: Any, first: int, tensor: int, bounds: Any, addresses: Any, kinds: Any,
    starts: Any, plus: Any, minus: Any, start: int, stop: int,
) -> int:  # fmt: skip
    """Write the words from start to stop of two masks, whose arrays begin at a word ``first``.

    The search for their tensors begins at one of them; returns that of the last.
    """
    end, word = bounds[-1], start
    while word < stop:
        i = np.int64(word) * LANES
        while i >= bounds[tensor + 1]:
            tensor += 1
        until = min(stop, bounds[tensor + 1] // LANES)  # words that are within this tensor
        address, at = addresses[tensor], i - bounds[tensor]
        up, down, begin = plus[tensor], minus[tensor], starts[tensor]
        if word < until and kinds[tensor] == NARROW:
            for w in range(word, until):
                _store_64_narrow(
                    address, at + (w - word) * LANES, positive[w - first], negative[w - first],
                    up, down, np.uint32(begin),
                )  # fmt: skip
            word = until
        elif word < until and kinds[tensor] == WIDE:
            for w in range(word, until):
                _store_64_wide(
                    address, at + (w - word) * LANES, positive[w - first], negative[w - first],
                    up, down, np.uint32(begin),
                )  # fmt: skip
            word = until
        elif word < until:
            for w in range(word, until):
                _store_64_added(
                    address, at + (w - word) * LANES, positive[w - first], negative[w - first],
                    up, down, begin,
                )  # fmt: skip
            word = until
        else:  # a tensor ends here: one by one
            for lane in range(min(LANES, end - i)):
                j = i + lane
                while j >= bounds[tensor + 1]:
                    tensor += 1
                address, at, kind = addresses[tensor], j - bounds[tensor], kinds[tensor]
                if kind == ADDED:
                    _store(address, at, np.uint8(WIDE), _load(starts[tensor], at))
                else:
                    _store(address, at, kind, np.uint32(starts[tensor]))
                bit = np.uint64(1) << np.uint64(lane)
                if positive[word - first] & bit:
                    _store(address, at, kind, plus[tensor])
                elif negative[word - first] & bit:
                    _store(address, at, kind, minus[tensor])
            word += 1
    return tensor


@njit(nogil=True, cache=True)
def _write_masks(
    positive: Any, negative: Any, bounds: Any, addresses: Any, kinds: Any, starts: Any, plus: Any,
    minus: Any, start: int, stop: int,
) -> None:  # fmt: skip
    tensor = np.searchsorted(bounds, start * LANES, side="right") - 1
    _write_words(
        positive, negative, 0, tensor, bounds, addresses, kinds, starts, plus, minus, start, stop
    )


def write_masks(positive: Words, negative: Words, target: Target) -> None:
    """Put the start, and the nonzeros of two bit masks, into the target's tensors."""
    in_threads(
        lambda a, b: _write_masks(
            positive, negative, target.bounds, target.addresses, target.kinds, target.starts,
            target.plus, target.minus, a, b,
        ),
        positive.size,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def _flush(
    positive: Any, negative: Any, first: int, last: int, tensor: int, bounds: Any, addresses: Any,
    kinds: Any, starts: Any, plus: Any, minus: Any,
) -> int:  # fmt: skip
    """Write a window's words before ``last``, and empty it; returns the tensor it ends in."""
    tensor = _write_words(
        positive, negative, first, tensor, bounds, addresses, kinds, starts, plus, minus, first,
        min(first + _WINDOW, last),
    )  # fmt: skip
    positive[:] = 0
    negative[:] = 0
    return tensor


@njit(nogil=True, cache=True)
def _write_streams(
    level: int, counts: Any, rice: Any, start: int, stop: int, at: Any,
    quotients: Any, remainders: Any, signs: Any,
    bounds: Any, addresses: Any, kinds: Any, starts: Any, plus: Any, minus: Any,
) -> None:  # fmt: skip
    """As `cpu_golomb.read_streams` reads, but what is read goes to where it belongs."""
    q_previous, r_at, s_at = at[0] - 1, at[1], at[2]
    q_index = at[0] >> 6
    q_word = np.uint64(0)
    if q_index < quotients.size:
        q_word = quotients[q_index] & (~np.uint64(0) << np.uint64(at[0] & 63))
    tensor = np.searchsorted(bounds, start << level, side="right") - 1
    positive, negative = np.zeros(_WINDOW, np.uint64), np.zeros(_WINDOW, np.uint64)
    first = (start << level) // LANES  # of the window
    last = (min(stop << level, bounds[-1]) + LANES - 1) // LANES
    for block in range(start, stop):
        b = np.int64(rice[block])
        low = (np.uint64(1) << np.uint64(b)) - np.uint64(1)
        previous = (np.int64(block) << level) - 1
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
            sign = (signs[s_at >> 6] >> np.uint64(s_at & 63)) & np.uint64(1)
            s_at += 1
            while previous >= (first + _WINDOW) * LANES:
                tensor = _flush(
                    positive, negative, first, last, tensor, bounds, addresses, kinds, starts,
                    plus, minus,
                )  # fmt: skip
                first += _WINDOW
            word = (previous >> 6) - first
            bit = np.uint64(1) << np.uint64(previous & 63)
            # Whichever sign it has: a branch would be wrong every other time.
            negative[word] |= bit * sign
            positive[word] |= bit * (sign ^ np.uint64(1))
    while first < last:
        tensor = _flush(
            positive, negative, first, last, tensor, bounds, addresses, kinds, starts, plus, minus
        )
        first += _WINDOW


def write_streams(packed: PackedStreams, target: Target) -> None:
    """Put the start, and the nonzeros of Golomb-Rice streams, into the target's tensors.

    The streams are `cpu_golomb.write_streams`'s own: no position in them is past the last tensor.
    """
    counts = packed.nonzeros.astype(np.int64)
    bits = np.stack([counts * packed.rice, counts])
    words_per_block = (1 << packed.level) // LANES

    def write(first_word: int, last_word: int) -> None:
        start, stop = first_word // words_per_block, -(-last_word // words_per_block)
        before = bits[:, :start].sum(axis=1)
        ones = int(before[1])
        q_at = int(find_one(packed.quotients, ones - 1)) + 1 if ones else 0
        at = np.array([q_at, before[0], before[1]], np.int64)
        _write_streams(
            packed.level, counts, packed.rice, start, stop, at,
            packed.quotients, packed.remainders, packed.signs,
            target.bounds, target.addresses, target.kinds, target.starts, target.plus,
            target.minus,
        )  # fmt: skip

    in_threads(write, num_words(int(target.bounds[-1])), align=words_per_block)
