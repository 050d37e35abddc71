"""Updates to bytes and back: the protobuf ``Update`` of proto/FORMAT.md.

Nothing that arrives is trusted: the checksum is compared before the bytes are parsed, every number
is compared with the layout before memory is taken for it, and each rejection is an error of its own
class (`compeft_fl.errors.WireError`); see `compeft_fl.wire.opening`.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compeft_fl import codecs
from compeft_fl.codecs import auto
from compeft_fl.codecs.base import Update
from compeft_fl.errors import ParameterError, UpdateSizeError
from compeft_fl.task_vector import Layout
from compeft_fl.wire.layouts import layout_id, layout_message
from compeft_fl.wire.opening import CRC_TAG, MAX_PARTS, open_update, parse
from compeft_fl.wire.v1 import update_pb2

__all__ = [
    "MAX_BODY_BYTES",
    "RANK_KEY",
    "STYPE",
    "Header",
    "decode",
    "decode_parts",
    "encode",
    "encode_parts",
    "inspect",
    "iter_parts",
    "layout_id",
    "part_message",
]

STYPE = "compeft_fl.wire.v1.Update"  # names the bytes, in Flower's Array.stype
RANK_KEY = "rank"  # in the metadata of an update of a lower rank; see compeft_fl.parts.ranks
MAX_BODY_BYTES = 512 << 20  # a body that could be larger is cut into parts


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
    cuts: Sequence[int] = (),
) -> list[bytes]:
    """Serialise an update as several messages where its size asks for it.

    It is cut at tensor borders where that is possible.

    Parameters
    ----------
    max_body_bytes : int
        The largest body of one part. The others as `encode`; the metadata goes with the first part.
    cuts : sequence of int
        Parameters at which it is cut in any case, ascending.
    """
    return list(
        iter_parts(
            update,
            codec,
            link_mbps=link_mbps,
            layout_by_id=layout_by_id,
            base_version=base_version,
            metadata=metadata,
            max_body_bytes=max_body_bytes,
            cuts=cuts,
        )
    )


def iter_parts(
    update: Update,
    codec: str = "golomb",
    *,
    link_mbps: float | None = None,
    layout_by_id: bool = False,
    base_version: int = 0,
    metadata: Mapping[str, str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    cuts: Sequence[int] = (),
    layout_once: bool = False,
) -> Iterator[bytes]:
    """`encode_parts`, one part in memory at a time.

    With ``layout_once`` the first part has the layout, and the others name it: for a file, whose
    parts are read in their order.
    """
    codec = auto.choose(update, codec, link_mbps)
    writer, d = codecs.get(codec), update.num_parameters
    if writer.max_body_bytes(1) > max_body_bytes:
        raise ParameterError(
            f"expected max_body_bytes >= {writer.max_body_bytes(1)}, found {max_body_bytes}"
        )
    borders = update.layout.offsets.tolist()
    spans, start = [], 0
    while True:
        stop = next((cut for cut in cuts if cut > start), d)
        while writer.max_body_bytes(stop - start) > max_body_bytes:
            stop = _cut_near_half(borders, start, stop)
        spans.append((start, stop))
        if len(spans) > MAX_PARTS:
            raise ParameterError(
                f"expected a max_body_bytes that makes at most {MAX_PARTS} parts of {d} "
                f"parameters, found {max_body_bytes}"
            )
        start = stop
        if start >= d:
            break
    for i, span in enumerate(spans):
        by_id = layout_by_id or (layout_once and i > 0)
        yield _message(update, codec, span, by_id, base_version, None if i else metadata)


def part_message(
    update: Update,
    codec: str,
    layout: Layout,
    start: int,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """One part of an update that is never in memory as a whole: `encode_parts`, for a stream.

    Parameters
    ----------
    update : TernaryVector or TaskVector
        The parameters ``start .. start + update.num_parameters``, over their own layout
        (`compeft_fl.wire.layouts.part_layout`).
    layout : Layout
        Of the whole update. The first part (``start`` 0) has it, the others name it by its id.
    """
    writer, d = codecs.get(codec), update.num_parameters
    if writer.max_body_bytes(d) > MAX_BODY_BYTES:
        raise UpdateSizeError(f"expected a part of at most {MAX_BODY_BYTES} bytes, found more")
    head = update_pb2.Update(num_parameters=d, offset=start)
    if start:
        head.layout_id = layout_id(layout)
    else:
        head.layout.CopyFrom(layout_message(layout))
    return _sealed(head, metadata, update_pb2.Update(**{writer.field: writer.encode(update, 0, d)}))


def _cut_near_half(borders: list[int], start: int, stop: int) -> int:
    """The tensor border within ``start .. stop`` nearest to its half, or the half itself."""
    half = start + (stop - start) // 2
    at = bisect.bisect_left(borders, half)
    near = [border for border in borders[max(0, at - 1) : at + 1] if start < border < stop]
    return min(near, key=lambda border: abs(border - half), default=half)


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
        head.layout.CopyFrom(layout_message(update.layout))
    # Serialised messages that follow each other are one message, so this is in the order of the
    # fields' numbers; protobuf leaves the order of a map's entries to its implementations.
    body = update_pb2.Update(**{writer.field: writer.encode(update, *span)})
    return _sealed(head, metadata, body)


def _sealed(head: Any, metadata: Mapping[str, str] | None, body: Any) -> bytes:
    """A message and its checksum."""
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
    return b"".join((serialised, CRC_TAG, zlib.crc32(serialised).to_bytes(4, "little")))


# --- reading ----------------------------------------------------------------------------------


def decode(
    blob: bytes,
    *,
    layout: Layout | None = None,
    base_version: int | None = None,
    device: Any = None,
    max_parameters: int | None = None,
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
    max_parameters : int, optional
        The most parameters where no layout is expected. Default: 2^24, or 2^10 for each byte of the
        encoded values if that is more, which covers densities from 1/1000.

    Returns
    -------
    TernaryVector, or TaskVector for a dense body

    Raises
    ------
    WireError
        A subclass for each rejection that proto/FORMAT.md lists.
    """
    return decode_parts(
        [blob],
        layout=layout,
        base_version=base_version,
        device=device,
        max_parameters=max_parameters,
    )


def decode_parts(
    blobs: Iterable[bytes],
    *,
    layout: Layout | None = None,
    base_version: int | None = None,
    device: Any = None,
    max_parameters: int | None = None,
) -> Update:
    """Read an update from all of its parts, in any order; see `decode`."""
    opened = open_update(
        blobs, layout=layout, base_version=base_version, max_parameters=max_parameters
    )
    return opened.decode(device)


def inspect(blob: bytes, *, layout: Layout | None = None) -> Header:
    """What an update says of itself; all but the body is read and checked.

    Raises
    ------
    WireError
    """
    message, found = parse(blob, layout)
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
