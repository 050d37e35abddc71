"""What a run leaves behind: ``summary.json``, ``metrics.csv``, plots, and a table."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import CompeftError
from compeft_fl.exchange.records import LOGGER
from compeft_fl.results import html_report, overhead
from compeft_fl.results.journal import RoundRecord, RunRecord
from compeft_fl.results.units import percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["TASK_MARK", "link_latest", "plot", "table", "tasks_table", "write"]

TASK_MARK: Final = "/"
"""Stands between task and metric in the name of a further score that is one of lm-eval's."""

SUMMARY_FILE: Final = "summary.json"
METRICS_FILE: Final = "metrics.csv"
PLOT_FILE: Final = "accuracy.png"
_COLUMNS: Final = 1  # of further scores or the budget, in a table of 80 columns
_ROUNDS_SHOWN: Final = 6  # of tasks, likewise

_UP, _BOTH = "#0072b2", "#d55e00"  # told apart by everyone


def write(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Write all reports of a run into its folder and return the summary.

    What cannot be written is missing, with a line in the log.

    Raises
    ------
    OSError
        The summary cannot be written; all others were tried.
    """
    summary = record.summary()
    parts: list[tuple[str, Callable[[Path], None]]] = [
        (METRICS_FILE, lambda path: _write_metrics(path, record)),
        (PLOT_FILE, lambda path: plot(path, summary)),
    ]
    if record.ledger is not None:
        parts.append((overhead.BYTES_PLOT_FILE, lambda path: overhead.plot(path, summary)))
    for name, write_part in parts:
        try:
            write_part(folder / name)
        except OSError as error:
            LOGGER.warning("%s is not written: %s", name, error)
    text = json.dumps(summary, indent=2) + "\n"
    with replacing(folder / SUMMARY_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    try:
        html_report.write(folder / html_report.REPORT_FILE, [html_report.read_run(folder)])
    except (OSError, CompeftError) as error:
        LOGGER.warning("%s is not written: %s", html_report.REPORT_FILE, error)
    return summary


def link_latest(folder: Path) -> None:
    """Point ``latest``, beside the run's folder, to it; where links cannot be, leave it."""
    link, fresh = folder.parent / "latest", folder.parent / f".latest-{os.getpid()}"
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(folder.name, target_is_directory=True)
        fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)


def plot(path: Path, summary: Mapping[str, Any]) -> None:
    """Draw accuracy by round, and by cumulative bytes beside what dense float32 takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    accuracy = [None if value is None else 100 * value for value in summary["accuracy"]]
    figure = Figure(figsize=(10, 4.4))
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    by_round.plot(range(len(accuracy)), accuracy, "o-", color=_UP, markersize=4)
    _mark_ends(by_round, accuracy)
    by_round.set(xlabel="round", ylabel="test accuracy (%)")
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    up, down = _totals(summary, "payload")
    dense_up, dense_down = _totals(summary, "dense")
    both, dense_both = _added(up, down), _added(dense_up, dense_down)
    for label, totals, color, style in (
        ("up", up, _UP, "o-"),
        ("up, dense", dense_up, _UP, ":"),
        ("up + down", both, _BOTH, "s-"),
        ("up + down, dense", dense_both, _BOTH, ":"),
    ):
        if any(totals):
            by_bytes.plot(
                totals,
                accuracy[1:],
                style,
                color=color,
                label=f"{label}: {size(totals[-1])}",
                markersize=4,
                linewidth=3 if style == ":" else 1.5,
                alpha=0.6 if style == ":" else 1,
            )
    by_bytes.set(xlabel="bytes so far, all nodes (log scale)", xscale="log")
    by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    by_bytes.minorticks_off()
    if by_bytes.lines:
        figure.legend(frameon=False, loc="lower right", ncols=4, fontsize="small", handlelength=3)
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    by_bytes.set_xlim(overhead.with_powers(*by_bytes.get_xlim()))
    figure.subplots_adjust(**overhead.MARGINS)
    figure.suptitle(_title(summary), fontsize="medium")
    figure.savefig(path, dpi=120, pil_kwargs=overhead.FAST)


def table(summary: Mapping[str, Any]) -> Table:
    """Return the run as a table for a person: by round, then in all."""
    from rich.table import Table

    dense = " and ".join(
        f"{size(sum(summary[f'{way}_dense_bytes']))} {where}"
        for way, where in (("uplink", "up"), ("downlink", "down"))
    )
    found = Table(
        title=_title(summary),
        caption=f"dense float32 would take {dense}{_way(summary)}",
        title_justify="left",
        caption_justify="left",
        show_footer=True,
    )
    more: list[Mapping[str, float]] = summary.get("more") or [{}] * len(summary["loss"])
    further = sorted({name for scores in more for name in scores if TASK_MARK not in name})
    budget = 1e6 * float(summary.get("config", {}).get("budget-mb", 0))
    ledger = summary.get("ledger") or {}
    kept = [ledger.get(name, []) for name in ("cosine", "relative_error")]
    known = any(value is not None for values in kept for value in values)
    further = further if len(further) + (budget > 0) + known <= _COLUMNS else []  # else metrics.csv
    headers = ["round", "accuracy", "loss", *further]
    headers += ["sent up", "of dense", "sent down", "of dense"]
    sums = [
        summary[f"{way}_{kind}_bytes"]
        for way in ("uplink", "downlink")
        for kind in ("payload", "dense")
    ]
    footers = ["all", "", "", *[""] * len(further), *_sent(*map(sum, sums))]
    used = [100 * both / budget for both in _added(*_totals(summary, "payload"))] if budget else []
    if used:
        headers, footers = [*headers, "of budget"], [*footers, f"{used[-1]:.3g} %"]
    if known:
        # How much of what the nodes have compressed their updates keep, in the mean.
        headers, footers = [*headers, "cosine", "error"], [*footers, "", ""]
        found.padding = (0, 1, 0, 0)  # so that 80 columns hold it
    for header, footer in zip(headers, footers, strict=True):
        found.add_column(header, footer, justify="right")
    scores = zip(summary["accuracy"], summary["loss"], strict=True)
    for index, (accuracy, loss) in enumerate(scores):
        found.add_row(
            str(index),
            percent(accuracy),
            "-" if loss is None else f"{loss:.3f}",
            *("-" if name not in more[index] else f"{more[index][name]:.3g}" for name in further),
            *(_sent(*(column[index - 1] for column in sums)) if index else ()),
            *([f"{used[index - 1]:.3g} %"] if used and index else []),
            *(_figure(values, index - 1) for values in kept if index and "cosine" in headers),
        )
    return found


def tasks_table(summary: Mapping[str, Any]) -> Table | None:
    """Return what lm-eval's tasks gave in the rounds that they were asked in; None: in none."""
    from rich.table import Table

    more: list[Mapping[str, float]] = summary.get("more") or []
    asked = [index for index, scores in enumerate(more) if any(TASK_MARK in n for n in scores)]
    if not asked:
        return None
    shown = asked if len(asked) <= _ROUNDS_SHOWN else [asked[0], *asked[1 - _ROUNDS_SHOWN :]]
    found = Table(title="tasks of lm-eval, by round", title_justify="left")
    found.add_column("task")
    found.add_column("metric")
    for index in shown:
        found.add_column(str(index), justify="right")
    for name in sorted({name for index in asked for name in more[index] if TASK_MARK in name}):
        figures = [more[index].get(name) for index in shown]
        cells = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        found.add_row(*name.rsplit(TASK_MARK, 1), *cells)
    return found


def _sent(up: int, dense_up: int, down: int, dense_down: int) -> tuple[str, str, str, str]:
    """Return the cells of bytes up and down, each with its part of the dense ones."""
    return size(up), _part(up, dense_up), size(down), _part(down, dense_down)


def _figure(values: Sequence[float | None], index: int) -> str:
    value = values[index] if index < len(values) else None
    return "-" if value is None else f"{value:.3f}"


def _part(sent: float, dense: float) -> str:
    """Return sent / dense as ``1/57``; ``1/1`` where nothing is gained."""
    if not sent or not dense:
        return "-"
    return f"1/{dense / sent:.3g}" if abs(dense / sent - 1) > 0.05 else "1/1"


def _title(summary: Mapping[str, Any]) -> str:
    parameters = summary["num_parameters"]
    return (
        f"{summary['scenario']}: {summary['nodes']} nodes, {summary['rounds']} rounds, "
        f"{parameters:,} parameters in the adapter"
    )


def _way(summary: Mapping[str, Any]) -> str:
    """Return how a run's configuration had updates written, as a line."""
    config = summary.get("config", {})
    names = ("codec", "density", "downlink-codec", "downlink-density")
    if not {"strategy", *names} <= set(config) or config["strategy"] == "fedavg":
        return ""
    up, density, down, down_density = (config[name] for name in names)
    if config.get("downlink") == "dense":
        down, down_density = "dense", ""
    of_down = f" {down_density}" if down_density else ""
    return f"\nup: {up} {density}; down: {down}{of_down}"


def _totals(summary: Mapping[str, Any], kind: str) -> tuple[list[int], list[int]]:
    """Return the bytes up and down until each round's end."""
    return (
        list(accumulate(summary[f"uplink_{kind}_bytes"])),
        list(accumulate(summary[f"downlink_{kind}_bytes"])),
    )


def _added(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _mark_ends(axes: Axes, values: Sequence[float | None]) -> None:
    """Write the first value below its point, and the last above."""
    last = len(values) - 1
    for at, shift in ((0, -14), (last, 7)) if last else ((0, 7),):
        value = values[at]
        if value is not None:
            axes.annotate(
                f"{value:.1f}", (at, value), (0, shift), textcoords="offset points", ha="center"
            )


def _write_metrics(path: Path, record: RunRecord) -> None:
    columns = [f.name for f in dataclasses.fields(RoundRecord) if f.name != "more"]
    further = sorted({name for entry in record.rounds for name in entry.more})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["round", *columns, *further])
        for index, entry in enumerate(record.rounds):
            values = [getattr(entry, column) for column in columns]
            values += [entry.more.get(name) for name in further]
            rounded = [round(v, 6) if isinstance(v, float) else v for v in values]
            writer.writerow([index, *rounded])
