"""Fuzzing of what reads bytes from elsewhere: ``make fuzz``, or ``python simulations/fuzz.py``.

Three sources of inputs. A seeded generator changes valid ones: the bulk. For each codec, a node's
state, checkpoints and partial sums (`simulations/fuzz_targets.py`), for what server and node send
each other (`simulations/fuzz_exchange.py`), for calls to a store of experts and its replies
(`simulations/fuzz_experts.py`), and for files, folders and the commands on them
(`simulations/fuzz_commands.py`). Hypothesis makes messages of
any field values under a checksum that is right, and any bytes. Atheris, where it is installed, is
guided by the code that an input reaches (`simulations/fuzz_guided.py`). Each input must be read, or
be rejected by an error of `compeft_fl.errors`; anything else, and more memory than the limit that
this program sets itself, is a failure. ``--out DIR`` writes fuzz.md there.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import logging
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz_commands  # noqa: E402
import fuzz_exchange  # noqa: E402
import fuzz_experts  # noqa: E402
import fuzz_targets  # noqa: E402
from fuzz_targets import Target  # noqa: E402

import compeft_fl as cf  # noqa: E402
from compeft_fl import codecs  # noqa: E402
from compeft_fl.errors import CompeftError  # noqa: E402
from compeft_fl.wire.messages import seal  # noqa: E402
from compeft_fl.wire.v1 import update_pb2  # noqa: E402

LIMIT = 1 << 30  # bytes of address space beyond what the program has when it begins
STRUCTURED_SHARE = 0.1  # of the inputs of a target, for those that hypothesis makes

Counts = collections.Counter[str]
Row = tuple[str, int, float, Counts]


class FoundError(Exception):
    """An input that was neither read nor rejected."""


def hostile_messages() -> st.SearchStrategy[bytes]:
    """Messages of any field values, near valid ones and far from them."""
    number = st.one_of(st.integers(0, 1000), st.sampled_from([2**31, 2**32 - 1, 711, 712]))
    huge = st.one_of(number, st.sampled_from([2**62, 2**63, 2**64 - 1, 10**9]))
    huge32 = st.integers(0, 2**32 - 1)
    scales = st.lists(st.one_of(st.floats(0, 4, width=32), st.floats(width=32)), max_size=3)
    stream = st.binary(max_size=200)

    @st.composite
    def message(draw: st.DrawFn) -> bytes:
        update = update_pb2.Update(
            num_parameters=draw(huge), offset=draw(st.one_of(st.just(0), huge))
        )
        sizes = []
        for name in draw(st.lists(st.sampled_from("abcd"), max_size=3)):
            shape = draw(st.lists(st.one_of(st.integers(0, 20), huge), max_size=2))
            dtype = draw(st.sampled_from([0, 1, 1, 2, 2, 3, 3, 4]))
            update.layout.tensors.add(name=name, shape=shape, dtype=dtype)
            sizes.append(math.prod(shape))
        if draw(st.integers(0, 3)):  # mostly what the layout says
            update.offset, update.num_parameters = 0, sum(sizes) % 2**64
        kind = draw(st.integers(0, 3))
        if kind == 0:
            body = update.golomb
            body.scales.extend(draw(scales))
            body.block_size = draw(st.sampled_from([0, 255, 256, 256, 512, 2**24, 2**25]))
            body.block_nonzeros.extend(
                draw(st.lists(st.one_of(st.integers(0, 9), huge32), max_size=6))
            )
            body.rice_parameters = draw(st.binary(max_size=6))
            body.quotients, body.remainders = draw(stream), draw(stream)
            body.signs = draw(stream)
        elif kind == 1:
            update.bitmask.scales.extend(draw(scales))
            update.bitmask.positive, update.bitmask.negative = draw(stream), draw(stream)
        elif kind == 2:
            update.context.scales.extend(draw(scales))
            update.context.num_nonzeros = draw(huge)
            update.context.flat, update.context.code = draw(st.booleans()), draw(stream)
        else:
            update.dense.dtype = draw(st.integers(0, 5))
            update.dense.values = draw(stream)
        return seal(update.SerializeToString())

    return message()


def attempt(target: Callable[[bytes], object], content: bytes, outcomes: Counts) -> None:
    """Read one input and count the outcome."""
    try:
        target(content)
    except CompeftError as error:
        outcomes[type(error).__name__] += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        shown = content if len(content) < 4000 else content[:4000] + b"..."
        raise FoundError(f"{type(error).__name__}: {error}; the input: {shown!r}") from error
    else:
        outcomes["read"] += 1


def changed(target: Target, count: int, seed: int) -> Counts:
    """Try ``count`` inputs of a target."""
    outcomes: Counts = collections.Counter()
    source = random.Random(f"{seed} {target.name}")
    for _ in range(count):
        attempt(target.read, target.make(source), outcomes)
    return outcomes


def structured(inputs: st.SearchStrategy[bytes], count: int, seed: int) -> Counts:
    """Try ``count`` updates that hypothesis makes."""
    outcomes: Counts = collections.Counter()

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def try_one(content: bytes) -> None:
        attempt(fuzz_targets.read_update, content, outcomes)

    seeded(seed)(try_one)()
    return outcomes


def guided(count: int, seed: int, packages: Path | None) -> Counts | None:
    """Try ``count`` updates that atheris makes, in a process of its own; None: not installed."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz_guided.py"))]
    command += [str(count), str(seed), str(LIMIT), str(packages or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("outcome ")]
    if done.returncode != 0 or not lines:
        raise FoundError((done.stdout + done.stderr)[-4000:])
    found: Counts = collections.Counter()
    for line in lines:
        _, name, number = line.split()
        found[name] = int(number)
    return found


def runs(
    folder: Path, inputs: int, seed: int, packages: Path | None
) -> Iterator[tuple[str, Callable[[], Counts | None]]]:
    """Each run's name, and what runs it."""
    targets = [
        *fuzz_targets.update_targets(),
        fuzz_targets.state_target(folder / "state"),
        fuzz_targets.checkpoint_target(folder / "checkpoints"),
        *fuzz_targets.partial_targets(),
        *fuzz_exchange.exchange_targets(),
        *fuzz_commands.file_targets(folder / "files"),
        *fuzz_experts.expert_targets(folder / "experts"),
    ]
    for target in targets:
        count = max(1, int(target.share * inputs))
        yield (
            f"{target.name}: changed",
            lambda target=target, count=count: changed(target, count, seed),
        )
    few = max(1, int(STRUCTURED_SHARE * inputs))
    yield "update: hostile fields (hypothesis)", lambda: structured(hostile_messages(), few, seed)
    yield "update: any bytes (hypothesis)", lambda: structured(st.binary(max_size=400), few, seed)
    yield "update: guided by coverage (atheris)", lambda: guided(inputs, seed, packages)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def main() -> int:
    """Run all; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description="Fuzz what reads bytes from elsewhere.")
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for fuzz.md")
    parser.add_argument("--atheris", type=Path, help="a folder that atheris is installed in")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # a damaged checkpoint is logged each time

    for name in codecs.names():  # compiles, before the limit
        for blob in fuzz_targets.valid_updates(name):
            fuzz_targets.read_update(blob)
    rows: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory(dir=next(fuzz_commands.memory_folders(), None)) as folder:
        every = list(runs(Path(folder), arguments.inputs, arguments.seed, arguments.atheris))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT, held + LIMIT))
        for name, run in every:
            started = cpu_seconds()
            try:
                outcomes = run()
            except FoundError as error:
                failed = True
                print(f"{name}: {error}", file=sys.stderr)
                continue
            if outcomes is None:
                print(f"{name}: not installed, left out", file=sys.stderr)
                continue
            rows.append((name, outcomes.total(), cpu_seconds() - started, outcomes))
    show(rows, arguments.out)
    return 1 if failed else 0


def show(rows: list[Row], out: Path | None) -> None:
    """Print the table; write it where asked."""
    title = (
        f"{sum(row[1] for row in rows):,} inputs, at most {LIMIT >> 20} MiB of memory beyond the "
        f"start, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB resident; "
        f"compeft-fl {cf.__version__}, {platform.machine()}, {datetime.date.today()}"
    )
    table = Table(title=title)
    for column in ("target", "inputs", "CPU s", "outcomes"):
        table.add_column(column, justify="right" if column in {"inputs", "CPU s"} else "left")
    lines = [f"{title}\n", "| target | inputs | CPU s | outcomes |", "|---|---:|---:|---|"]
    for name, count, seconds, outcomes in rows:
        seen = ", ".join(f"{each} {number:,}" for each, number in outcomes.most_common())
        table.add_row(name, f"{count:,}", f"{seconds:.0f}", seen)
        lines.append(f"| {name} | {count:,} | {seconds:.0f} | {seen} |")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "fuzz.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
