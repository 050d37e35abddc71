"""Context coding: adaptive binary arithmetic coding of the support and the signs, for slow links.

In real adapters the density differs between tensors, rows and columns, and of the few parameters
that share a row or a column of a low-rank matrix the large ones come together and with signs that
go together. Two online logistic regressions learn that from what was coded before; a range coder
turns each decision into the bits that its probability is worth. Smaller than Golomb codes, and
slower: see `compeft_fl.codecs.auto`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.base import Codec, Part, Update, check_scales, masks_of_range
from compeft_fl.errors import CodeEndError, NonzeroCountError, ParameterError, StreamLengthError
from compeft_fl.task_vector import Layout, is_torch
from compeft_fl.ternary import TernaryVector


class Context(Codec):
    """Below the entropy of independent parameters, at tens of millions of parameters a second."""

    name, field = "context", "context"

    def encode(self, update: Update, start: int, stop: int) -> Any:
        """See `Codec.encode`."""
        from compeft_fl.kernels import cpu_context
        from compeft_fl.wire.v1 import update_pb2

        if not isinstance(update, TernaryVector):
            raise ParameterError("expected a TernaryVector for codec 'context': compress() first")
        masks = [
            mask.cpu().numpy().view(np.uint64) if is_torch(mask) else mask
            for mask in masks_of_range(update, start, stop)
        ]
        count = int(np.bitwise_count(masks[0] | masks[1]).sum())
        tensors = matrices(update.layout, start, stop)
        code = cpu_context.write_code(masks[0], masks[1], tensors, count, flat=False)
        flat = code is None
        if code is None:
            code = cpu_context.write_code(masks[0], masks[1], tensors, count, flat=True)
        return update_pb2.ContextTernary(
            scales=update.scales.tolist(), num_nonzeros=count, flat=flat, code=code
        )

    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """See `Codec.decode`. The masks are made on the CPU, and copied to another device."""
        from compeft_fl.kernels import cpu_context

        scales = check_scales(body.scales, layout)
        count, size = body.num_nonzeros, stop - start
        if count > size:
            raise NonzeroCountError(f"expected at most {size} nonzeros, found {count}")
        if body.code.endswith(b"\0"):
            raise CodeEndError("expected a code whose last byte is not 0, found one that ends on 0")
        tensors = matrices(layout, start, stop)
        positive, negative, length, found, value = cpu_context.read_code(
            body.code, tensors, count, body.flat
        )
        if len(body.code) > length:
            raise StreamLengthError(
                f"expected at most {length} bytes of code for {size} parameters, "
                f"found {len(body.code)}"
            )
        if found < count:
            raise NonzeroCountError(f"expected {count} nonzeros in code, found {found}")
        if value >= cpu_context.LOW_TOP:
            raise CodeEndError(
                "expected the code to end on the first multiple of 2^24 in its range, found "
                f"{value} above the range's low end"
            )
        if device is not None:
            from compeft_fl.kernels import torch_ops

            masks = torch_ops.upload(positive, negative, device)
            return Part(start, stop, masks=masks, scales=scales)
        return Part(start, stop, masks=(positive, negative), scales=scales)

    def max_body_bytes(self, num_parameters: int) -> int:
        """See `Codec.max_body_bytes`: at most two bits a parameter, since a code may be flat."""
        return num_parameters // 4 + 4096


def matrices(layout: Layout, start: int, stop: int) -> NDArray[np.int64]:
    """Rows and columns of the tensors in parameters ``start .. stop``; int64, shape (n, 2).

    Columns are the last axis, rows all others. A tensor that is covered in part counts as one
    column, and one without parameters not at all.
    """
    found: list[tuple[int, int]] = []
    offsets = layout.offsets
    first = max(0, int(np.searchsorted(offsets, start, side="right")) - 1)
    last = int(np.searchsorted(offsets, stop, side="left"))
    borders = offsets[first : last + 1].tolist()
    for tensor, begin, end in zip(
        layout.tensors[first:last], borders[:-1], borders[1:], strict=True
    ):
        covered = min(end, stop) - max(begin, start)
        if covered <= 0:
            continue
        columns = tensor.shape[-1] if tensor.shape and covered == tensor.size else 1
        found.append((covered // columns, columns))
    return np.array(found, np.int64).reshape(-1, 2)
