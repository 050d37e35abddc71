"""The page of bench paper: paper.md, paper.csv, paper_sweep.png and paper_pareto.png."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench.paper_figures import TABLE_2, TABLE_3, TABLE_4
from compeft_fl.bench.results import machine, say, write_csv
from compeft_fl.results.units import size

__all__ = ["frontier", "write"]

Found = Sequence[tuple[str, dict[str, Any]]]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_COMPARED: Final = ("", "base", "dense (16 bits)", "ComPEFT, k and alpha chosen",
                    "untuned: k 5 %, norm", "chosen: gain / smaller")  # fmt: skip
_LINES: Final = {
    "compeft": "ComPEFT, best alpha",
    "norm": "ComPEFT, norm kept",
    "stc": "STC",
    "pruned": "Pruned",
    "unsigned": "without signs",
}


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
        "k and alpha are chosen on validation rows. A figure is the mean over tasks and seeds;",
        "with more seeds than one, ± is the standard deviation of their means. The paper's figures",
        "are beside ours for the eye: other models, other tasks. `--only PART` measures one part.",
        "",
    ]
    if experts:
        lines += _table_2(experts)
        lines += _by_task(experts)
    if merged := _of(found, "merged"):
        lines += _table_3(merged)
    if full:
        lines += _table_4(full)
    ablations = _of(found, "ablations")
    if experts:
        plot_sweep(out / "paper_sweep.png", experts, ablations)
        lines += _figures_5_and_6(experts, ablations)
    if dense and experts:
        points = _pareto([*experts, *full, *dense])
        plot_pareto(out / "paper_pareto.png", points)
        lines += _figure_4(points)
    (out / "paper.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    rows = [_flat(part, one) for part, one in found if part in ("experts", "full", "pareto")]
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
    lines = ["## Table 2: LoRA and IA3 on all tasks", ""]
    lines += _head(*_COMPARED)
    for method in _methods(experts):
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
    )


def _by_task(experts: list[dict[str, Any]]) -> list[str]:
    lines = ["### Tables 6 and 8 to 16: by task", ""]
    lines += _head(*_COMPARED, "k, alpha by seed")
    for method in _methods(experts):
        for task in dict.fromkeys(one["task"] for one in experts):
            some = [one for one in experts if (one["task"], one["method"]) == (task, method)]
            if some:
                chosen = [
                    f"{100 * one['compeft']['density']:g} %, {one['compeft']['alpha']:g}"
                    for one in some
                ]
                line = _compared(f"{Path(task).stem}, {method}", some)
                lines.append(f"{line} {'; '.join(chosen)} |")
    return [*lines, ""]


def _table_3(merged: list[dict[str, Any]]) -> list[str]:
    lines = ["## Table 3: one model of all experts", ""]
    lines += [
        "The mean over the tasks, lambda chosen on validation rows. Dense task vectors are trimmed",
        "to their top fifth before TIES; compressed ones are as their own validation rows chose.",
        "",
    ]
    methods = _methods(merged)
    for method in methods:
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
    lines = ["## Table 4: the whole model fine-tuned", ""]
    lines += _head(*_COMPARED)
    lines.append(_compared("all weights", full))
    lines += ["", "The paper's, over seven GLUE tasks:", ""]
    lines += _head("", "dense", "ComPEFT", "gain / smaller")
    lines += [_row(*row) for row in TABLE_4]
    return [*lines, ""]


def _figures_5_and_6(experts: list[dict[str, Any]], ablations: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Figures 5 and 6: over k and alpha",
        "",
        "![Score by density, and by alpha](paper_sweep.png)",
    ]
    lines += ["", "Means on validation rows, LoRA. Bands: the seeds' standard deviation.", ""]
    curves = _curves(experts, ablations)
    densities = sorted({density for points in curves.values() for density in points})
    lines += _head("", *(f"k = {100 * density:g} %" for density in densities))
    for name, points in curves.items():
        cells = [_with_deviation(points[d]) if d in points else "-" for d in densities]
        lines.append(_row(_LINES.get(name, name), *cells))
    signs = [score for one in ablations for _, score in one["trials"]["signs"]]
    if signs:
        lines += ["", f"All signs and no sparsification: {statistics.fmean(signs):.1f}."]
    return [*lines, ""]


def _figure_4(points: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Figure 4: methods by score and bytes",
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


# --- curves and points ------------------------------------------------------------------------


def _curves(
    experts: list[dict[str, Any]], ablations: list[dict[str, Any]]
) -> dict[str, dict[float, list[float]]]:
    """Per variant and density, the means of each seed, of LoRA."""
    found: dict[str, dict[float, dict[int, list[float]]]] = {}
    for one in experts:
        if one["method"] != "lora":
            continue
        best: dict[float, float] = {}
        for density, _, score in one["trials"]:
            best[density] = max(score, best.get(density, 0.0))
        for density, score in best.items():
            _add(found, "compeft", density, one["seed"], score)
    for one in ablations:
        for variant, points in one["trials"].items():
            for density, score in points:
                if variant != "signs":
                    _add(found, variant, density, one["seed"], score)
    return {
        name: {d: [statistics.fmean(v) for v in seeds.values()] for d, seeds in points.items()}
        for name, points in found.items()
    }


def _add(found: Any, name: str, density: float, seed: int, score: float) -> None:
    found.setdefault(name, {}).setdefault(density, {}).setdefault(seed, []).append(score)


def _pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method, dense in 32 and in 16 bits and compressed, over the tasks that all have."""
    tasks: set[str] = set.intersection(
        *({one["task"] for one in rows if one["method"] == m} for m in _methods(rows))
    )
    points = []
    for method in _methods(rows):
        some = [one for one in rows if one["method"] == method and one["task"] in tasks]
        forms = [("float32", "dense", "dense"), ("bfloat16", "dense", "dense-bf16")]
        for name, key, codec in forms if some else []:
            mean = _bytes(one["bytes"][codec] for one in some)
            points.append(_point(f"{method}, {name}", mean, some, key))
        if some and all("compeft" in one for one in some):
            for name, key in (("compressed", "compeft"), ("compressed at 5 %", "untuned")):
                mean = _bytes(one[key]["bytes"] for one in some)
                points.append(_point(f"{method}, {name}", mean, some, key))
    return points


def _point(name: str, num_bytes: float, some: list[dict[str, Any]], key: str) -> dict[str, Any]:
    scores = _by_seed(some, key)
    mean = statistics.fmean(scores)
    return {"name": name, "bytes": num_bytes, "score": mean, "scores": scores, "count": len(some)}


def frontier(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that none with as few bytes beats, from few bytes to many."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bytes"], -p["score"])):
        if not found or point["score"] > found[-1]["score"]:
            found.append(point)
    return found


# --- cells ------------------------------------------------------------------------------------


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(one["method"] for one in rows))


def _by_seed(some: list[dict[str, Any]], key: str) -> list[float]:
    """The mean over the tasks of each seed."""
    seeds: dict[int, list[float]] = {}
    for one in some:
        seeds.setdefault(one["seed"], []).append(one[key]["test"])
    return [statistics.fmean(values) for values in seeds.values()]


def _mean(some: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(one[key]["test"] for one in some)


def _score(some: list[dict[str, Any]], key: str) -> str:
    return _with_deviation(_by_seed(some, key))


def _with_deviation(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def _bytes(values: Iterable[int]) -> float:
    return statistics.fmean(values)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# --- plots ------------------------------------------------------------------------------------


def plot_sweep(path: Path, experts: list[dict[str, Any]], ablations: list[dict[str, Any]]) -> None:
    """Draw the score by density and variant, and by alpha and density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    by_density, by_alpha = figure.subplots(1, 2)
    lora = [one for one in experts if one["method"] == "lora"] or experts
    for colour, (name, points) in zip(_COLOURS, _curves(experts, ablations).items(), strict=False):
        where = sorted(points)
        means = [statistics.fmean(points[d]) for d in where]
        spread = [statistics.stdev(points[d]) if len(points[d]) > 1 else 0.0 for d in where]
        x = [100 * density for density in where]
        by_density.plot(x, means, "o-", color=colour, label=_LINES.get(name, name), markersize=4)
        low = [mean - each for mean, each in zip(means, spread, strict=True)]
        high = [mean + each for mean, each in zip(means, spread, strict=True)]
        by_density.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    by_density.set(xlabel="density k (%)", ylabel="score on validation rows (%)", title="Figure 5")
    by_alpha.set(xlabel="alpha", title="Figure 6")
    densities = sorted({trial[0] for one in lora for trial in one["trials"]})
    for colour, density in zip(_COLOURS, densities, strict=False):
        alphas = sorted({trial[1] for one in lora for trial in one["trials"]})
        means = [
            statistics.fmean(t[2] for one in lora for t in one["trials"] if t[:2] == [density, a])
            for a in alphas
        ]
        by_alpha.plot(
            alphas, means, "o-", color=colour, label=f"k = {100 * density:g} %", markersize=4
        )
    dense = statistics.fmean(one["dense"]["val"] for one in lora)
    for axes in (by_density, by_alpha):
        axes.axhline(dense, color="#777777", linestyle=":", label="dense")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def plot_pareto(path: Path, points: list[dict[str, Any]]) -> None:
    """Draw the score of each method and form by its bytes, and the frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    best = frontier(points)
    axes.step([p["bytes"] for p in best], [p["score"] for p in best], where="post", color="#777777",
              linestyle=":", label="frontier")  # fmt: skip
    for point in points:
        small = "compressed" in point["name"]
        axes.plot(point["bytes"], point["score"], "s" if small else "o",
                  color=_COLOURS[1] if small else _COLOURS[0], markersize=6)  # fmt: skip
        axes.annotate(point["name"], (point["bytes"], point["score"]), (5, 4),
                      textcoords="offset points", fontsize="x-small")  # fmt: skip
    axes.set(xscale="log", xlabel="bytes (log scale)", ylabel="score on test rows (%)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
