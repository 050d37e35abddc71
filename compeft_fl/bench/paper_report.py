"""The page of bench paper: paper.md, paper.csv, paper_sweep.png and paper_pareto.png."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench.paper_figures import TABLE_1, TABLE_2, TABLE_3, TABLE_4
from compeft_fl.bench.paper_plots import (
    LINES,
    by_seed,
    curves,
    frontier,
    methods,
    pareto,
    plot_pareto,
    plot_sweep,
)
from compeft_fl.bench.results import machine, say, write_csv
from compeft_fl.results.units import size

__all__ = ["write"]

Found = Sequence[tuple[str, dict[str, Any]]]

_COMPARED: Final = ("", "base", "dense (16 bits)", "ComPEFT, k and alpha chosen",
                    "untuned: k 5 %, norm", "chosen: gain / smaller", "experts")  # fmt: skip
_ROWS: Final = ("experts", "full", "pareto", "language")  # parts that are rows of paper.csv
_NAMES: Final = {"qlora": "LoRA, base in 4 bits (Table 1)", "lora": "LoRA (Table 2)",
                 "ia3": "IA3 (Table 2)", "full": "all weights (Table 4)"}  # fmt: skip


def write(out: Path, command: str, found: Found) -> None:
    """Write the page, the figures as CSV, and the plots, from what has been measured."""
    experts, full = _of(found, "experts"), _of(found, "full")
    dense = _of(found, "pareto")
    lines = [
        "# The paper, point by point",
        "",
        f"`{command}`: {machine()}",
        "",
        "Experts are trained centrally on one task each and scored on its test rows, in percent;",
        "k and alpha are chosen on rows held out of its training rows. A figure is the mean over",
        "tasks and seeds; with more seeds than one, ± is the standard deviation of their means.",
        "Differences under two points of one seed say nothing. The paper's figures are beside ours",
        "for the eye: other models, other tasks. The head of a table names the part that measures",
        "it alone: `--only PART`.",
        "",
    ]
    if experts:
        lines += _table_2(experts)
        lines += _by_task(experts)
    if merged := _of(found, "merged"):
        lines += _table_3(merged)
    if full:
        lines += _table_4(full)
    if language := _of(found, "language"):
        lines += _language(language)
    ablations = _of(found, "ablations")
    if experts:
        plot_sweep(out / "paper_sweep.png", experts, ablations)
        lines += _figures_5_and_6(experts, ablations)
    if dense and experts:
        points = pareto([*experts, *full, *dense])
        plot_pareto(out / "paper_pareto.png", points)
        lines += _figure_4(points)
    (out / "paper.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    rows = [_flat(part, one) for part, one in found if part in _ROWS]
    if rows:
        write_csv(out / "paper.csv", rows)
    say(f"{out / 'paper.md'} is written")


def _of(found: Found, part: str) -> list[dict[str, Any]]:
    return [one for name, one in found if name == part]


def _flat(part: str, one: dict[str, Any]) -> dict[str, Any]:
    compressed = one.get("compeft", {})
    return {
        "part": part,
        "task": one["task"],
        "method": one["method"],
        "seed": one["seed"],
        "parameters": one["parameters"],
        "base": round(one["base"]["test"], 2),
        "dense_val": round(one["dense"]["val"], 2),
        "dense": round(one["dense"]["test"], 2),
        "dense_bytes": one["bytes"]["dense-bf16"],
        "density": compressed.get("density", ""),
        "alpha": compressed.get("alpha", ""),
        "compeft_val": round(compressed["val"], 2) if compressed else "",
        "compeft": round(compressed["test"], 2) if compressed else "",
        "compeft_bytes": compressed.get("bytes", ""),
        "untuned": round(one["untuned"]["test"], 2) if "untuned" in one else "",
        "untuned_bytes": one["untuned"]["bytes"] if "untuned" in one else "",
        "cpu_seconds": one["seconds"],
    }


# --- tables -----------------------------------------------------------------------------------


def _table_2(experts: list[dict[str, Any]]) -> list[str]:
    lines = ["## Table 2: LoRA and IA3 on all tasks (experts)", ""]
    lines += _head(*_COMPARED)
    for method in methods(experts):
        lines.append(_compared(method, [e for e in experts if e["method"] == method]))
    lines += ["", "The paper's, over seven GLUE tasks:", ""]
    lines += _head("", "dense", "ComPEFT", "gain / smaller")
    for method, rows in TABLE_2.items():
        lines += [_row(f"{name}, {method}", *cells) for name, *cells in rows]
    return [*lines, ""]


def _compared(name: str, experts: list[dict[str, Any]]) -> str:
    dense, chosen = _mean(experts, "dense"), _mean(experts, "compeft")
    given = _bytes(one["bytes"]["dense-bf16"] for one in experts)
    kept = _bytes(one["compeft"]["bytes"] for one in experts)
    small = _bytes(one["untuned"]["bytes"] for one in experts)
    return _row(
        name,
        _score(experts, "base"),
        f"{_score(experts, 'dense')} ({size(given)})",
        f"{_score(experts, 'compeft')} ({size(kept)})",
        f"{_score(experts, 'untuned')} ({size(small)})",
        f"{chosen - dense:+.1f} / {given / kept:.1f}x",
        str(len(experts)),
    )


def _by_task(experts: list[dict[str, Any]]) -> list[str]:
    lines = ["### Tables 6 and 8 to 16: by task", ""]
    lines += _head(*_COMPARED, "k, alpha by seed")
    for method, task, some in _kinds(experts):
        line = _compared(f"{Path(task).stem}, {method}", some)
        lines.append(f"{line} {_chosen(some)} |")
    return [*lines, ""]


def _kinds(experts: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Experts of one method and task, all seeds."""
    for method in methods(experts):
        for task in dict.fromkeys(one["task"] for one in experts):
            some = [one for one in experts if (one["task"], one["method"]) == (task, method)]
            if some:
                yield method, task, some


def _chosen(experts: list[dict[str, Any]]) -> str:
    each = [one["compeft"] for one in experts]
    return "; ".join(f"{100 * one['density']:g} %, {one['alpha']:g}" for one in each)


def _table_3(merged: list[dict[str, Any]]) -> list[str]:
    lines = ["## Table 3: one model of all experts (merged)", ""]
    lines += [
        "The mean over the tasks, lambda chosen on validation rows. Dense task vectors are trimmed",
        "to their top fifth before TIES; compressed ones are as their own validation rows chose.",
        "",
    ]
    for method in methods(merged):
        some = [one for one in merged if one["method"] == method]
        base = statistics.fmean(one["base"] for one in some)
        single = statistics.fmean(one["single"] for one in some)
        lines += [
            f"{method}: {base:.1f} without training, {single:.1f} by an expert for each task.",
            "",
        ]
        theirs = "the paper's T5-Base, T5-Large, T0-3B"
        lines += _head("", "dense", "compressed", "lambda", f"{theirs}: dense", "compressed")
        for rule in ("average", "task arithmetic", "ties"):
            cells, scales = [], []
            for form in ("dense", "compressed"):
                rows = [
                    r for one in some for r in one["rows"] if (r["form"], r["rule"]) == (form, rule)
                ]
                cells.append(_with_deviation([row["test"] for row in rows]))
                scales.append(", ".join(f"{row['lambda']:g}" for row in rows))
            known = [TABLE_3[method].get((form, rule), ()) for form in ("dense", "compressed")]
            shown = [" ".join(f"{value:.1f}" for value in values) or "-" for values in known]
            lines.append(_row(rule, *cells, "; ".join(scales), *shown))
        lines.append("")
    return lines


def _table_4(full: list[dict[str, Any]]) -> list[str]:
    lines = ["## Table 4: the whole model fine-tuned (full)", ""]
    lines += _head(*_COMPARED)
    lines.append(_compared("all weights", full))
    lines += ["", "The paper's, over seven GLUE tasks:", ""]
    lines += _head("", "dense", "ComPEFT", "gain / smaller")
    lines += [_row(*row) for row in TABLE_4]
    return [*lines, ""]


def _language(experts: list[dict[str, Any]]) -> list[str]:
    lines = ["## Tables 1, 2 and 4 on a language model (language)", ""]
    lines += [
        "The embedded debian-lm, 5 million parameters, one expert a kind of instruction. Kinds",
        "with few answers are scored by rank classification, the others by the tokens that are the",
        "likeliest; k and alpha are chosen by the loss. Loss: nats a token, on the same test rows.",
        "",
    ]
    heads = (*_COMPARED, "loss: base, dense, ComPEFT, untuned")
    lines += _head(*heads)
    for method in methods(experts):
        some = [one for one in experts if one["method"] == method]
        lines.append(f"{_compared(_NAMES[method], some)} {_losses(some)} |")
    lines += ["", "The paper's Table 1: the mean over eight QLoRA experts, on MMLU:", ""]
    lines += _head("", "gain / smaller")
    lines += [_row(*row) for row in TABLE_1]
    lines += ["", "By kind:", ""]
    lines += _head(*heads, "k, alpha by seed")
    for method, task, some in _kinds(experts):
        line = _compared(f"{task.partition(':')[2]}, {method}", some)
        lines.append(f"{line} {_losses(some)} | {_chosen(some)} |")
    return [*lines, ""]


def _losses(experts: list[dict[str, Any]]) -> str:
    means = [
        statistics.fmean(one[key]["loss"] for one in experts)
        for key in ("base", "dense", "compeft", "untuned")
    ]
    return ", ".join(f"{mean:.2f}" for mean in means)


def _figures_5_and_6(experts: list[dict[str, Any]], ablations: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Figures 5 and 6: over k and alpha (experts, ablations)",
        "",
        "![Score by density, and by alpha](paper_sweep.png)",
    ]
    lines += ["", "Means on validation rows, LoRA. Bands: the seeds' standard deviation.", ""]
    found = curves(experts, ablations)
    densities = sorted({density for points in found.values() for density in points})
    lines += _head("", *(f"k = {100 * density:g} %" for density in densities))
    for name, points in found.items():
        cells = [_with_deviation(points[d]) if d in points else "-" for d in densities]
        lines.append(_row(LINES.get(name, name), *cells))
    signs = [score for one in ablations for _, score in one["trials"]["signs"]]
    if signs:
        lines += ["", f"All signs and no sparsification: {statistics.fmean(signs):.1f}."]
    return [*lines, ""]


def _figure_4(points: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Figure 4: methods by score and bytes (pareto, experts, full)",
        "",
        "![Score by bytes](paper_pareto.png)",
        "",
    ]
    names = [point["name"] for point in frontier(points)]
    lines += [f"On the frontier, from few bytes to many: {', '.join(names)}.", ""]
    lines += _head("", "bytes", "score", "tasks and seeds")
    for point in sorted(points, key=lambda p: p["bytes"]):
        score = _with_deviation(point["scores"])
        lines.append(_row(point["name"], size(point["bytes"]), score, str(point["count"])))
    return [*lines, ""]


# --- cells ------------------------------------------------------------------------------------


def _mean(some: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(one[key]["test"] for one in some)


def _score(some: list[dict[str, Any]], key: str) -> str:
    return _with_deviation(by_seed(some, key))


def _with_deviation(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def _bytes(values: Iterable[int]) -> float:
    return statistics.fmean(values)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
