"""``compeft-fl bench few``: federations that ask few of their nodes in a round.

Two of 20 nodes, and five of 50, on the app's model and data (`compeft_fl.bench.federation`), with
the adapter on top of the model's embeddings, so that a run takes half a minute of a core. What is
compared: dense FedAvg; the grid, at several densities on the way down; and the chain that the grid
has replaced, whose bytes follow from the same runs, since it learns the same. Dense and grid also
with other steps of the server, so that each can be seen at its best. A finished run is stored
under OUT/few and not run again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench import few_report as report
from compeft_fl.bench.federation import Setting
from compeft_fl.bench.sweep import Job, seeds_of, show_jobs
from compeft_fl.errors import CompeftError

__all__ = ["jobs_of", "run", "settings"]

SEEDS: Final = (42, 43, 44)
DENSITIES: Final = (0.05, 0.2, 0.1, 0.02)
BEST_DENSITY: Final = 0.05
STEPS: Final[dict[str, tuple[float, float]]] = {
    "": (1.0, 0.0),
    "step-0.5": (0.5, 0.0),
    "momentum-0.8": (0.2, 0.8),
}
RANK: Final = 16
KEYS: Final = (("learning-rate", 5e-4),)  # near dense FedAvg's best: 3e-4 is alike, 1e-3 swings
SECONDS_A_RUN: Final = 15  # of a core
SECONDS_A_TRAINING: Final = 0.08
SECONDS_A_SCORE: Final = 0.15
QUICK_KEYS: Final = (("rounds", 8), ("local-steps", 5), ("limit-rows", 600))


@dataclass(frozen=True)
class Case:
    """A federation: so many nodes, so many of them in a round, so many rounds.

    ``coarse_start``: its app adds the two lines and nothing else, so nodes are sent the start.
    """

    nodes: int
    a_round: int
    rounds: int
    densities: tuple[float, ...]
    steps: tuple[str, ...]
    score_every: int
    coarse_start: bool = False


CASES: Final = {
    "2-of-20": Case(20, 2, 60, DENSITIES, tuple(STEPS), 3),
    "5-of-50": Case(50, 5, 20, (0.05, 0.2), ("",), 2, coarse_start=True),
}


def settings(case: str) -> list[Setting]:
    """What is compared in a case of `CASES`."""
    of, found = CASES[case], []
    for name in of.steps:
        learning_rate, momentum = STEPS[name]
        for density in (None, *of.densities) if not name else (None, BEST_DENSITY):
            sent = "dense" if density is None else f"grid-{density:g}"
            codec, up = ("dense", 1.0) if density is None else ("golomb", 0.1)
            found.append(
                Setting(
                    "-".join(part for part in (case, sent, name) if part),
                    codec,
                    codec,
                    up,
                    density or 1.0,
                    nodes_a_round=of.a_round,
                    coarse_start=of.coarse_start and density is not None,
                    server_learning_rate=learning_rate,
                    server_momentum=momentum,
                    score_every=of.score_every,
                    on_top=RANK,
                )
            )
    return found


def jobs_of(
    quick: bool, names: list[str] | None = None, seeds: list[int] | None = None
) -> list[Job]:
    """The runs of a sweep.

    All settings with the first seed; with the others what claims are about: dense and the grid at
    `BEST_DENSITY`, each with the server's step of today's default and at its best.

    Raises
    ------
    CompeftError
        A name that no setting has.
    """
    known = {setting.name: (case, setting) for case in CASES for setting in settings(case)}
    for name in names or ():
        if name not in known:
            raise CompeftError(f"expected a setting among {', '.join(known)}; found {name!r}")
    found = []
    for seed in seeds or (SEEDS[:1] if quick else SEEDS):
        for name, (case, setting) in known.items():
            few = name in (QUICK if quick else CLAIMS)
            if name in names if names else few or not (quick or seed != SEEDS[0]):
                of = CASES[case]
                keys: tuple[tuple[str, Any], ...] = (("rounds", of.rounds), *KEYS)
                found.append(Job(setting, seed, of.nodes, QUICK_KEYS if quick else keys))
    return found


CLAIMS: Final = ("2-of-20-dense", f"2-of-20-grid-{BEST_DENSITY:g}")
QUICK: Final = CLAIMS


def run(options: argparse.Namespace) -> int:
    """Run what is missing, then write few.csv, few.md and few.png."""
    names = options.settings.split(",") if options.settings else None
    jobs = jobs_of(options.quick, names, seeds_of(options.seeds))
    folder: Path = options.out / ("few-quick" if options.quick else "few")
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        show_jobs(jobs, folder, options.workers, [_seconds(job) for job in jobs])
    results = [found for job in jobs if (found := job.finished(folder)) is not None]
    if not results:
        raise CompeftError(f"no finished run in {folder}")
    command = "compeft-fl bench few" + (" --quick" if options.quick else "")
    report.write(options.out, command, results)
    return 0


def _seconds(job: Job) -> float:
    """What a run takes of a core, about."""
    keys, of = dict(job.keys), job.setting
    rounds, steps = keys["rounds"], keys.get("local-steps", 20)
    trainings = rounds * of.nodes_a_round * steps / 20
    return float(
        trainings * SECONDS_A_TRAINING + rounds / of.score_every * SECONDS_A_SCORE + SECONDS_A_RUN
    )
