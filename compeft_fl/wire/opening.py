"""Reading updates: all that the messages say of themselves is checked before a body is decoded.

A few bytes can claim any number of parameters. So the parts of an update are parsed first, and what
they claim *together* is compared with the layout, and where none is expected with the bytes of
their bodies; only then is memory taken for parameters. Names, metadata and fields that this version
does not know are no bytes of a body.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from compeft_fl import codecs
from compeft_fl.codecs.base import Part, Update, paste
from compeft_fl.errors import (
    ChecksumError,
    CoverageError,
    ImplausibleSizeError,
    LayoutMismatchError,
    MalformedError,
    MissingBodyError,
    ScaleCountError,
    UnknownLayoutError,
    UpdateSizeError,
    VersionError,
)
from compeft_fl.printable import one_line
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector, num_words
from compeft_fl.wire.layouts import ID_BYTES, difference, layout_id, read_layout
from compeft_fl.wire.v1 import update_pb2

__all__ = [
    "CRC_TAG",
    "MAX_PARTS",
    "PLAUSIBLE_PARAMETERS",
    "PLAUSIBLE_PER_BYTE",
    "Opened",
    "open_part",
    "open_update",
    "parse",
]

CRC_TAG: Final = b"\x7d"  # field 15, fixed32
MAX_PARTS: Final = 4096  # of 512 MiB each: 2 TiB
_MAX_MESSAGE_BYTES = (2 << 30) - 1  # protobuf's own limit

# Where no layout is expected: so many parameters always, and beyond that so many for each byte of
# the bodies. Golomb codes of density 1/1000 have about 650 parameters in a byte.
PLAUSIBLE_PARAMETERS: Final = 1 << 24
PLAUSIBLE_PER_BYTE: Final = 1 << 10


@dataclass(frozen=True)
class Opened:
    """An update whose parts have been parsed and fit together; no body is decoded yet.

    Attributes
    ----------
    layout : Layout
    base_version : int
    metadata : dict of str to str
        That of the first part, by offset, that has any.
    codec : str
        The codec that reads the first part's body.
    body_bytes : int
        The size of all bodies.
    """

    layout: Layout
    base_version: int
    metadata: dict[str, str]
    codec: str
    body_bytes: int
    _messages: list[Any]  # by offset

    @property
    def dense(self) -> bool:
        """Is this a value for each parameter, and no masks?"""
        return not codecs.get(self.codec).ternary

    def decode(self, device: Any = None) -> Update:
        """The update; every field of the bodies is checked. A second call finds nothing.

        Raises
        ------
        WireError
        """
        if len(self._messages) == 1:
            return self._single(device)
        total = self.layout.num_parameters
        if self.dense:
            values = np.empty(total, np.float32)
            for part in self._parts():
                found = part.values if part.factored is None else part.factored.values
                values[part.start : part.stop] = found
            if device is not None:
                import torch

                return TaskVector(self.layout, torch.from_numpy(values).to(device))
            return TaskVector(self.layout, values)
        masks = [np.zeros(num_words(total), np.uint64) for _ in range(2)]
        scales: NDArray[np.float32] | None = None
        for part in self._parts():
            if scales is not None and not np.array_equal(part.scales, scales):  # type: ignore[arg-type]
                raise ScaleCountError("expected the same scales in every part, found others")
            scales = part.scales
            for target, source in zip(masks, part.masks or (), strict=True):
                paste(target, source, part.start)
        if device is not None:
            from compeft_fl.kernels import torch_ops

            return TernaryVector(self.layout, *torch_ops.upload(masks[0], masks[1], device), scales)
        return TernaryVector(self.layout, masks[0], masks[1], scales)

    def _single(self, device: Any) -> Update:
        part = self._decoded(self._messages.pop(), device)
        if part.factored is not None:
            return part.factored
        if part.masks is None:
            return TaskVector(self.layout, part.values)  # type: ignore[arg-type]
        return TernaryVector(self.layout, *part.masks, part.scales)

    def _parts(self) -> Iterable[Part]:
        """Each part, on the CPU; its message is given up before the next."""
        self._messages.reverse()
        while self._messages:
            yield self._decoded(self._messages.pop(), None)

    def _decoded(self, message: Any, device: Any) -> Part:
        reader = codecs.reader_of(message.WhichOneof("body"))
        start, stop = message.offset, message.offset + message.num_parameters
        return reader.decode(getattr(message, reader.field), self.layout, start, stop, device)


def open_update(
    blobs: Iterable[bytes],
    *,
    layout: Layout | None = None,
    base_version: int | None = None,
    max_parameters: int | None = None,
) -> Opened:
    """Parse an update's parts, in any order, and check what they say but for their bodies.

    Parameters
    ----------
    blobs : iterable of bytes
    layout : Layout, optional
        The layout that the update must be for. Needed where the bytes name it by its id.
    base_version : int, optional
        The version that the update must be relative to.
    max_parameters : int, optional
        The most parameters where no layout is expected. Default: 2^24, or 2^10 for each byte of the
        bodies if that is more.

    Raises
    ------
    WireError
    """
    messages: list[Any] = []
    found = layout
    for blob in blobs:
        if len(messages) == MAX_PARTS:
            raise CoverageError(f"expected at most {MAX_PARTS} parts, found more")
        message, found = parse(blob, found)
        if found is None:
            raise UnknownLayoutError(
                f"expected a layout in the bytes or given, found only its id "
                f"{message.layout_id.hex()}"
            )
        if base_version is not None and message.base_version != base_version:
            raise VersionError(
                f"expected an update to version {base_version}, found {message.base_version}"
            )
        base_version = message.base_version  # the same in every part
        messages.append(message)
    if found is None or not messages:
        raise CoverageError("expected at least one part, found none")
    messages.sort(key=lambda message: (message.offset, message.num_parameters))
    bodies = [getattr(message, message.WhichOneof("body")) for message in messages]
    if layout is None:
        _check_plausible(messages, bodies, max_parameters)
    _check_coverage(messages, found)
    kinds = {codecs.reader_of(message.WhichOneof("body")).ternary for message in messages}
    if len(kinds) > 1:
        raise CoverageError("expected parts of one kind, found ternary and dense ones")
    return Opened(
        layout=found,
        base_version=messages[0].base_version,
        metadata=next((dict(m.metadata) for m in messages if m.metadata), {}),
        codec=codecs.reader_of(messages[0].WhichOneof("body")).name,
        body_bytes=sum(body.ByteSize() for body in bodies),
        _messages=messages,
    )


def open_part(blob: bytes, layout: Layout, max_parameters: int | None = None) -> tuple[Part, int]:
    """One part of an update over a known layout, and the size of its body in bytes.

    Raises
    ------
    WireError
    """
    message, _ = parse(blob, layout)
    body = getattr(message, message.WhichOneof("body"))
    _check_plausible([message], [body], max_parameters)
    reader = codecs.reader_of(message.WhichOneof("body"))
    start, stop = message.offset, message.offset + message.num_parameters
    return reader.decode(body, layout, start, stop), body.ByteSize()


def _check_plausible(messages: list[Any], bodies: list[Any], most: int | None) -> None:
    """Compare the number of parameters that the parts claim in all with the bytes of the bodies."""
    claimed = sum(message.num_parameters for message in messages)
    streams = sum(_stream_bytes(body) for body in bodies)
    if most is None:
        most = max(PLAUSIBLE_PARAMETERS, PLAUSIBLE_PER_BYTE * streams)
    if claimed > most:
        raise ImplausibleSizeError(
            f"expected at most {most} parameters in {streams} bytes of values, found {claimed}; "
            "give the layout, or max_parameters (a command's --max-parameters), if it has so many"
        )


def _stream_bytes(body: Any) -> int:
    """The bytes that say something of parameters: streams, whose lengths are checked exactly."""
    total = 0
    for field, value in body.ListFields():
        if isinstance(value, bytes):
            total += len(value)
        elif field.message_type is not None:  # ternary values beside terms
            total += _stream_bytes(value)
    return total


def _check_coverage(messages: list[Any], layout: Layout) -> None:
    """Raise CoverageError where the parts, by offset, leave a gap or overlap."""
    at = 0
    for message in messages:
        if message.offset < at:
            raise CoverageError(
                f"expected each parameter once, found {message.offset} .. {at} twice"
            )
        if message.offset != at:
            raise CoverageError(
                f"expected a part from parameter {at}, found one from {message.offset}"
            )
        at += message.num_parameters
    if at != layout.num_parameters:
        raise CoverageError(f"expected {layout.num_parameters} parameters, found {at}")


def parse(blob: bytes, expected: Layout | None) -> tuple[Any, Layout | None]:
    """A message, after its checksum, and its layout: None where only its id is known.

    Raises
    ------
    WireError
    """
    message = _checked_message(blob)
    kind = message.WhichOneof("layout_ref")
    layout = expected
    if kind == "layout":
        layout = read_layout(message.layout)
        if expected is not None:
            if layout != expected:
                raise LayoutMismatchError(difference(expected, layout))
            layout = expected  # one object for all parts
    elif kind is None:
        raise UnknownLayoutError("expected a layout or a layout's id, found neither")
    elif len(message.layout_id) != ID_BYTES:
        raise MalformedError(
            f"expected a layout id of {ID_BYTES} bytes, found {len(message.layout_id)}"
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
    if len(blob) < 5 or blob[-5:-4] != CRC_TAG:
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
        raise MalformedError(
            f"expected a protobuf Update, found other bytes: {one_line(error, 200)}"
        ) from None
    if message.crc32:
        raise MalformedError("expected one checksum, at the end; found field 15 also before it")
    if message.WhichOneof("body") is None:
        raise MissingBodyError("expected a body (field 8 to 13), found none that is known")
    return message
