"""One HTML file of one run or of several side by side: tables to sort, plots to hover over.

It needs no server and no network: plotly.js is in it, deflated, and drawn from the figures below
it. Names and settings are a stranger's, so all text is escaped.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import ConfigError, MissingPackageError
from compeft_fl.exchange.ledger import LEDGER_FILE, read_ledger
from compeft_fl.printable import one_line, printable
from compeft_fl.results.html_page import PAGE, SCRIPT, STYLE
from compeft_fl.results.units import size

__all__ = ["REPORT_FILE", "Run", "read_run", "write"]

REPORT_FILE: Final = "report.html"
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_FEW: Final = 12  # rounds that each have a tick
_NEAR: Final = 100  # times as many bytes: ticks between powers of ten have room on a telephone
_HALF: Final = "80"  # behind a colour: half of it, for what goes down
_LAYERS: Final = (  # what each adds to the one before
    ("payload (Updates)", "payload_bytes", None),
    ("records and metadata", "message_bytes", "payload_bytes"),
    ("RPCs, TLS, polling", "socket_bytes", "message_bytes"),
)


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes
    ----------
    name : str
        The folder's.
    summary : dict
        The content of ``summary.json``.
    by_node : dict of str to tuple of int
        Payload bytes up and down of each node.
    """

    name: str
    summary: Mapping[str, Any]
    by_node: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def total(self, kind: str) -> int:
        """Payload or dense bytes, both ways, all rounds."""
        return sum(sum(self.summary[f"{way}_{kind}_bytes"]) for way in ("uplink", "downlink"))


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises
    ------
    ConfigError
        No ``summary.json`` in it, or one of something else.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        run = Run(folder.resolve().name, summary, _by_node(folder / LEDGER_FILE))
        _runs_table([run])
        _figures([run])
    except FileNotFoundError:
        raise ConfigError(f"{folder}: expected a finished run, found no summary.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{folder}: expected a run's results: {one_line(error, 200)}") from None
    return run


def _by_node(file: Path) -> dict[str, tuple[int, int]]:
    found: dict[str, list[int]] = {}
    if file.is_file():
        for _, transfer in read_ledger(file):
            sums = found.setdefault(str(transfer.node), [0, 0])
            sums[transfer.direction == "down"] += transfer.payload_bytes
    return {node: (up, down) for node, (up, down) in found.items()}


def write(path: Path, runs: Sequence[Run]) -> None:
    """Write the report of one run or several.

    Raises
    ------
    MissingPackageError
        plotly is not installed.
    """
    sections = [("Runs", _table(*_runs_table(runs)))]
    sections += [(title, _plot(index)) for index, (title, _) in enumerate(_figures(runs))]
    if settings := _differing(runs):
        sections.append(("Settings that differ", _table(["key", *_names(runs)], settings)))
    sections += [(f"Rounds of {name}", _table(*_rounds_table(run)))
                 for name, run in zip(_names(runs), runs, strict=True)]  # fmt: skip
    title = f"compeft-fl: {_names(runs)[0]}" if len(runs) == 1 else f"compeft-fl: {len(runs)} runs"
    body = "\n".join(
        f"<section><h2>{_text(head)}</h2>{inside}</section>" for head, inside in sections
    )
    content = PAGE.format(
        title=_text(title),
        style=STYLE,
        body=body,
        figures=_json([figure for _, figure in _figures(runs)]),
        library=_library(),
        script=SCRIPT,
    )
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@cache
def _library() -> str:
    """plotly.js, deflated, as text."""
    try:
        script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise MissingPackageError(
            "the HTML report needs plotly, which is not installed: pip install 'compeft-fl[app]'"
        ) from None
    return base64.b64encode(gzip.compress(script, 6, mtime=0)).decode("ascii")


def _names(runs: Sequence[Run]) -> list[str]:
    """Each run's name; a number behind those that another one has too."""
    names = [run.name for run in runs]
    return [
        f"{name} ({index + 1})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


# --- tables -----------------------------------------------------------------------------------

Cell = str | float | None


def _runs_table(runs: Sequence[Run]) -> tuple[list[str], list[list[Cell]]]:
    heads = ["run", "nodes", "rounds", "parameters", "accuracy, last", "accuracy, best", "loss"]
    heads += ["bytes up", "bytes down", "of dense", "seconds"]
    rows: list[list[Cell]] = []
    for name, run in zip(_names(runs), runs, strict=True):
        told = run.summary
        scores = [100 * value for value in told["accuracy"] if value is not None]
        losses = [value for value in told["loss"] if value is not None]
        sent, dense = run.total("payload"), run.total("dense")
        rows.append(
            [
                name,
                told["nodes"],
                told["rounds"],
                told["num_parameters"],
                _rounded(scores[-1] if scores else None, 2),
                _rounded(max(scores, default=None), 2),
                _rounded(losses[-1] if losses else None, 4),
                sum(told["uplink_payload_bytes"]),
                sum(told["downlink_payload_bytes"]),
                _rounded(sent / dense if dense else None, 4),
                _rounded(told["wall_seconds"], 1),
            ]
        )
    return heads, rows


def _rounds_table(run: Run) -> tuple[list[str], list[list[Cell]]]:
    told = run.summary
    heads = ["round", "accuracy", "loss", "bytes up", "bytes down", "replies", "set aside"]
    rows: list[list[Cell]] = []
    for index, accuracy in enumerate(told["accuracy"]):
        score = _rounded(None if accuracy is None else 100 * accuracy, 2)
        row: list[Cell] = [index, score, _rounded(told["loss"][index], 4)]
        for key in ("uplink_payload_bytes", "downlink_payload_bytes", "replies", "set_aside"):
            row.append(told[key][index - 1] if index else None)
        rows.append(row)
    return heads, rows


def _differing(runs: Sequence[Run]) -> list[list[Cell]]:
    """The settings that are not the same in all runs, but for where they lie."""
    configs = [run.summary.get("config", {}) for run in runs]
    rows: list[list[Cell]] = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) for config in configs]
        if key not in ("run-dir", "out") and any(value != values[0] for value in values):
            rows.append([key, *("-" if value is None else str(value) for value in values)])
    return rows


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table whose heads sort it; numbers carry their value, so that 9 comes before 10."""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{_text(h)}</button></th>'
        for h in heads
    )
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="wide"><table>{inside}</table></div>'


def _cell(value: Cell) -> str:
    if value is None:
        return '<td class="number">-</td>'
    if isinstance(value, str):
        return f"<td>{_text(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return f'<td class="number" data-value="{value!r}">{shown}</td>'


def _text(value: object) -> str:
    return html.escape(printable(value, 300))


# --- plots ------------------------------------------------------------------------------------


def _figures(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    """Plotly's data and layout of each plot, with its title."""
    names = _names(runs)
    found = [
        ("Accuracy by bytes", _by_bytes(names, runs)),
        ("Accuracy by round", _by_round(names, runs)),
        ("Bytes by layer", _by_layer(names, runs)),
    ]
    if any(run.by_node for run in runs):
        found.append(("Bytes by node", _per_node(names, runs)))
    return found


def _line(
    name: str, index: int, x: Sequence[Any], y: Sequence[Any], text: list[str]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "connectgaps": True,
        "name": printable(name, 60),
        "x": list(x),
        "y": list(y),
        "text": text,
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": _COLOURS[index % len(_COLOURS)]},
    }


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 12}}


def _percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(100 * value, 3) for value in values]


def _hovers(name: str, accuracy: Sequence[float | None], sent: Sequence[int]) -> list[str]:
    return [
        f"{_text(name)}<br>round {index}: {'-' if score is None else f'{score:.2f} %'}"
        f"<br>{size(num_bytes)}"
        for index, (score, num_bytes) in enumerate(zip(accuracy, sent, strict=True))
    ]


def _sent(run: Run) -> list[int]:
    """Bytes until the end of each round, both ways; round 0 has none."""
    ways = (run.summary["uplink_payload_bytes"], run.summary["downlink_payload_bytes"])
    return [0, *accumulate(up + down for up, down in zip(*ways, strict=True))]


def _by_bytes(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    data = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        accuracy, sent = _percent(run.summary["accuracy"]), _sent(run)
        hovers = _hovers(name, accuracy, sent)
        data.append(_line(name, index, sent[1:], accuracy[1:], hovers[1:]))
    known = [value for line in data for value in line["x"] if value > 0]
    near = not known or max(known) < _NEAR * min(known)
    axis = {
        **_axis("bytes up and down so far, all nodes"),
        "type": "log",
        "dtick": "D2" if near else 1,  # 1, 2 and 5 of each power of ten; else these alone
        "exponentformat": "SI",
    }
    return {"data": data, "layout": {"xaxis": axis, "yaxis": _axis("accuracy (%)")}}


def _by_round(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    data = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        accuracy = _percent(run.summary["accuracy"])
        hovers = _hovers(name, accuracy, _sent(run))
        data.append(_line(name, index, range(len(accuracy)), accuracy, hovers))
    rounds = max(len(run.summary["accuracy"]) for run in runs)
    ticks = {"dtick": 1} if rounds <= _FEW else {}
    layout = {"xaxis": {**_axis("round"), **ticks}, "yaxis": _axis("accuracy (%)")}
    return {"data": data, "layout": layout}


def _by_layer(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """Stacked: what each layer adds, up and down."""
    bars = [f"{printable(name, 40)}, {way}" for name in names for way in ("up", "down")]
    data = []
    for index, (label, outer, inner) in enumerate(_LAYERS):
        values = [
            _added(run.summary, f"{way}link", outer, inner)
            for run in runs
            for way in ("up", "down")
        ]
        if any(values):
            hovers = [f"{html.escape(bar)}<br>{label}: {size(value)}"
                      for bar, value in zip(bars, values, strict=True)]  # fmt: skip
            data.append(_bar(label, index, bars, values, hovers))
    layout = {"barmode": "stack", "yaxis": _axis("bytes")}
    return {"data": data, "layout": layout}


def _added(summary: Mapping[str, Any], way: str, outer: str, inner: str | None) -> int:
    ledger = summary.get("ledger") or {}
    if inner is None and not ledger:
        return int(sum(summary[f"{way}_{outer}"]))
    sums = [sum(value or 0 for value in ledger.get(f"{way}_{name}", [])) for name in (outer, inner)]
    return max(0, int(sums[0] - (sums[1] if inner else 0)))


def _per_node(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    data = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        nodes = [f"node {at}" for at in range(1, len(run.by_node) + 1)]
        for at, way in enumerate(("up", "down")):
            values = [each[at] for each in run.by_node.values()]
            hovers = [
                f"{_text(name)}<br>{_text(node)}, {way}: {size(value)}"
                for node, value in zip(run.by_node, values, strict=True)
            ]
            label = f"{name}, {way}" if len(runs) > 1 else way
            bar = _bar(label, index, nodes, values, hovers)
            bar["marker"]["color"] += _HALF if at else ""
            data.append(bar)
    layout = {"barmode": "group", "yaxis": _axis("payload bytes")}
    return {"data": data, "layout": layout}


def _bar(
    name: str, index: int, x: Sequence[str], y: Sequence[int], text: list[str]
) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": printable(name, 60),
        "x": list(x),
        "y": list(y),
        "hovertext": text,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": _COLOURS[index % len(_COLOURS)]},
    }


def _plot(index: int) -> str:
    return f'<div class="plot" data-figure="{index}"></div>'


def _json(value: Any) -> str:
    """JSON that can stand in a script: no tag ends it."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
