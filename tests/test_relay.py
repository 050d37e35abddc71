"""The relay: what passes is what was sent, every byte is counted, and connections can be cut."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from compeft_fl.cli.main import main
from compeft_fl.deploy.relay import DOWN, UP, Link, Relay
from compeft_fl.errors import ParameterError

SECONDS = 60


class Server:
    """Answers each connection's bytes, when its client has said all, with them twice over."""

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.got: list[bytes] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()

    def _serve(self):
        with ThreadPoolExecutor() as pool:
            while True:
                try:
                    connection, _ = self.listener.accept()
                except OSError:
                    return
                pool.submit(self._answer, connection)

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            data = read_all(connection)
            self.got.append(data)
            connection.sendall(2 * data)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def ask(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def some(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize(
    "link",
    [
        Link(),
        Link(mbit_per_second=80),
        Link(latency=0.02),
        Link(mbit_per_second=40, latency=0.05),
        Link(mbit_per_second=0.5),
    ],
    ids=str,
)
def test_bytes_arrive_as_they_were_sent_and_are_counted(link):
    size = 300_000 if link.bytes_per_second > 1e6 else 5_000
    sent = {index: some(size + index, index) for index in range(6)}
    with Server() as server, Relay(server.port, 2, link) as relay, ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda i: ask(relay.ports[i % 2], sent[i]), sent))
        assert answers == [2 * data for data in sent.values()]
        assert sorted(server.got) == sorted(sent.values())
        for node in range(2):
            up = sum(len(data) for index, data in sent.items() if index % 2 == node)
            assert relay.total(UP, node) == up
            assert relay.total(DOWN, node) == 2 * up
            for way in (UP, DOWN):
                assert sum(count for _, count in relay.passed(node, way)) == relay.total(way, node)
                times = [when for when, _ in relay.passed(node, way)]
                assert times == sorted(times)
        assert len(relay.connections) == 6
        assert sorted(each.up for each in relay.connections) == sorted(map(len, sent.values()))


def test_a_tap_sees_each_direction_in_order():
    seen: dict = {}

    def tap(node, connection, direction, data):
        seen[node, id(connection), direction] = seen.get((node, id(connection), direction), b"")
        seen[node, id(connection), direction] += data

    with Server() as server, Relay(server.port, tap=tap) as relay:
        data = some(200_000)
        ask(relay.ports[0], data)
        (connection,) = relay.connections
        assert seen == {(0, id(connection), UP): data, (0, id(connection), DOWN): 2 * data}


def test_a_connection_is_closed_after_so_many_bytes():
    with Server() as server, Relay(server.port, link=Link(close_after=100_000)) as relay:
        assert ask(relay.ports[0], some(1_000)) == 2 * some(1_000)
        assert lost(relay.ports[0], some(500_000))
        first, second = relay.connections
        assert (first.up, first.down) == (1_000, 2_000)
        assert 100_000 <= second.up + second.down < 100_000 + (1 << 16)


def test_all_connections_can_be_closed_and_made_anew():
    with Server() as server, Relay(server.port) as relay:
        with socket.create_connection(("127.0.0.1", relay.ports[0]), SECONDS) as idle:
            idle.sendall(b"here")
            while not relay.total(UP):
                pass
            relay.close_connections()
            assert closed(idle)
        assert ask(relay.ports[0], b"again") == b"againagain"
        assert relay.total(UP) == len(b"hereagain")


def test_a_server_that_is_down_refuses_and_comes_back():
    with Server() as server:
        port = server.port
    with Relay(port) as relay:
        assert lost(relay.ports[0], b"anybody?")
        assert relay.connections == []


def test_nothing_is_left():
    before = threading.active_count()
    with Server() as server:
        with Relay(server.port, 3) as relay:
            ask(relay.ports[2], b"x")
            ports = set(relay.ports)
            with socket.create_connection(("127.0.0.1", relay.ports[0])) as idle:
                idle.sendall(b"still open")
                while relay.total(UP) < 11:
                    pass
        listening = {
            c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"
        }
        assert not ports & listening
        assert not any(each.open for each in relay.connections)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "options",
    [
        {"mbit_per_second": 0},
        {"mbit_per_second": float("nan")},
        {"latency": -0.1},
        {"latency": float("inf")},
        {"close_after": 0},
    ],
    ids=str,
)
def test_links_that_cannot_be(options):
    with pytest.raises(ParameterError, match="expected"):
        Link(**options)


def test_parts_are_small_where_the_link_is_slow():
    assert Link().part_bytes == Link(mbit_per_second=1000).part_bytes == 1 << 16
    assert Link(mbit_per_second=0.1).part_bytes == 512
    assert 512 < Link(mbit_per_second=10).part_bytes < 1 << 16


def lost(port: int, data: bytes) -> bool:
    """Whether a connection breaks before all is said and answered."""
    try:
        return ask(port, data) != 2 * data
    except OSError:
        return True


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except OSError:
        return True


@pytest.mark.parametrize("option", [["--mbit", "0"], ["--latency", "-1"]])
def test_the_command_rejects_links_that_cannot_be(option, capsys):
    assert main(["deploy", *option]) == 2
    assert "compeft-fl deploy: error: expected" in capsys.readouterr().err
