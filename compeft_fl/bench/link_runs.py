"""Rounds over real links: a deployment on loopback behind the throttled relay, codec by codec.

Every finished round is a line of a file in the folder of results, so that a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compeft_fl.deploy.counted import by_round
from compeft_fl.deploy.deployment import Deployment
from compeft_fl.deploy.relay import DOWN, UP, Link, Relay
from compeft_fl.runs.launch import FlowerError, last_line

__all__ = ["LinkPoint", "MeasuredRound", "Plan", "finished", "run_plan"]

ROUNDS_FILE: Final = "bandwidth.rounds.jsonl"
FOLDER: Final = "bandwidth-deployment"  # logs of its processes

_APP: Final = """\
[project]
name = "compeft-fl-links"
version = "1.0.0"
description = "Rounds that take what their messages take"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "compeft-fl"
[tool.flwr.app.components]
serverapp = "compeft_fl.bench.link_app:server_app"
clientapp = "compeft_fl.bench.link_app:client_app"
[tool.flwr.app.config]
plan = "{plan}"
"""
_SERVER_PROGRAM: Final = "flwr-serverapp"
_LOOK_SECONDS: Final = 0.05
_ALIVE_SECONDS: Final = 5.0
_START_SECONDS: Final = 120.0


@dataclass(frozen=True)
class LinkPoint:
    """A link to measure a codec over."""

    codec: str
    mbit_per_second: float
    latency: float  # seconds one way

    def link(self) -> dict[str, float]:
        """As JSON has it."""
        return {"mbit_per_second": self.mbit_per_second, "latency": self.latency}


@dataclass(frozen=True)
class MeasuredRound:
    """One round over a link.

    Attributes
    ----------
    point : LinkPoint
    nodes, parameters : int
    warm_up : bool
        The first round of a codec: nothing goes down, and nothing is in memory yet.
    seconds : float
        From the end of the round before until the merged adapter.
    payload, message, socket : (int, int)
        Bytes up and down, all nodes.
    codec_seconds : float
        Encoding and decoding: the server's, and the slowest node's.
    waiting, starting, returning : float
        Means over nodes, in seconds. From the message's push to the birth of the client process;
        from there until the ClientApp begins, which includes what of the download is left and
        decoding; from its end until the server has the reply, which includes encoding.
    """

    point: LinkPoint
    nodes: int
    parameters: int
    warm_up: bool
    seconds: float
    payload: tuple[int, int]
    message: tuple[int, int]
    socket: tuple[int, int]
    codec_seconds: float
    waiting: float
    starting: float
    returning: float


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Parameters
    ----------
    points : sequence of LinkPoint
        In any order; those of one codec are measured one after another.
    rounds : int
        Of each point.
    nodes, parameters : int
    """

    points: Sequence[LinkPoint]
    rounds: int
    nodes: int
    parameters: int

    def without(self, done: Sequence[MeasuredRound]) -> dict[str, list[dict[str, float]]]:
        """By codec: the link of each round that is to be run; the first one warms up."""
        wanted: dict[str, list[dict[str, float]]] = {}
        for point in self.points:
            have = sum(
                each.point == point
                and not each.warm_up
                and (each.nodes, each.parameters) == (self.nodes, self.parameters)
                for each in done
            )
            if have < self.rounds:
                links = wanted.setdefault(point.codec, [])
                links += [point.link()] * (self.rounds - have)
        fastest = {"mbit_per_second": 1000.0, "latency": 0.0}
        return {codec: [fastest, *links] for codec, links in wanted.items()}


def finished(out: Path) -> list[MeasuredRound]:
    """The rounds that have been measured, from a run that was stopped."""
    file = out / ROUNDS_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [_from_plain(json.loads(line)) for line in lines if line.endswith("\n")]


def run_plan(
    plan: Plan, out: Path, on_round: Callable[[MeasuredRound], None]
) -> list[MeasuredRound]:
    """Measure what of a plan has not been measured; return all rounds.

    Parameters
    ----------
    plan : Plan
    out : Path
        Folder of results.
    on_round : callable
        Called with each round as it ends.

    Raises
    ------
    FlowerError
        Where a process does not start, or the run fails.
    """
    done = finished(out)
    codecs = plan.without(done)
    if not codecs:
        return done
    logs = out / FOLDER
    logs.mkdir(exist_ok=True)
    with (
        _ended_in_order(),
        Deployment(logs, num_nodes=plan.nodes, link=Link()) as deployment,
        (out / ROUNDS_FILE).open("a", encoding="utf-8") as file,
    ):
        for index in range(plan.nodes):
            deployment.start_node(index)
        folder = deployment.home / "links"
        folder.mkdir()
        told = {"folder": str(folder), "nodes": plan.nodes, "parameters": plan.parameters}
        (folder / "plan.json").write_text(json.dumps({**told, "codecs": codecs}))
        app = deployment.home / "app"
        app.mkdir()
        text = _APP.format(plan=folder / "plan.json")
        (app / "pyproject.toml").write_text(text, encoding="utf-8")
        run_id = deployment.submit(app)
        deployment.stream_log(run_id, logs / "flower.log")
        relay = deployment.relay
        assert relay is not None
        expected = sum(map(len, codecs.values()))
        for row in _follow(deployment, relay, folder, expected):
            measured = _measured(row, plan, relay)
            file.write(json.dumps(_to_plain(measured)) + "\n")
            file.flush()
            done.append(measured)
            on_round(measured)
    return done


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Make SIGTERM end the deployment as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _follow(
    deployment: Deployment, relay: Relay, folder: Path, expected: int
) -> Iterator[dict[str, Any]]:
    """Yield the app's rounds as they end; change the link when it asks."""
    asked = read = 0
    looked = started = time.monotonic()
    seen = False
    while read < expected:
        ask = folder / f"ask-{asked}"
        if ask.exists():
            relay.link = Link(**json.loads(ask.read_text(encoding="utf-8")))
            (folder / f"go-{asked}").touch()
            asked += 1
        rows = _lines(folder / "rounds.jsonl")
        yield from (json.loads(line) for line in rows[read:])
        read = len(rows)
        if time.monotonic() - looked > _ALIVE_SECONDS:
            looked = time.monotonic()
            deployment.check()
            alive = deployment.family.running(_SERVER_PROGRAM)
            gone = not alive and (seen or looked - started > _START_SECONDS)
            seen = seen or alive
            if gone and len(_lines(folder / "rounds.jsonl")) == read < expected:
                log = deployment.folder / "flower.log"
                raise FlowerError(f"the run ended early; {log} ends: {last_line(log)}")
        time.sleep(_LOOK_SECONDS)


def _lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _measured(row: dict[str, Any], plan: Plan, relay: Relay) -> MeasuredRound:
    transfers, window = row["transfers"], [(row["began"], row["ended"])]

    def total(name: str) -> tuple[int, int]:
        sums = [
            sum(each[name] or 0 for each in transfers if each["direction"] == way)
            for way in (UP, DOWN)
        ]
        return sums[0], sums[1]

    on_socket = [
        sum(by_round(relay.passed(node, way), window)[1] for node in range(plan.nodes))
        for way in (UP, DOWN)
    ]
    ups = [each for each in transfers if each["direction"] == UP]
    downs = {each["node"]: each for each in transfers if each["direction"] == DOWN}
    clients = {int(node): told for node, told in row["clients"].items()}
    born = [c.get("born", c["began"]) for c in clients.values()]
    pushed = [downs[node]["time"] for node in clients]
    arrived = {each["node"]: each["time"] for each in ups}
    return MeasuredRound(
        LinkPoint(row["codec"], row["mbit_per_second"], row["latency"]),
        plan.nodes,
        plan.parameters,
        row["round"] == 1,
        row["ended"] - row["began"],
        total("payload_bytes"),
        total("message_bytes"),
        (on_socket[0], on_socket[1]),
        sum(each["encode_seconds"] or 0.0 for each in downs.values())
        + sum(each["decode_seconds"] or 0.0 for each in ups)
        + max((e["encode_seconds"] or 0.0) + (e["node_decode_seconds"] or 0.0) for e in ups),
        statistics.mean(b - p for b, p in zip(born, pushed, strict=True)),
        statistics.mean(c["began"] - b for c, b in zip(clients.values(), born, strict=True)),
        statistics.mean(arrived[node] - told["ended"] for node, told in clients.items()),
    )


def _to_plain(measured: MeasuredRound) -> dict[str, Any]:
    plain = {**vars(measured), **vars(measured.point)}
    del plain["point"]
    return plain


def _from_plain(plain: dict[str, Any]) -> MeasuredRound:
    point = LinkPoint(*(plain.pop(name) for name in ("codec", "mbit_per_second", "latency")))
    pairs: dict[str, Any] = {n: tuple(plain.pop(n)) for n in ("payload", "message", "socket")}
    return MeasuredRound(point=point, **pairs, **plain)
