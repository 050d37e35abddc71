"""``compeft-fl bench merge``: merging against PEFT's and mergekit's functions, on the same updates.

The project's own merging starts from encoded updates and decodes them within its time. The others
merge dense tensors, which they are given decoded. PEFT's ``ties`` trims its inputs first; a ComPEFT
update is trimmed when it is made, so its steps after that are timed on their own too. What it
writes: merge.csv, merge.md and merge.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.bench import layouts, packages, results
from compeft_fl.bench.measure import peak_memory
from compeft_fl.compeft import compress
from compeft_fl.merging.accumulators import Accumulator, TaskArithmetic, Ties, merge
from compeft_fl.wire.messages import decode, encode

__all__ = ["Contender", "Updates", "contenders", "rows_of", "run"]

DENSITY: Final = 0.05
OURS: Final = "compeft-fl"
_REPEATS: Final = 3

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Updates:
    """The same updates as bytes and as dense torch tensors, with weights."""

    blobs: list[bytes]
    tensors: list[Any]
    weights: list[float]

    @classmethod
    def synthetic(cls, layout_name: str, count: int, weights: Sequence[float]) -> Updates:
        """``count`` ComPEFT updates at density 0.05, each with a scale of its own."""
        import torch

        layout = layouts.get(layout_name).layout
        taus = (layouts.synthetic(layout, seed) for seed in range(count))
        blobs = [encode(compress(tau, DENSITY)) for tau in taus]
        dense = [np.asarray(decode(blob).to_task_vector().values) for blob in blobs]
        return cls(blobs, [torch.from_numpy(values) for values in dense], list(weights))


@dataclass(frozen=True)
class Contender:
    """A way to merge: whose it is, what it is called, and the call."""

    library: str
    call: str
    merge: Callable[[Updates], Floats]


def contenders(method: str, weighted: bool) -> list[Contender]:
    """The ways to merge that mean the same, this project's first.

    Parameters
    ----------
    method : "task_arithmetic" or "ties"
    weighted : bool
        PEFT's ``ties`` divides by counts and not by weights, so with weights it is another rule and
        is left out.
    """
    rule: Accumulator = TaskArithmetic() if method == "task_arithmetic" else Ties(tie="positive")

    def ours(updates: Updates) -> Floats:
        return np.asarray(merge(updates.blobs, rule, updates.weights).values)

    def by_mergekit(updates: Updates) -> Floats:
        import torch

        api = packages.load("mergekit.merge_methods.api")
        base = torch.zeros_like(updates.tensors[0])
        parameters = {"weight": updates.weights}
        tensors = [base, *updates.tensors]
        # Its parameters are for the inputs beside the base.
        merged = api.merge_tensors(tensors, method, parameters=parameters, base_index=0)
        return np.asarray(merged)

    found = [Contender(OURS, f"merge(bytes, {rule!r})", ours)]
    if method == "task_arithmetic":
        found.append(Contender("peft", "task_arithmetic", _peft_task_arithmetic))
    elif not weighted:
        found.append(Contender("peft", "ties", _peft_ties))
        found.append(Contender("peft", "ties, trimmed before", _peft_ties_trimmed))
    if packages.why_missing("mergekit") is None:
        found.append(Contender("mergekit", method, by_mergekit))
    return found


def _peft_task_arithmetic(updates: Updates) -> Floats:
    import torch
    from peft.utils.merge_utils import task_arithmetic

    return np.asarray(task_arithmetic(updates.tensors, torch.tensor(updates.weights)))


def _peft_ties(updates: Updates) -> Floats:
    import torch
    from peft.utils.merge_utils import ties

    return np.asarray(ties(updates.tensors, torch.tensor(updates.weights), DENSITY))


def _peft_ties_trimmed(updates: Updates) -> Floats:
    """What PEFT's ``ties`` does after trimming, with all weights 1."""
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    stacked = torch.stack(updates.tensors)
    return np.asarray(disjoint_merge(stacked, calculate_majority_sign_mask(stacked)))


def run(options: argparse.Namespace) -> int:
    """Measure, show and write all; see `compeft_fl.cli.bench`."""
    out: Path = options.out
    command = "compeft-fl bench merge" + (" --quick" if options.quick else "")
    layout, count = ("t5-base-r16", 8) if options.quick else ("t5-large-r16", 20)
    minutes = "about half a minute" if options.quick else "about 2 minutes"
    results.say(f"{command}: {minutes} on two cores; results: {out}")
    why = packages.why_missing("mergekit")
    if why:
        results.say(f"without mergekit: it {why}")
    cases = [("task_arithmetic", False), ("ties", False), ("ties", True)]
    rows: list[dict[str, Any]] = []
    with results.Progress("merge", len(cases)) as progress:
        for method, weighted in cases:
            progress.step(f"{method}, {'weights' if weighted else 'equal weights'}", 1)
            weights = [1.0 + (i % 4 if weighted else 0) for i in range(count)]
            updates = Updates.synthetic(layout, count, weights)
            rows += rows_of(updates, method, weighted, layout)
    results.write_csv(out / "merge.csv", rows)
    heads = ["method", "weights", "whose", "call", "ms", "against ours", "memory MB", "equal"]
    table = [
        [
            row["method"],
            row["weights"],
            row["library"],
            row["call"],
            f"{1e3 * row['seconds']:.0f}",
            f"{row['times_ours']:.1f}x",
            str(row["peak_memory_mb"]) or "-",
            _equality(row),
        ]
        for row in rows
    ]
    if why:
        table += [["all", "all", "mergekit", why, "-", "-", "-", "not run"]]
    notes = (
        f"{count} updates of {rows[0]['num_parameters']:,} parameters (synthetic, {layout}) at "
        f"density {DENSITY}. Medians of {_REPEATS} runs in turns; memory beyond the inputs at the "
        "peak. Ours decodes the bytes within that time; the others start from dense tensors."
    )
    results.write_markdown(out / "merge.md", command, heads, table, notes)
    results.show_table(f"merging {count} updates of {layout}", heads, table)
    plot(out / "merge.png", rows, notes)
    return 0


def rows_of(
    updates: Updates, method: str, weighted: bool, layout: str = ""
) -> list[dict[str, Any]]:
    """A row of merge.csv for each contender: timed in turns, compared with ours."""
    ways = contenders(method, weighted)
    merged: list[Floats] = []
    peaks: list[int | None] = []
    for way in ways:
        way.merge(updates)  # compiles, imports
        result, peak = peak_memory(partial(way.merge, updates))
        merged.append(result)
        peaks.append(peak)
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(_REPEATS):
        for way, times in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way.merge(updates)
            times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds]
    largest = float(np.abs(merged[0]).max())
    rows = []
    for way, result, peak, median in zip(ways, merged, peaks, medians, strict=True):
        gap = np.abs(result - merged[0]) / largest
        rows.append(
            {
                "method": method,
                "weights": "1 .. 4" if weighted else "equal",
                "library": way.library,
                "call": way.call,
                "layout": layout,
                "updates": len(updates.tensors),
                "num_parameters": int(updates.tensors[0].numel()),
                "input_bytes": (
                    sum(map(len, updates.blobs))
                    if way.library == OURS
                    else sum(4 * int(tensor.numel()) for tensor in updates.tensors)
                ),
                "seconds": round(median, 6),
                "times_ours": round(median / medians[0], 2),
                "peak_memory_mb": "" if peak is None else round(peak / 1e6, 1),
                "largest_difference": float(f"{gap.max():.3g}"),
                "entries_apart": int((gap > 1e-5).sum()),
            }
        )
    return rows


def _equality(row: dict[str, Any]) -> str:
    if row["library"] == OURS:
        return "-"
    if row["entries_apart"] == 0:
        return f"to {row['largest_difference']:.0e}"
    return f"but for {row['entries_apart']} of {row['num_parameters']}"


def plot(path: Path, rows: Sequence[dict[str, Any]], notes: str) -> None:
    """Draw time and memory of each way to merge as bars, on log axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = [f"{row['method']}, {row['weights']}: {_short(row)}" for row in rows]
    colours = ["#c1440e" if row["library"] == OURS else "#1f6f8b" for row in rows]
    panels = [("milliseconds", [1e3 * row["seconds"] for row in rows])]
    if all(row["peak_memory_mb"] != "" for row in rows):
        panels.append(("MB beyond the inputs", [row["peak_memory_mb"] for row in rows]))
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.8), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(grid, panels, strict=True):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set(xlabel=label, xscale="log")
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].invert_yaxis()
    figure.suptitle(notes.split(". ")[0], fontsize="medium")
    figure.savefig(path, dpi=120)


def _short(row: dict[str, Any]) -> str:
    return OURS if row["library"] == OURS else f"{row['library']} {row['call']}"
