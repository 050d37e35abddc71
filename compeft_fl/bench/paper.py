"""``compeft-fl bench paper``: ComPEFT's tables and figures (arXiv 2311.13171) on what is at hand.

Each part is a list of pieces, each measured once and stored under OUT/paper: a run that was stopped
goes on. The page is written from what there is, with the paper's own figures beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import compeft_fl as cf
from compeft_fl.ablations import VARIANTS, ablate
from compeft_fl.app.config import parse_assignment
from compeft_fl.bench import paper_report, results
from compeft_fl.bench.paper_experts import METHODS, Expert, Plan, Scorer, plan_text, train
from compeft_fl.codecs.base import Update
from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.ternary import TernaryVector
from compeft_fl.tuning import DENSITIES, tune

__all__ = ["PARTS", "run"]

TASKS: Final = ("debian-role", "debian-interface", "debian-lang", "debian-section")
_PARETO_TASKS: Final = 2
COMPRESSED: Final = ("lora", "ia3")
LAMBDAS: Final = (0.2, 0.4, 0.6, 0.8, 1.0)
ABLATED: Final = ("norm", "stc", "pruned", "unsigned")
_UNSIGNED_ALPHAS: Final = (0.5, 1.0, 2.0)
SEEDS: Final = 3

PARTS: Final = {
    "experts": "Tables 2, 6, 8 to 16; Figures 5 and 6: LoRA and IA3 on every task",
    "ablations": "Figure 5: STC, Pruned, and without each step",
    "merged": "Table 3: one multitask model of all experts",
    "pareto": "Figure 4: methods by score and bytes",
    "full": "Table 4: the whole model fine-tuned",
}


@dataclass(frozen=True)
class Piece:
    """Something to measure.

    Attributes
    ----------
    part, name : str
        A name of `PARTS`, and one within it.
    measure : callable
        Gives what is stored, as JSON has it.
    depends : str
        What it depends on: another text, and it is measured anew.
    """

    part: str
    name: str
    measure: Callable[[], dict[str, Any]]
    depends: str

    def file(self, folder: Path) -> Path:
        """Where its result lies."""
        return folder / f"{self.part}-{self.name}.json"

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What has been measured; None: nothing yet, or something else."""
        try:
            found: dict[str, Any] = json.loads(self.file(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("depends") == self.depends else None


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, then write paper.md, paper.csv and the plots."""
    keys = dict(parse_assignment(text) for text in options.keys)
    data = str(keys.pop("data", ",".join(TASKS)))
    tasks = tuple(task for task in data.split(",") if task)
    folder: Path = options.out / ("paper-quick" if options.quick else "paper")
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(folder, tasks, keys)
    seeds = options.seeds or SEEDS
    if options.quick:
        plan, seeds = Plan(folder, tasks[:2], {"limit-rows": 60, **keys}, steps=4, rows=24), 1
    chosen = options.only.split(",") if options.only else list(PARTS)
    for part in chosen:
        if part not in PARTS:
            raise ParameterError(f"expected parts among {', '.join(PARTS)}; found {part!r}")
    pieces = [piece for piece in _pieces(plan, seeds) if piece.part in chosen]
    if not options.report:
        _measure(pieces, folder)
    found = [(p.part, r) for p in _pieces(plan, seeds) if (r := p.result(folder)) is not None]
    if not found:
        raise CompeftError(f"no measured piece in {folder}")
    command = "compeft-fl bench paper" + (" --quick" if options.quick else "")
    paper_report.write(options.out, " ".join([command, *options.keys]), found)
    return 0


def _measure(pieces: Sequence[Piece], folder: Path) -> None:
    """Measure what is missing, piece by piece."""
    missing = [piece for piece in pieces if piece.result(folder) is None]
    results.say(
        f"{len(pieces)} pieces, {len(pieces) - len(missing)} of them measured before. "
        "Stop it when you like: what is measured stays."
    )
    import torch

    torch.set_num_threads(1)  # small matrices gain nothing from more
    failed: list[str] = []
    with results.Progress("paper", len(missing)) as progress:
        for piece in missing:
            progress.step(f"{piece.part} {piece.name}", 1)
            try:
                _stored(piece, folder)
            except CompeftError as error:  # a method that does not fit the model
                failed.append(f"{piece.part} {piece.name}: {error}")
                results.say(failed[-1])
    if failed:
        results.say(f"{len(failed)} pieces could not be measured; the page leaves them out")


def _stored(piece: Piece, folder: Path) -> dict[str, Any]:
    """Measure a piece, and store its result."""
    started = time.process_time()
    found = piece.measure()
    found |= {"depends": piece.depends, "seconds": round(time.process_time() - started, 1)}
    with replacing(piece.file(folder)) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _pieces(plan: Plan, seeds: int) -> Iterator[Piece]:
    """All pieces; the first seed of every part before the second of any."""
    for seed in range(seeds):
        for at, task in enumerate(plan.tasks):
            for method in COMPRESSED:
                expert = Expert(task, method, seed)
                yield _piece("experts", expert, partial(_expert, plan, expert), plan)
            if at < _PARETO_TASKS:
                for method in METHODS:
                    if method not in (*COMPRESSED, "full"):
                        expert = Expert(task, method, seed)
                        yield _piece("pareto", expert, partial(_dense, plan, expert), plan)
                expert = Expert(task, "full", seed)
                yield _piece("full", expert, partial(_expert, plan, expert), plan)
            expert = Expert(task, "lora", seed)
            yield _piece("ablations", expert, partial(_ablations, plan, expert), plan)
        for method in COMPRESSED:
            if len(plan.tasks) > 1:
                experts = [Expert(task, method, seed) for task in plan.tasks]
                depends = json.dumps([plan_text(plan, expert) for expert in experts])
                measure = partial(_merged, plan, experts)
                yield Piece("merged", f"{method}-{seed}", measure, depends)


def _piece(part: str, expert: Expert, measure: Callable[[], dict[str, Any]], plan: Plan) -> Piece:
    return Piece(part, expert.key, measure, plan_text(plan, expert))


# --- what is measured -------------------------------------------------------------------------


def _dense(plan: Plan, expert: Expert) -> dict[str, Any]:
    """An expert as it is."""
    tau = train(plan, expert)
    return _described(expert, Scorer(plan, expert), tau)


def _described(expert: Expert, scorer: Scorer, tau: cf.TaskVector) -> dict[str, Any]:
    return {
        "task": expert.task,
        "method": expert.method,
        "seed": expert.seed,
        "parameters": tau.num_parameters,
        "base": {split: scorer.accuracy(split, None) for split in ("val", "test")},
        "dense": {split: scorer.accuracy(split, tau) for split in ("val", "test")},
        "bytes": {c: len(cf.encode(tau, codec=c)) for c in ("dense", "dense-bf16")},
    }


def _expert(plan: Plan, expert: Expert) -> dict[str, Any]:
    """An expert as it is, and swept over densities and scales on validation rows."""
    tau = train(plan, expert)
    scorer = Scorer(plan, expert)
    found = _described(expert, scorer, tau)
    best = tune(tau, partial(scorer.accuracy, "val"))
    assert isinstance(best.update, TernaryVector)
    found["compeft"] = {
        "density": best.density,
        "alpha": best.alpha,
        "val": best.score,
        "test": scorer.accuracy("test", best.update),
        "bytes": len(cf.encode(best.update)),
    }
    untuned = cf.compress(tau, 0.05, "norm")
    found["untuned"] = {
        "test": scorer.accuracy("test", untuned),
        "bytes": len(cf.encode(untuned)),
    }
    found["trials"] = [list(trial) for trial in best.trials]
    return found


def _ablations(plan: Plan, expert: Expert) -> dict[str, Any]:
    """The variants of Figure 5, by density, on validation rows."""
    tau = train(plan, expert)
    scorer = Scorer(plan, expert)
    trials: dict[str, list[list[float]]] = {}
    for variant in ABLATED:
        tuned = VARIANTS[variant].tuned
        trials[variant] = []
        for density in DENSITIES:
            scores = [
                scorer.accuracy("val", ablate(tau, variant, density, alpha))
                for alpha in (_UNSIGNED_ALPHAS if tuned else (1.0,))
            ]
            trials[variant].append([density, max(scores)])
    scores = [scorer.accuracy("val", ablate(tau, "signs", alpha=a)) for a in _UNSIGNED_ALPHAS]
    trials["signs"] = [[1.0, max(scores)]]
    return {"task": expert.task, "method": expert.method, "seed": expert.seed, "trials": trials}


def _merged(plan: Plan, experts: Sequence[Expert]) -> dict[str, Any]:
    """One model of all experts, by each rule, of dense and of compressed task vectors."""
    scorers = [Scorer(plan, expert) for expert in experts]
    taus = [train(plan, expert) for expert in experts]
    forms: dict[str, list[Update]] = {
        "dense": list(taus),
        "compressed": [_best(plan, expert, tau) for expert, tau in zip(experts, taus, strict=True)],
    }
    rules: dict[str, list[tuple[float, Any]]] = {
        "average": [(1.0, cf.Average())],
        "task arithmetic": [(scale, cf.TaskArithmetic(scale)) for scale in LAMBDAS],
        "ties": [(scale, cf.Ties(scale)) for scale in LAMBDAS],
    }
    rows = []
    for form, updates in forms.items():
        for rule, settings in rules.items():
            # TIES trims first: of dense task vectors it takes the top fifth.
            given = updates
            if rule == "ties" and form == "dense":
                given = [ablate(tau, "pruned", 0.2) for tau in taus]
            scored = []
            for scaling, accumulator in settings:
                merged = _merge(accumulator, given)
                scored.append((_mean(scorers, "val", merged), scaling, merged))
            val, scaling, merged = max(scored, key=lambda entry: entry[0])
            test = _mean(scorers, "test", merged)
            rows.append({"form": form, "rule": rule, "lambda": scaling, "val": val, "test": test})
    single = [scorer.accuracy("test", tau) for scorer, tau in zip(scorers, taus, strict=True)]
    base = _mean(scorers, "test", None)
    return {
        "method": experts[0].method,
        "seed": experts[0].seed,
        "rows": rows,
        "base": base,
        "single": sum(single) / len(single),
    }


def _merge(accumulator: Any, updates: Sequence[Update]) -> cf.TaskVector:
    for update in updates:
        accumulator.add(update)
    merged: cf.TaskVector = accumulator.result()
    return merged


def _best(plan: Plan, expert: Expert, tau: cf.TaskVector) -> TernaryVector:
    """An expert as its own validation rows would have it compressed."""
    piece = _piece("experts", expert, partial(_expert, plan, expert), plan)
    found = piece.result(plan.folder)
    if found is None:
        found = _stored(piece, plan.folder)
    return cf.compress(tau, found["compeft"]["density"], found["compeft"]["alpha"])


def _mean(scorers: Sequence[Scorer], split: str, update: Update | None) -> float:
    return sum(scorer.accuracy(split, update) for scorer in scorers) / len(scorers)
