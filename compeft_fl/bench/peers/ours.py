"""The project's own codecs as peers, so that benchmarks loop over one thing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compeft_fl import codecs
from compeft_fl.bench.peers.base import Floats, PeerCodec, Reader
from compeft_fl.codecs.dense import Dense
from compeft_fl.compeft import compress
from compeft_fl.reduction.factorize import factorize
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.wire.messages import MAX_BODY_BYTES, decode, decode_parts, encode, encode_parts

__all__ = ["DensePeer", "FactoredPeer", "TernaryPeer", "registered"]


class TernaryPeer(PeerCodec):
    """ComPEFT by one of the registry's codecs: whole messages, the layout by its id.

    Parameters
    ----------
    codec : str
        A name of `compeft_fl.codecs.names`.
    scale : "mean", "norm" or float
        See `compeft_fl.compress`; "mean" is what rounds with error feedback use.
    """

    source = "https://arxiv.org/abs/2311.13171"
    biased = True
    densities = (0.05, 0.2)

    def __init__(self, codec: str, scale: str | float = "mean") -> None:
        self.family = f"compeft-{codec}"
        super().__init__()
        self.codec, self.scale = codec, scale

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        update = compress(TaskVector(layout, values), self.density, self.scale)
        return encode(update, self.codec, layout_by_id=True)

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        return np.asarray(decode(blob, layout=layout).to_task_vector().values)


class FactoredPeer(PeerCodec):
    """Low-rank signs: in the bits that ternary values of a density take."""

    source = "https://arxiv.org/abs/1905.13727"
    biased = True
    densities = (0.02, 0.05, 0.2)
    family = "compeft-factored"

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        update = factorize(TaskVector(layout, values), self.density)
        return encode(update, "factored", layout_by_id=True)

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        return np.asarray(decode(blob, layout=layout).to_task_vector().values)


class DensePeer(PeerCodec):
    """Every value in 32 or 16 bits, which is what federated averaging sends."""

    source = "https://arxiv.org/abs/1602.05629"

    def __init__(self, codec: str) -> None:
        dtype = {"DTYPE_F32": "fp32", "DTYPE_F16": "fp16", "DTYPE_BF16": "bf16"}
        dense = codecs.get(codec)
        assert isinstance(dense, Dense)
        self.family = dtype[dense.dtype]
        self.lossless = self.family == "fp32"
        super().__init__()
        self.codec = codec

    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        parts = encode_parts(TaskVector(layout, values), self.codec, layout_by_id=True)
        return parts[0] if len(parts) == 1 else join_parts(parts)

    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        bound = codecs.get(self.codec).max_body_bytes(layout.num_parameters)
        parts = [blob] if bound <= MAX_BODY_BYTES else split_parts(blob)
        return np.asarray(decode_parts(parts, layout=layout).to_task_vector().values)


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Messages, each after its length as 8 little-endian bytes."""
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(8, "little"), part))


def split_parts(blob: bytes) -> list[bytes]:
    """The messages of `join_parts`.

    Raises
    ------
    StreamLengthError
        A length past the end.
    """
    reader, parts = Reader(blob), []
    while reader.left:
        parts.append(reader.array(np.uint8, int(reader.array("<u8", 1)[0])).tobytes())
    return parts


def registered() -> list[PeerCodec]:
    """A peer for each codec of the registry, in its order, the dense ones first."""
    dense = [name for name in codecs.names() if isinstance(codecs.get(name), Dense)]
    others = [name for name in codecs.names() if name not in dense]
    return [
        *(DensePeer(name) for name in dense),
        *(FactoredPeer() if name == "factored" else TernaryPeer(name) for name in others),
    ]
