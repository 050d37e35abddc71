"""A TCP relay that keeps what clients send through it, and the HTTP/2 frames in that."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, CONTINUATION = 1, 9
_FRAME_HEAD = 9


class Relay:
    """Passes connections to a free loopback port on to `target_port`; a context manager."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.sent: list[bytearray] = []  # by connection: from the client to the server

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.close()
        self._thread.join()
        self._woken.close()

    def _serve(self) -> None:
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            stack.enter_context(self._listener)
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            peers: dict[socket.socket, tuple[socket.socket, bytearray | None]] = {}
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        for end in peers:
                            end.close()
                        return
                    if key.fileobj is self._listener:
                        client, _ = self._listener.accept()
                        try:
                            server = socket.create_connection(("127.0.0.1", self._target_port))
                        except OSError:
                            client.close()
                            continue
                        record = bytearray()
                        self.sent.append(record)
                        peers[client], peers[server] = (server, record), (client, None)
                        selector.register(client, selectors.EVENT_READ)
                        selector.register(server, selectors.EVENT_READ)
                    elif key.fileobj in peers:
                        self._pass_on(key.fileobj, peers, selector)

    def _pass_on(self, source, peers, selector) -> None:
        target, record = peers[source]
        try:
            data = source.recv(1 << 16)
            target.sendall(data)
        except OSError:
            data = b""
        if record is not None:
            record += data
        if not data:
            for end in (source, target):
                selector.unregister(end)
                del peers[end]
                end.close()


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
