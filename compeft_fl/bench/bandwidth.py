"""``compeft-fl bench bandwidth``: seconds a round against the speed of the link, codec by codec.

Twice: computed from each codec's bytes and seconds (`compeft_fl.bench.link_model`), and measured
over a deployment on loopback behind a relay that makes the link slow
(`compeft_fl.bench.link_runs`). Where they disagree, the table's notes say by what.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from compeft_fl import codecs
from compeft_fl.bench.link_app import DENSITY_DOWN, DENSITY_UP
from compeft_fl.bench.link_model import CodecCost, measure, round_seconds
from compeft_fl.bench.link_runs import (
    ROUNDS_FILE,
    LinkPoint,
    MeasuredRound,
    Plan,
    finished,
    run_plan,
)
from compeft_fl.bench.results import show_table, write_csv, write_markdown

__all__ = ["run"]

_SPEEDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
_LATENCIES: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
_SAME_BYTES: Final = ("dense-bf16",)  # as dense-fp16: computed, not measured
_LATENCY_SPEED: Final = 10.0  # Mbit/s at which latencies are measured
_FAST: Final = 10.0  # Mbit/s from which on the link hardly counts
_ROUND_GUESS: Final = 8.0  # seconds of a round beside its transfers, to say how long it takes
_START_GUESS: Final = 30.0


def run(options: argparse.Namespace) -> int:
    """Measure, compute, write ``bandwidth.csv``, ``.md`` and ``.png``, and return the exit code."""
    quick = bool(options.quick)
    nodes, parameters = (2, 200_000) if quick else (3, 500_000)
    started = time.perf_counter()
    costs = {name: measure(name, parameters) for name in codecs.names()}
    plan = _plan(costs, nodes, parameters, quick)
    done = finished(options.out)
    wanted = plan.without(done)
    seconds = _START_GUESS + sum(
        _ROUND_GUESS + round_seconds(costs[codec], link["mbit_per_second"], link["latency"], nodes)
        for codec, links in wanted.items()
        for link in links
    )
    number = sum(map(len, wanted.values()))
    again = f"; {len(done)} are there from a run that was stopped" if done else ""
    print(f"{number} rounds of {nodes} nodes: about {seconds / 60:.1f} min{again}", flush=True)

    def show(measured: MeasuredRound) -> None:
        point, label = measured.point, " (first round: warms up)" if measured.warm_up else ""
        print(
            f"  {point.codec:<10} {point.mbit_per_second:>6g} Mbit/s  "
            f"{1000 * point.latency:>3.0f} ms  {measured.seconds:6.2f} s{label}",
            flush=True,
        )

    rounds = [
        each
        for each in run_plan(plan, options.out, show)
        if not each.warm_up and (each.nodes, each.parameters) == (nodes, parameters)
    ]
    rows = [*_computed_rows(costs, nodes), *_measured_rows(rounds, costs)]
    write_csv(options.out / "bandwidth.csv", rows)
    command = f"compeft-fl bench bandwidth{' --quick' if quick else ''}"
    heads, cells = _table(rows)
    notes = _explained(rounds, costs, nodes)
    write_markdown(options.out / "bandwidth.md", command, heads, cells, notes)
    fast = [e for e in rounds if e.point.mbit_per_second >= _FAST and not e.point.latency]
    constant = statistics.median(_beyond(each, costs) for each in fast)
    _plot(options.out / "bandwidth.png", rows, nodes, rounds, constant)
    show_table("seconds a round: computed, and measured", heads, cells)
    print(notes)
    (options.out / ROUNDS_FILE).unlink(missing_ok=True)  # all is measured: the next run is anew
    print(f"done in {time.perf_counter() - started:.0f} s; results: {options.out}")
    return 0


def _plan(costs: dict[str, CodecCost], nodes: int, parameters: int, quick: bool) -> Plan:
    """Points to measure: those whose transfers take not too long."""
    names = [name for name in costs if name not in _SAME_BYTES]
    if quick:
        names = ["golomb", "dense"]
    speeds, latencies, longest = [0.1, 1.0, 10.0, 100.0], [0.1, 0.3], 40.0
    if quick:
        speeds, latencies, longest = [1.0, 10.0, 100.0], [], 20.0
    points = [
        LinkPoint(name, speed, 0.0)
        for name in names
        for speed in speeds
        if round_seconds(costs[name], speed, 0.0, nodes) <= longest
    ]
    points += [
        LinkPoint(name, _LATENCY_SPEED, latency)
        for name in ("golomb", "dense")
        for latency in latencies
    ]
    return Plan(points, 1 if quick else 2, nodes, parameters)


def _computed_rows(costs: dict[str, CodecCost], nodes: int) -> list[dict[str, Any]]:
    return [
        _row("computed", cost, speed, latency, nodes)
        for cost in costs.values()
        for latency in _LATENCIES
        for speed in _SPEEDS
    ]


def _row(
    kind: str, cost: CodecCost, speed: float, latency: float, nodes: int, **more: Any
) -> dict[str, Any]:
    seconds = round(round_seconds(cost, speed, latency, nodes), 4)
    columns = {
        "kind": kind,
        "codec": cost.codec,
        "mbit_per_second": speed,
        "latency_ms": round(1000 * latency, 3),
        "nodes": nodes,
        "num_parameters": cost.num_parameters,
        "seconds": seconds,
        "computed_seconds": seconds,
        "payload_up": cost.up.payload_bytes,
        "payload_down": cost.down.payload_bytes,
        "message_up": cost.up.message_bytes,
        "message_down": cost.down.message_bytes,
        "socket_up": "",
        "socket_down": "",
        "encode_up_seconds": round(cost.up.encode_seconds, 6),
        "decode_up_seconds": round(cost.up.decode_seconds, 6),
        "encode_down_seconds": round(cost.down.encode_seconds, 6),
        "decode_down_seconds": round(cost.down.decode_seconds, 6),
        "waiting_seconds": "",
        "starting_seconds": "",
        "returning_seconds": "",
    }
    return {**columns, **more}


def _measured_rows(
    rounds: Sequence[MeasuredRound], costs: dict[str, CodecCost]
) -> list[dict[str, Any]]:
    """One row a round; bytes are a node's."""
    return [
        _row(
            "measured",
            costs[each.point.codec],
            each.point.mbit_per_second,
            each.point.latency,
            each.nodes,
            seconds=round(each.seconds, 3),
            **{
                f"{layer}_{way}": round(getattr(each, layer)[index] / each.nodes)
                for layer in ("payload", "message", "socket")
                for index, way in enumerate(("up", "down"))
            },
            waiting_seconds=round(each.waiting, 3),
            starting_seconds=round(each.starting, 3),
            returning_seconds=round(each.returning, 3),
        )
        for each in rounds
    ]


def _table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Codecs by speeds without latency: computed seconds, and the median of the measured ones."""
    speeds = [0.1, 1.0, 10.0, 100.0, 1000.0]
    heads = ["codec", "kB up", "kB down", *(f"{speed:g} Mbit/s" for speed in speeds)]
    cells = []
    for codec in dict.fromkeys(row["codec"] for row in rows):
        mine = [row for row in rows if row["codec"] == codec and row["latency_ms"] == 0]
        line = [codec, *(f"{mine[0][f'message_{way}'] / 1000:.1f}" for way in ("up", "down"))]
        for speed in speeds:
            here = [row for row in mine if row["mbit_per_second"] == speed]
            computed = next(row["seconds"] for row in here if row["kind"] == "computed")
            measured = [row["seconds"] for row in here if row["kind"] == "measured"]
            more = f" ({statistics.median(measured):.1f})" if measured else ""
            line.append(f"{computed:.3g}{more}")
        cells.append(line)
    return heads, cells


def _explained(rounds: Sequence[MeasuredRound], costs: dict[str, CodecCost], nodes: int) -> str:
    """Say, with figures, what a measured round takes beyond a computed one."""
    if not rounds:
        return ""

    near = [each for each in rounds if not each.point.latency]
    fast = [each for each in near if each.point.mbit_per_second >= _FAST]
    median = statistics.median
    extra = [
        median((e.socket[way] - e.message[way]) / e.nodes / 1000 for e in fast) for way in (0, 1)
    ]
    more = [_beyond(each, costs) for each in fast]
    lines = [
        f"Seconds a round for {nodes} nodes, each on a link of its own, and an adapter of "
        f"{costs[rounds[0].point.codec].num_parameters:,} parameters; density {DENSITY_UP} up, "
        f"{DENSITY_DOWN} down. Computed; in parentheses: measured, median. kB: Flower's messages.",
        "",
        f"At {_FAST:g} Mbit/s and more a round takes {median(more):.1f} s beyond what is computed "
        f"(median of {len(fast)} rounds, {min(more):.1f} to {max(more):.1f}): "
        f"{median(e.waiting for e in fast):.1f} s from the push to a client process (SuperNodes "
        "ask for messages every 3 s), "
        f"{median(e.starting for e in fast):.1f} s for that process to start, get the message, "
        f"object by object, and begin, {median(e.returning for e in fast):.1f} s from its end "
        "until the server has the reply (encoding, the process's end, pushing object by object, "
        "the server's looks for it), all medians of the nodes' means; a round waits for the "
        "slowest node. Encoding and "
        f"decoding are {1000 * median(e.codec_seconds for e in fast):.0f} ms of it, with the first "
        "use of the kernels in each process.",
        "",
        f"On a node's socket a round is {extra[0]:.1f} kB up and {extra[1]:.1f} kB down more than "
        "its messages (RPCs with their credentials, TLS, polling; median): at 0.1 Mbit/s that is "
        f"{8 * sum(extra) / 100:.1f} s.",
    ]
    late = [_beyond(each, costs) for each in near if each not in fast]
    if late:
        lines += [
            "",
            f"Below {_FAST:g} Mbit/s it is {median(late):.1f} s beyond what is computed (median of "
            f"{len(late)} rounds, {min(late):.1f} to {max(late):.1f}): whoever waits for an object "
            "that is still on its way, in Flower, looks again after pauses that double.",
        ]
    slow = [each for each in rounds if each.point.latency]
    trips = []
    for each in slow:
        same = [
            other.seconds
            for other in near
            if other.point.codec == each.point.codec
            and other.point.mbit_per_second == each.point.mbit_per_second
        ]
        if same:
            trips.append((each.seconds - median(same)) / (2 * each.point.latency))
    if trips:
        lines += [
            "",
            "Latency counts more than once: a measured round takes as long as "
            f"{median(trips):.0f} round trips more (median of {len(trips)} rounds, "
            f"{min(trips):.0f} to {max(trips):.0f}), where the model has one in all, because "
            "Flower asks, takes, confirms and pushes one RPC after another.",
        ]
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[1]
        lines += ["", f"The machine's load average over the last 5 minutes of it: {load:.1f}."]
    return "\n".join(lines)


def _beyond(measured: MeasuredRound, costs: dict[str, CodecCost]) -> float:
    """Seconds that a measured round takes more than a computed one."""
    point = measured.point
    cost, speed = costs[point.codec], point.mbit_per_second
    return measured.seconds - round_seconds(cost, speed, point.latency, measured.nodes)


def _plot(
    path: Path, rows: Sequence[dict[str, Any]], nodes: int, rounds: Sequence[MeasuredRound],
    constant: float,
) -> None:  # fmt: skip
    """Draw seconds against speed, and against latency, computed and measured.

    Dashed: computed, plus a constant for what Flower takes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    names = [n for n in dict.fromkeys(row["codec"] for row in rows) if n not in _SAME_BYTES]
    colours = dict(zip(names, _COLOURS * 3, strict=False))
    latencies = sorted({each.point.latency for each in rounds if each.point.latency})
    figure = Figure(figsize=(11 if latencies else 7.5, 5), layout="constrained")
    panels = figure.subplots(1, 2 if latencies else 1, squeeze=False, sharey=True)[0]

    def draw(axes: Any, column: str, kept: dict[str, float], codec: str) -> None:
        mine = [
            row
            for row in rows
            if row["codec"] == codec and all(row[key] == value for key, value in kept.items())
        ]
        line = [row for row in mine if row["kind"] == "computed"]
        axes.plot(
            [row[column] for row in line],
            [row["seconds"] for row in line],
            color=colours[codec],
            label=codec,
        )
        axes.plot(
            [row[column] for row in line],
            [row["seconds"] + constant for row in line],
            "--",
            color=colours[codec],
            linewidth=1,
            alpha=0.7,
        )
        points = [row for row in mine if row["kind"] == "measured"]
        axes.plot(
            [row[column] for row in points],
            [row["seconds"] for row in points],
            "o",
            color=colours[codec],
            markersize=6,
            markeredgecolor="white",
        )

    for codec in names:
        draw(panels[0], "mbit_per_second", {"latency_ms": 0}, codec)
    panels[0].set(xlabel="each node's link (Mbit/s)", ylabel="seconds a round", xscale="log")
    panels[0].set(yscale="log", title="no latency")
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if latencies:
        measured = {each.point.codec for each in rounds if each.point.latency}
        for codec in (name for name in names if name in measured):
            draw(panels[1], "latency_ms", {"mbit_per_second": _LATENCY_SPEED}, codec)
        panels[1].set(xlabel="latency, one way (ms)", title=f"{_LATENCY_SPEED:g} Mbit/s")
    for axes in panels:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=6)
    figure.suptitle(
        f"dots: measured, {nodes} nodes over gRPC and TLS, nothing trained; lines: computed from "
        f"bytes,\nencoding and decoding alone; dashed: {constant:.1f} s more, which is what Flower "
        f"takes at {_FAST:g} Mbit/s and above",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


_COLOURS: Final = ["#0072b2", "#e69f00", "#999999", "#cc79a7", "#009e73", "#d55e00", "#56b4e9"]
