#!/usr/bin/env python
"""What a message costs a node: the seconds of a client process, and what they are spent on.

    python simulations/deploy/message_cost.py [--repeat 5] [--threads 1] [--imports]

Flower starts a process for every message. This does what such a process does with the default
scenario (one of three nodes), step by step: once cold, as `flwr-clientapp` starts it, and once
warm, as `compeft-fl warm` forks it. Wall and CPU seconds, the least of the repetitions. Not in it:
what waits, which is the SuperNode asking for messages every 3 s, flower-superexec asking for work
(FLWR_SUPEREXEC_TASK_POLL_INTERVAL, 1 s), and the transfers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

_NODES: Final = 3
_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
Laps = list[tuple[str, float, float]]


class _Clock:
    """Laps of wall and CPU time."""

    def __init__(self) -> None:
        self.laps: Laps = []
        self.resume()

    def resume(self) -> None:
        """Begin a lap here, and leave out what was since the last one."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """End a lap."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.laps.append((name, wall - self._wall, cpu - self._cpu))
        self.resume()


def client(threads: int) -> dict[str, Laps]:
    """Do, in this process, what a client process does; then again in a fork of it."""
    clock = _Clock()
    clock.laps.append(("interpreter", 0.0, time.process_time()))
    from importlib.metadata import entry_points

    next(iter(entry_points(group="console_scripts", name="flwr-clientapp"))).load()
    clock.lap("import flwr")
    import compeft_fl.app.client_app  # noqa: F401

    clock.lap("import compeft_fl (mod, app)")
    import torch

    torch.set_num_threads(threads)
    clock.lap("import torch")
    from transformers import AutoModel, AutoTokenizer  # noqa: F401

    clock.lap("import transformers")
    import peft  # noqa: F401

    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.tasks import data, model, training

    clock.lap("import peft")
    config = AppConfig(preset="compeft")
    rows = data.load(config)
    clock.lap("read the data")
    base, tokenizer = model._load_base(config, rows.labels, torch.float32)
    clock.lap("load the base model")
    bare = model.Classifier(base, None, tokenizer, rows.labels, config.max_length)
    model._prototypes(bare, rows.validation)
    clock.lap(f"measure prototypes on {len(rows.validation)} rows")
    del base, bare
    classifier = model.build(config, rows)  # the above once more, and the adapter

    def message(clock: _Clock) -> None:
        _work(clock, classifier, rows, config, training)

    warm = _forked(message)  # first: a process that has trained has threads
    clock.resume()
    message(clock)
    return {"cold": clock.laps, "warm": warm}


def _work(clock: _Clock, classifier: Any, rows: Any, config: Any, training: Any) -> None:
    """Train and compress, as on a train message."""
    from compeft_fl import TaskVector, compress, encode
    from compeft_fl.app.tasks import data

    before = {name: tensor.numpy().copy() for name, tensor in classifier.adapter_state().items()}
    mine = data.node_rows(rows, {"partition-id": 0, "num-partitions": _NODES}, config)
    result = training.train(classifier, mine, config, seed=1)
    clock.lap(f"train {result.steps} steps of {config.batch_size} rows")
    after = {name: tensor.numpy() for name, tensor in classifier.adapter_state().items()}
    encode(compress(TaskVector.between(before, after), config.density, config.scale))
    clock.lap("compress and encode")


def _forked(message: Callable[[_Clock], None]) -> Laps:
    """Do the work of a message in a fork, as a warm client."""
    import torch

    from compeft_fl.deploy import warm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    read, write = os.pipe()
    started = time.perf_counter()
    if (child := os.fork()) == 0:
        fork = ("fork", time.perf_counter() - started, time.process_time())
        warm.load_kernels()  # as what clients are forked from has done
        clock = _Clock()
        clock.laps.append(fork)
        torch.set_num_threads(threads)
        message(clock)
        os.write(write, json.dumps(clock.laps).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        laps: Laps = json.load(file)
    os.waitpid(child, 0)
    return laps


def _front() -> tuple[str, float, float]:
    """Return what starting the program in front takes."""
    from compeft_fl.deploy import warm

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not warm.write_program(folder, folder / "none"):
            return ("program in front", 0.0, 0.0)
        text = (folder / warm.PROGRAM).read_text(encoding="utf-8").replace("os.execv", "print")
        (folder / warm.PROGRAM).write_text(text, encoding="utf-8")
        before, started = os.times(), time.perf_counter()
        subprocess.run([folder / warm.PROGRAM], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
    cpu = after.children_user - before.children_user
    cpu += after.children_system - before.children_system
    return ("program in front", time.perf_counter() - started, cpu)


def _imports(environment: dict[str, str]) -> Table:
    """Return a table of what importing takes, by top-level package, from ``-X importtime``."""
    code = (
        "from importlib.metadata import entry_points as e; "
        "next(iter(e(group='console_scripts', name='flwr-clientapp'))).load(); "
        "import compeft_fl.app.client_app, torch, peft; from transformers import AutoModel"
    )
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    own: dict[str, tuple[float, int]] = {}
    for match in re.finditer(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", done.stderr):
        package = match[2].partition(".")[0]
        seconds, count = own.get(package, (0.0, 0))
        own[package] = (seconds + int(match[1]) / 1e6, count + 1)
    table = Table(title="importing, by package (its own modules only)", title_justify="left")
    for header in ("package", "modules", "s"):
        table.add_column(header, justify="left" if header == "package" else "right")
    for package, (seconds, count) in sorted(own.items(), key=lambda item: -item[1][0])[:15]:
        table.add_row(package, str(count), f"{seconds:.2f}")
    return table


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in a client (1)")
    parser.add_argument("--imports", action="store_true", help="show importing by package too")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps(client(options.threads)))
        return 0
    environment = {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(options.threads)}
    runs: list[dict[str, Laps]] = []
    for _ in range(options.repeat):
        command = [sys.executable, __file__, "--client", "--threads", str(options.threads)]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        whole = time.perf_counter() - started
        run = json.loads(done.stdout.splitlines()[-1])
        name, _, cpu = run["cold"][0]
        run["cold"][0] = (name, min(cpu, whole), cpu)
        run["warm"].insert(0, _front())
        runs.append(run)
    console = Console()
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{options.threads} thread(s), least of {options.repeat}, {time.strftime('%Y-%m-%d')}"
    )
    for kind, title in (("cold", "a cold client process"), ("warm", "a warm one")):
        table = Table(title=title, title_justify="left", show_footer=True)
        rows = [
            (laps[0][0], min(lap[1] for lap in laps), min(lap[2] for lap in laps))
            for laps in zip(*(run[kind] for run in runs), strict=True)
        ]
        table.add_column("spent on", "in all")
        for index, header in ((1, "wall s"), (2, "CPU s")):
            total = sum(float(row[index]) for row in rows)
            table.add_column(header, f"{total:.2f}", justify="right")
        for name, wall, cpu in rows:
            table.add_row(name, f"{wall:.2f}", f"{cpu:.2f}")
        console.print(table)
    if options.imports:
        console.print(_imports(environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
