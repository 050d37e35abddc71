"""What a run's bytes are made of: Updates, Flower's messages around them, and what is around those.

From the sums of the ledger in ``summary.json``; in a counted deployment with the bytes on the
socket, see `compeft_fl.deploy.counted`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.results.units import size

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BYTES_PLOT_FILE", "FAST", "MARGINS", "plot", "table", "with_powers"]

BYTES_PLOT_FILE: Final = "bytes.png"

MARGINS: Final = {"left": 0.1, "right": 0.985, "top": 0.88, "bottom": 0.19, "wspace": 0.06}
"""Of a run's plots, which are alike: finding them takes longer than to draw all else."""

FAST: Final = {"compress_level": 1}
"""Of a run's plots as PNG: less time, for a few kilobytes more."""

_WAYS: Final = (("uplink", "up"), ("downlink", "down"))
_SERIES: Final = (  # colours told apart by everyone
    ("raw_bytes", "dense float32", "#999999", "--"),
    ("socket_bytes", "on the socket", "#d55e00", "^-"),
    ("message_bytes", "Flower's messages", "#e69f00", "s-"),
    ("payload_bytes", "payload (Updates)", "#0072b2", "o-"),
)


def plot(path: Path, summary: Mapping[str, Any]) -> None:
    """Draw the bytes of each round, both ways, from the payload to the socket."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ledger = summary["ledger"]
    figure = Figure(figsize=(10, 4.4))
    shown: dict[str, Any] = {}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (way, title) in zip(panels, _WAYS, strict=True):
        for name, label, colour, style in _SERIES:
            values = ledger.get(f"{way}_{name}", [])
            rounds = range(1, len(values) + 1)
            drawn = [value or None for value in values]  # a logarithm knows no 0
            if any(drawn):
                (shown[label],) = axes.plot(
                    rounds, drawn, style, color=colour, label=label, markersize=4
                )
        axes.set(xlabel="round", yscale="log")
        axes.set_title(title, y=1.0)  # else it is looked for where nothing else is
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(with_powers(*panels[0].get_ylim()))
    panels[0].set_ylabel("bytes a round, all nodes")
    if shown:
        figure.legend(
            shown.values(),
            shown.keys(),
            frameon=False,
            loc="lower center",
            ncols=4,
            fontsize="small",
        )
    figure.subplots_adjust(**MARGINS)
    figure.suptitle(
        f"{summary['scenario']}: {summary['nodes']} nodes, {summary['rounds']} rounds, "
        f"{summary['num_parameters']:,} parameters",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120, pil_kwargs=FAST)


def with_powers(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic axis with two powers of ten or more on it: those have numbers.

    Examples
    --------
    >>> with_powers(0.5, 20.0)
    (0.5, 20.0)
    >>> with_powers(2.0, 5.0)
    (0.8, 12.5)
    """
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last > first:
        return low, high
    return 10 ** math.floor(math.log10(low)) / 1.25, 10 ** math.ceil(math.log10(high)) * 1.25


def table(summary: Mapping[str, Any]) -> Table:
    """Return for a person, layer by layer, what the bytes of a whole run are made of.

    What a layer adds is the sum over the run, and in parentheses divided by the messages.
    """
    from rich.table import Table

    ledger = summary["ledger"]
    sums = [
        {name.removeprefix(f"{way}_"): sum(values) for name, values in ledger.items()
         if name.startswith(f"{way}_") and isinstance(values, list)}
        for way, _ in _WAYS
    ]  # fmt: skip
    found = Table(title="bytes, layer by layer", title_justify="left", caption_justify="left")
    found.add_column("")
    for _, title in _WAYS:
        found.add_column(title, justify="right")
    found.add_row("messages", *(str(each["messages"]) for each in sums))
    found.add_row("payload", *(size(each["payload_bytes"]) for each in sums))
    layers = [("records and metadata", "payload_bytes", "message_bytes", "messages")]
    if "uplink_socket_bytes" in ledger:
        layers.append(("RPCs, TLS, polling", "message_bytes", "socket_bytes", "on the sockets"))
        outside = sum(ledger[f"{way}_socket_bytes_outside"] for way, _ in _WAYS)
        found.caption = f"outside of rounds, connecting and polling: {size(outside)} on the sockets"
    for adds, inner, outer, name in layers:
        found.add_row(f"+ {adds}", *(_more(each, inner, outer) for each in sums))
        found.add_row(f"= {name}", *(size(each[outer]) for each in sums))
    found.add_section()
    up = sums[0]
    found.add_row("encoding", *(_seconds(each["encode_seconds"]) for each in sums))
    # Nodes tell with their replies how long they took to decode what they got.
    decoding = (up["decode_seconds"], up["node_decode_seconds"])
    found.add_row("decoding", *map(_seconds, decoding))
    return found


def _more(sums: Mapping[str, float], inner: str, outer: str) -> str:
    """Return what a layer adds, in all and for each message."""
    more = sums[outer] - sums[inner]
    each = more / sums["messages"] if sums["messages"] else 0
    return f"{size(more)} ({size(each)} each)"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s"
