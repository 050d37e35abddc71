"""What a sweep of federations came to: learning.csv, learning.md, learning.png."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from compeft_fl import codecs
from compeft_fl.bench import results
from compeft_fl.bench.sweep import Job, read_updates
from compeft_fl.codecs.dense import Dense
from compeft_fl.results.units import size
from compeft_fl.task_vector import Layout, TensorSpec
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode

__all__ = ["BASELINE", "Curve", "curves_of", "write"]

BASELINE: Final = "dense-fp32"
SHARE: Final = 0.95  # of the dense run's gain
HEADS: Final = (
    "setting", "codec", "seeds", "accuracy", "loss", "up", "of dense", "both", "of dense",
    "95 % of the gain: round", "up, of dense", "both, of dense",
)  # fmt: skip
_DRAWN_TOO: Final = ((BASELINE, "dense"), ("compeft-0.1", "context"))


@dataclass(frozen=True)
class Curve:
    """One run over one codec: by round, beginning with round 0.

    ``up`` and ``down`` are the bytes of all nodes so far; ``accuracy`` is 0 to 1.
    """

    setting: str
    codec: str
    seed: int
    accuracy: list[float]
    loss: list[float]
    up: list[int]
    down: list[int]

    @property
    def both(self) -> list[int]:
        """Bytes so far in both directions."""
        return [a + b for a, b in zip(self.up, self.down, strict=True)]


def curves_of(result: Mapping[str, Any], folder: Path) -> list[Curve]:
    """A stored run as it was sent and, where it was ternary, over each other ternary codec.

    Another codec carries the same updates without loss, so it learns the same; its bytes are those
    of the run's updates, encoded again.
    """
    job, rounds = Job.of(result["job"]), result["rounds"]
    scores = [[record[key] for record in rounds] for key in ("accuracy", "loss")]
    sent = [[record[way] for record in rounds] for way in ("up", "down")]
    found = [_curve(job, job.setting.up, scores, sent)]
    if job.setting.up not in codecs.names() or _is_dense(job.setting.up):
        return found
    layout = Layout([TensorSpec(name, tuple(shape)) for name, shape in result["layout"]])
    updates = list(read_updates(folder / f"{job.key}.updates"))
    for codec in codecs.names():
        if codec == job.setting.up or not codecs.get(codec).ternary:
            continue
        again = {"up": [0] * len(rounds), "down": [0] * len(rounds)}
        for number, way, nodes, blob in updates:
            update = decode(blob, layout=layout)
            assert isinstance(update, TernaryVector)
            again[way][number] += nodes * len(encode(update, codec, layout_by_id=True))
        found.append(_curve(job, codec, scores, [again["up"], again["down"]]))
    return found


def write(
    out: Path, command: str, found: Sequence[Mapping[str, Any]], folder: Path
) -> list[list[str]]:
    """Write the table, the CSV file and the plot of these runs, and print the table."""
    curves = [curve for result in found for curve in curves_of(result, folder)]
    results.write_csv(out / "learning.csv", _csv_rows(curves))
    rows = _table(curves)
    notes = _notes(curves, found)
    results.write_markdown(out / "learning.md", command, HEADS, rows, notes)
    plot(out / "learning.png", curves)
    results.show_table("accuracy and bytes of all nodes, means over seeds", HEADS, rows)
    print(notes)
    return rows


def _is_dense(codec: str) -> bool:
    return isinstance(codecs.get(codec), Dense)


def _curve(job: Job, codec: str, scores: list[list[float]], sent: list[list[int]]) -> Curve:
    up, down = (list(accumulate(each)) for each in sent)
    return Curve(job.setting.name, codec, job.seed, scores[0], scores[1], up, down)


def _csv_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    return [
        {
            "setting": curve.setting, "codec": curve.codec, "seed": curve.seed, "round": number,
            "accuracy": round(curve.accuracy[number], 6), "loss": round(curve.loss[number], 6),
            "up_bytes": curve.up[number], "down_bytes": curve.down[number],
        }
        for curve in curves
        for number in range(len(curve.accuracy))
    ]  # fmt: skip


def _groups(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.setting, curve.codec), []).append(curve)
    return groups


def _means(columns: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(each) for each in zip(*columns, strict=True)]


def _table(curves: Sequence[Curve]) -> list[list[str]]:
    groups = _groups(curves)
    rows = []
    for (setting, codec), group in groups.items():
        if codec == "bitmask" and setting != "compeft-0.1":
            continue  # two bits a parameter each time; the CSV file has them
        seeds = [curve.seed for curve in group]
        dense = [c for c in curves if c.setting == BASELINE and c.seed in seeds]
        accuracy = [100 * curve.accuracy[-1] for curve in group]
        up, both = (_means([getattr(curve, way) for curve in group]) for way in ("up", "both"))
        row = [setting, codec, str(len(group)), _spread(accuracy),
               f"{statistics.mean(curve.loss[-1] for curve in group):.3f}"]  # fmt: skip
        if len(dense) == len(group):
            dense_up = _means([curve.up for curve in dense])
            dense_both = _means([curve.both for curve in dense])
            reached = reaches(group, dense)
            row += [size(up[-1]), _part(up[-1], dense_up[-1]),
                    size(both[-1]), _part(both[-1], dense_both[-1])]  # fmt: skip
            theirs = reaches(dense, dense)
            if reached is None or theirs is None:
                row += ["-", "-", "-"]
            else:
                row += [
                    str(reached),
                    _part(up[reached], dense_up[theirs]),
                    _part(both[reached], dense_both[theirs]),
                ]
        else:
            row += [size(up[-1]), "-", size(both[-1]), "-", "-", "-", "-"]
        rows.append(row)
    return rows


def reaches(group: Sequence[Curve], dense: Sequence[Curve]) -> int | None:
    """The first round after which the mean accuracy has 95 % of the dense runs' gain."""
    baseline = _means([curve.accuracy for curve in dense])
    goal = baseline[0] + SHARE * (baseline[-1] - baseline[0])
    mean = _means([curve.accuracy for curve in group])
    return next((number for number, value in enumerate(mean) if value >= goal), None)


def _notes(curves: Sequence[Curve], found: Sequence[Mapping[str, Any]]) -> str:
    """How the table is to be read, and what it says of the claims."""
    seconds = sum(result["cpu_seconds"] for result in found)
    lines = [
        f"{len(found)} runs, {seconds / 60:.0f} minutes of a core. Accuracy: test split, mean and "
        "standard deviation over seeds (the split's own standard error is 1.3 points). Bytes: "
        "updates of all nodes. 95 % of the gain: the first round after which the mean accuracy has "
        "95 % of the dense runs' gain on the same seeds, and the bytes until then against the "
        "dense runs' bytes until theirs. A codec that carries the same updates without loss has "
        "the same accuracy.",
    ]
    dense = {c.seed: c for c in curves if c.setting == BASELINE}
    for (setting, codec), group in _groups(curves).items():
        if not setting.startswith("compeft") or codec != "golomb":
            continue
        pairs = [(curve, dense[curve.seed]) for curve in group if curve.seed in dense]
        if not pairs:
            continue
        gaps = [100 * (ours.accuracy[-1] - theirs.accuracy[-1]) for ours, theirs in pairs]
        losses = [ours.loss[-1] - theirs.loss[-1] for ours, theirs in pairs]
        ratio = sum(t.both[-1] for _, t in pairs) / max(1, sum(o.both[-1] for o, _ in pairs))
        lines.append(
            f"{setting} against {BASELINE}, {len(pairs)} seeds: {statistics.mean(gaps):+.1f} "
            f"points of accuracy ({', '.join(f'{gap:+.1f}' for gap in gaps)}), "
            f"{statistics.mean(losses):+.3f} of loss, 1/{ratio:.1f} of the bytes in both "
            "directions."
        )
    return "\n\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f} %" if len(values) > 1 else f"{mean:.1f} %"


def _part(sent: float, dense: float) -> str:
    return f"1/{dense / sent:.1f}" if sent else "-"


def plot(path: Path, curves: Sequence[Curve]) -> None:
    """Draw accuracy over the bytes so far, up and in both directions, on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    groups = _groups(curves)
    names = list(dict.fromkeys(setting for setting, _ in groups))
    for (setting, codec), group in groups.items():
        if codec not in ("golomb", setting) and (setting, codec) not in _DRAWN_TOO:
            continue  # the same updates over another codec: one curve of them will do
        style = _style(setting, codec, names.index(setting))
        accuracy = [100 * value for value in _means([curve.accuracy for curve in group])]
        label = f"{setting} ({codec})" if codec == "context" else setting
        for each, way in zip(axes, ("up", "both"), strict=True):
            sent = _means([getattr(curve, way) for curve in group])
            each.plot(sent[1:], accuracy[1:], label=label, markersize=4, **style)
            if len(group) > 1:
                low, high = (
                    [100 * edge(values) for values in
                     zip(*(curve.accuracy for curve in group), strict=True)]
                    for edge in (min, max)
                )  # fmt: skip
                each.fill_between(
                    sent[1:], low[1:], high[1:], color=style["color"], alpha=0.08, linewidth=0
                )
    for each, title in zip(axes, ("up", "up and down"), strict=True):
        each.set(xscale="log", xlabel=f"bytes so far, {title}, all nodes (log scale)")
        each.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        each.xaxis.set_minor_formatter(NullFormatter())
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%), mean over seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=120)


def _style(setting: str, codec: str, index: int) -> dict[str, Any]:
    """Ours in lines, its peers in dashes; one colour a setting."""
    import matplotlib

    colours = [*matplotlib.colormaps["tab10"].colors, "#005f73", "#b59f00"]  # type: ignore[attr-defined]
    ours = setting.startswith("compeft")
    return {
        "color": "black" if setting == BASELINE else colours[(index - 1) % len(colours)],
        "linestyle": "-" if ours else "--",
        "marker": {"golomb": "o", "context": "D"}.get(codec, "s"),
        "linewidth": 1.8 if ours else 1.1,
    }
