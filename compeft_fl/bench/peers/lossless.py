"""General compressors over dense values: Zstandard, and Blosc's byte shuffle before it.

By numcodecs, which wraps the C libraries.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from compeft_fl.bench.packages import load
from compeft_fl.bench.peers.base import Floats, PeerCodec
from compeft_fl.errors import MalformedError, ParameterError, StreamLengthError
from compeft_fl.task_vector import Layout

__all__ = ["BloscFloat16", "BloscFloat32", "ZstdFloat16", "ZstdFloat32"]

LEVEL = 3  # zstd's default


class _Compressor(PeerCodec):
    """One compressed buffer."""

    package = "numcodecs"
    dtype: ClassVar[str]

    def _compressor(self) -> Any:
        return load("numcodecs.zstd").Zstd(level=LEVEL)

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        with np.errstate(over="ignore"):
            dense = values.astype(self.dtype)
        if not np.isfinite(dense).all():
            raise ParameterError("expected magnitudes that float16 holds (<= 65504), found more")
        return bytes(self._compressor().encode(dense))

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        dense = np.zeros(layout.num_parameters, self.dtype)
        self._check(blob, dense.nbytes)
        try:
            self._compressor().decode(blob, out=dense)
        except (RuntimeError, ValueError) as error:
            raise MalformedError(f"expected {dense.nbytes} compressed bytes: {error}") from None
        return dense.astype(np.float32)

    def _check(self, blob: bytes, size: int) -> None:
        """Raise where the header says another size than the layout's."""


class ZstdFloat32(_Compressor):
    """Zstandard, level 3, over float32."""

    family, dtype, lossless = "zstd-fp32", "<f4", True
    source = "https://facebook.github.io/zstd"


class ZstdFloat16(ZstdFloat32):
    """Zstandard, level 3, over float16."""

    family, dtype, lossless = "zstd-fp16", "<f2", False


class BloscFloat32(_Compressor):
    """Bytes of equal significance together, then Zstandard, in Blosc's chunks, over float32."""

    family, dtype, lossless = "blosc-fp32", "<f4", True
    source = "https://www.blosc.org"

    def _compressor(self) -> Any:
        blosc = load("numcodecs.blosc")
        return blosc.Blosc("zstd", LEVEL, blosc.Blosc.SHUFFLE)

    def _check(self, blob: bytes, size: int) -> None:
        raw, packed = (int.from_bytes(blob[at : at + 4], "little") for at in (4, 12))
        if len(blob) < 16 or packed != len(blob) or raw != size:
            raise StreamLengthError(f"expected {size} values' bytes, found a header of {raw}")


class BloscFloat16(BloscFloat32):
    """The same over float16."""

    family, dtype, lossless = "blosc-fp16", "<f2", False
