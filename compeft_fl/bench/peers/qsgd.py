"""QSGD: values rounded at random to s levels of their bucket's norm, in Elias codes.

Source: Alistarh et al., https://arxiv.org/abs/1610.02132, section 3. The paper's recursive Elias
code is replaced by Elias gamma, which is as short or shorter for numbers below 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.bench.peers.bits import gamma_bits, get_bits, get_gamma, put_bits, put_gamma
from compeft_fl.bench.peers.stc import check_stream
from compeft_fl.errors import PositionError, ScaleError
from compeft_fl.task_vector import Layout

__all__ = ["BUCKET", "Qsgd16", "QsgdTernary"]

BUCKET = 512  # values to a norm, as in the paper's experiments


@njit(cache=True, nogil=True)
def _norms(values: Any, norms: Any) -> None:
    for bucket in range(norms.size):
        total = 0.0
        for i in range(bucket * BUCKET, min(values.size, (bucket + 1) * BUCKET)):
            total += float(values[i]) * float(values[i])
        norms[bucket] = np.float32(np.sqrt(total))


@njit(cache=True, nogil=True)
def _round(values: Any, norms: Any, levels: int, uniform: Any, out: Any) -> int:
    """Signed levels, unbiased; returns how many bits their codes take."""
    bits, last = 0, -1
    for i in range(values.size):
        norm = norms[i // BUCKET]
        if norm == 0:
            continue
        exact = min(abs(float(values[i])) / float(norm), 1.0) * levels
        level = int(exact)
        if uniform[i] < exact - level:
            level += 1
        if level:
            out[i] = level if values[i] > 0 else -level
            bits += gamma_bits(i - last) + 1 + gamma_bits(level)
            last = i
    return bits


@njit(cache=True, nogil=True)
def _write(rounded: Any, stream: Any) -> None:
    """Of each level that is not 0: the distance to the one before, the sign, the level."""
    bit, last = 0, -1
    for i in range(rounded.size):
        if rounded[i]:
            bit = put_gamma(stream, bit, i - last)
            bit = put_bits(stream, bit, 1 if rounded[i] < 0 else 0, 1)
            bit = put_gamma(stream, bit, abs(rounded[i]))
            last = i


@njit(cache=True, nogil=True)
def _read(stream: Any, count: int, levels: int, norms: Any, values: Any) -> int:
    """Set the values; returns the number of bits read, -1: too few, -2: beyond a bound."""
    bit, place, end = 0, -1, 8 * stream.size
    for _ in range(count):
        gap, bit = get_gamma(stream, bit, end)
        negative, bit = get_bits(stream, bit, end, 1)
        level, bit = get_gamma(stream, bit, end)
        if bit < 0:
            return -1
        place += gap
        if place >= values.size or level > levels:
            return -2
        value = np.float32(float(norms[place // BUCKET]) * level / levels)
        values[place] = -value if negative else value
    return bit


class _Qsgd(PeerCodec):
    """float32 norms, uint32 count of levels that are not 0, then one stream of codes."""

    source = "https://arxiv.org/abs/1610.02132"
    levels: int

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        uniform = np.random.default_rng(seed).random(values.size, np.float32)
        norms = np.zeros(-(-values.size // BUCKET), np.float32)
        rounded = np.zeros(values.size, np.int8)
        _norms(values, norms)
        if not np.isfinite(norms).all():
            raise ScaleError("expected norms that float32 holds, found larger values")
        bits = _round(values, norms, self.levels, uniform, rounded)
        stream = np.zeros((bits + 7) >> 3, np.uint8)
        _write(rounded, stream)
        count = np.array(np.count_nonzero(rounded), "<u4")
        return norms.astype("<f4").tobytes() + count.tobytes() + stream.tobytes()

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        values = np.zeros(layout.num_parameters, np.float32)
        reader = Reader(blob)
        norms = reader.array("<f4", -(-values.size // BUCKET))
        if not (np.isfinite(norms) & (norms >= 0)).all():
            raise ScaleError("expected finite norms >= 0, found others")
        count = int(reader.array("<u4", 1)[0])
        stream = reader.array(np.uint8, reader.left)
        bits = _read(stream, count, self.levels, norms, values)
        if bits == -2:
            raise PositionError(f"expected positions below {values.size}, levels to {self.levels}")
        check_stream(stream, bits)
        return values


class QsgdTernary(_Qsgd):
    """s = 1, the paper's sparse regime: about sqrt(512) of 512 values are not 0."""

    family = "qsgd-s1"
    levels = 1


class Qsgd16(_Qsgd):
    """s = 16, near the paper's dense regime of sqrt(n) levels."""

    family = "qsgd-s16"
    levels = 16
