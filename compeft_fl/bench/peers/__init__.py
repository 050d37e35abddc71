"""Codecs to compare with, this project's own among them, by name. One file per family.

>>> names()[:3]
('fp32', 'fp16', 'bf16')
>>> get("stc@0.02").density
0.02
"""

from __future__ import annotations

from compeft_fl.bench.packages import why_missing
from compeft_fl.bench.peers.base import PeerCodec
from compeft_fl.bench.peers.bitsandbytes import Float4, Int8Dynamic, NormFloat4
from compeft_fl.bench.peers.int8 import Int8Blockwise
from compeft_fl.bench.peers.lossless import BloscFloat16, BloscFloat32, ZstdFloat16, ZstdFloat32
from compeft_fl.bench.peers.ours import registered
from compeft_fl.bench.peers.qsgd import Qsgd16, QsgdTernary
from compeft_fl.bench.peers.signsgd import SignSgd
from compeft_fl.bench.peers.sparse import TopKCoo, TopKFloat16
from compeft_fl.bench.peers.stc import Stc
from compeft_fl.errors import ParameterError

__all__ = ["PeerCodec", "available", "get", "names", "reason"]

_OTHERS = (
    ZstdFloat32,
    BloscFloat32,
    ZstdFloat16,
    BloscFloat16,
    Int8Blockwise,
    Int8Dynamic,
    NormFloat4,
    Float4,
    Qsgd16,
    QsgdTernary,
    SignSgd,
    TopKFloat16,
    TopKCoo,
    Stc,
)


def _families() -> dict[str, PeerCodec]:
    """All codecs by family; the registry is asked anew, because codecs can be added to it."""
    ours = registered()
    dense = [codec for codec in ours if not codec.densities]
    ternary = [codec for codec in ours if codec.densities]
    codecs: list[PeerCodec] = [*dense, *(kind() for kind in _OTHERS), *ternary]
    return {codec.family: codec for codec in codecs}


def names() -> tuple[str, ...]:
    """The default set, whether their packages are installed or not."""
    found: list[str] = []
    for codec in _families().values():
        found += [codec.at(density).name for density in codec.densities] or [codec.name]
    return tuple(found)


def get(name: str) -> PeerCodec:
    """The codec of a name: a family, or ``family@density`` with any density.

    Raises
    ------
    ParameterError
        No such family, or a density that it does not take.
    """
    family, _, density = name.partition("@")
    codec = _families().get(family)
    if codec is None:
        raise ParameterError(f"expected a codec among {', '.join(names())}; found {name!r}")
    if not density:
        return codec.at(codec.densities[0]) if codec.densities else codec
    try:
        return codec.at(float(density))
    except ValueError as error:
        raise ParameterError(f"expected a density after {family}@: {error}") from None


def reason(name: str) -> str | None:
    """Why a codec cannot run here, and how to make it; None where it can."""
    package = get(name).package
    return why_missing(package) if package else None


def available(name: str) -> bool:
    """Can the codec run here?"""
    return reason(name) is None
