"""The library's figures, as ratios within one run: ``make bench-core``.

Times are medians over interleaved repeats (ours, theirs, ours, ...), so that a noisy machine
disturbs both alike. Memory is the peak of the resident set in a process of its own. ``--out DIR``
also writes bench_core.csv and bench_core.md there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import compeft_fl as cf
from compeft_fl.wire.messages import inspect

D = 50_000_000
TAUS = Path(__file__).parent / "data" / "taus"


class Row(NamedTuple):
    """One figure beside the bound that the project holds itself to."""

    what: str
    value: float
    bound: float
    at_least: bool = False
    target: float | None = None
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Is the figure, as printed, within its bound?"""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def task_vector(size: int, seed: int = 0) -> cf.TaskVector:
    """Independent standard normal values."""
    values = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    return cf.TaskVector(cf.Layout([cf.TensorSpec("w", (size,))]), values)


def entropy(density: float) -> float:
    """Bits per parameter of a sparse ternary vector with uniform signs (ComPEFT section 3.3)."""
    if not 0 < density < 1:
        return density
    return -(1 - density) * float(np.log2(1 - density)) - density * float(np.log2(density / 2))


def medians(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, run in turns after one run to warm up."""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def speed(repeats: int) -> list[Row]:
    """compress, encode and decode of 5e7 values at density 0.05, against a copy and torch.topk."""
    import torch

    tau = task_vector(D)
    values = tau.values
    tensor = torch.from_numpy(values)  # type: ignore[arg-type]
    blob = cf.encode(cf.compress(tau, 0.05))
    copy, ours, compress, best, back, dense = medians(
        lambda: values.copy(),  # type: ignore[union-attr]
        lambda: cf.encode(cf.compress(tau, 0.05)),
        lambda: cf.compress(tau, 0.05),
        lambda: cf.compress(tau, 0.05, support="best"),
        lambda: cf.decode(blob),
        lambda: cf.decode(blob).to_task_vector(),
        repeats=repeats,
    )
    (topk,) = medians(lambda: torch.topk(tensor.abs(), D // 20), repeats=2)
    return [
        Row(
            "compress + encode against copying the array",
            ours / copy,
            5.0,
            target=2.0,
            detail=f"{ours * 1e3:.1f} ms ({compress * 1e3:.1f} of them compress), "
            f"copy {copy * 1e3:.1f} ms",
        ),
        Row(
            "compress with the best support against the fixed one",
            best / compress,
            2.0,
            detail=f"{best * 1e3:.1f} ms",
        ),
        Row(
            "torch.topk alone against compress + encode",
            topk / ours,
            15.0,
            at_least=True,
            detail=f"{topk * 1e3:.0f} ms",
        ),
        Row(
            "decode against copying the array",
            back / copy,
            1.5,
            target=0.5,
            detail=f"{back * 1e3:.1f} ms; {dense * 1e3:.1f} ms to a dense vector",
        ),
    ]


def iid_bits() -> list[Row]:
    """Bits per parameter on iid values against the entropy, the whole message counted."""
    rows = []
    tau = task_vector(D)
    for density, bound in ((0.05, 1.010), (0.2, 1.020), (0.5, 1.002)):
        blob = cf.encode(cf.compress(tau, density))
        bits = 8 * len(blob) / D
        rows.append(
            Row(
                f"bits per parameter against the entropy, iid, density {density}",
                bits / entropy(density),
                bound,
                detail=f"{bits:.4f} against {entropy(density):.4f}",
            )
        )
    return rows


def real_bits() -> list[Row]:
    """The same on real task vectors, the layout by its id: whole messages, and bodies alone."""
    from safetensors.numpy import load_file

    files = sorted(TAUS.glob("*.safetensors"))
    rows = []
    for density, bound in ((0.05, 1.00), (0.2, 1.01)):
        ratios, bodies = [], []
        for file in files:
            tau = cf.TaskVector.from_dict(load_file(file))
            update = cf.compress(tau, density)
            blob = cf.encode(update, layout_by_id=True)
            header = inspect(blob, layout=tau.layout)
            floor = tau.num_parameters * entropy(update.density) / 8
            ratios.append(len(blob) / floor)
            bodies.append(header.body_bytes / floor)
        rows.append(
            Row(
                f"bytes against the global entropy, {len(files)} real vectors, density {density}",
                statistics.mean(ratios),
                bound,
                detail=f"whole messages, {min(ratios):.3f} .. {max(ratios):.3f}; "
                f"bodies alone {statistics.mean(bodies):.3f}",
            )
        )
    return rows


def merging(repeats: int) -> list[Row]:
    """TIES of 20 encoded updates x 1e7 at density 0.05, against PEFT's ties on dense tensors."""
    import torch
    from peft.utils.merge_utils import ties

    vectors = [task_vector(10_000_000, seed) for seed in range(20)]
    blobs = [cf.encode(cf.compress(tau, 0.05)) for tau in vectors]
    tensors = [torch.from_numpy(tau.values) for tau in vectors]  # type: ignore[arg-type]
    (ours,) = medians(lambda: cf.merge(blobs, cf.Ties()), repeats=repeats)
    start = time.perf_counter()
    ties(tensors, torch.ones(20), density=0.05)
    theirs = time.perf_counter() - start
    return [
        Row(
            "PEFT's dense ties against TIES of 20 encoded updates x 1e7",
            theirs / ours,
            40.0,
            at_least=True,
            detail=f"{theirs:.1f} s against {ours:.3f} s, decoding included",
        )
    ]


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _peak_of_compress_and_encode() -> float:
    """Peak resident bytes beyond those before the call, over the vector's bytes."""
    tau = task_vector(D)
    cf.encode(cf.compress(task_vector(1_000_000), 0.05))  # compiles, and warms the allocator
    before = _status("VmRSS")
    cf.encode(cf.compress(tau, 0.05))
    return max(0, _status("VmHWM") - before) / (4 * D)


def memory() -> list[Row]:
    """Extra memory at the peak of compress + encode, in a process of its own."""
    if not Path("/proc/self/status").exists():
        return []
    output = subprocess.run(
        [sys.executable, __file__, "--peak"], capture_output=True, text=True, check=True
    ).stdout
    return [
        Row(
            "extra memory at the peak of compress + encode, against the vector's",
            float(output),
            1.5,
            detail="resident set, 5e7 float32",
        )
    ]


def show(rows: list[Row], out: Path | None) -> None:
    """Print the table; write it where asked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()}, {cores} cores, Python {platform.python_version()}"
    title = f"compeft-fl {cf.__version__}, {machine}, {datetime.date.today()}"
    table = Table(title=title)
    for column in ("figure", "value", "bound", "", "detail"):
        table.add_column(column, justify="right" if column in {"value", "bound"} else "left")
    lines = [f"{title}\n", "| figure | value | bound | detail |", "|---|---|---|---|"]
    for row in rows:
        bound = f"{'>=' if row.at_least else '<='} {row.bound:g}"
        bound += f" (target {row.target:g})" if row.target else ""
        value = f"{row.value:.1f}" if row.value >= 10 else f"{row.value:.4f}"
        mark = "[green]holds[/]" if row.holds else "[red]misses[/]"
        table.add_row(row.what, value, bound, mark, row.detail)
        lines.append(f"| {row.what} | {value} | {bound} | {row.detail} |")
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench_core.md").write_text("\n".join(lines) + "\n")
        with (out / "bench_core.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("figure", "value", "bound", "at_least", "holds", "detail"))
            for row in rows:
                writer.writerow(
                    (row.what, row.value, row.bound, row.at_least, row.holds, row.detail)
                )


def main() -> int:
    """Run all and print the table, which says where a figure misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for bench_core.csv and bench_core.md")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(_peak_of_compress_and_encode())
        return 0
    steps: list[Callable[[], list[Row]]] = [
        lambda: speed(arguments.repeats),
        iid_bits,
        real_bits,
        memory,
        lambda: merging(3),
    ]
    rows: list[Row] = []
    console = Console(stderr=True)
    for step in steps:
        with console.status(f"measuring, {len(rows)} figures so far (about a minute in all)"):
            rows += step()
    show(rows, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
