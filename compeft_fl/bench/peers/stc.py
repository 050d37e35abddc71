"""Sparse ternary compression: top-k, one magnitude, Golomb codes of the gaps.

Source: Sattler et al., https://arxiv.org/abs/1903.02891, algorithms 1 and 3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.bench.peers.bits import get_bits, get_unary, put_bits, put_unary
from compeft_fl.compeft import compress
from compeft_fl.errors import PaddingError, PositionError, ScaleError, StreamLengthError
from compeft_fl.task_vector import Layout, TaskVector

__all__ = ["Stc", "golomb_parameter"]


def golomb_parameter(density: float) -> int:
    """b* of the paper's eq. (17), which depends on the density alone; at least 0."""
    if density >= 1:
        return 0
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-density)
    return max(0, 1 + math.floor(math.log2(ratio)))


@njit(cache=True, nogil=True)
def _write(at: Any, negative: Any, width: int, stream: Any) -> int:
    """Each gap in Golomb-Rice code and the sign after it; returns the number of bits."""
    bit, last = 0, -1
    for i in range(at.size):
        gap = at[i] - last - 1
        bit = put_unary(stream, bit, gap >> width)
        bit = put_bits(stream, bit, gap & ((1 << width) - 1), width)
        bit = put_bits(stream, bit, 1 if negative[i] else 0, 1)
        last = at[i]
    return bit


@njit(cache=True, nogil=True)
def _read(stream: Any, count: int, width: int, scale: Any, values: Any) -> int:
    """Set the values; returns the number of bits read, -1: too few, -2: past the last parameter."""
    bit, place, end = 0, -1, 8 * stream.size
    for _ in range(count):
        quotient, bit = get_unary(stream, bit, end)
        rest, bit = get_bits(stream, bit, end, width)
        negative, bit = get_bits(stream, bit, end, 1)
        if bit < 0:
            return -1
        place += (quotient << width) + rest + 1
        if place >= values.size:
            return -2
        values[place] = -scale if negative else scale
    return bit


class Stc(PeerCodec):
    """STC at sparsity p: float32 magnitude, uint32 count, then gaps and signs in one stream.

    The values are those of this project's Golomb codec with the scale rule "mean". The codes are
    not: one parameter b* for the whole vector here, one for each block there.
    """

    family = "stc"
    source = "https://arxiv.org/abs/1903.02891"
    biased = True
    densities = (0.01, 0.05)

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        kept = compress(TaskVector(layout, values), self.density, "mean")
        width = golomb_parameter(self.density)
        signs = np.unpackbits(kept.negative.view(np.uint8), bitorder="little")
        both = np.unpackbits((kept.positive | kept.negative).view(np.uint8), bitorder="little")
        at = np.flatnonzero(both)
        gaps = np.diff(at, prepend=-1) - 1
        bits = int((gaps >> width).sum()) + at.size * (width + 2)
        stream = np.zeros((bits + 7) >> 3, np.uint8)
        _write(at, signs[at], width, stream)
        head = np.float32(kept.scales[0]).tobytes() + np.array(at.size, "<u4").tobytes()
        return head + stream.tobytes()

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        reader = Reader(blob)
        scale, count = reader.array("<f4", 1)[0], int(reader.array("<u4", 1)[0])
        if not (np.isfinite(scale) and scale >= 0):
            raise ScaleError(f"expected a finite magnitude >= 0, found {scale}")
        stream = reader.array(np.uint8, reader.left)
        values = np.zeros(layout.num_parameters, np.float32)
        bits = _read(stream, count, golomb_parameter(self.density), scale, values)
        if bits == -2:
            raise PositionError(f"expected positions below {values.size}, found one beyond")
        check_stream(stream, bits)
        return values


def check_stream(stream: Any, bits: int) -> None:
    """Raise where a stream does not end with its last code: -1 bits stands for too few."""
    if bits < 0:
        raise StreamLengthError(f"expected more codes than {stream.size} bytes hold")
    if stream.size != (bits + 7) >> 3:
        raise StreamLengthError(f"expected {(bits + 7) >> 3} bytes, found {stream.size}")
    if bits & 7 and stream[-1] & (255 >> (bits & 7)):
        raise PaddingError(f"expected zeros after bit {bits}, found set bits")
