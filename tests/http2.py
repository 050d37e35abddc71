"""The HTTP/2 frames in what a gRPC client sends."""

from __future__ import annotations

from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, CONTINUATION = 1, 9
_FRAME_HEAD = 9


def frames(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and payload of each whole HTTP/2 frame after the preface (RFC 9113, 4.1)."""
    at = len(PREFACE)
    while at + _FRAME_HEAD <= len(stream):
        size = int.from_bytes(stream[at : at + 3], "big")
        payload = stream[at + _FRAME_HEAD : at + _FRAME_HEAD + size]
        if len(payload) < size:
            return
        yield stream[at + 3], payload
        at += _FRAME_HEAD + size


def new_paths(stream: bytes) -> list[str]:
    """Return the values of ``:path`` that a connection's client spelt out, in order.

    gRPC spells each path out once per connection: a literal that enters the table, with a new name,
    without Huffman coding (RFC 7541, 6.2.1); later requests refer to the entry.
    """
    found = []
    for kind, payload in frames(stream):
        if kind in (HEADERS, CONTINUATION):
            for rest in payload.split(b"\x40\x05:path")[1:]:
                found.append(rest[1 : 1 + rest[0]].decode())
    return found
