"""The figures of bench paper: their curves and points, and paper_sweep.png and paper_pareto.png."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from compeft_fl.results.units import size

__all__ = [
    "LINES",
    "by_seed",
    "curves",
    "frontier",
    "methods",
    "pareto",
    "plot_pareto",
    "plot_sweep",
]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES: Final = {
    "compeft": "ComPEFT, best alpha",
    "norm": "ComPEFT, norm kept",
    "stc": "STC",
    "pruned": "Pruned",
    "unsigned": "without signs",
}


def methods(rows: list[dict[str, Any]]) -> list[str]:
    """The methods that there are, in their order."""
    return list(dict.fromkeys(one["method"] for one in rows))


def by_seed(some: list[dict[str, Any]], key: str) -> list[float]:
    """The mean over the tasks of each seed."""
    seeds: dict[int, list[float]] = {}
    for one in some:
        seeds.setdefault(one["seed"], []).append(one[key]["test"])
    return [statistics.fmean(values) for values in seeds.values()]


def curves(
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


def pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method, dense in 32 and in 16 bits and compressed, over the tasks that all have."""
    tasks: set[str] = set.intersection(
        *({one["task"] for one in rows if one["method"] == m} for m in methods(rows))
    )
    points = []
    for method in methods(rows):
        some = [one for one in rows if one["method"] == method and one["task"] in tasks]
        forms = [("float32", "dense", "dense"), ("bfloat16", "dense", "dense-bf16")]
        for name, key, codec in forms if some else []:
            mean = statistics.fmean(one["bytes"][codec] for one in some)
            points.append(_point(f"{method}, {name}", mean, some, key))
        if some and all("compeft" in one for one in some):
            for name, key in (("compressed", "compeft"), ("compressed at 5 %", "untuned")):
                mean = statistics.fmean(one[key]["bytes"] for one in some)
                points.append(_point(f"{method}, {name}", mean, some, key))
    return points


def _point(name: str, num_bytes: float, some: list[dict[str, Any]], key: str) -> dict[str, Any]:
    scores = by_seed(some, key)
    mean = statistics.fmean(scores)
    return {"name": name, "bytes": num_bytes, "score": mean, "scores": scores, "count": len(some)}


def frontier(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that none with as few bytes beats, from few bytes to many."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bytes"], -p["score"])):
        if not found or point["score"] > found[-1]["score"]:
            found.append(point)
    return found


def plot_sweep(path: Path, experts: list[dict[str, Any]], ablations: list[dict[str, Any]]) -> None:
    """Draw the score by density and variant, and by alpha and density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    by_density, by_alpha = figure.subplots(1, 2)
    lora = [one for one in experts if one["method"] == "lora"] or experts
    for colour, (name, points) in zip(_COLOURS, curves(experts, ablations).items(), strict=False):
        where = sorted(points)
        means = [statistics.fmean(points[d]) for d in where]
        spread = [statistics.stdev(points[d]) if len(points[d]) > 1 else 0.0 for d in where]
        x = [100 * density for density in where]
        by_density.plot(x, means, "o-", color=colour, label=LINES.get(name, name), markersize=4)
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
