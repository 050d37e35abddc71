"""``compeft-fl bench learning``: accuracy against bytes, every codec and strategy alike.

Each setting runs on the app's default federation (`compeft_fl.bench.federation`) with several
seeds. Bytes are those of the updates, both ways. A finished run is stored under OUT/learning and
not run again, so the sweep can be stopped at any time and goes on with the same command.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

from compeft_fl.app.config import parse_assignment
from compeft_fl.bench import learning_report as report
from compeft_fl.bench.federation import Setting
from compeft_fl.bench.sweep import Job, seeds_of, show_jobs
from compeft_fl.errors import CompeftError

__all__ = ["jobs_of", "run", "settings"]

NODES: Final = 10
SEEDS: Final = (42, 43, 44)  # of the first two settings
FEWER_SEEDS: Final = (42, 43)  # of the others: an hour is not for ever
CPU_SECONDS: Final = 300  # a run of the default federation takes about so many

QUICK_KEYS: Final = (("rounds", 4), ("local-steps", 10), ("limit-rows", 600))
QUICK_NODES: Final = 4
QUICK: Final = ("dense-fp32", "compeft-0.1", "compeft-ties-0.1", "int8-blockwise", "stc@0.01")
QUICK_CPU_SECONDS: Final = 60


def settings() -> list[Setting]:
    """What is compared by default: dense FedAvg, this project's, and its peers.

    The peers' codecs carry changes in both directions as ours do, with error feedback where they
    are biased: each at its best, not as its project happens to use it.
    """
    from compeft_fl.bench import peers

    own = [
        Setting("dense-fp32", "dense", "dense"),
        Setting("compeft-0.1", "golomb", "golomb", 0.1, 0.2),
        Setting("compeft-0.1-down-0.1", "golomb", "golomb", 0.1, 0.1),
        Setting("compeft-0.05", "golomb", "golomb", 0.05, 0.1),
        Setting("compeft-0.02", "golomb", "golomb", 0.02, 0.05),
        Setting("compeft-ties-0.1", "golomb", "golomb", 0.1, 0.2, "ties", 0.4),
        Setting(
            "compeft-task-arithmetic-0.1", "golomb", "golomb", 0.1, 0.2, "task-arithmetic", 0.2
        ),
    ]
    return own + [Setting(name, name, name) for name in PEERS if peers.available(name)]


PEERS: Final = ("int8-blockwise", "nf4", "topk-fp16@0.1", "stc@0.01", "signsgd", "qsgd-s16")


def jobs_of(
    quick: bool, names: list[str] | None = None, seeds: list[int] | None = None
) -> list[Job]:
    """The runs of a sweep; the ones that say most come first.

    Raises
    ------
    CompeftError
        A name that no setting has.
    """
    known = {setting.name: setting for setting in settings()}
    chosen = names or ([name for name in QUICK if name in known] if quick else list(known))
    for name in chosen:
        if name not in known:
            raise CompeftError(f"expected a setting among {', '.join(known)}; found {name!r}")
    if quick:
        seeds = seeds or [SEEDS[0]]
        return [Job(known[n], seed, QUICK_NODES, QUICK_KEYS) for seed in seeds for n in chosen]
    found = []
    for seed in seeds or SEEDS:
        for name in chosen:
            if seeds or seed in FEWER_SEEDS or name in list(known)[:2]:
                found.append(Job(known[name], seed, NODES))
    return found


def run(options: argparse.Namespace) -> int:
    """Run what is missing, then write learning.csv, learning.md and learning.png."""
    names = options.settings.split(",") if options.settings else None
    keys = tuple(parse_assignment(text) for text in options.keys)
    jobs = [
        replace(job, keys=(*job.keys, *keys))
        for job in jobs_of(options.quick, names, seeds_of(options.seeds))
    ]
    folder: Path = options.out / ("learning-quick" if options.quick else "learning")
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        seconds = QUICK_CPU_SECONDS if options.quick else CPU_SECONDS
        show_jobs(jobs, folder, options.workers, [seconds] * len(jobs))
    results = [found for job in jobs if (found := job.finished(folder)) is not None]
    if not results:
        raise CompeftError(f"no finished run in {folder}")
    only = ["--settings", options.settings] if options.settings else []
    command = " ".join(
        ["compeft-fl bench learning", *["--quick"] * options.quick, *only, *options.keys]
    )
    report.write(options.out, command, results, folder)
    return 0
