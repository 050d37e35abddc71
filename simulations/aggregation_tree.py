"""An aggregation tree of real processes on 127.0.0.1, against one flat server.

Each edge server listens for its clients, merges their encoded updates as they come, and passes one
accumulator (`compeft_fl.merging.partial`) on to the server above; with ``--regions`` there is a
level in between. A process per edge plays its clients, over a connection for each. The root
compares its result with that of one server that has merged every update itself, and prints bytes
and seconds per hop.

    python simulations/aggregation_tree.py --edges 4 --clients 50 --regions 2
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import compeft_fl as cf
from compeft_fl.merging.partial import decode_partial, encode_partial, max_partial_bytes

HOST = "127.0.0.1"
VERSION = 3  # of the global adapter that all updates are relative to
TIMEOUT = 600.0  # seconds until a socket gives up

METHODS: dict[str, Callable[[cf.Layout], Any]] = {
    "average": lambda layout: cf.Average(layout=layout),
    "task-arithmetic": lambda layout: cf.TaskArithmetic(0.1, layout=layout),
    "ties": lambda layout: cf.Ties(0.4, layout=layout),
}


class Hop(NamedTuple):
    """What came in at a server: from how many, bytes, CPU seconds of merging and of passing on."""

    level: str
    senders: int
    num_bytes: int
    seconds: float
    passing: float = 0.0


def layout_of(size: int) -> cf.Layout:
    """The adapter of the example: one matrix and its bias."""
    return cf.Layout([cf.TensorSpec("weight", (size - 10,)), cf.TensorSpec("bias", (10,))])


def client_update(client: int, size: int, density: float) -> tuple[bytes, int]:
    """What a client sends: its encoded update, and its number of examples."""
    rng = np.random.default_rng([7, client])
    tau = cf.TaskVector(layout_of(size), rng.standard_normal(size, dtype=np.float32))
    update = cf.compress(tau, density, "mean")
    blob = cf.encode(update, layout_by_id=True, base_version=VERSION)
    return blob, 20 + int(rng.integers(500))


# --- framing: 8 bytes of length, 8 of weight, the bytes -------------------------------------------


def send(connection: socket.socket, blob: bytes, weight: int = 0) -> None:
    """Write one frame."""
    connection.sendall(len(blob).to_bytes(8, "little") + weight.to_bytes(8, "little"))
    connection.sendall(blob)


def receive(connection: socket.socket, most: int) -> tuple[bytes, int]:
    """Read one frame of at most ``most`` bytes."""
    head = _exactly(connection, 16)
    length = int.from_bytes(head[:8], "little")
    if length > most:
        raise ValueError(f"expected at most {most} bytes, found {length}")
    return _exactly(connection, length), int.from_bytes(head[8:], "little")


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(1 << 20, count - len(data)))
        if not part:
            raise ValueError(f"expected {count} bytes, found {len(data)}")
        data += part
    return bytes(data)


def frames(server: socket.socket, count: int, most: int) -> Iterator[tuple[bytes, int]]:
    """One frame from each of ``count`` connections."""
    server.settimeout(TIMEOUT)  # a socket from another process has lost its own
    for _ in range(count):
        connection, _ = server.accept()
        with connection:
            connection.settimeout(TIMEOUT)
            yield receive(connection, most)


def port_of(server: socket.socket) -> int:
    """Where others reach it."""
    port: int = server.getsockname()[1]
    return port


def listen() -> socket.socket:
    """A server socket on a free port."""
    server = socket.create_server((HOST, 0), backlog=1024)
    server.settimeout(TIMEOUT)
    return server


# --- the processes -------------------------------------------------------------------------------


def play_clients(port: int, clients: range, size: int, density: float) -> None:
    """Send the updates of these clients to their edge, each over a connection of its own."""
    for client in clients:
        blob, weight = client_update(client, size, density)
        with socket.create_connection((HOST, port), TIMEOUT) as connection:
            send(connection, blob, weight)


def serve_edge(
    server: socket.socket, above: int, clients: int, method: str, size: int, hops: Queue[Hop]
) -> None:
    """Merge the clients' updates as they come; pass one accumulator on."""
    accumulator = METHODS[method](layout_of(size))
    warm_up(method)
    seconds, num_bytes = 0.0, 0
    for blob, weight in frames(server, clients, 8 * size):
        start = time.process_time()
        accumulator.add(cf.decode(blob, layout=accumulator.layout, base_version=VERSION), weight)
        seconds += time.process_time() - start
        num_bytes += len(blob)
    passing = pass_on(accumulator, above)
    hops.put(Hop("clients to edges", clients, num_bytes, seconds, passing))


def serve_region(
    server: socket.socket, above: int, edges: int, method: str, size: int, hops: Queue[Hop]
) -> None:
    """Combine the accumulators of the servers below; pass one on."""
    warm_up(method)
    accumulator, hop = combined(server, edges, METHODS[method](layout_of(size)))
    hops.put(Hop("edges to regions", *hop, pass_on(accumulator, above)))


def pass_on(accumulator: Any, port: int) -> float:
    """Send an accumulator to the server above; the CPU seconds of making bytes of it."""
    start = time.process_time()
    blob = encode_partial(accumulator, base_version=VERSION)
    seconds = time.process_time() - start
    with socket.create_connection((HOST, port), TIMEOUT) as connection:
        send(connection, blob)
    return seconds


def warm_up(method: str) -> None:
    """Load the compiled kernels before time is taken."""
    accumulator = METHODS[method](layout_of(1000))
    accumulator.add(*client_update(0, 1000, 0.1))
    decode_partial(encode_partial(accumulator), accumulator).result()


def combined(
    server: socket.socket, senders: int, accumulator: Any
) -> tuple[Any, tuple[int, int, float]]:
    """The accumulators of ``senders`` servers in one; senders, bytes, CPU seconds."""
    seconds, num_bytes = 0.0, 0
    for blob, _ in frames(server, senders, max_partial_bytes(accumulator)):
        start = time.process_time()
        accumulator.combine(decode_partial(blob, accumulator, base_version=VERSION))
        seconds += time.process_time() - start
        num_bytes += len(blob)
    return accumulator, (senders, num_bytes, seconds)


def run_tree(options: argparse.Namespace, method: str) -> tuple[Any, list[Hop], float]:
    """Start the tree, be its root; the root's accumulator, the hops, and the seconds in all."""
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    hops: Queue[Hop] = context.Queue()
    processes = []

    def start(target: Callable[..., None], *args: Any) -> None:
        processes.append(context.Process(target=target, args=args, daemon=True))
        processes[-1].start()

    size, regions = options.parameters, options.regions
    start_time = time.perf_counter()
    # The sockets stay open here until all has been sent: a process takes its own when it starts.
    with contextlib.ExitStack() as sockets:
        root = sockets.enter_context(listen())
        above = [root]
        if regions:
            above = [sockets.enter_context(listen()) for _ in range(regions)]
            for index, server in enumerate(above):
                below = len(range(index, options.edges, regions))
                start(serve_region, server, port_of(root), below, method, size, hops)
        for edge in range(options.edges):
            clients = range(edge * options.clients, (edge + 1) * options.clients)
            port = port_of(above[edge % len(above)])
            server = sockets.enter_context(listen())
            start(serve_edge, server, port, len(clients), method, size, hops)
            start(play_clients, port_of(server), clients, size, options.density)
        warm_up(method)
        accumulator = METHODS[method](layout_of(size))
        accumulator, hop = combined(root, regions or options.edges, accumulator)
        for process in processes:
            process.join(TIMEOUT)
    seconds = time.perf_counter() - start_time
    found = [Hop("regions to root" if regions else "edges to root", *hop)]
    for _ in range(options.edges + regions):
        try:
            found.append(hops.get(timeout=10))
        except queue.Empty:
            raise RuntimeError("expected a report of each server, found fewer") from None
    return accumulator, found, seconds


def run_flat(options: argparse.Namespace, method: str) -> Any:
    """One server that merges every update itself."""
    accumulator = METHODS[method](layout_of(options.parameters))
    for client in range(options.edges * options.clients):
        accumulator.add(*client_update(client, options.parameters, options.density))
    return accumulator


def report(options: argparse.Namespace, method: str) -> bool:
    """Run the tree and the flat server, print what they did; whether they agree."""
    tree, hops, seconds = run_tree(options, method)
    flat = run_flat(options, method)
    difference = np.abs(tree.result().values - flat.result().values).max()
    table = Table(title=f"{method}: {tree.count} updates of {options.parameters} parameters")
    for column in ("hop", "servers", "senders", "bytes", "bytes each", "CPU ms each"):
        table.add_column(column, justify="left" if column == "hop" else "right")
    for level in ("clients to edges", "edges to regions", "regions to root", "edges to root"):
        mine = [hop for hop in hops if hop.level == level]
        if mine:
            senders, total = sum(hop.senders for hop in mine), sum(hop.num_bytes for hop in mine)
            each = 1e3 * sum(hop.seconds for hop in mine) / senders
            table.add_row(
                level, str(len(mine)), str(senders), f"{total:,}", f"{total / senders:,.0f}",
                f"{each:.2f}",
            )  # fmt: skip
    passing = [hop.passing for hop in hops if hop.passing]
    Console(width=None if sys.stdout.isatty() else 120).print(
        table,
        f"making bytes of an accumulator: {1e3 * sum(passing) / len(passing):.0f} ms of CPU",
        f"{seconds:.1f} s with starting {options.edges * 2 + options.regions} processes; "
        f"max difference from flat: {difference:g}",
        sep="\n",
    )
    same = (tree.count, tree.total_weight) == (flat.count, flat.total_weight)
    return bool(same and difference <= 1e-6 * np.abs(flat.result().values).max())


def main() -> int:
    """Run the example; exit code 1 where a tree's result is not the flat one's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=4)
    parser.add_argument("--clients", type=int, default=50, help="of each edge")
    parser.add_argument("--regions", type=int, default=0, help="servers between edges and root")
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["average", "ties"])
    options = parser.parse_args()
    if not 0 <= options.regions <= options.edges or options.clients < 1 or options.edges < 1:
        parser.error("expected at least one edge, one client each, and no more regions than edges")
    return 0 if all(report(options, method) for method in options.methods) else 1


if __name__ == "__main__":
    sys.exit(main())
