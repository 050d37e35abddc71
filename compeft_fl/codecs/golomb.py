"""Golomb-Rice codes of the gaps between nonzeros, block by block (ComPEFT section 3.3).

Of a gap and a block's Rice parameter b, gap >> b goes in unary into one stream, the low b bits into
a second, the sign into a third. The writer takes for each block the b with the fewest bits (of
equal ones the smaller), and the block size with the fewest bytes for the whole body (of equal ones
the smaller). Eq. (1)'s b* is the best b where gaps are geometric; on real adapters the density
differs between blocks, and the exact choice is below the entropy that the paper reports.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compeft_fl.codecs.base import Codec, Part, Update, check_scales, masks_of_range
from compeft_fl.errors import (
    BlockCountError,
    BlockNonzerosError,
    BlockSizeError,
    PaddingError,
    ParameterError,
    PositionError,
    RiceParameterError,
    StreamLengthError,
)
from compeft_fl.task_vector import Layout, is_torch
from compeft_fl.ternary import TernaryVector

MIN_LEVEL, MAX_LEVEL = 8, 24  # block sizes 2^8 .. 2^24
MAX_RICE = 24


class Golomb(Codec):
    """The default: sparse ternary updates at the size of their entropy."""

    name, field = "golomb", "golomb"

    def encode(self, update: Update, start: int, stop: int) -> Any:
        """See `Codec.encode`."""
        from compeft_fl.kernels import cpu_golomb
        from compeft_fl.wire.v1 import update_pb2

        if not isinstance(update, TernaryVector):
            raise ParameterError("expected a TernaryVector for codec 'golomb': compress() first")
        masks = masks_of_range(update, start, stop)
        if is_torch(masks[0]):
            from compeft_fl.kernels import torch_ops

            streams = torch_ops.write_streams(*masks, stop - start)
        else:
            plan = cpu_golomb.plan_blocks(*masks, stop - start)
            streams = cpu_golomb.write_streams(*masks, plan)
        return update_pb2.GolombTernary(
            scales=update.scales.tolist(),
            block_size=1 << streams.plan.level,
            block_nonzeros=streams.plan.nonzeros.tolist(),
            rice_parameters=streams.plan.rice.tobytes(),
            quotients=streams.quotients,
            remainders=streams.remainders,
            signs=streams.signs,
        )

    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """See `Codec.decode`."""
        from compeft_fl.kernels import cpu_golomb

        scales = check_scales(body.scales, layout)
        size, count = body.block_size, stop - start
        if size & (size - 1) or not 1 << MIN_LEVEL <= size <= 1 << MAX_LEVEL:
            raise BlockSizeError(f"expected a power of two in 2^8 .. 2^24, found {size}")
        blocks = -(-count // size)
        for table in ("block_nonzeros", "rice_parameters"):
            found = len(getattr(body, table))
            if found != blocks:
                raise BlockCountError(
                    f"expected {blocks} entries in {table}, one per block of {size}; found {found}"
                )
        rice = np.frombuffer(body.rice_parameters, np.uint8)
        if blocks and rice.max() > MAX_RICE:
            block = int(rice.argmax())
            raise RiceParameterError(
                f"expected b <= {MAX_RICE}, found {rice[block]} in block {block}"
            )
        nonzeros = np.array(body.block_nonzeros, dtype=np.int64)
        sizes = np.full(blocks, size, np.int64)
        if blocks:
            sizes[-1] = count - size * (blocks - 1)
        if (nonzeros > sizes).any():
            block = int((nonzeros > sizes).argmax())
            raise BlockNonzerosError(
                f"expected at most {sizes[block]} nonzeros in block {block}, "
                f"found {nonzeros[block]}"
            )
        total = int(nonzeros.sum())
        check_bits("remainders", body.remainders, int((nonzeros * rice).sum()))
        check_bits("signs", body.signs, total)
        _check_quotients(body.quotients, total)
        level = size.bit_length() - 1
        masks: list[Any]
        arguments = (count, level, nonzeros, rice, body.quotients, body.remainders, body.signs)
        if device is not None:
            from compeft_fl.kernels import torch_ops

            *masks, block = torch_ops.read_streams(*arguments, device=device)
        else:
            *masks, block = cpu_golomb.read_streams(*arguments)
        if block >= 0:
            raise PositionError(
                f"expected positions below {sizes[block]}, found one past the end of block {block}"
            )
        return Part(start, stop, masks=(masks[0], masks[1]), scales=scales)

    def max_body_bytes(self, num_parameters: int) -> int:
        """See `Codec.max_body_bytes`: at most 2.5 bits a parameter, and the tables."""
        return num_parameters * 5 // 16 + 4096


def check_bits(name: str, stream: bytes, bits: int) -> None:
    """A stream of a known number of bits: the right length, and nothing after its end."""
    expected = (bits + 7) >> 3
    if len(stream) != expected:
        raise StreamLengthError(
            f"expected {expected} bytes of {name} for {bits} bits, found {len(stream)}"
        )
    if bits & 7 and stream[-1] >> (bits & 7):
        raise PaddingError(f"expected zeros after bit {bits} of {name}, found set bits")


def _check_quotients(stream: bytes, nonzeros: int) -> None:
    """The stream of unary codes: one set bit per nonzero, the last of them in the last byte."""
    from compeft_fl.kernels import cpu_golomb

    ones, end = cpu_golomb.count_ones(stream, nonzeros)
    if ones < nonzeros:
        raise StreamLengthError(
            f"expected {nonzeros} codes in quotients, found {ones}: the stream is too short"
        )
    if len(stream) != (end + 7) >> 3:
        raise StreamLengthError(
            f"expected {(end + 7) >> 3} bytes of quotients for {nonzeros} codes, "
            f"found {len(stream)}"
        )
    if ones > nonzeros:
        raise PaddingError(f"expected zeros after bit {end} of quotients, found set bits")
