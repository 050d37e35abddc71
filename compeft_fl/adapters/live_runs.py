"""Ternary updates into a model's tensors by torch operations: what `live` does on other devices.

Some thousand tensors of an adapter would be some ten thousand small kernels of a GPU, each of which
takes longer to start than to run. So tensors that follow each other are written together, as one
vector, in runs that are no longer than what a device has to spare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import NonFiniteError
from compeft_fl.printable import quoted
from compeft_fl.task_vector import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["write_runs"]

_LONGEST: Final = 1 << 23  # parameters of a run: it takes 16 bytes each, for a moment
_DTYPES: Final = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def write_runs(
    live: Sequence[torch.Tensor],
    layout: Layout,
    masks: Sequence[Any],
    scales: NDArray[np.float32],
    start: float | Sequence[torch.Tensor],
    longest: int = _LONGEST,
) -> None:
    """Put a start plus a ternary update into tensors, to the bit as one by one.

    Parameters
    ----------
    live : sequence of torch.Tensor
        Of the layout's shapes, on any devices.
    layout : Layout
    masks : pair of ndarray of uint64, or of torch.Tensor of uint8
        Positive and negative, as `compeft_fl.ternary` has them.
    scales : ndarray of float32, shape (tensors,)
    start : float, or sequence of torch.Tensor
        One number for all, or the tensors to which the update is added.
    longest : int
        Parameters that are written together at most; a tensor is never cut.

    Raises
    ------
    NonFiniteError
        A value that a tensor's data type does not hold. Runs before it are written.
    """
    import torch

    from compeft_fl.kernels import torch_ops

    bounds = layout.offsets
    for first, last in _runs(live, layout, longest):
        device, dtype = live[first].device, live[first].dtype
        where = slice(int(bounds[first]), int(bounds[last]))
        flat = torch_ops.to_dense_range(masks, 1.0, where, device)
        sizes = [tensor.size for tensor in layout.tensors[first:last]]
        changes = list(torch.split(flat, sizes))
        torch._foreach_mul_(changes, scales[first:last].tolist())
        if isinstance(start, float):
            flat += start
        else:
            added: Any = [each.to(device).float().reshape(-1) for each in start[first:last]]
            torch._foreach_add_(changes, added)
        stored = getattr(torch, _DTYPES[layout.tensors[first].dtype])
        rounded = flat.to(stored).to(dtype)
        pieces = torch.split(rounded, sizes)
        if not bool(torch.isfinite(rounded).all()):
            wrong = next(i for i, each in enumerate(pieces) if not bool(each.isfinite().all()))
            name = layout.tensors[first + wrong].name
            raise NonFiniteError(f"expected values that {dtype} holds in tensor {quoted(name)}")
        tensors = list(live[first:last])
        torch._foreach_copy_(
            tensors, [p.view(t.shape) for p, t in zip(pieces, tensors, strict=True)]
        )


def _runs(live: Sequence[torch.Tensor], layout: Layout, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of tensors of one device and data type, in which none stands under two names."""
    first, size, seen, kind = 0, 0, set[int](), None
    for index, (tensor, spec) in enumerate(zip(live, layout.tensors, strict=True)):
        own, address = (tensor.device, tensor.dtype, spec.dtype), tensor.data_ptr()
        if index > first and (own != kind or address in seen or size + spec.size > longest):
            yield first, index
            first, size, seen = index, 0, set()
        kind = own
        size += spec.size
        seen.add(address)
    if len(live) > first:
        yield first, len(live)
