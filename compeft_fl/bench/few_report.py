"""What federations with few nodes a round came to: few.csv, few.md, few.png."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench import results
from compeft_fl.bench.federation import LONG_ABSENCE
from compeft_fl.results.units import size

__all__ = ["Run", "write"]

LATE: Final = 50  # the round of a late joiner; of shorter runs, the last
LAST: Final = 7  # scores whose mean is a run's result: few nodes a round make it swing
CHAIN: Final = ", each delta"
HEADS: Final = (
    "setting", "seeds", "server's accuracy", "server's loss", "nodes' accuracy", "nodes' loss",
    "up", "down", "down, of dense", "both, of dense",
    "bits a visit", f"missed {LONG_ABSENCE}", "joins", f"joins at {LATE}",
)  # fmt: skip


class Run:
    """One stored run: its scores, and its bytes so far by round, beginning with round 0."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.job = result["job"]
        self.setting: Mapping[str, Any] = self.job["setting"]
        self.name, self.seed = self.setting["name"], self.job["seed"]
        self.case = re.split("-(?:dense|grid)", self.name)[0]
        self.num_parameters: int = result["num_parameters"]
        self.rounds: Sequence[Mapping[str, Any]] = result["rounds"]
        self.seconds: float = result["cpu_seconds"]
        self.scored = [n for n, each in enumerate(self.rounds) if each["loss"] is not None]
        self.up, self.down, self.chain = (
            list(accumulate(each[way] for each in self.rounds)) for way in ("up", "down", "chain")
        )

    @property
    def dense(self) -> bool:
        """Whether all of the adapter goes both ways."""
        return str(self.setting["down"]).startswith("dense")

    @property
    def method(self) -> tuple[str, ...]:
        """What it has in common with runs that differ in the server's step alone."""
        return (self.case, *(str(self.setting[key]) for key in ("down", "density", "down_density")))

    @property
    def visits(self) -> int:
        """So many times a node was sent what it lacks."""
        return int(self.setting["nodes_a_round"]) * (len(self.rounds) - 1)

    def last(self, key: str) -> float:
        """The mean of the last scores."""
        last = [n for n in self.scored[1:][-LAST:] if self.rounds[n][key] is not None]
        return float(statistics.mean(self.rounds[n][key] for n in last))

    def bits(self, num_bytes: float) -> float:
        """Bits a parameter."""
        return 8 * num_bytes / self.num_parameters

    def mean_bits(self, key: str) -> float | None:
        """Of what one node would be sent, on the mean over the rounds in which there is one."""
        found = [each[key] for each in self.rounds if each[key]]
        return self.bits(statistics.mean(found)) if found else None

    def late_bits(self) -> float | None:
        """What a node of which nothing is known is sent late in the run."""
        found = self.rounds[min(LATE, len(self.rounds) - 1)]["joiner"]
        return self.bits(found) if found else None


def write(out: Path, command: str, found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Write the table, the CSV file and the plot of these runs, and print the table."""
    runs = [Run(result) for result in found]
    results.write_csv(out / "few.csv", [row for run in runs for row in _csv_rows(run)])
    rows = _table(runs)
    notes = _notes(runs)
    results.write_markdown(out / "few.md", command, HEADS, rows, notes)
    plot(out / "few.png", runs)
    results.show_table("few of many nodes a round, means over seeds", HEADS, rows)
    print(notes)
    return rows


def _csv_rows(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "setting": run.name, "seed": run.seed, "round": number,
            **{
                key: "" if each[key] is None else round(each[key], 6)
                for key in ("accuracy", "loss", "shared_accuracy", "shared_loss")
            },
            "up_bytes": run.up[number], "down_bytes": run.down[number],
            "chain_bytes": run.chain[number], f"missed_{LONG_ABSENCE}_bytes": each["long_absence"],
            "joiner_bytes": each["joiner"],
        }
        for number, each in enumerate(run.rounds)
    ]  # fmt: skip


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def _table(runs: Sequence[Run]) -> list[list[str]]:
    rows = []
    for name, group in _groups(runs).items():
        dense = 4 * group[0].num_parameters * group[0].visits
        rows.append(_row(name, group, "down", dense))
        if not group[0].dense:
            rows.append(_row(name + CHAIN, group, "chain", dense))
    return rows


def _row(name: str, group: Sequence[Run], way: str, dense: int) -> list[str]:
    up, down = (statistics.mean(getattr(run, key)[-1] for run in group) for key in ("up", way))
    row = [name, str(len(group))]
    if way == "chain":  # it learns the same
        row += ["-"] * 4
    else:
        for of in ("", "shared_"):
            row.append(_spread([100 * run.last(f"{of}accuracy") for run in group], 1) + " %")
            row.append(_spread([run.last(f"{of}loss") for run in group], 3))
    row += [size(up), size(down), f"1/{dense / down:.1f}", f"1/{2 * dense / (up + down):.1f}"]
    row.append(f"{group[0].bits(down) / group[0].visits:.2f}")
    missed, joins = ([run.mean_bits(key) for run in group] for key in ("long_absence", "joiner"))
    for found in (missed, joins, [run.late_bits() for run in group]):
        known = [each for each in found if each is not None]
        row.append(f"{statistics.mean(known):.2f}" if known and way == "down" else "-")
    return row


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _notes(runs: Sequence[Run]) -> str:
    """How the table is to be read, and what it says of the claims."""
    lines = [
        f"{len(runs)} runs, {sum(run.seconds for run in runs) / 60:.0f} minutes of a core. "
        f"Accuracy and loss: test split, means of a run's last {LAST} scores, mean and standard "
        "deviation over seeds; first of the server's adapter, then of the copy that nodes have, "
        "which lacks what has not gone down yet, and is what a run gives. Settings of one seed "
        "draw the same nodes. Bytes: updates of all nodes. Dense: the adapter in float32 to and "
        "from each node of a round. "
        "Bits: a parameter, of what a node is sent on a visit; of one that has missed "
        f"{LONG_ABSENCE} versions; of one of which nothing is known: means over all rounds, and in "
        f"round {LATE} or the last. "
        f'"{CHAIN.strip(", ")}": the same run, had each node been sent every delta that it lacks, '
        "or all in float32 where that is less."
    ]
    groups = _groups(runs)
    for name, group in groups.items():
        others = groups.get(_dense_name(group[0]), [])
        if not group[0].dense and (told := _against(group, others)):
            lines.append(f"{name} against {others[0].name}: {told}.")
    best = _best_steps(groups)
    dense = {group[0].case: group for group in best.values() if group[0].dense}
    for group in best.values():
        others = dense.get(group[0].case, [])
        if (
            not group[0].dense
            and _has_steps(group[0], groups)
            and (told := _against(group, others))
        ):
            lines.append(
                "Each at the best of its steps of the server by the nodes' loss, "
                f"{group[0].name} against {others[0].name}: {told}."
            )
    return "\n\n".join(lines)


def _best_steps(groups: Mapping[str, list[Run]]) -> dict[tuple[str, ...], list[Run]]:
    """Of each method the setting whose nodes end with the least loss."""
    best: dict[tuple[str, ...], list[Run]] = {}
    for group in groups.values():
        held = best.get(group[0].method)
        if held is None or _ends(group) < _ends(held):
            best[group[0].method] = group
    return best


def _has_steps(run: Run, groups: Mapping[str, list[Run]]) -> bool:
    return sum(group[0].method == run.method for group in groups.values()) > 1


def _ends(group: Sequence[Run]) -> float:
    return statistics.mean(run.last("shared_loss") for run in group)


def _against(group: Sequence[Run], dense: Sequence[Run]) -> str:
    """How these runs end beside dense ones of the same seeds; nothing where there are none."""
    theirs = {run.seed: run for run in dense}
    pairs = [(run, theirs[run.seed]) for run in group if run.seed in theirs]
    if not pairs:
        return ""
    return f"{_gap(pairs, '')}; the nodes' copies {_gap(pairs, 'shared_')}"


def _gap(pairs: Sequence[tuple[Run, Run]], of: str) -> str:
    """By how much runs end above dense ones: of the adapter, or ("shared_") of nodes' copies."""
    gaps = [ours.last(f"{of}loss") - dense.last(f"{of}loss") for ours, dense in pairs]
    points = [100 * (o.last(f"{of}accuracy") - d.last(f"{of}accuracy")) for o, d in pairs]
    each = ", ".join(f"{gap:+.3f}" for gap in gaps)
    return f"{statistics.mean(gaps):+.3f} of loss ({each}), {statistics.mean(points):+.1f} points"


def _dense_name(run: Run) -> str:
    """The dense setting with the same step of the server."""
    sent = f"grid-{run.setting['down_density']:g}"
    return str(run.name.replace(sent, "dense").partition("-up-")[0])


def plot(path: Path, runs: Sequence[Run]) -> None:
    """Draw loss and accuracy of nodes' copies by round, and loss by bytes, a row a federation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    cases = list(dict.fromkeys(run.case for run in runs))
    figure = Figure(figsize=(15, 4.4 * len(cases) + 1.2), layout="constrained")
    grid = figure.subplots(len(cases), 3, squeeze=False)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = (*colours[::2], *colours[1::2])  # the strong ones first
    kinds = list(dict.fromkeys(run.name.removeprefix(run.case + "-") for run in runs))
    for case, axes in zip(cases, grid, strict=True):
        groups = _groups([run for run in runs if run.case == case])
        for name, group in groups.items():
            kind = name.removeprefix(case + "-")
            style = {
                "color": colours[kinds.index(kind) % len(colours)],
                "linestyle": "--" if group[0].dense else "-",
                "marker": "s" if group[0].dense else "o",
                "markersize": 3,
                "linewidth": 1.3,
            }
            scored = group[0].scored[1:]  # nobody has a copy of the start
            loss, accuracy = (
                [statistics.mean(run.rounds[n][key] for run in group) for n in scored]
                for key in ("shared_loss", "shared_accuracy")
            )
            both = [statistics.mean(run.up[n] + run.down[n] for run in group) for n in scored]
            label = f"{kind} ({len(group)} seeds)" if len(group) > 1 else kind
            axes[0].plot(scored, loss, label=label, **style)
            axes[1].plot(scored, [100 * each for each in accuracy], **style)
            axes[2].plot(both, loss, **style)
        few, _, where = case.replace("-", " ").partition(" last ")
        title = f"{few} nodes a round" + (f", LoRA in the last {where}" if where else "")
        axes[0].set(title=title, ylabel="test loss of nodes' copies")
        axes[1].set(ylabel="test accuracy (%)")
        axes[2].set(xscale="log", ylabel="test loss", xlabel="bytes so far, both ways (log scale)")
        axes[2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        for each in axes[:2]:
            each.set_xlabel("round")
        for each in axes:
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[2].legend(
            handles, labels, frameon=False, fontsize="small",
            loc="upper left", bbox_to_anchor=(1.02, 1.0),
        )  # fmt: skip
    figure.savefig(path, dpi=110)
