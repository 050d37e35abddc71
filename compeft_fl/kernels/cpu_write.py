"""Ternary vectors straight into the tensors of a model, for the CPU: no dense vector between.

A flat vector's tensors lie anywhere in memory, so the kernels take their addresses. What a nonzero
becomes is the same for all of a tensor, but for its sign: two patterns of bits, in the tensor's own
data type, which the caller has rounded. Only where a start differs from place to place are floats
added, and those are float32.

The start is written just ahead of the nonzeros, some thousand parameters at a time: they find it in
the core's cache, and memory is passed over once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from compeft_fl.kernels.cpu import Words, in_threads, num_words
from compeft_fl.kernels.cpu_golomb import Streams, find_one, words_of
from compeft_fl.kernels.llvm import LANES, trailing_zeros

__all__ = ["PackedStreams", "Target", "write_masks", "write_streams"]

WIDE, NARROW, ADDED = 0, 1, 2  # 32 bits are stored, 16 bits are stored, a float32 is added
_AHEAD = 14  # the start is written 2^14 parameters ahead at most


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


def _at(bits: Any) -> Any:
    """The intrinsic that makes a pointer to such integers of an address."""

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        kind = types.CPointer(bits)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.uint64), codegen

    return pointer


_at_16, _at_32 = _at(types.uint16), _at(types.uint32)


@njit(nogil=True, cache=True)
def _write_start(
    tensor: int, begin: int, end: int, bounds: Any, addresses: Any, kinds: Any, starts: Any
) -> int:
    """Put the start into a range of the flat vector, from a tensor on; the tensor where it ends."""
    while begin < end:
        while begin >= bounds[tensor + 1]:
            tensor += 1
        stop = min(end, bounds[tensor + 1])
        first, last = begin - bounds[tensor], stop - bounds[tensor]
        address, size = addresses[tensor], bounds[tensor + 1] - bounds[tensor]
        if kinds[tensor] == NARROW:
            carray(_at_16(address), size)[first:last] = np.uint16(starts[tensor])
        elif kinds[tensor] == WIDE:
            carray(_at_32(address), size)[first:last] = np.uint32(starts[tensor])
        else:
            source = carray(_at_32(starts[tensor]), size)
            carray(_at_32(address), size)[first:last] = source[first:last]
        begin = stop
    return tensor


@njit(nogil=True, cache=True)
def _write_masks(
    positive: Any, negative: Any, bounds: Any, addresses: Any, kinds: Any, starts: Any, plus: Any,
    minus: Any, start: int, stop: int,
) -> None:  # fmt: skip
    tensor = np.searchsorted(bounds, start * LANES, side="right") - 1
    ahead, written, end = tensor, start * LANES, min(stop * LANES, bounds[-1])
    for word in range(start, stop):
        down = negative[word]
        rest = positive[word] | down
        while rest != np.uint64(0):
            lane = trailing_zeros(rest)
            rest &= rest - np.uint64(1)
            i = word * LANES + lane
            if i >= written:
                until = min(((i >> _AHEAD) + 1) << _AHEAD, end)
                ahead = _write_start(ahead, written, until, bounds, addresses, kinds, starts)
                written = until
            while i >= bounds[tensor + 1]:
                tensor += 1
            bits = minus[tensor] if (down >> np.uint64(lane)) & np.uint64(1) else plus[tensor]
            _store(addresses[tensor], np.int64(i - bounds[tensor]), kinds[tensor], bits)
    _write_start(ahead, written, end, bounds, addresses, kinds, starts)


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
    ahead, written, end = tensor, start << level, min(stop << level, bounds[-1])
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
            if previous >= written:
                until = min(((previous >> _AHEAD) + 1) << _AHEAD, end)
                ahead = _write_start(ahead, written, until, bounds, addresses, kinds, starts)
                written = until
            while previous >= bounds[tensor + 1]:
                tensor += 1
            bits = minus[tensor] if sign else plus[tensor]
            _store(addresses[tensor], np.int64(previous - bounds[tensor]), kinds[tensor], bits)
    _write_start(ahead, written, end, bounds, addresses, kinds, starts)


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
