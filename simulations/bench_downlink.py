"""What the way down costs a server whose nodes all have other versions, and a node that is new.

``python simulations/bench_downlink.py --out DIR``: two minutes of a core. Writes downlink.md: the
seconds and the memory of one round in which each of 1,000 nodes has another version, at 10^7
parameters; and the bytes of first contact with a node that cannot make the start.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import compeft_fl as cf
from compeft_fl.bench import layouts, results
from compeft_fl.bench.measure import peak_memory
from compeft_fl.exchange.downlink import Downlink

NODES = 1_000
SIZE = 10_000_000
ROWS = 8  # of each factor, as a LoRA of rank 8 has
WIDE = 4_096
DENSITIES = (0.2, 0.05, 0.01)
FIRST = ("t5-base-r16", "mistral-7b-r32", "llama-7b-r64")


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description="What the way down costs a server.")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR")
    parser.add_argument("--size", type=int, default=SIZE, metavar="D", help="parameters")
    parser.add_argument("--nodes", type=int, default=NODES, metavar="N")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    heads = [
        "density down", "versions in the log", "log MB", "one catch-up, the slowest, s",
        "all, s", "all, MB", "memory, vectors of float32",
    ]  # fmt: skip
    table = []
    for density in DENSITIES:
        results.say(f"{options.nodes} nodes at density {density:g}")
        table.append(served(options.size, options.nodes, density))
    first = [contact(name) for name in FIRST]
    notes = (
        f"{options.nodes:,} nodes, each at another version of {options.size:,} parameters, of "
        "which the log has the newest; the start can be made from the seed. A version in the log "
        "gets a catch-up of its own, made in one walk over the log; all older ones get what came "
        "since the start, made once. The slowest is made alone, as for one node that asks. "
        "Memory: the largest resident set in vectors of float32, less log and shipments; two are "
        "the adapter that nodes share, and its start. One core but for the reading of deltas.\n\n"
        "First contact with a node that cannot make the start of a LoRA (A drawn as PEFT draws it, "
        "B 0), before the first round:\n\n"
        "| adapter | parameters | MB | bits a parameter |\n|---|---|---|---|\n" + "\n".join(first)
    )
    command = "python simulations/bench_downlink.py"
    results.write_markdown(options.out / "downlink.md", command, heads, table, notes)
    results.show_table("a server with nodes at many versions", heads, table)
    print(notes)


def served(size: int, nodes: int, density: float) -> list[str]:
    """One row: all versions that are asked for, each made."""
    layout = cf.Layout(
        cf.TensorSpec(f"{i}.{name}", shape)
        for i in range(max(1, round(size / (2 * ROWS * WIDE))))
        for name, shape in (("lora_A", (ROWS, WIDE)), ("lora_B", (WIDE, ROWS)))
    )
    start = cf.TaskVector(layout, np.zeros(layout.num_parameters, np.float32))
    downlink = Downlink(start, density=density, seeded=True)
    for theta in wandering(layout, nodes):
        downlink.advance(theta)
        if len(downlink.state()["log"]) < downlink.version:
            break  # it has begun to forget, and all older versions are as one
    held = downlink.state()["log"]
    log = sum(map(len, held.values()))

    def serve() -> float:
        started = time.perf_counter()
        downlink.prepare(range(downlink.version))
        return time.perf_counter() - started

    seconds, grown = peak_memory(serve)
    shipments = [downlink.lacking(version) for version in range(downlink.version)]
    sent = sum({id(each): each.num_bytes for each in shipments}.values())
    slowest = 0.0
    for version in (min(held) - 1, 0):  # the oldest in the log has most deltas to read
        alone = Downlink(start, density=density, seeded=True)
        alone.restore(downlink.state())
        started = time.perf_counter()
        alone.lacking(version)
        slowest = max(slowest, time.perf_counter() - started)
    size = 4 * layout.num_parameters
    floats = "-" if grown is None else f"{2 + (grown - sent) / size:.1f}"
    return [
        f"{density:g}", str(len(held)), f"{log / 1e6:.1f}", f"{slowest:.2f}", f"{seconds:.1f}",
        f"{sent / 1e6:.0f}", floats,
    ]  # fmt: skip


def wandering(layout: cf.Layout, count: int) -> Iterator[cf.TaskVector]:
    """Theta after each round: a pull back, and a step in one of a few directions."""
    directions = [np.asarray(layouts.synthetic(layout, seed=1 + i).values) for i in range(4)]
    rng = np.random.default_rng(0)
    theta = np.zeros(layout.num_parameters, np.float32)
    for _ in range(count):
        theta = np.float32(0.95) * theta + np.float32(0.3) * directions[rng.integers(4)]
        yield cf.TaskVector(layout, theta)


def contact(name: str) -> str:
    """A row about first contact."""
    layout = layouts.get(name).layout
    rng = np.random.default_rng(0)
    start = np.zeros(layout.num_parameters, np.float32)
    for tensor, where in layout.slices():
        if ".lora_A." in tensor.name:  # kaiming_uniform with a = sqrt(5)
            bound = 1 / math.sqrt(tensor.shape[-1])
            start[where] = rng.uniform(-bound, bound, tensor.size)
    downlink = Downlink(cf.TaskVector(layout, start), coarse_start=True)
    size = downlink.lacking(None).num_bytes
    bits = 8 * size / layout.num_parameters
    return f"| {name} | {layout.num_parameters:,} | {size / 1e6:.2f} | {bits:.2f} |"


if __name__ == "__main__":
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    main()
