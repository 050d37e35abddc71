"""``compeft-fl bench few``: federations that ask few of their nodes in a round.

Two of 20 nodes, and five of 50, on the app's model and data (`compeft_fl.bench.federation`), with
the adapter in the last layer, so that what lies below is computed once. What is compared: dense
FedAvg; the grid, at several densities on the way down; and the chain that the grid has replaced,
whose bytes follow from the same runs, since it learns the same. Up goes what keeps the usual share
of an update's energy; once, to see the difference, a tenth of the parameters. Dense and grid also
with other steps of the server, so that each can be seen at its best. A finished run is stored under
OUT/few and not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench import few_report as report
from compeft_fl.bench.federation import Setting
from compeft_fl.bench.sweep import Job, seeds_of, show_jobs
from compeft_fl.errors import CompeftError
from compeft_fl.reduction import AUTO
from compeft_fl.server.downlink_options import DENSITY_FEW

__all__ = ["jobs_of", "run", "settings"]

SEEDS: Final = (42, 43, 44)
DENSITIES: Final = (DENSITY_FEW, 0.05, 0.2, 0.02)  # down; the default first
STEPS: Final[dict[str, tuple[float, float]]] = {
    "": (1.0, 0.0),
    "step-0.5": (0.5, 0.0),
    "momentum-0.8": (0.2, 0.8),
}
TENTH: Final = 0.1  # of the parameters up, where other rows send by energy
RANK: Final = 16  # of a quick look's adapter, on top of the model's embeddings
LAST_LAYER: Final = {
    "layers_to_transform": [5],
    "target_modules": ["query", "key", "value", "dense"],
}
KEYS: Final = (
    ("peft-options", json.dumps(LAST_LAYER)),
    ("learning-rate", 5e-4),  # near dense FedAvg's best: 3e-4 is alike, 1e-3 swings
)
SECONDS_A_RUN: Final = 15  # of a core
SECONDS_A_TRAINING: Final = 0.8
SECONDS_A_SCORE: Final = 0.6
QUICK_KEYS: Final = (("rounds", 8), ("local-steps", 5), ("limit-rows", 600), KEYS[1])


@dataclass(frozen=True)
class Case:
    """A federation: so many nodes, so many of them in a round, so many rounds.

    ``coarse_start``: its app adds the two lines and nothing else, so nodes are sent the start.
    """

    nodes: int
    a_round: int
    rounds: int
    steps: tuple[str, ...]
    score_every: int
    tenth: bool = False
    coarse_start: bool = False


CASES: Final = {
    "2-of-20": Case(20, 2, 60, tuple(STEPS), 3, tenth=True),
    "5-of-50": Case(50, 5, 20, ("",), 2, coarse_start=True),
}


def settings(case: str, quick: bool = False) -> list[Setting]:
    """What is compared in a case of `CASES`."""
    of = CASES[case]
    kinds: list[tuple[str, float | None, float | str]] = []  # step, density down and up
    for step in of.steps:
        densities = (None, *DENSITIES) if not step else (None, DENSITIES[0])
        kinds += [(step, density, AUTO) for density in densities]
    kinds += [("", DENSITIES[0], TENTH)] * of.tenth
    found = []
    for step, down, up in kinds:
        learning_rate, momentum = STEPS[step]
        sent = "dense" if down is None else f"grid-{down:g}"
        codec = "dense" if down is None else "golomb"
        name = "-".join(
            part for part in (case, sent, step, "" if up == AUTO else f"up-{up:g}") if part
        )
        found.append(
            Setting(
                name, codec, codec, 1.0 if down is None else up, down or 1.0,
                nodes_a_round=of.a_round,
                coarse_start=of.coarse_start and down is not None,
                server_learning_rate=learning_rate,
                server_momentum=momentum,
                score_every=of.score_every,
                on_top=RANK if quick else 0,
            )
        )  # fmt: skip
    return found


def jobs_of(
    quick: bool, names: list[str] | None = None, seeds: list[int] | None = None
) -> list[Job]:
    """The runs of a sweep; what claims are about comes first.

    Raises
    ------
    CompeftError
        A name that no setting has.
    """
    known = {each.name: (case, each) for case in CASES for each in settings(case, quick)}
    for name in names or ():
        if name not in known:
            raise CompeftError(f"expected a setting among {', '.join(known)}; found {name!r}")
    order = [*CLAIMS, *(name for name in known if name not in CLAIMS)]
    found = []
    for name in names or (QUICK if quick else order):
        case, setting = known[name]
        of = CASES[case]
        keys: tuple[tuple[str, Any], ...] = (("rounds", of.rounds), *KEYS)
        for seed in seeds or (SEEDS[:1] if quick else SEEDS):
            found.append(Job(setting, seed, of.nodes, QUICK_KEYS if quick else keys))
    return found


QUICK: Final = ("2-of-20-dense", f"2-of-20-grid-{DENSITIES[0]:g}")
CLAIMS: Final = (*QUICK, "5-of-50-dense", f"5-of-50-grid-{DENSITIES[0]:g}")


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
    work = rounds * of.nodes_a_round * steps / 20 * SECONDS_A_TRAINING
    work += rounds / of.score_every * SECONDS_A_SCORE
    return float(work / (8 if of.on_top else 1) + SECONDS_A_RUN)
