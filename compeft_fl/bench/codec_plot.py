"""The picture of ``bench codecs``: bits against speed, and bits against error."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

_OURS: Final = "#c1440e"
_GROUPS: Final = (
    # what a group's names start with, its colour, its marker, its line in the legend
    (("compeft-",), _OURS, "o", "compeft-fl"),
    (("stc", "topk"), "#1f6f8b", "s", "sparse"),
    (("qsgd", "signsgd"), "#7a5195", "^", "gradient quantisers"),
    (("int8", "nf4", "fp4"), "#3d7a3d", "D", "weight quantisers"),
    (("fp32", "fp16", "bf16", "zstd", "blosc"), "#666666", "v", "dense, lossless compressors"),
)


def plot(path: Path, rows: Sequence[Mapping[str, Any]], headline: str) -> None:
    """Draw encode throughput over ``headline``, and the error on real vectors where there are any.

    Parameters
    ----------
    path : Path
        A PNG.
    rows : sequence of dict
        Those of codecs.csv.
    headline : str
        The layout of the left half.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    speed = [
        (row["codec"], row["bits_per_parameter"], row["encode_mb_s"])
        for row in rows
        if row["layout"] == headline
    ]
    real = [row for row in rows if row["kind"] == "real"]
    error = [(codec, *_means(real, codec)) for codec in dict.fromkeys(r["codec"] for r in real)]
    panels = [
        (speed, "MB of float32 encoded a second", f"speed, {headline}"),
        ([point for point in error if point[2] > 0], "error / norm", "one message, real vectors"),
    ]
    panels = [panel for panel in panels if panel[0]]
    figure = Figure(figsize=(7.2 * len(panels), 6.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (points, label, title) in zip(grid, panels, strict=True):
        _draw(axes, points)
        axes.set(xlabel="bits per parameter", ylabel=label, title=title)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=text)
        for _, colour, marker, text in _GROUPS
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.draw_without_rendering()  # places the axes, and the labels between them
    for axes, panel in zip(grid, panels, strict=True):
        _label(axes, panel[0])
    figure.savefig(path, dpi=120)


def _means(rows: Sequence[Mapping[str, Any]], codec: str) -> tuple[float, float]:
    mine = [row for row in rows if row["codec"] == codec]
    bits, errors = ([row[key] for row in mine] for key in ("bits_per_parameter", "relative_error"))
    return statistics.mean(bits), statistics.mean(errors)


def _draw(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Labelled points on two log axes; a label is moved down while it covers another."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(xscale="log", yscale="log")
    for codec, bits, value in points:
        colour, marker = _style(codec)
        axes.plot(bits, value, marker, color=colour, markersize=7)
    axes.margins(x=0.18, y=0.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def _style(codec: str) -> tuple[str, str]:
    for starts, colour, marker, _ in _GROUPS:
        if codec.startswith(starts):
            return colour, marker
    return "black", "x"


# Where a label may stand from its point, in points, with its alignment; the first that is free.
_PLACES: Final = tuple(
    (x, y, "left" if x > 0 else "right")
    for y in (-3, 6, -12, 15, -21, 24, -30, 33, -39, 42, -48, 51)
    for x in (8, -8)
)


def _label(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """A name beside each point, where it covers neither a point nor another name."""
    scale = axes.figure.dpi / 72
    centres = [axes.transData.transform((bits, value)) for _, bits, value in points]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in centres]
    for (codec, bits, value), (x, y) in sorted(
        zip(points, centres, strict=True), key=lambda pair: -pair[1][1]
    ):
        width, height = 5.4 * len(codec) * scale, 9 * scale
        for dx, dy, side in _PLACES:
            left = x + dx * scale - (width if side == "right" else 0)
            low = y + dy * scale
            box = (left, low, left + width, low + height)
            if not any(_meet(box, other) for other in taken):
                break
        taken.append(box)
        note = axes.annotate(
            codec,
            (bits, value),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8.5,
            color=_style(codec)[0],
            arrowprops={"arrowstyle": "-", "alpha": 0.3, "lw": 0.6} if abs(dy) > 8 else None,
        )
        note.set_in_layout(False)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
