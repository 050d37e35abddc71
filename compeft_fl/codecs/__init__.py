"""The codecs, by name. One file each; a name stands for its bytes for ever.

>>> names()
('golomb', 'bitmask', 'dense', 'dense-fp16', 'dense-bf16', 'context', 'steps', 'factored')
"""

from __future__ import annotations

from compeft_fl.codecs.base import Codec
from compeft_fl.codecs.bitmask import Bitmask
from compeft_fl.codecs.context import Context
from compeft_fl.codecs.dense import Dense, DenseBFloat16, DenseFloat16
from compeft_fl.codecs.factored import Factored
from compeft_fl.codecs.golomb import Golomb
from compeft_fl.codecs.steps import Steps
from compeft_fl.errors import ParameterError

__all__ = ["Codec", "get", "names", "reader_of", "register"]

_BY_NAME: dict[str, Codec] = {}
_BY_FIELD: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Add a codec; the first one of a field of the format reads that field.

    Raises
    ------
    ParameterError
        The name is taken, or the format has no such field.
    """
    from compeft_fl.wire.v1 import update_pb2

    if codec.name in _BY_NAME:
        raise ParameterError(f"expected a new name, found {codec.name!r} twice")
    bodies = [field.name for field in update_pb2.Update.DESCRIPTOR.oneofs_by_name["body"].fields]
    if codec.field not in bodies:
        raise ParameterError(f"expected a field among {bodies}, found {codec.field!r}")
    _BY_NAME[codec.name] = codec
    _BY_FIELD.setdefault(codec.field, codec)


def get(name: str) -> Codec:
    """The codec of that name.

    Raises
    ------
    ParameterError
        No such codec; the message lists those there are.
    """
    if name not in _BY_NAME:
        raise ParameterError(f"expected a codec among {', '.join(names())}; found {name!r}")
    return _BY_NAME[name]


def names() -> tuple[str, ...]:
    """All names, in order of registration."""
    return tuple(_BY_NAME)


def reader_of(field: str) -> Codec:
    """The codec that reads a field of the format."""
    return _BY_FIELD[field]


for _codec in (
    Golomb(),
    Bitmask(),
    Dense(),
    DenseFloat16(),
    DenseBFloat16(),
    Context(),
    Steps(),
    Factored(),
):
    register(_codec)
