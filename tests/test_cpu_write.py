"""Ternary vectors straight into tensors: of any sizes, and not one element beside them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compeft_fl.kernels import cpu, cpu_golomb
from compeft_fl.kernels.cpu_write import (
    ADDED,
    NARROW,
    WIDE,
    PackedStreams,
    Target,
    write_masks,
    write_streams,
)

GUARD = 70
SIZES = {
    "small": [1, 63, 64, 65, 1, 2, 128, 127, 3, 1000],
    "windows": [20_000, 1, 16_384 * 3 + 5, 64, 31],
    "threads": [700_001, 64, 900_003],
}


@pytest.mark.parametrize("form", ["masks", "streams"])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.3, 1.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_tensors_of_any_sizes(sizes, density, form):
    sizes = SIZES[sizes]
    rng = np.random.default_rng(len(sizes))
    d, count = sum(sizes), len(sizes)
    bounds = np.array([0, *itertools.accumulate(sizes)], np.int64)
    kept = rng.random(d) < density
    up = rng.random(d) < 0.5
    packed = np.zeros((2, 8 * cpu.num_words(d)), np.uint8)
    for row, bits in zip(packed, (kept & up, kept & ~up), strict=True):
        row[: (d + 7) // 8] = np.packbits(bits, bitorder="little")
    positive, negative = packed.view(np.uint64)

    kinds = np.resize(np.array([NARROW, ADDED, WIDE], np.uint8), count)
    plus, minus, begin = rng.integers(1, 1 << 16, (3, count)).astype(np.uint32)
    added = kinds == ADDED
    values = rng.standard_normal((2, count)).astype(np.float32)
    plus[added], minus[added] = values[:, added].view(np.uint32)
    sources = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    for source in sources:
        source[::3] = -0.0  # whose sign stays
    starts = np.where(added, [x.ctypes.data for x in sources], begin).astype(np.uint64)

    tensors, expected = [], []
    for i, size in enumerate(sizes):
        dtype = np.uint16 if kinds[i] == NARROW else np.uint32
        tensors.append(np.full(size + 2 * GUARD, 0x5A5A, dtype))
        where = slice(bounds[i], bounds[i + 1])
        pos, neg = (kept & up)[where], (kept & ~up)[where]
        if added[i]:
            each = sources[i].copy()
            each[pos] += values[0, i]
            each[neg] += values[1, i]
            each = each.view(np.uint32)
        else:
            each = np.where(pos, plus[i], np.where(neg, minus[i], begin[i])).astype(dtype)
        expected.append(each)
    addresses = np.array([x.ctypes.data + GUARD * x.itemsize for x in tensors], np.uint64)
    target = Target(bounds, addresses, kinds, starts, plus, minus)
    if form == "masks":
        write_masks(positive, negative, target)
    else:
        plan = cpu_golomb.plan_blocks(positive, negative, d)
        streams = PackedStreams.of(cpu_golomb.write_streams(positive, negative, plan))
        write_streams(streams, target)
    for found, wanted in zip(tensors, expected, strict=True):
        assert np.array_equal(found[GUARD:-GUARD], wanted)
        assert (found[:GUARD] == 0x5A5A).all()
        assert (found[-GUARD:] == 0x5A5A).all()
