"""Vector instructions that numba does not reach by itself, as LLVM IR: 64 lanes at a time.

One word of a bit mask stands for 64 parameters, so these work on 64 float32 values at once. The IR
names no processor: LLVM lowers it to AVX-512, AVX2, NEON or plain instructions.

Sums are defined by their order, so that every device gets the same bits: values are cut into
chunks of ``CHUNK`` = 64 rows x 64 lanes, each lane adds its rows in order in float64, and the lanes
are folded in halves (32 + 32, 16 + 16, ...). ``torch_ops`` does the same with tensors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
ROWS = 64
CHUNK = LANES * ROWS

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_VI32 = ir.VectorType(_I32, LANES)
_VF32 = ir.VectorType(ir.FloatType(), LANES)
_VF64 = ir.VectorType(ir.DoubleType(), LANES)
_MAGNITUDE = ir.Constant(_VI32, [0x7FFFFFFF] * LANES)


def _load(context: Any, builder: Any, signature: Any, args: Any, vector: Any) -> Any:
    """Load 64 elements of the array ``args[0]`` from index ``args[1]``."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    pointer = builder.gep(array.data, [args[1]])
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)


@intrinsic
def magnitude_mask(typing_context: Any, bits: Any, start: Any, threshold: Any) -> Any:
    """Bit j of the result: is the magnitude of ``bits[start + j]``, as an integer, >= threshold?"""
    signature = types.uint64(bits, types.int64, types.uint32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        magnitude = builder.and_(_load(context, builder, signature, args, _VI32), _MAGNITUDE)
        one = builder.insert_element(ir.Constant(_VI32, ir.Undefined), args[2], _I32(0))
        zeros = ir.Constant(_VI32, [0] * LANES)
        splat = builder.shuffle_vector(one, ir.Constant(_VI32, ir.Undefined), zeros)
        return builder.bitcast(builder.icmp_unsigned(">=", magnitude, splat), _I64)

    return signature, codegen


@intrinsic
def sign_mask(typing_context: Any, bits: Any, start: Any) -> Any:
    """Bit j of the result: is the sign bit of ``bits[start + j]`` set?"""
    signature = types.uint64(bits, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = _load(context, builder, signature, args, _VI32)
        return builder.bitcast(builder.icmp_signed("<", loaded, ir.Constant(_VI32, None)), _I64)

    return signature, codegen


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Index of the lowest set bit of a word that is not 0."""
    signature = types.int64(types.uint64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], _I1(1))

    return signature, codegen


@intrinsic
def bit_count(typing_context: Any, word: Any) -> Any:
    """How many bits of the word are set."""
    signature = types.int64(types.uint64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return signature, codegen


@intrinsic
def add_shifted(typing_context: Any, sums: Any, index: Any, gap: Any) -> Any:
    """Add ``gap >> b`` to ``sums[index + b]`` for b = 0 .. 7; int32."""
    signature = types.void(sums, types.int64, types.int32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        eight = ir.VectorType(_I32, 8)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), eight.as_pointer())
        undefined = ir.Constant(eight, ir.Undefined)
        one = builder.insert_element(undefined, args[2], _I32(0))
        splat = builder.shuffle_vector(one, undefined, ir.Constant(eight, [0] * 8))
        shifted = builder.lshr(splat, ir.Constant(eight, list(range(8))))
        builder.store(builder.add(builder.load(pointer, align=4), shifted), pointer, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _fold(builder: Any, vector: Any) -> Any:
    """Add the upper half of the lanes to the lower half until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        indices = ir.VectorType(_I32, lanes)
        lower = builder.shuffle_vector(vector, undefined, ir.Constant(indices, list(range(lanes))))
        upper = builder.shuffle_vector(
            vector, undefined, ir.Constant(indices, list(range(lanes, 2 * lanes)))
        )
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, _I32(0))


def _chunk_sum(term: Any) -> Any:
    """Code that adds ``term(builder, 64 float64 values, row)`` over the 64 rows of a chunk."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = cgutils.alloca_once(builder, _VF64)
        builder.store(ir.Constant(_VF64, None), total)
        with cgutils.for_range(builder, _I64(ROWS)) as loop:
            start = builder.add(args[1], builder.mul(loop.index, _I64(LANES)))
            values = _load(context, builder, signature, (args[0], start), _VF32)
            wide = builder.fpext(values, _VF64)
            addend = term(context, builder, signature, args, wide, loop.index)
            builder.store(builder.fadd(builder.load(total), addend), total)
        return _fold(builder, builder.load(total))

    return codegen


@intrinsic
def chunk_sum(typing_context: Any, values: Any, start: Any) -> Any:
    """Sum of ``values[start : start + CHUNK]`` in float64."""

    def term(_context: Any, _b: Any, _s: Any, _args: Any, wide: Any, _row: Any) -> Any:
        return wide

    return types.float64(values, types.int64), _chunk_sum(term)


@intrinsic
def chunk_sum_squares(typing_context: Any, values: Any, start: Any) -> Any:
    """Sum of the squares of ``values[start : start + CHUNK]`` in float64 (each square is exact)."""

    def term(_context: Any, builder: Any, _s: Any, _args: Any, wide: Any, _row: Any) -> Any:
        return builder.fmul(wide, wide)

    return types.float64(values, types.int64), _chunk_sum(term)


@intrinsic
def chunk_sum_kept(
    typing_context: Any, values: Any, start: Any, positive: Any, negative: Any, word: Any
) -> Any:
    """Sum of the magnitudes that a pair of masks keeps; the masks' first word is ``word``.

    A kept value has the sign that its mask says, so +x or -x is its magnitude.
    """
    signature = types.float64(values, types.int64, positive, negative, types.int64)

    def term(context: Any, builder: Any, signature: Any, args: Any, wide: Any, row: Any) -> Any:
        lanes = ir.VectorType(_I1, LANES)
        index = builder.add(args[4], row)
        zero = ir.Constant(_VF64, None)
        masks = []
        for which in (2, 3):
            array = context.make_array(signature.args[which])(context, builder, args[which])
            bits = builder.load(builder.gep(array.data, [index]))
            masks.append(builder.bitcast(bits, lanes))
        minus = builder.fsub(ir.Constant(_VF64, [-0.0] * LANES), wide)
        return builder.select(masks[0], wide, builder.select(masks[1], minus, zero))

    return signature, _chunk_sum(term)
