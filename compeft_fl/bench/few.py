"""``compeft-fl bench few``: federations that ask few of their nodes in a round.

Two of 20 nodes, and five of 50, on the app's model and data (`compeft_fl.bench.federation`), with
an adapter of the app's size on top of the model's embeddings, so that a run takes a quarter of a
minute of a core; and, two of 20 again, with one in the last layer. What is compared: dense
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
from compeft_fl.reduction.rules import AUTO
from compeft_fl.server.downlink_options import DENSITY_FEW

__all__ = ["jobs_of", "run", "settings"]

SEEDS: Final = (42, 43, 44)
DENSITIES: Final = (DENSITY_FEW, 0.1, 0.05, 0.2, 0.02)  # down; the default first
STEPS: Final[dict[str, tuple[float, float]]] = {
    "": (1.0, 0.0),
    "step-0.5": (0.5, 0.0),
    "step-1.5": (1.5, 0.0),
    "momentum-0.8": (0.2, 0.8),
}
TENTH: Final = 0.1  # of the parameters up, where other rows send by energy
RANK: Final = 96  # on top of the embeddings: 73,728 parameters, as the app's adapter has
QUICK_RANK: Final = 16
LAST_LAYER: Final = {
    "layers_to_transform": [5],
    "target_modules": ["query", "key", "value", "dense"],
}
# Near dense FedAvg's best: on top 3e-4 swings, in the last layer 3e-4 is alike and 1e-3 swings.
KEYS: Final = (("learning-rate", 1e-4),)
LAYER_KEYS: Final = (("learning-rate", 5e-4), ("peft-options", json.dumps(LAST_LAYER)))
SECONDS_A_RUN: Final = 15  # of a core
SECONDS_A_TRAINING: Final = 0.1
SECONDS_A_TRAINING_IN_LAYER: Final = 1.0
QUICK_KEYS: Final = (
    ("rounds", 8), ("local-steps", 5), ("limit-rows", 600),
    ("learning-rate", 5e-4),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A federation: so many nodes, so many of them in a round, so many rounds.

    ``densities``: on the way down. ``tenth``: also with a tenth of the parameters up.
    ``in_layer``: the adapter is in the last layer. ``coarse_start``: its app adds the two
    lines and nothing else, so nodes are sent the start.
    """

    nodes: int
    a_round: int
    rounds: int
    steps: tuple[str, ...]
    score_every: int
    densities: tuple[float, ...] = DENSITIES
    tenth: bool = False
    in_layer: bool = False
    coarse_start: bool = False


CASES: Final = {
    "2-of-20": Case(20, 2, 60, tuple(STEPS), 3, tenth=True),
    "5-of-50": Case(50, 5, 20, ("", "step-1.5"), 2, coarse_start=True),
    "2-of-20-last-layer": Case(20, 2, 60, ("", "step-1.5"), 6, DENSITIES[:2], in_layer=True),
}


def settings(case: str, quick: bool = False) -> list[Setting]:
    """What is compared in a case of `CASES`."""
    of = CASES[case]
    kinds: list[tuple[str, float | None, float | str]] = []  # step, density down and up
    for step in of.steps:
        densities = (None, *of.densities) if not step else (None, of.densities[0])
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
                on_top=0 if of.in_layer else QUICK_RANK if quick else RANK,
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
        keys: tuple[tuple[str, Any], ...] = (
            ("rounds", of.rounds),
            *(LAYER_KEYS if of.in_layer else KEYS),
        )
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
    each = SECONDS_A_TRAINING if of.on_top else SECONDS_A_TRAINING_IN_LAYER
    return float(keys["rounds"] * of.nodes_a_round * each + SECONDS_A_RUN)
