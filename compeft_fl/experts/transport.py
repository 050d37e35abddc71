"""How a client reaches a server: channel, token, and statuses as this package's errors."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from compeft_fl.errors import (
    AccessError,
    BrokenExpertError,
    ExpertError,
    ParameterError,
    StoreFullError,
    UnavailableError,
    UnknownExpertError,
)
from compeft_fl.experts.protocol import PROTOCOL, PROTOCOL_KEY, is_loopback
from compeft_fl.experts.v1 import experts_pb2_grpc
from compeft_fl.printable import one_line, quoted

__all__ = ["Connection", "read_certificate"]

_MAX_MESSAGE: Final = 64 << 20  # of a server's: a page of a thousand experts
_PROBE_SECONDS: Final = 3.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 20_000),  # a server that hangs is found out
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_OTHER_CERTIFICATE: Final = ("CERTIFICATE", "Peer name", "verification check failed")
_ERRORS: Final = {
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.NOT_FOUND: UnknownExpertError,
    grpc.StatusCode.INVALID_ARGUMENT: ExpertError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: StoreFullError,
    grpc.StatusCode.DATA_LOSS: BrokenExpertError,
    grpc.StatusCode.FAILED_PRECONDITION: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnavailableError,
}


class Connection:
    """A channel to a server of experts.

    Parameters
    ----------
    server : str
        HOST:PORT.
    token : str
    ca : bytes, optional
        The authority whose certificate the server has, PEM: TLS; empty: any that this system
        trusts. None: plain text, which is for servers that no other machine reaches, and a token
        is not sent elsewhere.
    plain : bool
        Plain text and a token even so.

    Raises
    ------
    ParameterError
        An address that is none, or a token without TLS.
    """

    def __init__(
        self, server: str, token: str = "", ca: bytes | None = None, *, plain: bool = False
    ) -> None:
        host, colon, port = server.rpartition(":")
        if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ParameterError(f"expected a server as HOST:PORT, found {quoted(server)}")
        if token and ca is None and not is_loopback(host) and not plain:
            raise ParameterError(
                f"expected TLS to {server}, for a token: give its authority's certificate (--ca)"
            )
        if token and not (token.isascii() and token.isprintable()):
            raise ParameterError("expected a token of printable ASCII, found another text")
        self.server = server
        self._where = host.strip("[]"), int(port)
        self._tls = ca is not None
        if ca is None:
            self._channel = grpc.insecure_channel(server, _OPTIONS)
        else:
            if ca:
                _check_certificate(ca)
            credentials = grpc.ssl_channel_credentials(ca or None)
            self._channel = grpc.secure_channel(server, credentials, _OPTIONS)
        stub: Any = experts_pb2_grpc.ExpertsStub
        self.stub: Any = stub(self._channel)
        self.metadata: Sequence[tuple[str, str]] = [(PROTOCOL_KEY, str(PROTOCOL))]
        if token:
            self.metadata = [*self.metadata, ("authorization", f"Bearer {token}")]

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn gRPC's errors in a block into this package's.

        Raises
        ------
        ExpertError
            `UnavailableError` where asking again may help.
        """
        try:
            yield
        except grpc.RpcError as error:
            code, details = error.code(), one_line(error.details() or "", 400)
            kind = _ERRORS.get(code)
            if kind is not None and kind is not UnavailableError:
                raise kind(details) from None
            why, again = (details, False) if kind is not None else self._why(code, details)
            unavailable = UnavailableError(f"{self.server}: {why}")
            unavailable.again = again
            raise unavailable from None
        except ValueError as error:  # gRPC's own, for a channel that another thread has closed
            if "closed channel" not in str(error):
                raise
            unavailable = UnavailableError(f"{self.server}: the connection was ended here")
            unavailable.again = False
            raise unavailable from None

    def _why(self, code: Any, details: str) -> tuple[str, bool]:
        """Why there is no answer, in words: gRPC's own are of sockets. May asking again help?"""
        if details.startswith("busy"):
            return details, True
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "no answer in time", True
        speaks = None if "refused" in details else _speaks_tls(*self._where)
        if speaks is None:
            return "no server answers there", True
        if speaks and not self._tls:
            return "expected plain text, found TLS: give its authority's certificate (--ca)", False
        if not speaks and self._tls:
            return "expected TLS, found a server that speaks plain text", False
        if self._tls and any(word in details for word in _OTHER_CERTIFICATE):
            return (
                "expected a certificate of the given authority for this host, found another",
                False,
            )
        return f"the server stopped in mid-call ({details})", True


def _check_certificate(content: bytes) -> None:
    try:
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ParameterError(f"expected a certificate in PEM, found other bytes: {error}") from None


def _speaks_tls(host: str, port: int) -> bool | None:
    """Does TLS answer there? None: nothing does."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host):
                    return True
            except (ssl.SSLError, OSError):
                return False
    except OSError:
        return None


def read_certificate(path: str) -> bytes:
    """The content of a certificate's file; nothing for ``system``, the authorities it trusts.

    Raises
    ------
    ParameterError
        It cannot be read.
    """
    if path == "system":
        return b""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ParameterError(f"{path}: {error.strerror}") from None
