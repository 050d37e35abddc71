"""The block-wise formats of bitsandbytes, by its own CPU backend, tensor by tensor.

This is what NVFlare's ModelQuantizer sends as blockwise8, normfloat4 and float4. It also sends the
code book with every tensor (1 KiB, or 64 bytes), which the receiver knows and which is not counted.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from compeft_fl.bench.packages import load
from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.errors import ScaleError
from compeft_fl.task_vector import Layout

__all__ = ["Float4", "Int8Dynamic", "NormFloat4"]


class _Bitsandbytes(PeerCodec):
    """Of each tensor: float32 absmax of its blocks, then its codes."""

    source = "https://github.com/NVIDIA/NVFlare"
    package = "bitsandbytes"
    block: ClassVar[int]

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        import torch

        pieces = []
        for tensor, where in layout.slices():
            if tensor.size:
                codes, state = self._quantize(torch.from_numpy(values[where]))
                pieces += [state.absmax.numpy().astype("<f4"), codes.numpy().reshape(-1)]
        return b"".join(piece.tobytes() for piece in pieces)

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        import torch

        reader = Reader(blob)
        values = np.empty(layout.num_parameters, np.float32)
        for tensor, where in layout.slices():
            if tensor.size:
                absmax = reader.array("<f4", -(-tensor.size // self.block)).astype(np.float32)
                if not (np.isfinite(absmax) & (absmax >= 0)).all():
                    raise ScaleError("expected finite absmax >= 0, found others")
                codes = reader.array(np.uint8, self._num_codes(tensor.size)).copy()
                out = torch.from_numpy(values[where])
                self._dequantize(torch.from_numpy(codes), torch.from_numpy(absmax), out)
        reader.end()
        return values

    def _num_codes(self, size: int) -> int:
        """Bytes of codes for a tensor."""
        return size

    @abstractmethod
    def _quantize(self, tensor: Any) -> tuple[Any, Any]:
        """Codes, and a state with the blocks' ``absmax``."""

    @abstractmethod
    def _dequantize(self, codes: Any, absmax: Any, out: Any) -> None:
        """Write the values of the codes into ``out``."""


class Int8Dynamic(_Bitsandbytes):
    """Dynamic 8-bit values, blocks of 4096 (https://arxiv.org/abs/2110.02861)."""

    family = "int8-dynamic"
    block = 4096

    def _quantize(self, tensor: Any) -> tuple[Any, Any]:
        return load("bitsandbytes.functional").quantize_blockwise(tensor, blocksize=self.block)  # type: ignore[no-any-return]

    def _dequantize(self, codes: Any, absmax: Any, out: Any) -> None:
        functional = load("bitsandbytes.functional")
        out[:] = functional.dequantize_blockwise(codes, absmax=absmax, blocksize=self.block)


class _FourBit(_Bitsandbytes):
    block = 64
    kind: ClassVar[str]

    def _num_codes(self, size: int) -> int:
        return (size + 1) >> 1

    def _quantize(self, tensor: Any) -> tuple[Any, Any]:
        functional = load("bitsandbytes.functional")
        return functional.quantize_4bit(tensor, blocksize=self.block, quant_type=self.kind)  # type: ignore[no-any-return]

    def _dequantize(self, codes: Any, absmax: Any, out: Any) -> None:
        functional = load("bitsandbytes.functional")
        book = functional.get_4bit_type(self.kind, device="cpu")
        state = functional.QuantState(
            absmax, out.shape, book, self.block, self.kind, dtype=out.dtype
        )
        out[:] = functional.dequantize_4bit(codes.view(-1, 1), state)


class NormFloat4(_FourBit):
    """NF4, blocks of 64 (QLoRA, https://arxiv.org/abs/2305.14314)."""

    family = "nf4"
    kind = "nf4"


class Float4(_FourBit):
    """FP4, blocks of 64."""

    family = "fp4"
    kind = "fp4"
