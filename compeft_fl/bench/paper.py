"""``compeft-fl bench paper``: ComPEFT's tables and figures (arXiv 2311.13171) on what is at hand.

Each part is a list of pieces, each measured once and stored under OUT/paper: a run that was stopped
goes on. The page is written from what there is, with the paper's own figures beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import compeft_fl as cf
from compeft_fl.app.config import parse_assignment
from compeft_fl.bench import paper_report
from compeft_fl.bench.paper_experts import (
    METHODS,
    Expert,
    Plan,
    Scorer,
    plan_text,
    scorer_of,
    train,
)
from compeft_fl.bench.paper_pieces import Piece, chosen, measure
from compeft_fl.codecs.base import Update
from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.reduction.ablations import VARIANTS, ablate
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
    "language": "Tables 1, 2 and 4: a language model in 4 bits, with LoRA, IA3, and as a whole",
}

LANGUAGE_TASKS: Final = tuple(
    f"debian-instructions:{kind}" for kind in ("section", "role", "language", "synopsis", "depends")
)
_LANGUAGE_METHODS: Final = ("qlora", "lora", "ia3", "full")
_LANGUAGE: Final = {
    "task": "instruction",
    "model": "debian-lm",
    "partition-column": "kind",
    "max-length": 320,
    "batch-size": 8,
}


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, then write paper.md, paper.csv and the plots."""
    keys = dict(parse_assignment(text) for text in options.keys)
    data = str(keys.pop("data", ",".join(TASKS)))
    tasks = tuple(task for task in data.split(",") if task)
    folder: Path = options.out / ("paper-quick" if options.quick else "paper")
    folder.mkdir(parents=True, exist_ok=True)
    plan, seeds = Plan(folder, tasks, keys), options.seeds or SEEDS
    given = {name: value for name, value in keys.items() if name in ("device", "limit-rows")}
    own = {"task", "model"} & set(keys) or data != ",".join(TASKS)
    language = Plan(
        folder, () if own else LANGUAGE_TASKS, {**_LANGUAGE, **given}, rows=60, tested=150
    )
    if options.quick:
        seeds = 1
        # Of 3 in 183 validation rows, the rarest class, a prototype is measured: all are needed.
        plan = replace(plan, tasks=tasks[:2], keys={"limit-rows": 200, **keys}, steps=4, rows=24)
        few = {"limit-rows": 60, **language.keys}
        language = replace(language, tasks=language.tasks[:2], keys=few, steps=4, rows=8)
    pieces = [*_pieces(plan, seeds), *_language_pieces(language, seeds)]
    parts = options.only.split(",") if options.only else list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise ParameterError(f"expected parts among {', '.join(PARTS)}; found {part!r}")
    wanted = chosen([piece for piece in pieces if piece.part in parts], options.pieces)
    if not options.report:
        measure(wanted, folder, options.workers or 1)
        if options.pieces:
            return 0  # several commands may be at it: the page is the last one's, by --report
    found = [(p.part, r) for p in pieces if (r := p.result(folder)) is not None]
    if not found:
        raise CompeftError(f"no measured piece in {folder}")
    command = "compeft-fl bench paper" + (" --quick" if options.quick else "")
    paper_report.write(options.out, " ".join([command, *options.keys]), found)
    return 0


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


def _language_pieces(plan: Plan, seeds: int) -> Iterator[Piece]:
    """Those of the language model."""
    for seed in range(seeds):
        for method in _LANGUAGE_METHODS:
            for task in plan.tasks:
                expert = Expert(task, method, seed)
                yield _piece("language", expert, partial(_expert, plan, expert), plan)


def _piece(part: str, expert: Expert, measure: Callable[[], dict[str, Any]], plan: Plan) -> Piece:
    return Piece(part, expert.key, measure, plan_text(plan, expert))


# --- what is measured -------------------------------------------------------------------------


def _dense(plan: Plan, expert: Expert) -> dict[str, Any]:
    """An expert as it is."""
    tau = train(plan, expert)
    return _described(expert, scorer_of(plan, expert), tau)


def _described(expert: Expert, scorer: Scorer, tau: cf.TaskVector) -> dict[str, Any]:
    return {
        "task": expert.task,
        "method": expert.method,
        "seed": expert.seed,
        "parameters": tau.num_parameters,
        "base": {split: scorer.score(split, None) for split in scorer.splits},
        "dense": {split: scorer.score(split, tau) for split in scorer.splits},
        "bytes": {c: len(cf.encode(tau, codec=c)) for c in ("dense", "dense-bf16")},
    }


def _expert(plan: Plan, expert: Expert) -> dict[str, Any]:
    """An expert as it is, and swept over densities and scales on validation rows."""
    tau = train(plan, expert)
    scorer = scorer_of(plan, expert)
    found = _described(expert, scorer, tau)
    best = tune(tau, partial(scorer.score, "val"))
    assert isinstance(best.update, TernaryVector)
    found["compeft"] = {
        "density": best.density,
        "alpha": best.alpha,
        **{split: scorer.score(split, best.update) for split in scorer.splits},
        "bytes": len(cf.encode(best.update)),
    }
    untuned = cf.compress(tau, 0.05, "norm")
    found["untuned"] = {
        **{split: scorer.score(split, untuned) for split in scorer.splits},
        "bytes": len(cf.encode(untuned)),
    }
    found["trials"] = [list(trial) for trial in best.trials]
    return found


def _ablations(plan: Plan, expert: Expert) -> dict[str, Any]:
    """The variants of Figure 5, by density, on validation rows."""
    tau = train(plan, expert)
    scorer = scorer_of(plan, expert)
    trials: dict[str, list[list[float]]] = {}
    for variant in ABLATED:
        tuned = VARIANTS[variant].tuned
        trials[variant] = []
        for density in DENSITIES:
            scores = [
                scorer.score("val", ablate(tau, variant, density, alpha))
                for alpha in (_UNSIGNED_ALPHAS if tuned else (1.0,))
            ]
            trials[variant].append([density, max(scores)])
    scores = [scorer.score("val", ablate(tau, "signs", alpha=a)) for a in _UNSIGNED_ALPHAS]
    trials["signs"] = [[1.0, max(scores)]]
    return {"task": expert.task, "method": expert.method, "seed": expert.seed, "trials": trials}


def _merged(plan: Plan, experts: Sequence[Expert]) -> dict[str, Any]:
    """One model of all experts, by each rule, of dense and of compressed task vectors."""
    scorers = [scorer_of(plan, expert) for expert in experts]
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
    single = [scorer.score("test", tau) for scorer, tau in zip(scorers, taus, strict=True)]
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
    found = piece.measured(plan.folder)
    return cf.compress(tau, found["compeft"]["density"], found["compeft"]["alpha"])


def _mean(scorers: Sequence[Scorer], split: str, update: Update | None) -> float:
    return sum(scorer.score(split, update) for scorer in scorers) / len(scorers)
