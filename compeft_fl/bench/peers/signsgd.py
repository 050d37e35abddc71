"""SignSGD with error feedback: one bit a parameter and a magnitude per tensor."""

from __future__ import annotations

import numpy as np

from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.errors import PaddingError, ScaleError
from compeft_fl.task_vector import Layout

__all__ = ["SignSgd"]


class SignSgd(PeerCodec):
    """EF-signSGD: sign(v) times the mean magnitude of its tensor; 0 counts as positive."""

    family = "signsgd"
    source = "https://arxiv.org/abs/1901.09847"
    biased = True

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        means = [
            np.abs(values[where]).mean(dtype=np.float64) if tensor.size else 0.0
            for tensor, where in layout.slices()
        ]
        return np.array(means, "<f4").tobytes() + np.packbits(values < 0).tobytes()

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        reader, d = Reader(blob), layout.num_parameters
        scales = reader.array("<f4", len(layout.tensors))
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ScaleError("expected finite magnitudes >= 0, found others")
        packed = reader.array(np.uint8, (d + 7) >> 3)
        reader.end()
        if d & 7 and packed[-1] & (255 >> (d & 7)):
            raise PaddingError(f"expected zeros after bit {d}, found set bits")
        values = np.repeat(scales.astype(np.float32), layout.sizes)
        np.negative(values, out=values, where=np.unpackbits(packed, count=d).view(bool))
        return values
