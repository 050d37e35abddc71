"""What best support and residual decay change: ``python simulations/bench_support.py --out DIR``.

Toys first, two or three minutes: one round of which most coordinates are rounding noise, a long run
to a heavy-tailed target, momentum on the server, and clipping for differential privacy. With
``--federation`` also the app's default federation, five minutes a run on a core of its own: runs
that have finished are stored in DIR/support and not run again. Writes support.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import compeft_fl as cf
from compeft_fl.bench.federation import Setting
from compeft_fl.bench.sweep import Job, run_jobs
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.uplink import ErrorFeedback

Floats = NDArray[np.float32]
UP, DOWN, NODES, ROUNDS = 0.1, 0.2, 5, 160
SEEDS = (42, 43, 44)


@dataclass(frozen=True)
class Way:
    """How updates are compressed, both ways; None: not at all."""

    name: str
    support: str | None = "best"
    decay: float = 0.9


WAYS = (
    Way("dense", None),
    Way("fixed top-k, decay 1 (before)", "fixed", 1.0),
    Way("fixed top-k, decay 0.9", "fixed", 0.9),
    Way("best support, decay 1", "best", 1.0),
    Way("best support, decay 0.95", "best", 0.95),
    Way("best support, decay 0.9 (default)", "best", 0.9),
    Way("best support, decay 0.8", "best", 0.8),
    Way("best support, no feedback", "best", 0.0),
)


class Toy:
    """A federation of nodes that each step towards one target, with noise of their own.

    Over the library's own uplink and downlink; what the server makes of the mean is given.
    """

    def __init__(self, way: Way, target: Floats, rate: float, momentum: float = 0.0) -> None:
        self.target, self.rate, self.momentum = target, rate, momentum
        self.layout = cf.Layout([cf.TensorSpec("w", target.shape)])
        self.theta: Floats = np.zeros_like(target)
        self.velocity: Floats = np.zeros_like(target)
        self.nodes: list[ErrorFeedback] = []
        self.downlink: Downlink | None = None
        if way.support is not None:
            self.nodes = [
                ErrorFeedback(UP, support=way.support, decay=way.decay) for _ in range(NODES)
            ]
            start = cf.TaskVector(self.layout, self.theta)
            self.downlink = Downlink(start, density=DOWN, support=way.support)

    @property
    def shared(self) -> Floats:
        """The nodes' copy."""
        return self.theta if self.downlink is None else self.downlink.shared

    def distances(self, rounds: int) -> Iterator[float]:
        """The server's distance to the target after each round."""
        for number in range(rounds):
            mean = np.zeros(self.target.size)
            for node in range(NODES):
                rng = np.random.default_rng([node, number])
                noise = 0.02 * rng.standard_normal(self.target.size)
                tau = (self.rate * (self.target - self.shared) + noise).astype(np.float32)
                if self.nodes:
                    sent = self.nodes[node].compress(cf.TaskVector(self.layout, tau))
                    tau = np.asarray(sent.to_task_vector().values)
                mean += tau / NODES
            self.velocity = (self.momentum * self.velocity + mean).astype(np.float32)
            self.theta = self.theta + self.velocity
            if self.downlink is not None:
                self.downlink.advance(cf.TaskVector(self.layout, self.theta))
            yield float(np.linalg.norm(self.theta - self.target))


def heavy_tailed(size: int = 8192) -> Floats:
    """Normal values, each times an exponential one."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal(size) * rng.exponential(1, size)).astype(np.float32)


def normal(size: int = 1088) -> Floats:
    """Normal values."""
    return np.random.default_rng(1).standard_normal(size).astype(np.float32)


def long_run(rate: float) -> list[list[str]]:
    """A row for each way: the distance after some rounds."""
    rows = []
    for way in WAYS:
        found = list(Toy(way, heavy_tailed(), rate).distances(ROUNDS))
        rows.append([way.name, *(f"{found[at - 1]:.1f}" for at in (10, 20, 40, 80, 120, 160))])
    return rows


def momentum(beta: float) -> list[list[str]]:
    """The same with momentum on the server, a rate that keeps it stable: relative distances."""
    rows = []
    for way in WAYS:
        target = normal()
        found = list(Toy(way, target, 0.3 * (1 - beta), beta).distances(ROUNDS))
        rows.append(
            [
                way.name,
                *(f"{found[at - 1] / np.linalg.norm(target):.3f}" for at in (20, 40, 80, 160)),
            ]
        )
    return rows


def rounding_noise() -> list[list[str]]:
    """One delta down of an adapter of which a tenth has moved, the rest by rounding alone."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal(1088).astype(np.float32)
    moved = np.arange(1088) < 109
    change = np.where(moved, rng.standard_normal(1088), 3e-8 * rng.standard_normal(1088))
    after = (before.astype(np.float64) + change).astype(np.float32)
    layout = cf.Layout([cf.TensorSpec("w", before.shape)])
    rows = []
    for support in ("fixed", "best"):
        downlink = Downlink(cf.TaskVector(layout, before), density=DOWN, support=support)
        downlink.advance(cf.TaskVector(layout, after))
        sent, real = downlink.shared - before, after - before
        wrong = np.abs(sent[~moved])
        cosine = sent @ real / np.linalg.norm(sent) / np.linalg.norm(real)
        rows.append(
            [support, str(int((wrong > 1e-5).sum())), f"{wrong.max():.3f}", f"{cosine:.3f}"]
        )
    return rows


def clipping() -> list[list[str]]:
    """The greatest norm that arrives at a bound of 1.0, each update clipped to it by training."""
    layout = cf.Layout([cf.TensorSpec("w", (1088,))])
    rows = []
    for name, bound in (
        ("clipped before the residual is added", math.inf),
        ("and after", 1.0),
    ):
        feedback = ErrorFeedback(UP, decay=1.0)
        norms = []
        for _ in range(40):
            tau = normal() / np.linalg.norm(normal())
            sent = feedback.compress(cf.TaskVector(layout, tau.astype(np.float32)), bound)
            norms.append(float(sent.scales[0]) * math.sqrt(sent.num_nonzeros))
        rows.append([name, f"{max(norms):.3f}"])
    return rows


FEDERATION = (
    Setting("dense", "dense", "dense"),
    Setting("fixed, decay 1", "golomb", "golomb", UP, DOWN, support="fixed", decay=1.0),
    Setting("best, decay 1", "golomb", "golomb", UP, DOWN, support="best", decay=1.0),
    Setting("best, decay 0.95", "golomb", "golomb", UP, DOWN, support="best", decay=0.95),
    Setting("best, decay 0.9", "golomb", "golomb", UP, DOWN, support="best", decay=0.9),
)


def federation(folder: Path, seeds: list[int], workers: int, run: bool) -> list[list[str]]:
    """A row for each finished run of the default federation."""
    jobs = [Job(setting, seed, 10) for seed in seeds for setting in reversed(FEDERATION)]
    folder.mkdir(parents=True, exist_ok=True)
    if run:
        for running in run_jobs(jobs, folder, workers):
            print(*(f"{key}: {lines[-1:]}" for key, lines in running.items()), end="\r")
    rows = []
    for job in sorted(jobs, key=lambda job: (FEDERATION.index(job.setting), job.seed)):
        found = job.finished(folder)
        if found is None:
            continue
        rounds = found["rounds"]
        scores = [(100 * rounds[at]["accuracy"], rounds[at]["loss"]) for at in (6, -1)]
        rows.append(
            [
                job.setting.name,
                str(job.seed),
                *(f"{accuracy:.1f} %, {loss:.3f}" for accuracy, loss in scores),
                *(f"{sum(each[way] for each in rounds) / 1e3:.0f} kB" for way in ("up", "down")),
            ]
        )
    return rows


Block = tuple[str, list[str], Callable[[], list[list[str]]]]


def main() -> int:
    """Run, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for support.md")
    parser.add_argument("--federation", action="store_true", help="run what is missing of it too")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    after = ["after round 10", "20", "40", "80", "120", "160"]
    blocks: list[Block] = [
        (
            "One delta down, of which a tenth is change and the rest rounding",
            ["support", "coordinates moved that did not change", "by at most", "cosine"],
            rounding_noise,
        ),
        (
            "Distance to a heavy-tailed target, 8,192 parameters, 5 nodes, steps of 0.3",
            ["", *after],
            lambda: long_run(0.3),
        ),
        ("The same with steps of 0.1", ["", *after], lambda: long_run(0.1)),
        (
            "Relative distance to a normal target with momentum 0.9 on the server",
            ["", "after round 20", "40", "80", "160"],
            lambda: momentum(0.9),
        ),
        ("Norms that arrive where training clips to 1.0", ["", "greatest norm"], clipping),
        (
            "The default federation: accuracy and loss, bytes of all nodes",
            ["", "seed", "round 6", "round 10", "up", "down"],
            lambda: federation(
                options.out / "support", options.seeds, options.workers, options.federation
            ),
        ),
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"compeft-fl {cf.__version__}, {platform.machine()}, {cores} cores, "
        f"{datetime.date.today()}: `python simulations/bench_support.py`\n",
        f"Density {UP:g} up and {DOWN:g} down, scale mean, residuals on nodes and server.",
    ]
    console = Console(width=140)
    for title, heads, rows_of in blocks:
        rows = rows_of()
        if not rows:
            continue
        table = Table(*heads, title=title)
        lines += [f"\n## {title}\n", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row in rows:
            table.add_row(*row)
            lines.append("| " + " | ".join(row) + " |")
        console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "support.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
