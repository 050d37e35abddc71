"""The protobuf part of the second reader (tests/reference_decoder.py): FORMAT.md, "Protobuf".

It imports nothing but the standard library. Where FORMAT.md lets a reader choose, it rejects.
"""

from __future__ import annotations

import struct
from typing import Any


class FaultError(Exception):
    """Bytes that are no valid update; ``kind`` is the error's name in FORMAT.md's table.

    ``choice``: what no writer produces, and FORMAT.md ("Protobuf") leaves to the reader.
    """

    def __init__(self, kind: str, message: str, *, choice: bool = False) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.choice = kind, choice


def malformed(message: str) -> FaultError:
    """The rejection of what is no message, or holds what it cannot hold."""
    return FaultError("MalformedError", message)


def unusual(message: str) -> FaultError:
    """A rejection that is this reader's choice."""
    return FaultError("MalformedError", message, choice=True)


VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Fields = list[tuple[int, int, Any]]  # number, wire type, value


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise malformed(f"a varint is cut off at byte {at}")
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if value >= 1 << 64:
                raise unusual(f"a varint of more than 64 bits at byte {at}")
            return value, at + i + 1
    raise malformed(f"a varint of more than 10 bytes at byte {at}")


def read_fields(data: bytes) -> Fields:
    """All fields of a message as (number, wire type, value)."""
    fields, at = [], 0
    while at < len(data):
        start = at
        tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if at - start > 5:
            raise unusual(f"a tag of {at - start} bytes at byte {start}")
        if number == 0 or number >= 1 << 29:
            raise malformed(f"field number {number} at byte {start}")
        if wire == VARINT:
            value, at = read_varint(data, at)
            fields.append((number, wire, value))
            continue
        if wire == BYTES:
            size, at = read_varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        elif wire in (3, 4):
            raise unusual(f"a group at byte {start}")
        else:
            raise malformed(f"wire type {wire} at byte {start}")
        if size > len(data) - at:
            raise malformed(f"field {number} goes on past the end of its message")
        fields.append((number, wire, data[at : at + size]))
        at += size
    return fields


def only(fields: Fields, number: int, wire: int) -> Any:
    """The value of a field that is not repeated; None where it is absent."""
    found = [item for item in fields if item[0] == number]
    if len(found) > 1:
        raise unusual(f"field {number} occurs {len(found)} times")
    if found and found[0][1] != wire:
        raise unusual(f"field {number} has wire type {found[0][1]}, not {wire}")
    return found[0][2] if found else None


def number_of(fields: Fields, number: int, bits: int = 64) -> int:
    """A varint field, 0 where it is absent."""
    value = only(fields, number, VARINT) or 0
    if value >= 1 << bits:
        raise unusual(f"field {number} has more than {bits} bits: {value}")
    return value


def bytes_of(fields: Fields, number: int) -> bytes:
    """A bytes field, empty where it is absent."""
    return only(fields, number, BYTES) or b""


def text_of(fields: Fields, number: int) -> str:
    """A string field, empty where it is absent."""
    try:
        return bytes_of(fields, number).decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed(f"field {number} is not UTF-8: {error}") from None


def numbers_of(fields: Fields, number: int, bits: int = 64) -> list[int]:
    """A repeated varint field, packed or not."""
    values: list[int] = []
    for wire, value in ((wire, value) for found, wire, value in fields if found == number):
        if wire == VARINT:
            values.append(value)
        elif wire == BYTES:
            at = 0
            while at < len(value):
                one, at = read_varint(value, at)
                values.append(one)
        else:
            raise unusual(f"field {number} has wire type {wire}")
    if any(one >= 1 << bits for one in values):
        raise unusual(f"field {number} has a value of more than {bits} bits")
    return values


def floats_of(fields: Fields, number: int) -> list[float]:
    """A repeated float field, packed or not."""
    data = b""
    for wire, value in ((wire, value) for found, wire, value in fields if found == number):
        if wire not in (FIXED32, BYTES):
            raise unusual(f"field {number} has wire type {wire}")
        if len(value) % 4:
            raise malformed(f"field {number} has {len(value)} bytes of floats")
        data += value
    return [item[0] for item in struct.iter_unpack("<f", data)]
