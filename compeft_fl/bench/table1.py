"""The sizes of ComPEFT's Table 1, as bytes that are sent, beside what the paper reports.

The paper gives sizes from the entropy formula of its section 3.3, in GB of 2^30 bytes with two
decimals, and not the density that was chosen for each row. Every size in its table is that of one
or two of the densities that it searched, so each line here names the rows that its size fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from compeft_fl import codecs
from compeft_fl.bench import results
from compeft_fl.compeft import compress
from compeft_fl.task_vector import TaskVector
from compeft_fl.wire.messages import encode

__all__ = ["DENSITIES", "PAPER", "entropy", "rows_of", "write"]

DENSITIES: Final = (0.05, 0.1, 0.2, 0.3, 0.5)
GIB: Final = float(1 << 30)
_SLOW_CODECS_UP_TO: Final = 200_000_000

_DATASETS: Final = (
    "Self-Instruct",
    "Longform",
    "Chip2",
    "HH-RLHF",
    "Unnatural",
    "Guanaco",
    "Alpaca",
    "FLAN v2",
)
PAPER: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    # original and compressed sizes in the order of the datasets, as printed
    "llama-7b": ("0.3", ("0.03", "0.02", "0.02", "0.01", "0.02", "0.01", "0.02", "0.02")),
    "llama-13b": ("0.47", ("0.01", "0.02", "0.03", "0.02", "0.03", "0.03", "0.03", "0.03")),
    "llama-33b": ("0.91", ("0.02", "0.07", "0.03", "0.07", "0.09", "0.05", "0.05", "0.07")),
    "llama-65b": ("1.49", ("0.03", "0.05", "0.05", "0.05", "0.03", "0.09", "0.05", "0.11")),
}


def entropy(density: float) -> float:
    """Bits per parameter of section 3.3, without the 16 of the scale."""
    return -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)


def datasets_of(model: str, density: float, num_parameters: int) -> list[str]:
    """The datasets whose row prints the size that this density has by the paper's formula."""
    printed = f"{entropy(density) * num_parameters / 8 / GIB:.2f}"
    rows = zip(_DATASETS, PAPER[model][1], strict=True)
    return [dataset for dataset, size in rows if size == printed]


def rows_of(tau: TaskVector, model: str) -> list[dict[str, Any]]:
    """A row of table1.csv for each density that the paper searched.

    Parameters
    ----------
    tau : TaskVector
        Over the layout of the model's adapter.
    model : str
        A key of `PAPER`.
    """
    rows = []
    d = tau.num_parameters
    for density in DENSITIES:
        update = compress(tau, density)
        floor = (entropy(density) * d + 16) / 8
        row: dict[str, Any] = {
            "model": model,
            "density": density,
            "num_parameters": d,
            "paper_fp16_gb": PAPER[model][0],
            "fp16_gb": round(2 * d / GIB, 4),
            "paper_rows": "; ".join(datasets_of(model, density, d)),
            "paper_entropy_bytes": round(floor),
            "paper_entropy_gb": f"{floor / GIB:.2f}",
        }
        for codec in ("golomb", "context"):
            known = codec in codecs.names() and (codec == "golomb" or d <= _SLOW_CODECS_UP_TO)
            size = len(encode(update, codec, layout_by_id=True)) if known else None
            row[f"{codec}_bytes"] = size or ""
            row[f"{codec}_of_entropy"] = round(size / floor, 4) if size else ""
        row["ratio_fp16"] = round(2 * d / row["golomb_bytes"], 2)
        rows.append(row)
    return rows


def write(out: Path, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write table1.csv and table1.md, and show the table."""
    results.write_csv(out / "table1.csv", rows)
    heads = ["model", "density", "fp16 GB (paper)", "rows of the paper", "paper GB"]
    heads += ["entropy MB", "golomb MB", "of entropy", "context of entropy", "of fp16"]
    table = [
        [
            row["model"],
            f"{row['density']:g}",
            f"{row['fp16_gb']:.2f} ({row['paper_fp16_gb']})",
            row["paper_rows"] or "-",
            row["paper_entropy_gb"],
            f"{row['paper_entropy_bytes'] / 1e6:.2f}",
            f"{row['golomb_bytes'] / 1e6:.2f}",
            f"{row['golomb_of_entropy']:.3f}",
            f"{row['context_of_entropy']:.3f}" if row["context_of_entropy"] else "-",
            f"{row['ratio_fp16']:.1f}x",
        ]
        for row in rows
    ]
    notes = (
        "GB are 2^30 bytes, which is what the paper's sizes are; MB are 10^6. The paper does not "
        "say which density a row has: each stands at every density whose entropy prints its size. "
        "Bytes are whole messages over synthetic values (compeft_fl/bench/layouts.py); on "
        "independent values Golomb codes take 1.01 to 1.02 of the entropy (bench_core.md)."
    )
    results.write_markdown(out / "table1.md", command, heads, table, notes)
    results.show_table("ComPEFT's Table 1 in bytes", heads, table)
