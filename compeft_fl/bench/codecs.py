"""``compeft-fl bench codecs``: bytes, speed and memory of every codec over adapters.

Real task vectors where there are any, and synthetic ones over the layouts of real adapters
(`compeft_fl.bench.layouts`). What it writes: codecs.csv, codecs.md, codecs_layouts.md and
codecs.png; table1.csv and table1.md (`compeft_fl.bench.table1`); steps.csv and steps.md
(`compeft_fl.bench.steps`); flowertune.csv and flowertune.md (`compeft_fl.bench.flowertune`); where
there is a CUDA device codecs_cuda.csv and codecs_cuda.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.bench import cuda, flowertune, layouts, peers, results, steps, table1
from compeft_fl.bench.measure import measure
from compeft_fl.task_vector import TaskVector

__all__ = ["rows_of", "run"]

HEADLINE: Final = "mistral-7b-r32"
REAL: Final = "real"
# Codecs that take minutes on the largest adapters are left out there.
_ALL_UP_TO: Final = 20_000_000
_MOST_UP_TO: Final = 200_000_000
_MOST: Final = ("fp32", "fp16", "int8-blockwise", "signsgd", "topk-fp16", "stc", "compeft-")
_FAST: Final = ("compeft-golomb", "compeft-bitmask")  # and in memory of 8 GiB
_QUICK: Final = ("t5-base-ia3", "t5-base-r16", HEADLINE)
_SLOW: Final = 2_000_000  # the quick set leaves bitsandbytes out of what is larger than this

_MINUTES: Final = {None: 25, "adapters": 6, "steps": 2, "flowertune": 16}

Row = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Measure, show and write all; see `compeft_fl.cli.bench`."""
    out: Path = options.out
    command = "compeft-fl bench codecs" + (" --quick" if options.quick else "")
    command += f" --only {options.only}" if options.only else ""
    minutes = 2 if options.quick else _MINUTES[options.only]
    results.say(f"{command}: about {minutes} minutes on two cores; results: {out}")
    if options.only in (None, "adapters"):
        _adapters(options, command)
    if options.only in (None, "steps"):
        steps.run(out, command, layouts.real_vectors(options.taus), quick=options.quick)
    if options.only in (None, "flowertune"):
        flowertune.run(out, command, quick=options.quick)
    return 0


def _adapters(options: argparse.Namespace, command: str) -> None:
    """All codecs over all adapters, and the paper's Table 1 on the way."""
    real = layouts.real_vectors(options.taus)
    if not real:
        where = options.taus or "simulations/data/taus: not in an installed wheel"
        results.say(f"no real task vectors in {where}; give a folder with --taus")
    for name in peers.names():
        if why := peers.reason(name):
            results.say(f"without {name}: it {why}")
    chosen = _QUICK if options.quick else layouts.names()
    sizes = [tau.num_parameters for tau in real.values()]
    sizes += [layouts.get(name).layout.num_parameters for name in chosen]
    rows: list[Row] = []
    paper: list[Row] = []
    with results.Progress("codecs", 5e6 + sum(map(_weight, sizes))) as progress:
        progress.step("compiling", 5e6)
        warm = layouts.synthetic(layouts.get("t5-base-ia3").layout)
        for codec in codecs_for(0, quick=False):
            codec.decode(codec.encode(np.asarray(warm.values), warm.layout), warm.layout)
        for name, tau in real.items():
            progress.step(name, _weight(tau.num_parameters))
            rows += rows_of(tau, name, REAL, options.quick)
            results.write_csv(options.out / "codecs.csv", rows)  # what a stopped run leaves
        for name in chosen:
            layout = layouts.get(name).layout
            progress.step(name, _weight(layout.num_parameters))
            tau = layouts.synthetic(layout)
            rows += rows_of(tau, name, "synthetic", options.quick)
            if name.removesuffix("-r64") in layouts.LLAMA:
                paper += table1.rows_of(tau, name.removesuffix("-r64"))
            results.write_csv(options.out / "codecs.csv", rows)
    _write(options.out, command, rows)
    if paper:
        table1.write(options.out, command, paper)
    cuda.run(options.out, command, layouts.get(HEADLINE).layout)


def _weight(num_parameters: int) -> float:
    """How long an adapter takes, roughly: fewer codecs run on the larger ones."""
    share = 1.0 if num_parameters <= _ALL_UP_TO else 0.2 if num_parameters <= _MOST_UP_TO else 0.1
    return 2e5 + share * num_parameters


def codecs_for(num_parameters: int, quick: bool) -> Iterator[peers.PeerCodec]:
    """Those that run here and finish in time on a vector of that length."""
    for name in peers.names():
        codec = peers.get(name)
        if not peers.available(name) or (
            quick and codec.package == "bitsandbytes" and num_parameters > _SLOW
        ):
            continue
        if num_parameters > _MOST_UP_TO and not name.startswith(_FAST):
            continue
        if num_parameters > _ALL_UP_TO and not name.startswith(_MOST):
            continue
        yield codec


def rows_of(tau: TaskVector, layout: str, kind: str, quick: bool = False) -> list[Row]:
    """A row of codecs.csv for each codec, over one task vector."""
    values = np.asarray(tau.values)
    length = float(np.linalg.norm(values))
    megabytes = values.nbytes / 1e6
    budget = 0.2 if quick else 0.5
    rows = []
    for codec in codecs_for(values.size, quick):
        blob, encode, peak = measure(partial(codec.encode, values, tau.layout), budget)
        back, decode, peak_back = measure(partial(codec.decode, blob, tau.layout), budget)
        back -= values
        error = float(np.linalg.norm(back)) / length
        del back  # as large as the vector: 3 GB for the largest
        bits = 8 * len(blob) / values.size
        peaks = [each for each in (peak, peak_back) if each is not None]
        rows.append(
            {
                "codec": codec.name,
                "layout": layout,
                "kind": kind,
                "density": codec.density,
                "num_parameters": values.size,
                "bytes": len(blob),
                "bits_per_parameter": round(bits, 5),
                "ratio_fp16": round(16 / bits, 3),
                "ratio_fp32": round(32 / bits, 3),
                "relative_error": round(error, 6),
                "encode_seconds": round(encode, 6),
                "decode_seconds": round(decode, 6),
                "encode_mb_s": round(megabytes / encode, 1),
                "decode_mb_s": round(megabytes / decode, 1),
                "peak_memory_mb": round(max(peaks) / 1e6, 1) if peaks else "",
            }
        )
    return rows


# --- what is shown ------------------------------------------------------------------------------


def _write(out: Path, command: str, rows: Sequence[Row]) -> None:
    from compeft_fl.bench.codec_plot import plot

    results.write_csv(out / "codecs.csv", rows)
    heads, table = _summary(rows)
    notes = (
        "Bits and errors on real vectors are means over simulations/data/taus; all else is the "
        f"synthetic vector of {layouts.get(HEADLINE).text}, in MB (10^6 bytes) of float32 a "
        "second, the fastest of some runs, and MB of memory beyond the input at the peak. The "
        "error is that of one message, without error feedback."
    )
    results.write_markdown(out / "codecs.md", command, heads, table, notes)
    results.show_table(f"codecs; speed and memory on {HEADLINE}", heads, table)
    heads, table = _by_layout(rows)
    results.write_markdown(
        out / "codecs_layouts.md", command, heads, table, "Bits per parameter; - : not run there."
    )
    results.show_table("bits per parameter", heads, table)
    plot(out / "codecs.png", rows, HEADLINE)


def _summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One line per codec."""
    heads = ["codec", "bits, real", "error, real", "bits", "of fp16", "of fp32"]
    heads += ["encode MB/s", "decode MB/s", "memory MB"]
    table = []
    for codec in dict.fromkeys(row["codec"] for row in rows):
        mine = [row for row in rows if row["codec"] == codec]
        real = [row for row in mine if row["kind"] == REAL]
        one = next((row for row in mine if row["layout"] == HEADLINE), None)
        line = [codec]
        line.append(f"{_mean(real, 'bits_per_parameter'):.3f}" if real else "-")
        line.append(f"{_mean(real, 'relative_error'):.2g}" if real else "-")
        if one is None:
            line += ["-"] * 6
        else:
            line.append(f"{one['bits_per_parameter']:.3f}")
            line += [f"{one[key]:.1f}x" for key in ("ratio_fp16", "ratio_fp32")]
            line += [f"{one[key]:.0f}" for key in ("encode_mb_s", "decode_mb_s")]
            line.append(str(one["peak_memory_mb"]) or "-")
        table.append(line)
    return heads, table


def _by_layout(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line per codec, a column per layout; the real vectors as their mean."""
    columns = dict.fromkeys(REAL if row["kind"] == REAL else row["layout"] for row in rows)
    table = []
    for codec in dict.fromkeys(row["codec"] for row in rows):
        line = [codec]
        for column in columns:
            here = [
                row
                for row in rows
                if row["codec"] == codec and column in (row["layout"], row["kind"])
            ]
            line.append(f"{_mean(here, 'bits_per_parameter'):.3f}" if here else "-")
        table.append(line)
    return ["codec", *columns], table


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)
