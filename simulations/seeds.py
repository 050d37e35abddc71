"""A scenario with several seeds: accuracy and bytes of each, and what dense links would take.

``python simulations/seeds.py [SCENARIO.toml] --seeds 42 43 44 --out DIR`` runs those that DIR does
not hold yet, so that it can be stopped at any time, and writes seeds.md beside the runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import compeft_fl as cf

HERE = Path(__file__).parent
COLUMNS = ("scenario", "seed", "accuracy", "loss", "up", "of dense", "down", "both of dense", "s")


def finished(folder: Path) -> list[dict[str, Any]]:
    """The summaries of the runs in a folder that have come to their end."""
    files = sorted(folder.glob("*-*/summary.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def run(scenario: Path, seed: int, out: Path) -> None:
    """One run, shown as it goes; a failure stops the program."""
    command = [sys.executable, "-m", "compeft_fl.cli", "run", str(scenario), f"seed={seed}"]
    subprocess.run([*command, "--out", str(out)], check=True)


def row(summary: dict[str, Any]) -> tuple[str, ...]:
    """One run as cells."""
    up, down = sum(summary["uplink_payload_bytes"]), sum(summary["downlink_payload_bytes"])
    dense_up, dense_down = sum(summary["uplink_dense_bytes"]), sum(summary["downlink_dense_bytes"])
    return (
        summary["scenario"],
        str(summary["config"]["seed"]),
        f"{100 * summary['accuracy'][0]:.1f} -> {100 * summary['accuracy'][-1]:.1f} %",
        f"{summary['loss'][0]:.3f} -> {summary['loss'][-1]:.3f}",
        f"{up / 1e3:.0f} kB",
        f"1/{dense_up / max(1, up):.1f}",
        f"{down / 1e3:.0f} kB",
        f"1/{(dense_up + dense_down) / max(1, up + down):.1f}",
        f"{summary['wall_seconds']:.0f}",
    )


def means(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Each scenario's mean over its seeds, with the standard deviation, as lines."""
    lines = []
    for name in dict.fromkeys(summary["scenario"] for summary in summaries):
        mine = [summary for summary in summaries if summary["scenario"] == name]
        accuracies = [100 * summary["accuracy"][-1] for summary in mine]
        loss = statistics.fmean(summary["loss"][-1] for summary in mine)
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(mine) > 1 else ""
        up = sum(mine[0]["uplink_dense_bytes"]) / 1e6
        both = up + sum(mine[0]["downlink_dense_bytes"]) / 1e6
        lines.append(
            f"{name}, {len(mine)} seeds: accuracy {statistics.fmean(accuracies):.1f}{spread} %, "
            f"loss {loss:.3f}. Dense float32 takes {up:.1f} MB up, {both:.1f} MB both ways."
        )
    return lines


def main() -> int:
    """Run what is missing, and print the table of all."""
    parser = argparse.ArgumentParser(description="A scenario with several seeds.")
    parser.add_argument("scenario", type=Path, nargs="?", default=HERE / "default.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--out", type=Path, default=Path("runs") / "seeds")
    arguments = parser.parse_args()
    name = arguments.scenario.stem
    for seed in arguments.seeds:
        done = {(s["scenario"], s["config"]["seed"]) for s in finished(arguments.out)}
        if (name, seed) not in done:
            run(arguments.scenario, seed, arguments.out)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    title = (
        f"compeft-fl {cf.__version__}, {platform.machine()}, {cores} cores, {datetime.date.today()}"
    )
    table = Table(title=title)
    lines = [f"{title}\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for column in COLUMNS:
        table.add_column(column)
    for summary in finished(arguments.out):
        cells = row(summary)
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    lines += ["", *means(finished(arguments.out))]
    print("\n".join(means(finished(arguments.out))))
    (arguments.out / "seeds.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
