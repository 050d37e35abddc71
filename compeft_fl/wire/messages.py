"""Updates to bytes and back: the protobuf ``Update`` of proto/FORMAT.md, and all checks on it.

Nothing that arrives is trusted: the checksum is compared before the bytes are parsed, every number
is compared with the layout before memory is taken for it, and each rejection is an error of its own
class (`compeft_fl.errors.WireError`).
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from compeft_fl import codecs
from compeft_fl.codecs import auto
from compeft_fl.codecs.base import Part, Update, whole
from compeft_fl.errors import (
    ChecksumError,
    CoverageError,
    DTypeError,
    ImplausibleSizeError,
    LayoutError,
    LayoutMismatchError,
    MalformedError,
    MissingBodyError,
    ParameterError,
    UnknownLayoutError,
    UpdateSizeError,
    VersionError,
)
from compeft_fl.task_vector import Layout, TensorSpec
from compeft_fl.wire.v1 import update_pb2

__all__ = [
    "MAX_BODY_BYTES",
    "STYPE",
    "Header",
    "decode",
    "decode_parts",
    "encode",
    "encode_parts",
    "inspect",
    "layout_id",
]

STYPE = "compeft_fl.wire.v1.Update"  # names the bytes, in Flower's Array.stype
MAX_BODY_BYTES = 512 << 20  # a body that could be larger is cut into parts
_MAX_MESSAGE_BYTES = (2 << 30) - 1  # protobuf's own limit
_CRC_TAG = b"\x7d"  # field 15, fixed32
_ID_BYTES = 16

# Without an expected layout, a few bytes can claim any number of parameters, and two mask bits are
# taken for each. So many are always allowed, and beyond that so many per byte that arrived: a
# Golomb body of density 10^-4 has about 5,000 parameters in a byte.
_PLAUSIBLE_PARAMETERS = 1 << 24
_PLAUSIBLE_PER_BYTE = 1 << 13


@dataclass(frozen=True)
class Header:
    """What an update says of itself, without its body.

    Attributes
    ----------
    layout : Layout or None
        None where the bytes name the layout by its id and no such layout was given.
    layout_id : bytes, 16
    num_parameters, offset : int
        The parameters that it covers: ``offset .. offset + num_parameters`` of the layout.
    base_version : int
        The version of the global adapter that it is relative to.
    metadata : dict of str to str
    codec : str
        The codec that reads the body.
    num_bytes, body_bytes : int
        The size of the whole message, and of its body.
    """

    layout: Layout | None
    layout_id: bytes
    num_parameters: int
    offset: int
    base_version: int
    metadata: dict[str, str] = field(repr=False)
    codec: str
    num_bytes: int
    body_bytes: int


# --- writing ----------------------------------------------------------------------------------


def encode(
    update: Update,
    codec: str = "golomb",
    *,
    link_mbps: float | None = None,
    layout_by_id: bool = False,
    base_version: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Serialise an update as one message.

    Parameters
    ----------
    update : TernaryVector or TaskVector
    codec : str
        A name of `compeft_fl.codecs.names`. "golomb", "bitmask" and "context" write ternary
        vectors, the dense ones both. Or "auto": the one that writes these values and arrives first
        over the link, see `compeft_fl.codecs.auto`.
    link_mbps : float, optional
        The speed of the link in Mbit/s, for "auto" alone.
    layout_by_id : bool
        Name the layout by its 16-byte id, for a reader that knows it, and save its bytes.
    base_version : int
        The version of the global adapter that the update is relative to.
    metadata : mapping of str to str, optional

    Raises
    ------
    ParameterError
        An unknown codec, "auto" without a link's speed, an update that the codec does not write, or
        a version or metadata that the format cannot hold.
    UpdateSizeError
        The body could pass 512 MiB: use `encode_parts`.

    Examples
    --------
    >>> import numpy as np
    >>> from compeft_fl import TaskVector, compress
    >>> tau = TaskVector.from_dict({"w": np.arange(8, dtype="f4")})
    >>> blob = encode(compress(tau, density=0.25))
    >>> decode(blob).to_task_vector().values[-2:]
    array([8.3666, 8.3666], dtype=float32)
    """
    codec = auto.choose(update, codec, link_mbps)
    bound = codecs.get(codec).max_body_bytes(update.num_parameters)
    if bound > MAX_BODY_BYTES:
        raise UpdateSizeError(
            f"expected a body of at most {MAX_BODY_BYTES} bytes, found up to {bound}: "
            "use encode_parts"
        )
    span = (0, update.num_parameters)
    return _message(update, codec, span, layout_by_id, base_version, metadata)


def encode_parts(
    update: Update,
    codec: str = "golomb",
    *,
    link_mbps: float | None = None,
    layout_by_id: bool = False,
    base_version: int = 0,
    metadata: Mapping[str, str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> list[bytes]:
    """Serialise an update as several messages where its size asks for it.

    It is cut at tensor borders where that is possible.

    Parameters
    ----------
    max_body_bytes : int
        The largest body of one part. The others as `encode`; the metadata goes with the first part.
    """
    codec = auto.choose(update, codec, link_mbps)
    writer, d = codecs.get(codec), update.num_parameters
    if writer.max_body_bytes(1) > max_body_bytes:
        raise ParameterError(
            f"expected max_body_bytes >= {writer.max_body_bytes(1)}, found {max_body_bytes}"
        )
    borders = [int(offset) for offset in update.layout.offsets]
    spans, start = [], 0
    while True:
        stop = d
        while writer.max_body_bytes(stop - start) > max_body_bytes:
            half = start + (stop - start) // 2
            fitting = [border for border in borders if start < border < stop]
            best = min(fitting, key=lambda border: abs(border - half), default=half)
            stop = best if best < stop else half
        spans.append((start, stop))
        start = stop
        if start >= d:
            break
    return [
        _message(update, codec, span, layout_by_id, base_version, None if i else metadata)
        for i, span in enumerate(spans)
    ]


def _message(
    update: Update,
    codec: str,
    span: tuple[int, int],
    layout_by_id: bool,
    base_version: int,
    metadata: Mapping[str, str] | None,
) -> bytes:
    if not isinstance(base_version, int) or not 0 <= base_version < 1 << 64:
        raise ParameterError(f"expected a version in 0 .. 2^64 - 1, found {base_version!r}")
    writer = codecs.get(codec)
    head = update_pb2.Update(
        num_parameters=span[1] - span[0], offset=span[0], base_version=base_version
    )
    if layout_by_id:
        head.layout_id = layout_id(update.layout)
    else:
        head.layout.CopyFrom(_layout_message(update.layout))
    # Serialised messages that follow each other are one message, so this is in the order of the
    # fields' numbers; protobuf leaves the order of a map's entries to its implementations.
    body = update_pb2.Update(**{writer.field: writer.encode(update, *span)})
    pieces = [head, *_metadata_messages(metadata or {}), body]
    return seal(b"".join(piece.SerializeToString(deterministic=True) for piece in pieces))


def _metadata_messages(metadata: Mapping[str, str]) -> list[Any]:
    """One message per entry, in the order of the keys' bytes."""
    try:
        keys = sorted(metadata, key=lambda key: key.encode())
        return [update_pb2.Update(metadata={key: metadata[key]}) for key in keys]
    except (AttributeError, TypeError, UnicodeEncodeError) as error:
        raise ParameterError(f"expected metadata from text to text: {error}") from None


def seal(serialised: bytes) -> bytes:
    """Append the checksum: field 15, the CRC-32 of all bytes before it."""
    return b"".join((serialised, _CRC_TAG, zlib.crc32(serialised).to_bytes(4, "little")))


def _layout_message(layout: Layout) -> Any:
    message = update_pb2.Layout()
    for tensor in layout.tensors:
        message.tensors.add(name=tensor.name, shape=tensor.shape, dtype=_DTYPES[tensor.dtype])
    return message


_DTYPES = {
    "f32": update_pb2.DTYPE_F32,
    "f16": update_pb2.DTYPE_F16,
    "bf16": update_pb2.DTYPE_BF16,
}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}


@functools.lru_cache(maxsize=64)
def layout_id(layout: Layout) -> bytes:
    """The 16 bytes that stand for a layout: BLAKE2b-128 of its deterministic serialisation."""
    serialised = _layout_message(layout).SerializeToString(deterministic=True)
    return hashlib.blake2b(serialised, digest_size=_ID_BYTES).digest()


# --- reading ----------------------------------------------------------------------------------


def decode(
    blob: bytes,
    *,
    layout: Layout | None = None,
    base_version: int | None = None,
    device: Any = None,
) -> Update:
    """Read an update that is one message, and check every field of it.

    Parameters
    ----------
    blob : bytes
    layout : Layout, optional
        The layout that the update must be for. Needed where the bytes name it by its id.
    base_version : int, optional
        The version that the update must be relative to.
    device : torch.device or str, optional
        Decode there, by torch operations; default: on the CPU.

    Returns
    -------
    TernaryVector, or TaskVector for a dense body

    Raises
    ------
    WireError
        A subclass for each rejection that proto/FORMAT.md lists.
    """
    return decode_parts([blob], layout=layout, base_version=base_version, device=device)


def decode_parts(
    blobs: Iterable[bytes],
    *,
    layout: Layout | None = None,
    base_version: int | None = None,
    device: Any = None,
) -> Update:
    """Read an update from all of its parts, in any order; see `decode`."""
    parts: list[Part] = []
    expected, found = layout, layout
    for blob in blobs:
        message, found = _parse(blob, expected)
        if found is None:
            raise UnknownLayoutError(
                f"expected a layout in the bytes or given, found only its id "
                f"{message.layout_id.hex()}"
            )
        if base_version is not None and message.base_version != base_version:
            raise VersionError(
                f"expected an update to version {base_version}, found {message.base_version}"
            )
        if layout is None and message.num_parameters > _plausible(len(blob)):
            raise ImplausibleSizeError(
                f"expected at most {_plausible(len(blob))} parameters in {len(blob)} bytes, "
                f"found {message.num_parameters}; give the layout if that is what it has"
            )
        expected, base_version = found, message.base_version  # the same in every part
        start, stop = message.offset, message.offset + message.num_parameters
        if parts and any(part.start < stop and start < part.stop for part in parts):
            raise CoverageError(f"expected each parameter once, found {start} .. {stop} twice")
        reader = codecs.reader_of(message.WhichOneof("body"))
        body = getattr(message, reader.field)
        parts.append(reader.decode(body, found, start, stop, device))
    if found is None or not parts:
        raise CoverageError("expected at least one part, found none")
    return whole(parts, found)


def _plausible(num_bytes: int) -> int:
    return max(_PLAUSIBLE_PARAMETERS, _PLAUSIBLE_PER_BYTE * num_bytes)


def inspect(blob: bytes, *, layout: Layout | None = None) -> Header:
    """What an update says of itself; all but the body is read and checked.

    Raises
    ------
    WireError
    """
    message, found = _parse(blob, layout)
    kind = message.WhichOneof("body")
    by_id = message.WhichOneof("layout_ref") == "layout_id"
    return Header(
        layout=found,
        layout_id=message.layout_id if by_id or found is None else layout_id(found),
        num_parameters=message.num_parameters,
        offset=message.offset,
        base_version=message.base_version,
        metadata=dict(message.metadata),
        codec=codecs.reader_of(kind).name,
        num_bytes=len(blob),
        body_bytes=getattr(message, kind).ByteSize(),
    )


def _parse(blob: bytes, expected: Layout | None) -> tuple[Any, Layout | None]:
    """The message, after its checksum, and its layout: None where only its id is known."""
    message = _checked_message(blob)
    kind = message.WhichOneof("layout_ref")
    layout = expected
    if kind == "layout":
        layout = _read_layout(message.layout)
        if expected is not None and layout != expected:
            raise LayoutMismatchError(_difference(expected, layout))
    elif kind is None:
        raise UnknownLayoutError("expected a layout or a layout's id, found neither")
    elif len(message.layout_id) != _ID_BYTES:
        raise MalformedError(
            f"expected a layout id of {_ID_BYTES} bytes, found {len(message.layout_id)}"
        )
    elif expected is not None and message.layout_id != layout_id(expected):
        raise UnknownLayoutError(
            f"expected layout {layout_id(expected).hex()}, found {message.layout_id.hex()}"
        )
    if layout is not None and message.offset + message.num_parameters > layout.num_parameters:
        raise LayoutMismatchError(
            f"expected at most {layout.num_parameters} parameters as in the layout, found "
            f"{message.offset} + {message.num_parameters}"
        )
    return message, layout


def _checked_message(blob: bytes) -> Any:
    if len(blob) > _MAX_MESSAGE_BYTES:
        raise UpdateSizeError(f"expected at most {_MAX_MESSAGE_BYTES} bytes, found {len(blob)}")
    if len(blob) < 5 or blob[-5:-4] != _CRC_TAG:
        raise ChecksumError(
            f"expected a checksum in the last 5 of {len(blob)} bytes, found none: cut off?"
        )
    found, actual = int.from_bytes(blob[-4:], "little"), zlib.crc32(memoryview(blob)[:-5])
    if found != actual:
        raise ChecksumError(f"expected CRC-32 {actual:08x}, found {found:08x}: damaged bytes")
    try:
        message = update_pb2.Update.FromString(
            blob[:-5]
        )  # so that no field reaches into the checksum
    except (DecodeError, UnicodeDecodeError) as error:  # the latter: protobuf in pure Python
        raise MalformedError(f"expected a protobuf Update, found other bytes: {error}") from None
    if message.crc32:
        raise MalformedError("expected one checksum, at the end; found field 15 also before it")
    if message.WhichOneof("body") is None:
        raise MissingBodyError("expected a body (field 8, 9, 10 or 11), found none that is known")
    return message


def _read_layout(message: Any) -> Layout:
    tensors = []
    for tensor in message.tensors:
        if tensor.dtype not in _DTYPE_NAMES:
            raise DTypeError(
                f"expected a data type 1, 2 or 3, found {tensor.dtype} in tensor {tensor.name!r}"
            )
        tensors.append(TensorSpec(tensor.name, tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype]))
    try:
        return Layout(tensors)
    except LayoutError as error:
        raise MalformedError(f"expected a layout, found an impossible one: {error}") from None


def _difference(expected: Layout, found: Layout) -> str:
    """Where two layouts first differ."""
    for index, pair in enumerate(zip(expected.tensors, found.tensors, strict=False)):
        if pair[0] != pair[1]:
            return f"expected tensor {index} to be {pair[0]}, found {pair[1]}"
    return f"expected {len(expected.tensors)} tensors, found {len(found.tensors)}"
