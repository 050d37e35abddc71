"""8 bits a parameter: symmetric integers with one float32 scale per block of 256 values.

Source: LLM.int8(), Dettmers et al., https://arxiv.org/abs/2208.07339, section 2.1 (absmax
quantisation), by blocks as in https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import numpy as np

from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.errors import ScaleError
from compeft_fl.task_vector import Layout

__all__ = ["BLOCK", "Int8Blockwise"]

BLOCK = 256


class Int8Blockwise(PeerCodec):
    """round(127 v / absmax) of each block: no error is larger than absmax / 254."""

    family = "int8-blockwise"
    source = "https://arxiv.org/abs/2208.07339"

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        padded = np.zeros(-(-values.size // BLOCK) * BLOCK, np.float32)
        padded[: values.size] = values
        blocks = padded.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(axis=1) / np.float32(127)
        safe = np.where(scales > 0, scales, np.float32(1))[:, None]
        levels = np.clip(np.rint(blocks / safe), -127, 127).astype(np.int8)
        head: bytes = scales.astype("<f4").tobytes()
        return head + levels.reshape(-1)[: values.size].tobytes()

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        reader, d = Reader(blob), layout.num_parameters
        scales = reader.array("<f4", -(-d // BLOCK))
        levels = reader.array(np.int8, d)
        reader.end()
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ScaleError("expected finite scales >= 0, found others")
        values = levels.astype(np.float32)
        whole = d // BLOCK * BLOCK
        values[:whole].reshape(-1, BLOCK)[:] *= scales[: d // BLOCK, None]
        values[whole:] *= scales[-1]
        return values
