"""The codecs' torch path on a CUDA device: the same bytes, and its speed against a device copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compeft_fl.bench import layouts, results
from compeft_fl.compeft import compress
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.wire.messages import decode, encode

__all__ = ["rows_of", "run"]

_REPEATS = 5


def run(out: Path, command: str, layout: Layout) -> None:
    """Write codecs_cuda.csv and codecs_cuda.md where there is a CUDA device; else say so."""
    import torch

    if not torch.cuda.is_available():
        results.say("no CUDA device: the torch path is not timed")
        return
    rows = rows_of(layouts.synthetic(layout), torch.device("cuda"))
    results.write_csv(out / "codecs_cuda.csv", rows)
    heads = ["density", "bytes", "as on the CPU", "encode GB/s", "decode GB/s", "copy GB/s"]
    table = [
        [
            f"{row['density']:g}",
            f"{row['bytes']:,}",
            "identical" if row["identical"] else "DIFFERENT",
            *(f"{row[key]:.1f}" for key in ("encode_gb_s", "decode_gb_s", "copy_gb_s")),
        ]
        for row in rows
    ]
    device = torch.cuda.get_device_name()
    notes = f"{device}, {layout.num_parameters:,} parameters; GB of float32 a second."
    results.write_markdown(out / "codecs_cuda.md", command, heads, table, notes)
    results.show_table(f"Golomb codes on {device}", heads, table)


def rows_of(tau: TaskVector, device: Any) -> list[dict[str, Any]]:
    """Compress and encode on the device, decode to it, and copy the vector there."""
    import torch

    values = torch.from_numpy(np.asarray(tau.values)).to(device)
    there = TaskVector(tau.layout, values)
    gigabytes = 4 * tau.num_parameters / 1e9
    copy = gigabytes / _seconds(values.clone, device)
    rows = []
    for density in (0.05, 0.2):
        blob = encode(compress(there, density), layout_by_id=True)

        def write(density: float = density) -> object:
            return encode(compress(there, density), layout_by_id=True)

        def read(blob: bytes = blob) -> object:
            return decode(blob, layout=tau.layout, device=device).to_task_vector()

        rows.append(
            {
                "codec": "compeft-golomb",
                "density": density,
                "num_parameters": tau.num_parameters,
                "bytes": len(blob),
                "identical": blob == encode(compress(tau, density), layout_by_id=True),
                "encode_gb_s": round(gigabytes / _seconds(write, device), 3),
                "decode_gb_s": round(gigabytes / _seconds(read, device), 3),
                "copy_gb_s": round(copy, 3),
            }
        )
    return rows


def _seconds(function: Callable[[], object], device: Any) -> float:
    """The fastest of some runs after one to warm up, the device's queue emptied around each."""
    import torch

    def finish() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    function()
    best = float("inf")
    for _ in range(_REPEATS):
        finish()
        start = time.perf_counter()
        function()
        finish()
        best = min(best, time.perf_counter() - start)
    return best
