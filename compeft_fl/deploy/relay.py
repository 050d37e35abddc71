"""A TCP relay that counts what passes, and can make the link slow, distant or unreliable.

It stands between SuperNodes and SuperLink and passes bytes on as they are: what is encrypted stays
so. Each node has a port of its own, so its bytes can be told from the others'. Counted are the
bytes of the TCP streams, which is all of TLS, HTTP/2 and gRPC, but not the headers of TCP and IP
(about 3 % of full packets).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from compeft_fl.errors import ParameterError

__all__ = ["DOWN", "UP", "Connection", "Link", "Relay"]

UP: Final = "up"
"""From a node to the server."""
DOWN: Final = "down"

_HOST: Final = "127.0.0.1"
_LARGEST_PART: Final = 1 << 16
_SMALLEST_PART: Final = 512
_PART_SECONDS: Final = 0.01  # at the link's speed
_READY_SECONDS: Final = 0.002  # a read that takes less found its bytes waiting
_CREDIT_SECONDS: Final = 1.0  # that a busy link makes up for when the relay woke too late
_BIN_SECONDS: Final = 0.05  # of the record of when bytes passed
_START_SECONDS: Final = 10.0

Tap = Callable[[int, "Connection", str, bytes], None]


@dataclass(frozen=True)
class Link:
    """What a node's link is like, in each direction by itself.

    Parameters
    ----------
    mbit_per_second : float, optional
        10^6 bits a second of the TCP streams, shared by the node's connections. Default: as fast as
        the relay is.
    latency : float
        Seconds one way. It holds for bytes, not for TCP's handshake, which is local.
    close_after : int, optional
        Close each connection once so many bytes have passed, both directions together; those that
        are on their way are lost.

    Raises
    ------
    ParameterError
        A number out of its range.
    """

    mbit_per_second: float | None = None
    latency: float = 0.0
    close_after: int | None = None

    def __post_init__(self) -> None:
        if self.mbit_per_second is not None and not 0 < self.mbit_per_second < float("inf"):
            raise ParameterError(f"expected Mbit/s over 0, found {self.mbit_per_second}")
        if not 0 <= self.latency < float("inf"):
            raise ParameterError(f"expected a latency of at least 0, found {self.latency}")
        if self.close_after is not None and self.close_after < 1:
            raise ParameterError(f"expected close_after of at least 1, found {self.close_after}")

    @property
    def bytes_per_second(self) -> float:
        """Infinity where nothing limits it."""
        return float("inf") if self.mbit_per_second is None else self.mbit_per_second * 1e6 / 8

    @property
    def part_bytes(self) -> int:
        """How much is passed on at a time."""
        return int(min(_LARGEST_PART, max(_SMALLEST_PART, self.bytes_per_second * _PART_SECONDS)))


@dataclass
class Connection:
    """One TCP connection and what has passed on it, in bytes.

    Attributes
    ----------
    node : int
        Index of the port that it came in on.
    up, down : int
    open : bool
    """

    node: int
    up: int = 0
    down: int = 0
    open: bool = True


class Relay:
    """Passes connections to its loopback ports on to a port of the server; a context manager.

    It runs in a thread of its own.

    Parameters
    ----------
    target_port : int
        The server's port on 127.0.0.1.
    num_nodes : int
        Ports to open, one a node.
    link : Link, optional
        Of each node.
    tap : callable, optional
        Called with node, connection, direction and bytes before they are passed on.

    Attributes
    ----------
    ports : list of int
        One a node.
    connections : list of Connection
        All that there were.
    """

    def __init__(
        self,
        target_port: int,
        num_nodes: int = 1,
        link: Link | None = None,
        *,
        tap: Tap | None = None,
    ) -> None:
        self._target_port, self._num_nodes, self._tap = target_port, num_nodes, tap
        self.link = link or Link()
        self.ports: list[int] = []
        self.connections: list[Connection] = []
        self._free = {(node, way): 0.0 for node in range(num_nodes) for way in (UP, DOWN)}
        self._passed: dict[tuple[int, str], list[tuple[float, int]]] = {
            way: [] for way in self._free
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[int, tuple[asyncio.StreamWriter, ...]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._error: BaseException | None = None

    def open(self) -> None:
        """Listen; what `__enter__` does.

        Raises
        ------
        OSError
            No port is free.
        """
        self._thread.start()
        self._ready.wait(_START_SECONDS)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close all connections and ports; what `__exit__` does. The counts stay."""
        if self._thread.ident is None:
            return
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def total(self, direction: str, node: int | None = None) -> int:
        """Bytes that have passed in a direction, of one node or of all."""
        return sum(
            getattr(each, direction)
            for each in list(self.connections)
            if node is None or each.node == node
        )

    def passed(self, node: int, direction: str) -> list[tuple[float, int]]:
        """When bytes passed: (seconds since 1970, bytes) pairs, in steps of 0.05 s and more."""
        return list(self._passed[node, direction])

    def close_connections(self) -> None:
        """Close all connections now; new ones can be made."""
        if self._loop is not None:
            done = threading.Event()
            self._loop.call_soon_threadsafe(self._close_all, done)
            done.wait(_START_SECONDS)

    # What follows runs in the relay's thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        servers = []
        try:
            for node in range(self._num_nodes):
                server = await asyncio.start_server(
                    self._accept(node), _HOST, 0, limit=_LARGEST_PART
                )
                servers.append(server)
                self.ports.append(server.sockets[0].getsockname()[1])
            self._ready.set()
            await self._stop.wait()
        finally:
            for server in servers:
                server.close()
            self._close_all()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, node: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert self._loop is not None
            task = self._loop.create_task(self._relay(node, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return connected

    async def _relay(
        self, node: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection, until either side closes it."""
        try:
            far_reader, far_writer = await asyncio.open_connection(
                _HOST, self._target_port, limit=_LARGEST_PART
            )
        except OSError:  # the server is down: so is the connection
            writer.transport.abort()
            return
        connection = Connection(node)
        self.connections.append(connection)
        self._writers[id(connection)] = (writer, far_writer)
        ways = [
            asyncio.create_task(self._pass_on(connection, UP, reader, far_writer)),
            asyncio.create_task(self._pass_on(connection, DOWN, far_reader, writer)),
        ]
        try:
            await asyncio.gather(*ways)
        except OSError:
            pass  # reset by one side: so for the other
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._close(connection)

    async def _pass_on(
        self,
        connection: Connection,
        direction: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Pass on one direction, late and slowly where the link says so; in order."""
        link = self.link
        # What is on its way: as much as the link holds, so that the sender is slowed down too.
        held = link.bytes_per_second * link.latency / link.part_bytes if link.latency else 0
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(int(min(max(4, held), 10_000)))
        delivery = asyncio.create_task(self._deliver(connection, direction, queue, writer))
        try:
            busy, asked = False, time.monotonic()
            while data := await reader.read(link.part_bytes):
                busy = busy and time.monotonic() - asked < _READY_SECONDS
                when = await self._arrival(connection.node, direction, len(data), busy)
                await queue.put((when, data))
                if delivery.done():
                    break
                busy, asked = True, time.monotonic()
            if not delivery.done():
                await queue.put((time.monotonic() + link.latency, b""))
            await delivery
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)

    async def _arrival(self, node: int, direction: str, size: int, busy: bool) -> float:
        """Wait until the link has taken so many bytes; the time at which they arrive.

        Bytes that were waiting for the link begin when it became free, also where this process was
        late to see that: a machine with other work to do makes no link slower than it is.
        """
        now = time.monotonic()
        link = self.link
        if link.mbit_per_second is None:
            return now + link.latency
        begun = max(now - _CREDIT_SECONDS if busy else now, self._free[node, direction])
        sent = begun + size / link.bytes_per_second
        self._free[node, direction] = sent
        await asyncio.sleep(max(0.0, sent - now))
        return sent + link.latency

    async def _deliver(
        self,
        connection: Connection,
        direction: str,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
    ) -> None:
        while True:
            when, data = await queue.get()
            if (late := when - time.monotonic()) > 0:
                await asyncio.sleep(late)
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            if self._tap is not None:
                self._tap(connection.node, connection, direction, data)
            writer.write(data)
            self._count(connection, direction, len(data))
            limit = self.link.close_after
            if limit is not None and connection.up + connection.down >= limit:
                self._abort(connection)
                return
            await writer.drain()

    def _count(self, connection: Connection, direction: str, size: int) -> None:
        setattr(connection, direction, getattr(connection, direction) + size)
        passed, now = self._passed[connection.node, direction], time.time()
        if passed and now - passed[-1][0] < _BIN_SECONDS:
            passed[-1] = passed[-1][0], passed[-1][1] + size
        else:
            passed.append((now, size))

    def _close_all(self, done: threading.Event | None = None) -> None:
        for connection in self.connections:
            self._abort(connection)
        if done is not None:
            done.set()

    def _abort(self, connection: Connection) -> None:
        for writer in self._writers.get(id(connection), ()):
            writer.transport.abort()

    def _close(self, connection: Connection) -> None:
        connection.open = False
        for writer in self._writers.pop(id(connection), ()):
            writer.close()
