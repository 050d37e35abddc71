"""Fuzzing of what reads bytes from elsewhere: ``make fuzz``, or ``python simulations/fuzz.py``.

Hypothesis makes the inputs: valid ones, changed in bytes, or changed in the fields of the message
under a checksum that is right. Each must be read, or be rejected by an error of
`compeft_fl.errors`; anything else, and more memory than the limit that this program sets itself, is
a failure. ``--out DIR`` writes fuzz.md there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import math
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

import compeft_fl as cf
from compeft_fl import codecs
from compeft_fl.errors import CompeftError
from compeft_fl.exchange.downlink import Replica
from compeft_fl.exchange.node_state import NodeState, StateFile
from compeft_fl.records import to_arrays
from compeft_fl.strategies import Checkpoint, CheckpointFolder
from compeft_fl.wire.messages import seal
from compeft_fl.wire.v1 import update_pb2

LIMIT = 1 << 30  # bytes of address space beyond what the program has when it begins
LAYOUT = cf.Layout([cf.TensorSpec("a", (30, 7)), cf.TensorSpec("b", (501,), "bf16")])

Counts = collections.Counter[str]
Target = Callable[[bytes], object]


def valid_blobs() -> list[bytes]:
    """One update per codec and way to name the layout."""
    values = np.random.default_rng(0).standard_normal(LAYOUT.num_parameters).astype(np.float32)
    update = cf.compress(cf.TaskVector(LAYOUT, values), 0.2).with_scales([0.5, 0.25])
    return [
        cf.encode(update, name, layout_by_id=by_id, metadata={"key": "value"}, base_version=3)
        for name in codecs.names()
        for by_id in (False, True)
    ]


def mutations(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """An original with some bytes changed, cut out, doubled or put in."""

    @st.composite
    def mutate(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(originals)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(0, len(data) - 1)))
            kind = draw(st.integers(0, 4))
            if kind == 0 and data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            elif kind == 1:
                data[at : at + draw(st.integers(1, 40))] = b""
            elif kind == 2:
                data[at:at] = draw(st.binary(max_size=16))
            elif kind == 3:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            else:
                data = data[:at]
        return bytes(data)

    return mutate()


def resealed(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes changed under a checksum that is right: the sender is hostile."""
    return mutations([blob[:-5] for blob in originals]).map(seal)


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


def read_update(blob: bytes) -> object:
    """All the ways in which an update is read."""
    with contextlib.suppress(CompeftError):
        cf.decode(blob, layout=LAYOUT)
    accumulator = cf.Ties(layout=LAYOUT)
    with contextlib.suppress(CompeftError):
        accumulator.add(blob)
        accumulator.result()
    return cf.decode(blob)


def state_target(folder: Path) -> tuple[bytes, Target]:
    """A node's state file, and what reads it."""
    file = StateFile(folder)
    values = np.random.default_rng(1).standard_normal((3, LAYOUT.num_parameters)).astype("f4")
    with file.locked():
        file.save(NodeState(LAYOUT, Replica(LAYOUT, values[0], 4), values[1], 3, values[2], 4))

    def read(content: bytes) -> object:
        file.path.write_bytes(content)
        return file.load()

    return file.path.read_bytes(), read


def checkpoint_target(folder: Path) -> tuple[bytes, Target]:
    """A server's checkpoint, and what reads it."""
    import random

    checkpoints = CheckpointFolder(folder)
    shared = np.ones(6, np.float32)
    checkpoints.save(
        Checkpoint(
            server_round=2,
            arrays=to_arrays({"w": shared.reshape(2, 3)}),
            exchange={"version": 1, "shared": shared, "log": {1: b"delta"}, "nodes": {}},
            strategy={"momentum": {"value": shared}},
            history={},
            random_state=random.getstate(),
        )
    )
    (path,) = checkpoints.files()

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return checkpoints.load()

    return path.read_bytes(), read


def fuzz(inputs: st.SearchStrategy[bytes], target: Target, count: int, seed: int) -> Counts:
    """Try ``count`` inputs; how often each outcome was seen."""
    outcomes: Counts = collections.Counter()

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def attempt(content: bytes) -> None:
        try:
            target(content)
        except CompeftError as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["read"] += 1

    from hypothesis import seed as seeded

    seeded(seed)(attempt)()
    return outcomes


def main() -> int:
    """Run all targets; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description="Fuzz what reads bytes from elsewhere.")
    parser.add_argument("--inputs", type=int, default=30_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for fuzz.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    blobs = valid_blobs()
    read_update(blobs[0])  # compiles, before the limit
    cf.merge(blobs[::2], cf.Ties())
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT, held + LIMIT))

    with tempfile.TemporaryDirectory() as folder:
        state, read_state = state_target(Path(folder) / "state")
        checkpoint, read_checkpoint = checkpoint_target(Path(folder) / "checkpoints")
        targets: dict[str, tuple[st.SearchStrategy[bytes], Target]] = {
            "update, any bytes": (st.binary(max_size=400), read_update),
            "update, changed bytes": (mutations(blobs), read_update),
            "update, changed bytes, right checksum": (resealed(blobs), read_update),
            "update, hostile fields, right checksum": (hostile_messages(), read_update),
            "a node's state, changed bytes": (mutations([state]), read_state),
            "a checkpoint, changed bytes": (mutations([checkpoint]), read_checkpoint),
        }
        rows, failed = [], False
        import logging

        logging.disable(logging.CRITICAL)  # a damaged checkpoint is logged each time
        for name, (inputs, target) in targets.items():
            started = time.perf_counter()
            try:
                outcomes = fuzz(inputs, target, arguments.inputs, arguments.seed)
            except (Exception, DecodeError) as error:  # what no reader may raise
                failed = True
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            seconds = time.perf_counter() - started
            rows.append((name, sum(outcomes.values()), seconds, outcomes))
    _show(rows, arguments.out)
    return 1 if failed else 0


def _show(rows: list[tuple[str, int, float, Counts]], out: Path | None) -> None:
    total = sum(row[1] for row in rows)
    title = (
        f"{total:,} inputs, at most {LIMIT >> 20} MiB of memory beyond the start; "
        f"compeft-fl {cf.__version__}, {platform.machine()}, {datetime.date.today()}"
    )
    table = Table(title=title)
    for column in ("target", "inputs", "seconds", "outcomes"):
        table.add_column(column, justify="right" if column in {"inputs", "seconds"} else "left")
    lines = [f"{title}\n", "| target | inputs | seconds | outcomes |", "|---|---|---|---|"]
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
