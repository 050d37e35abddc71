"""Server memory and time per update from 10 to 10,000 nodes: ``make bench-scale``.

Each point is a process of its own that runs one round of a real strategy, by its `start`, over a
grid that makes the replies as they are pulled: real Flower messages with distinct encoded Updates
of 10^6 parameters at density 0.1. Making them is timed apart and taken off. Memory is the peak of
the resident set over what the process had before `start`. ``--out DIR`` writes bench_scale.csv
and bench_scale.md there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table

import compeft_fl as cf
from compeft_fl.exchange.protocol import Answer
from compeft_fl.exchange.records import EXCHANGE_KEY, answer_record, find_offer, update_record
from compeft_fl.server.robustness import SignAgreementFilter
from compeft_fl.strategies import ComPEFTAverage, ComPEFTStrategy, ComPEFTTies
from compeft_fl.wire.messages import seal
from compeft_fl.wire.v1 import update_pb2

D, DENSITY = 1_000_000, 0.1
NODES = (10, 100, 1_000, 10_000)
POOL = 8
KINDS = ("average", "ties", "ties + log", "ties + rule")  # log: a dry run of the rule


def strategy(kind: str) -> ComPEFTStrategy:
    """A strategy by its name in the table."""
    name, _, more = kind.partition(" + ")
    rule = SignAgreementFilter(dry_run=more == "log") if more else None
    cls = {"average": ComPEFTAverage, "ties": ComPEFTTies}[name]
    return cls(fraction_evaluate=0.0, robustness=rule)


class SyntheticGrid(Grid):
    """Nodes whose replies are made when they are pulled; none are kept.

    Parameters
    ----------
    nodes : int
    size : int
        d. The signs are drawn once for `POOL` updates; each node's has a scale of its own.
    """

    def __init__(self, nodes: int, size: int = D) -> None:
        self.nodes = range(1, nodes + 1)
        rng = np.random.default_rng(0)
        layout = cf.Layout([cf.TensorSpec("w", (size,))])
        direction = rng.standard_normal(size, dtype=np.float32)
        self._size = size
        self._pool = []
        for _ in range(POOL):
            noise = 2 * rng.standard_normal(size, dtype=np.float32)
            update = cf.compress(cf.TaskVector(layout, direction + noise), DENSITY, "mean")
            blob = cf.encode(update, layout_by_id=True)
            self._pool.append(update_pb2.Update.FromString(blob[:-5]))
        self._scales = [update.golomb.scales[0] for update in self._pool]
        self.seconds = self.cpu_seconds = 0.0  # spent on making replies
        self.num_bytes = 0
        self._waiting: dict[str, int] = {}
        self._template: Message | None = None
        self._version = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Note who was sent something; as a real grid does, keep none of the messages."""
        ids = []
        for message in messages:
            if self._template is None:
                offer = find_offer(message.content)
                self._version = offer[0].version if offer else 0
                message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
                self._template = Message(RecordDict(), reply_to=message)
            ids.append(f"{len(self._waiting):032x}")
            self._waiting[ids[-1]] = message.metadata.dst_node_id
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies of these nodes, made now."""
        for message_id in message_ids:
            start, cpu_start = time.perf_counter(), time.process_time()
            reply = self._reply(message_id, self._waiting.pop(message_id))
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu_start
            yield reply
            del reply

    def _reply(self, message_id: str, node: int) -> Message:
        if self._template is None:
            raise ValueError("expected push_messages before pull_messages")
        update = self._pool[node % POOL]
        update.base_version = self._version
        update.golomb.scales[0] = self._scales[node % POOL] * (1 + node / 65536)
        blob = seal(update.SerializeToString(deterministic=True))
        self.num_bytes += len(blob)
        metrics = MetricRecord({"num-examples": 10 + node % 500, "loss": 1 / node})
        told = answer_record(Answer(self._version))
        content = RecordDict({
            "arrays": update_record(blob, self._size),
            "metrics": metrics,
            EXCHANGE_KEY: told,
        })  # fmt: skip
        request = Message(RecordDict(), node, "train")
        request.metadata.__dict__["_message_id"] = message_id
        reply = Message(content, reply_to=request)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    def get_node_ids(self) -> list[int]:
        """All of them."""
        return list(self.nodes)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used by the strategies."""
        return Message(*args, **kwargs)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        """Not used: the strategies stream."""
        return list(self.pull_messages(self.push_messages(messages)))

    def set_run(self, run: Any) -> None:
        """Nothing depends on it."""

    @property
    def run(self) -> Any:
        """None."""
        return None


def identify() -> None:
    """Flower's newer messages ask who makes them."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def one_round(kind: str, grid: SyntheticGrid, size: int = D) -> None:
    """A round of a strategy over a grid."""
    arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
    strategy(kind).start(grid, arrays, num_rounds=1)


def point(kind: str, nodes: int, size: int = D) -> dict[str, float]:
    """Seconds per update and the peak resident bytes over those before, in this process."""
    identify()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    one_round(kind, SyntheticGrid(40, 6_400), 6_400)  # compiles, and imports what is lazy
    grid = SyntheticGrid(nodes, size)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    one_round(kind, grid, size)
    return {
        "seconds": time.perf_counter() - start - grid.seconds,
        "cpu_seconds": time.process_time() - cpu_start - grid.cpu_seconds,
        "peak": max(0, _status("VmHWM") - before),
        "num_bytes": grid.num_bytes,
    }


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(kind: str, nodes: int) -> dict[str, Any]:
    """A point in a process of its own."""
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, __file__, "--point", kind, str(nodes)]
    environment = {**os.environ, "PYTHONPATH": root}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(output.stdout.splitlines()[-1])
    return {
        "strategy": kind,
        "updates": nodes,
        "ms_per_update": 1e3 * found["seconds"] / nodes,
        "cpu_ms_per_update": 1e3 * found["cpu_seconds"] / nodes,
        "peak_mib": found["peak"] / 2**20,
        "update_kb": found["num_bytes"] / nodes / 1e3,
    }


def show(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the table; write it where asked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()}, {cores} cores, Python {platform.python_version()}"
    title = f"compeft-fl {cf.__version__}, {machine}, {datetime.date.today()}"
    table = Table(title=title)
    lines = [
        f"{title}\n",
        f"A round of the strategy over real Flower messages, {D} parameters, density {DENSITY}.\n",
        "| strategy | updates | ms per update | CPU ms | peak MiB over baseline | kB per update |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for column in ("strategy", "updates", "ms per update", "CPU ms", "peak MiB", "kB per update"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        cells = [
            row["strategy"],
            str(row["updates"]),
            f"{row['ms_per_update']:.2f}",
            f"{row['cpu_ms_per_update']:.2f}",
            f"{row['peak_mib']:.1f}",
            f"{row['update_kb']:.1f}",
        ]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    said = []
    for kind in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == kind and row["updates"] >= 100]
        if len(mine) > 1:
            first, last = mine[0], mine[-1]
            said.append(
                f"{kind}: {last['updates'] / first['updates']:.0f} times the updates "
                f"({first['updates']} to {last['updates']}) take "
                f"{last['peak_mib'] / first['peak_mib']:.2f} times the memory and "
                f"{last['cpu_ms_per_update'] / first['cpu_ms_per_update']:.2f} times the CPU time "
                "per update."
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table, *said, sep="\n")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        lines += ["", *(f"- {each}" for each in said)]
        (out / "bench_scale.md").write_text("\n".join(lines) + "\n")
        with (out / "bench_scale.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> int:
    """Measure all points, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for bench_scale.csv and bench_scale.md")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--strategies", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options.point[0], int(options.point[1]))))
        return 0
    rows = []
    for kind in options.strategies:
        for nodes in options.nodes:
            Console(stderr=True).print(f"{kind}, {nodes} updates ...", style="dim")
            rows.append(measure(kind, nodes))
    show(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
