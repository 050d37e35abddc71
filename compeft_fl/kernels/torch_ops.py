"""The kernels of `cpu`, `cpu_select` and `cpu_golomb` in torch operations, for any other device.

Every function gives the bytes that the CPU's gives, bit for bit: positions and bits are integers,
and sums are formed in the order that `llvm` defines. Masks are uint8 tensors with the bytes of the
CPU's words, so that only compressed bytes need to cross the bus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compeft_fl.kernels.support import NUM_BUCKETS, REST_BITS, best_threshold

if TYPE_CHECKING:
    from compeft_fl.kernels.cpu_golomb import Plan, Streams

Tensor = torch.Tensor
_LANES = _ROWS = 64
_CHUNK = _LANES * _ROWS
_MAX_CHUNKS = 1 << 12  # so many chunks of values at a time are widened to float64
_MIN_LEVEL, _MAX_LEVEL = 8, 24


# --- masks ------------------------------------------------------------------------------------


def pack(mask: Tensor, num_bits: int | None = None) -> Tensor:
    """Booleans, shape (d,), as bytes, LSB first, padded to whole 64-bit words."""
    size = ((mask.numel() if num_bits is None else num_bits) + 63) // 64 * 64
    padded = torch.zeros(size, dtype=torch.uint8, device=mask.device)
    padded[: mask.numel()] = mask
    bits = padded.view(-1, 8)
    out = bits[:, 0].clone()
    for i in range(1, 8):
        out |= bits[:, i] << i
    return out


def unpack(packed: Tensor, num_bits: int) -> Tensor:
    """The first ``num_bits`` bits as booleans."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:num_bits].bool()


def upload(positive: Any, negative: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Masks of the CPU as masks of a device."""
    masks = (torch.from_numpy(mask.view(np.uint8)).to(device) for mask in (positive, negative))
    return next(masks), next(masks)


def to_dense(
    masks: tuple[Tensor, Tensor], scales: NDArray[np.float32], sizes: Sequence[int]
) -> Tensor:
    """The dense vector, float32, shape (d,), of the two masks and one scale or one a tensor."""
    device = masks[0].device
    positive, negative = (unpack(mask, sum(sizes)) for mask in masks)
    each = torch.from_numpy(scales).to(device)
    if scales.size > 1:
        each = torch.repeat_interleave(each, torch.tensor(sizes, device=device))
    zero = torch.zeros((), device=device)
    return torch.where(positive, each, torch.where(negative, -each, zero))


def to_dense_range(masks: Sequence[Any], scale: float, where: slice, device: Any) -> Tensor:
    """`to_dense` of the parameters of one slice and one scale; masks of the CPU, or the device."""
    first, last = where.start >> 3, (where.stop + 7) >> 3
    signs = []
    for mask in masks:
        packed = mask if isinstance(mask, Tensor) else torch.from_numpy(mask.view(np.uint8))
        bits = unpack(packed[first:last].to(device), 8 * (last - first))
        signs.append(bits[where.start & 7 :][: where.stop - where.start].float())
    return (signs[0] - signs[1]) * scale


# --- top-k, the best support, and sums ------------------------------------------------------------


def select_top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """See `cpu_select.select_top_k`."""
    if not bool(torch.isfinite(values).all()):
        return None
    magnitudes = values.contiguous().view(torch.int32) & 0x7FFFFFFF
    threshold = max(1, _kth_largest(magnitudes, k))
    kept = magnitudes > threshold
    ties = k - int(kept.sum())
    equal = (magnitudes == threshold).nonzero().view(-1)[:ties]
    kept[equal] = True
    return pack(kept & (values > 0)), pack(kept & (values < 0))


def _kth_largest(magnitudes: Tensor, k: int) -> int:
    """The k-th largest of int32 values >= 0, by counting first their upper, then lower 16 bits.

    On a GPU that takes some passes over memory, where `torch.kthvalue` takes hundreds.
    """
    upper = magnitudes >> 16
    bucket, left = _bucket_of(torch.bincount(upper, minlength=1 << 15), k)
    lower = magnitudes[upper == bucket] & 0xFFFF
    rest, _ = _bucket_of(torch.bincount(lower, minlength=1 << 16), left)
    return (bucket << 16) | rest


def _bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th from the top, and which of its own it is, from 1."""
    at_least = counts.flip(0).cumsum(0)
    below = int((at_least < k).sum())
    before = int(at_least[below - 1]) if below else 0
    return counts.numel() - 1 - below, k - before


def select_best(values: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """See `cpu_select.select_best`."""
    masks = select_top_k(values, k)
    if masks is None:
        return None
    kept = unpack(masks[0] | masks[1], values.numel())
    magnitudes = values.contiguous().view(torch.int32) & 0x7FFFFFFF
    listed = magnitudes[kept]
    buckets = (listed >> REST_BITS).long()
    counts = _segment_sums(torch.ones_like(buckets), buckets, NUM_BUCKETS)
    rests = _segment_sums((listed & ((1 << REST_BITS) - 1)).long(), buckets, NUM_BUCKETS)

    def members(wanted: NDArray[np.bool_]) -> NDArray[np.uint32]:
        chosen = torch.from_numpy(wanted).to(values.device)[buckets]
        found: NDArray[np.uint32] = listed[chosen].cpu().numpy().view(np.uint32)
        return found

    threshold = best_threshold(counts.cpu().numpy(), rests.cpu().numpy(), members)
    if not threshold:
        return masks
    enough = pack(magnitudes >= threshold)
    return masks[0] & enough, masks[1] & enough


def _fixed_order_sum(values: Tensor, term: Any) -> float:
    """Sum of ``term(part, its start)`` in the order of `llvm`: rows, then lanes in halves."""
    sums: list[float] = []
    step = _CHUNK * _MAX_CHUNKS
    for start in range(0, max(1, values.numel()), step):
        part = values[start : start + step]
        if part.numel() % _CHUNK or part.numel() == 0:
            part = torch.nn.functional.pad(part, (0, _CHUNK - part.numel() % _CHUNK))
        terms = term(part.double(), start).view(-1, _ROWS, _LANES)
        total = torch.zeros_like(terms[:, 0])
        for row in range(_ROWS):
            total = total + terms[:, row]
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        sums += total.view(-1).tolist()
    return math.fsum(sums)


def sum_values(values: Tensor) -> float:
    """See `cpu.sum_values`."""
    return _fixed_order_sum(values, lambda part, _: part)


def sum_squares(values: Tensor) -> float:
    """See `cpu.sum_squares`."""
    return _fixed_order_sum(values, lambda part, _: part * part)


def sum_kept(values: Tensor, positive: Tensor, negative: Tensor) -> float:
    """See `cpu.sum_kept`."""

    def kept(part: Tensor, start: int) -> Tensor:
        first = start // 8
        packed = (positive | negative)[first : first + (part.numel() + 7) // 8]
        mask = torch.zeros(part.numel(), dtype=torch.bool, device=part.device)
        bits = unpack(packed, part.numel())
        mask[: bits.numel()] = bits
        return torch.where(mask, part.abs(), torch.zeros((), dtype=part.dtype, device=part.device))

    return _fixed_order_sum(values, kept)


# --- Golomb-Rice streams --------------------------------------------------------------------------


def _segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums of int64 values by segment; exact, so in any order."""
    out = torch.zeros(count, dtype=torch.int64, device=values.device)
    return out.index_add_(0, segments, values)


def _gaps(positions: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Block and gap of each nonzero, in blocks of 2^level."""
    blocks = positions >> level
    starts = blocks << level
    before = torch.cat([positions.new_tensor([-1]), positions[:-1]])
    return blocks, positions - torch.maximum(before, starts - 1) - 1


def _plan(positions: Tensor, num_parameters: int) -> Plan:
    """See `cpu_golomb.plan_blocks`."""
    from compeft_fl.kernels.cpu_golomb import Plan

    best: Plan | None = None
    for level in range(_MIN_LEVEL, _MAX_LEVEL + 1):
        count = -(-num_parameters // (1 << level))
        blocks, gaps = _gaps(positions, level)
        borders = torch.searchsorted(blocks, torch.arange(count + 1, device=positions.device))
        counts = borders.diff()
        cost = torch.empty((level + 1, count), dtype=torch.int64, device=positions.device)
        for b in range(level + 1):
            sums = torch.nn.functional.pad((gaps >> b).cumsum(0), (1, 0))[borders]
            cost[b] = sums.diff() + counts * (b + 1)
        rice = cost.min(dim=0).values == cost  # of equal costs the smallest b
        chosen = rice.to(torch.uint8).argmax(dim=0)
        quotient_bits = cost.gather(0, chosen[None])[0] - counts * chosen
        varints = torch.ones_like(counts)
        for bits in (7, 14, 21):
            varints += counts >= 1 << bits
        quotients, remainders, table = torch.stack(
            [quotient_bits.sum(), (counts * chosen).sum(), varints.sum()]
        ).tolist()
        total = _varint_size(1 << level)
        for size in ((quotients + 7) >> 3, (remainders + 7) >> 3, table, count):
            total += 1 + _varint_size(size) + size if size else 0
        if best is None or total < best.total_bytes:
            best = Plan(
                level,
                counts.to(torch.int32).cpu().numpy(),
                chosen.to(torch.uint8).cpu().numpy(),
                quotient_bits.cpu().numpy(),
                total,
            )
        if count == 1:
            break
    assert best is not None
    return best


def _varint_size(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _to_bytes(bits: Tensor, count: int) -> bytes:
    """Booleans as a stream of ``count`` bits."""
    return pack(bits, count).cpu().numpy().tobytes()[: (count + 7) >> 3]


def write_streams(positive: Tensor, negative: Tensor, num_parameters: int) -> Streams:
    """See `cpu_golomb.plan_blocks` and `cpu_golomb.write_streams`."""
    from compeft_fl.kernels.cpu_golomb import Streams

    device = positive.device
    minus = unpack(negative, num_parameters)
    positions = (unpack(positive, num_parameters) | minus).nonzero().view(-1)
    plan = _plan(positions, num_parameters)
    blocks, gaps = _gaps(positions, plan.level)
    b = torch.from_numpy(plan.rice).to(device).long()[blocks]

    ends = torch.cumsum((gaps >> b) + 1, 0)
    length = int(ends[-1]) if ends.numel() else 0
    quotients = torch.zeros(length, dtype=torch.bool, device=device)
    quotients[ends - 1] = True

    starts = torch.cumsum(b, 0) - b
    length_r = int(b.sum())
    remainders = torch.zeros(length_r, dtype=torch.bool, device=device)
    for bit in range(int(b.max()) if b.numel() else 0):
        has = b > bit
        remainders[(starts + bit)[has]] = ((gaps[has] >> bit) & 1).bool()
    return Streams(
        plan,
        _to_bytes(quotients, length),
        _to_bytes(remainders, length_r),
        _to_bytes(minus[positions], positions.numel()),
    )


def read_streams(
    num_parameters: int,
    level: int,
    counts: NDArray[np.int64],
    rice: NDArray[np.uint8],
    quotients: bytes,
    remainders: bytes,
    signs: bytes,
    *,
    device: Any,
) -> tuple[Tensor, Tensor, int]:
    """See `cpu_golomb.read_streams`."""
    streams = [
        torch.from_numpy(np.frombuffer(stream, np.uint8).copy()).to(device)
        for stream in (quotients, remainders, signs)
    ]
    per_block = torch.from_numpy(counts).to(device)
    blocks = torch.repeat_interleave(torch.arange(counts.size, device=device), per_block)
    b = torch.from_numpy(rice.astype(np.int64)).to(device)[blocks]
    total = int(counts.sum())

    ends = unpack(streams[0], 8 * len(quotients)).nonzero().view(-1)
    gaps = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1 << b
    starts = torch.cumsum(b, 0) - b
    bits = unpack(streams[1], 8 * len(remainders))
    for bit in range(int(b.max()) if total else 0):
        has = b > bit
        gaps[has] |= bits[(starts + bit)[has]].long() << bit

    # Position in its block: the sum of the block's gaps so far, and one for each nonzero before.
    along = torch.cumsum(gaps + 1, 0)
    firsts = torch.cumsum(per_block, 0) - per_block
    before = torch.cat([along.new_zeros(1), along])[firsts]
    inside = along - before[blocks] - 1
    sizes = torch.full((counts.size,), 1 << level, device=device)
    if counts.size:
        sizes[-1] = num_parameters - (counts.size - 1 << level)
    overrun = (inside >= sizes[blocks]).nonzero().view(-1)
    size = (num_parameters + 63) // 64 * 64
    masks = [torch.zeros(size, dtype=torch.bool, device=device) for _ in range(2)]
    if overrun.numel():
        return pack(masks[0]), pack(masks[1]), int(blocks[overrun[0]])
    positions = (blocks << level) + inside
    minus = unpack(streams[2], total)
    masks[0][positions[~minus]] = True
    masks[1][positions[minus]] = True
    return pack(masks[0]), pack(masks[1]), -1
