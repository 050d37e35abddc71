"""What a run's bytes are made of: Updates, Flower's messages around them, and what is around those.

From the sums of the ledger in ``summary.json``; in a counted deployment with the bytes on the
socket, see `compeft_fl.app.counted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.app.report import size

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BYTES_PLOT_FILE", "plot", "table"]

BYTES_PLOT_FILE: Final = "bytes.png"

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
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    ledger = summary["ledger"]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
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
        axes.set(xlabel="round", title=title, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("bytes a round, all nodes")
    if shown:
        figure.legend(
            shown.values(),
            shown.keys(),
            frameon=False,
            loc="outside lower center",
            ncols=4,
            fontsize="small",
        )
    figure.suptitle(
        f"{summary['scenario']}: {summary['nodes']} nodes, {summary['rounds']} rounds, "
        f"{summary['num_parameters']:,} parameters",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def table(summary: Mapping[str, Any]) -> Table:
    """Return for a person where the bytes of a whole run went, and what a message costs beside it.

    The overheads are sums over the run, and in parentheses divided by the number of messages.
    """
    from rich.table import Table

    ledger = summary["ledger"]
    sockets = "uplink_socket_bytes" in ledger
    found = Table(title="bytes, layer by layer", title_justify="left", caption_justify="left")
    heads = ["way", "messages", "payload", "messages' bytes", "overhead (each)"]
    heads += ["on the socket", "overhead (each)"] if sockets else []
    heads += ["encode", "decode"]
    for head in heads:
        found.add_column(head, justify="left" if head == "way" else "right")
    for way, title in _WAYS:
        total = {
            name: sum(ledger.get(f"{way}_{name}", []))
            for name in ("messages", "payload_bytes", "message_bytes", "socket_bytes")
        }
        cells = [title, str(total["messages"]), size(total["payload_bytes"])]
        cells += [size(total["message_bytes"])]
        cells += [_over(total, "payload_bytes", "message_bytes")]
        if sockets:
            cells += [size(total["socket_bytes"]), _over(total, "message_bytes", "socket_bytes")]
        decoding = "decode_seconds" if way == "uplink" else "node_decode_seconds"
        source = "uplink"  # nodes tell with their replies how long decoding took
        cells += [
            f"{sum(ledger[f'{way}_encode_seconds']):.3g} s",
            f"{sum(ledger[f'{source}_{decoding}']):.3g} s",
        ]
        found.add_row(*cells)
    if sockets:
        found.caption = (
            "on the socket: all rounds, with TLS, HTTP/2 and idle polling; before the first round "
            f"{size(ledger['socket_bytes_before'])} more"
        )
    return found


def _over(total: Mapping[str, int], inner: str, outer: str) -> str:
    """Return what a layer adds, in all and for each message."""
    more = total[outer] - total[inner]
    each = more / total["messages"] if total["messages"] else 0
    return f"{size(more)} ({size(each)})"
