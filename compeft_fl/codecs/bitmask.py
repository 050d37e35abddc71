"""Two bit masks, one for +scale and one for -scale (ComPEFT section 3.3): two bits a parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.base import Codec, Part, Update, check_scales, masks_of_range
from compeft_fl.errors import MaskOverlapError, PaddingError, ParameterError, StreamLengthError
from compeft_fl.task_vector import Layout, is_torch
from compeft_fl.ternary import TernaryVector


class Bitmask(Codec):
    """The form to compute with; smaller than Golomb codes at no density that ComPEFT uses."""

    name, field = "bitmask", "bitmask"

    def encode(self, update: Update, start: int, stop: int) -> Any:
        """See `Codec.encode`."""
        from compeft_fl.wire.v1 import update_pb2

        if not isinstance(update, TernaryVector):
            raise ParameterError("expected a TernaryVector for codec 'bitmask': compress() first")
        size = (stop - start + 7) >> 3
        masks = []
        for mask in masks_of_range(update, start, stop):
            words = mask.cpu().numpy() if is_torch(mask) else mask
            masks.append(words.view(np.uint8)[:size].tobytes())
        return update_pb2.BitmaskTernary(
            scales=update.scales.tolist(), positive=masks[0], negative=masks[1]
        )

    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """See `Codec.decode`."""
        scales = check_scales(body.scales, layout)
        masks = [
            _read(name, getattr(body, name), stop - start) for name in ("positive", "negative")
        ]
        both = masks[0] & masks[1]
        if both.any():
            word = int(np.flatnonzero(both)[0])
            bit = int(both[word]) & -int(both[word])
            raise MaskOverlapError(
                "expected each parameter in one mask at most, found parameter "
                f"{start + 64 * word + bit.bit_length() - 1} in both"
            )
        if device is not None:
            from compeft_fl.kernels import torch_ops

            return Part(
                start, stop, masks=torch_ops.upload(masks[0], masks[1], device), scales=scales
            )
        return Part(start, stop, masks=(masks[0], masks[1]), scales=scales)

    def max_body_bytes(self, num_parameters: int) -> int:
        """See `Codec.max_body_bytes`."""
        return num_parameters // 4 + 4096


def _read(name: str, stream: bytes, count: int) -> NDArray[np.uint64]:
    """One mask as words."""
    expected = (count + 7) >> 3
    if len(stream) != expected:
        raise StreamLengthError(
            f"expected {expected} bytes of {name} for {count} parameters, found {len(stream)}"
        )
    if count & 7 and stream[-1] >> (count & 7):
        raise PaddingError(f"expected zeros after bit {count} of {name}, found set bits")
    words = np.zeros((count + 63) >> 6, np.uint64)
    words.view(np.uint8)[:expected] = np.frombuffer(stream, np.uint8)
    return words
