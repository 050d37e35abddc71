"""A server of experts: the service over a store, TLS, the standard health and reflection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from compeft_fl.errors import ExpertError, MissingPackageError, ParameterError
from compeft_fl.experts.protocol import is_loopback
from compeft_fl.experts.service import ExpertsService
from compeft_fl.experts.store import Limits, Store
from compeft_fl.experts.tokens import Tokens
from compeft_fl.experts.v1 import experts_pb2, experts_pb2_grpc

__all__ = ["Server", "Tls", "running", "start"]

_MAX_MESSAGE: Final = 5 << 20  # of a caller's; chunks are of 4 MiB or less
_OTHER_CALLS: Final = 16  # threads that streams leave to calls without one
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.so_reuseport", 0),  # a second server on a port is an error
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True)
class Tls:
    """A server's certificate and key, PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes
    ----------
    address : str
        HOST:PORT.
    """

    address: str
    _server: Any
    _store: Store
    _health: Any

    def stop(self, grace: float = 2.0) -> None:
        """Take no more calls, let those that run go on for a moment, and close the store."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        self._store.close()

    def wait(self) -> None:
        """Until somebody stops it."""
        self._server.wait_for_termination()


def start(
    folder: Path, host: str = "127.0.0.1", port: int = 0, *, tls: Tls | None = None,
    tokens: bool = False, insecure: bool = False, limits: Limits | None = None,
    max_streams: int = 192, silent_seconds: float = 60.0,
) -> Server:  # fmt: skip
    """Open a store and serve it.

    Parameters
    ----------
    folder : Path
        The store; is made where it is missing.
    host, port
        Where to listen; port 0: a free one.
    tls : Tls, optional
    tokens : bool
        Let only those in who have a token of the store's.
    insecure : bool
        Allow other machines in without TLS or tokens.
    limits : Limits, optional
    max_streams : int
        Uploads and downloads at a time.
    silent_seconds : float
        After which an upload from which nothing comes is ended.

    Raises
    ------
    ParameterError
        Not loopback, and no TLS or no tokens; or a certificate that is none.
    ExpertError
        The store is open elsewhere, or the port is taken.
    MissingPackageError
    """
    if not is_loopback(host) and not insecure and not (tls and tokens):
        raise ParameterError(
            f"expected TLS and tokens where other machines reach the server, found host {host} "
            f"without {'TLS' if tls is None else 'tokens'}"
        )
    health_pb2, health, health_pb2_grpc, reflection = _packages()
    store = Store(folder, limits)
    try:
        if tokens and not Tokens(folder).all():
            raise ParameterError(f"{folder}: expected tokens, found none: make one first")
        workers = ThreadPoolExecutor(max_streams + _OTHER_CALLS, thread_name_prefix="experts")
        server = grpc.server(workers, options=_OPTIONS)
        service = ExpertsService(
            store, Tokens(folder) if tokens else None,
            max_streams=max_streams, silent_seconds=silent_seconds,
        )  # fmt: skip
        register: Any = experts_pb2_grpc.add_ExpertsServicer_to_server
        register(service, server)
        name = experts_pb2.DESCRIPTOR.services_by_name["Experts"].full_name
        state = health.HealthServicer()
        for each in ("", name):
            state.set(each, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        names = (name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        bound = _listen(server, host, port, tls)
        server.start()
    except BaseException:
        store.close()
        raise
    return Server(f"{host}:{bound}", server, store, state)


def _listen(server: Any, host: str, port: int, tls: Tls | None) -> int:
    address = f"{host}:{port}"
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)])
        return int(server.add_secure_port(address, credentials))
    except (RuntimeError, ValueError) as error:
        hint = "" if tls is None else ", or its certificate and key are none"
        raise ExpertError(f"cannot listen on {address}: in use{hint} ({error})") from None


def _packages() -> tuple[Any, Any, Any, Any]:
    try:
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection
    except ImportError as error:
        raise MissingPackageError(
            f"serving experts needs {error.name}: pip install '.[experts]'"
        ) from None
    return health_pb2, health, health_pb2_grpc, reflection


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Server]:
    """A server for the time of a block; parameters as `start`.

    Examples
    --------
    >>> import tempfile
    >>> with running(Path(tempfile.mkdtemp())) as server:
    ...     server.address.partition(":")[0]
    '127.0.0.1'
    """
    server = start(folder, **options)
    try:
        yield server
    finally:
        server.stop(grace=0.2)
