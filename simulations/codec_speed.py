"""The speeds by which ``codec="auto"`` chooses: ``python simulations/codec_speed.py``.

Encoding and decoding of one update on one core, at several densities, in turns; nanoseconds for
each parameter and for each nonzero besides, by least squares over medians. What it prints belongs
in compeft_fl/codecs/auto.py (SPEEDS). It takes a minute or two.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

import compeft_fl as cf
from compeft_fl.codecs.auto import SPEEDS

DENSITIES = (0.01, 0.05, 0.1, 0.2)
SHAPES = [(16, 4096), (4096, 16)]  # of LoRA with r = 16


def update_of(num_parameters: int, density: float) -> cf.TernaryVector:
    """Independent normal values over LoRA's shapes."""
    count = max(1, num_parameters // (2 * 16 * 4096))
    layout = cf.Layout(
        cf.TensorSpec(f"{index}.{kind}", shape)
        for index in range(count)
        for kind, shape in zip("AB", SHAPES, strict=True)
    )
    values = np.random.default_rng(0).standard_normal(layout.num_parameters, dtype=np.float32)
    return cf.compress(cf.TaskVector(layout, values), density)


def cpu_seconds(function: Callable[[], object]) -> float:
    """The processor's time of one call, which other processes disturb less than the clock's."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> int:
    """Measure, and print the table and the constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=1 << 23)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    updates = {density: update_of(arguments.parameters, density) for density in DENSITIES}
    blobs = {
        (density, name): cf.encode(update, name, layout_by_id=True)
        for density, update in updates.items()
        for name in SPEEDS
    }
    seconds: dict[tuple[float, str, str], list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        for (density, name), blob in blobs.items():
            update = updates[density]
            times = (
                cpu_seconds(lambda u=update, n=name: cf.encode(u, n, layout_by_id=True)),  # type: ignore[misc]
                cpu_seconds(lambda b=blob, u=update: cf.decode(b, layout=u.layout)),  # type: ignore[misc]
            )
            if repeat:  # the first warms up
                for way, one in zip(("encode", "decode"), times, strict=True):
                    seconds.setdefault((density, name, way), []).append(one)

    machine = f"{platform.processor() or platform.machine()}, one core, {datetime.date.today()}"
    table = Table(title=f"10^6 parameters a second; {machine}")
    for column in ("codec", "", *(f"density {density}" for density in DENSITIES), "bytes at 0.05"):
        table.add_column(column, justify="right" if column.startswith(("d", "b")) else "left")
    lines = []
    d = updates[DENSITIES[0]].num_parameters
    for name in SPEEDS:
        nanoseconds = np.zeros(len(DENSITIES))
        for way in ("encode", "decode"):
            medians = [statistics.median(seconds[density, name, way]) for density in DENSITIES]
            nanoseconds += np.array(medians) / d * 1e9
            cells = [f"{d / 1e6 / median:.1f}" for median in medians]
            table.add_row(name, way, *cells, f"{len(blobs[0.05, name]):,}")
        basis = np.stack([np.ones(len(DENSITIES)), np.array(DENSITIES)], axis=1)
        fit = np.linalg.lstsq(basis, nanoseconds, rcond=None)[0]
        lines.append(f'    "{name}": Speed({max(fit[0], 0):.2f}, {max(fit[1], 0):.1f}),')
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print("SPEEDS: Final = {", *lines, "}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
