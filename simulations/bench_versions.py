"""A server whose nodes all have other versions: ``python simulations/bench_versions.py --out DIR``.

The way down of an adapter of 10^7 parameters after 1,000 versions, at the density that the
strategies take where few nodes train in a round. The adapter nears a target and swings around the
way there, as with few nodes a round; by how much differs from parameter to parameter. Then 1,000
nodes, at versions 0 to 999, are sent what they lack, as a strategy makes it for a round. Printed:
CPU seconds, what the log holds, and the memory. Minutes of a core; ``--parameters`` and
``--versions`` make it smaller. Writes bench_versions.md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import compeft_fl as cf
from compeft_fl.bench import results
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.server.downlink_options import DENSITY_FEW

PARAMETERS, VERSIONS = 10_000_000, 1_000
FAR, NEARER, SWING, STAYS = 0.02, 0.01, 1e-3, 0.8  # of the target, a version, its swing and after
POOL = 1 << 20  # normal deviates, from which each version takes its own in another order
HEADS = ("what", "measured", "goal")


@dataclass(frozen=True)
class Found:
    """What a round of nodes at all versions took."""

    advance: float  # CPU seconds of a version, the mean
    catch_ups: list[float]  # CPU seconds, of those that the log gave
    older: float  # CPU seconds, of the one that all older nodes share
    log: int  # deltas
    log_bytes: int
    held: int  # bytes at rest: adapter, theta_shared, start, log
    peak: int  # bytes over what the process had before
    made_bytes: int  # of what was sent, each encoded once
    sent_bytes: int  # of all nodes together


def measure(parameters: int, versions: int, seed: int = 42) -> Found:
    """Make the versions, then what a node at each of them lacks."""
    rng = np.random.default_rng(seed)
    layout = cf.Layout([cf.TensorSpec("w", (parameters,))])
    pool = rng.standard_normal(POOL, dtype=np.float32)
    size = np.exp(rng.standard_normal(parameters, dtype=np.float32))
    target = rng.standard_normal(parameters, dtype=np.float32) * size * np.float32(FAR)
    swing, values = np.zeros_like(size), np.zeros_like(size)
    before = _resident("VmRSS") - values.nbytes  # the adapter is the server's
    way_down = Downlink(cf.TaskVector(layout, values.copy()), density=DENSITY_FEW, seeded=True)
    advanced = 0.0
    for _ in range(versions):
        for start in range(0, parameters, POOL):
            part = slice(start, start + POOL)
            noise = np.roll(pool, int(rng.integers(POOL)))[: values[part].size]
            values[part] -= swing[part]
            values[part] += np.float32(NEARER) * (target[part] - values[part])
            swing[part] = np.float32(STAYS) * swing[part] + size[part] * noise * np.float32(SWING)
            values[part] += swing[part]
        started = time.process_time()
        way_down.advance(cf.TaskVector(layout, values))
        advanced += time.process_time() - started
    state = way_down.state()
    log = sum(map(len, state["log"].values()))
    held = values.nbytes + state["shared"].nbytes + state["start"].nbytes + log
    del state
    _from_here()
    shipments, catch_ups, older = {}, [], 0.0
    for version in reversed(range(versions)):  # as `Downlink.prepare` goes
        started = time.process_time()
        shipment = way_down.lacking(version)
        seconds = time.process_time() - started
        if id(shipment) in shipments:
            continue
        if version + 1 in way_down.state()["log"]:
            catch_ups.append(seconds)
        else:
            older = seconds
        shipments[id(shipment)] = shipment
    peak = _resident("VmHWM") - before
    made = sum(each.num_bytes for each in shipments.values())
    sent = sum(way_down.lacking(version).num_bytes for version in range(versions))
    return Found(
        advanced / versions, catch_ups, older, len(way_down.state()["log"]), log, held, peak,
        made, sent,
    )  # fmt: skip


def table(found: Found, parameters: int, versions: int) -> list[list[str]]:
    """The rows."""
    floats = 4 * parameters
    rest = max(0, found.held - found.log_bytes)
    return [
        ["a version made", f"{found.advance:.2f} s", "-"],
        ["a catch-up from the log, longest", f"{max(found.catch_ups):.2f} s", "1 s"],
        ["a catch-up from the log, mean", f"{statistics.mean(found.catch_ups):.2f} s", "-"],
        ["all that came after the start, once for all older nodes", f"{found.older:.2f} s", "1 s"],
        [
            f"{versions} nodes at {versions} versions",
            f"{sum(found.catch_ups) + found.older:.1f} s",
            "-",
        ],
        ["versions in the log", str(found.log), "-"],
        ["bytes in the log", f"{found.log_bytes / 1e6:.1f} MB", "-"],
        [
            "adapter, theta_shared, start",
            f"{rest / floats:.1f} d floats, {rest / 1e6:.0f} MB",
            "3 d floats",
        ],
        [
            "memory at the peak, with all that is sent",
            f"{found.peak / floats:.1f} d floats, {found.peak / 1e6:.0f} MB",
            "-",
        ],
        ["what is sent, each encoded once", f"{found.made_bytes / 1e6:.0f} MB", "-"],
        ["bits a parameter and node", f"{8 * found.sent_bytes / versions / parameters:.2f}", "-"],
    ]


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _from_here() -> None:
    """Begin the high-water mark of the resident set anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("simulations/results"))
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--versions", type=int, default=VERSIONS)
    options = parser.parse_args()
    measure(10_000, 20)  # compiles
    found = measure(options.parameters, options.versions)
    rows = table(found, options.parameters, options.versions)
    notes = (
        f"{options.parameters:,} parameters (d), {options.versions:,} versions of density "
        f"{DENSITY_FEW:g}, nodes that make the start from the seed; CPU seconds of one process. "
        "The log holds as many deltas as take no more bytes than the adapter in float32. A node "
        "whose version is older is sent all that came after the start, one vector for all of them."
    )
    command = "python simulations/bench_versions.py"
    for key, usual in (("parameters", PARAMETERS), ("versions", VERSIONS)):
        if getattr(options, key) != usual:
            command += f" --{key} {getattr(options, key)}"
    options.out.mkdir(parents=True, exist_ok=True)
    results.write_markdown(options.out / "bench_versions.md", command, HEADS, rows, notes)
    results.show_table("nodes at as many versions", HEADS, rows)


if __name__ == "__main__":
    main()
