"""The part of bench experts that composes: LoraHub on tasks left out, dense and compressed.

Experts are trained on random halves of the classes of each of the package's tasks, from one start.
A task is left out: of the others' experts some are drawn, weights for them are found from four
examples a class, and the result is scored on the task's test rows. What is trained and what is
measured is stored piece by piece, so a run that was stopped goes on.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.adapters import StoredUpdate, load_folder
from compeft_fl.adapters.compression import compress_adapter, keep_adapter
from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import data, few_shot, model, training
from compeft_fl.bench import results
from compeft_fl.experts.composition import compose
from compeft_fl.experts.held import Recipe
from compeft_fl.experts.pool import ExpertPool

__all__ = ["FULL", "QUICK", "Case", "Plan", "cases", "measure", "summary", "train_experts"]

TASKS: Final = ("section", "role", "interface", "lang")
SEEDS: Final = 5
DENSITY: Final = 0.05
_FILE: Final = "experts_lorahub.csv"


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured.

    Attributes
    ----------
    variants : int
        Experts a task.
    steps : int
        Of training, each with 16 rows.
    shots : int
        Examples a class.
    evaluations : int
        Of a search.
    test_rows : int
        At most so many of a task are scored, the same for all.
    """

    variants: int
    steps: int
    shots: int
    evaluations: int
    test_rows: int

    @property
    def candidates(self) -> int:
        """The experts of all tasks but one."""
        return self.variants * (len(TASKS) - 1)


FULL: Final = Plan(variants=7, steps=100, shots=4, evaluations=40, test_rows=10_000)
QUICK: Final = Plan(variants=3, steps=30, shots=2, evaluations=24, test_rows=200)


@dataclass(frozen=True)
class Case:
    """One composition for one task.

    Attributes
    ----------
    task : str
        That is left out.
    form : {"dense", "compressed"}
        Of the experts.
    method : str
        ``"none"``, ``"average"``, ``"ties"``, or a rule of `compeft_fl.experts.composition`.
    candidates, evaluations, seed : int
    """

    task: str
    form: str
    method: str
    candidates: int
    evaluations: int
    seed: int


def cases(plan: Plan, *, sweep: bool = True) -> Iterator[Case]:
    """All that is measured, the figure's own cases first."""
    forms, most = ("dense", "compressed"), (plan.candidates, plan.evaluations)
    for task in TASKS:
        yield Case(task, "dense", "none", 0, 0, 0)
    sizes = [("factors", *most)]
    if sweep:
        sizes += [(method, *most) for method in ("changes", "average", "ties")]
        sizes += [("factors", most[0], n * most[1] // 2) for n in (1, 4)]
        sizes += [("factors", most[0] // n, most[1]) for n in (2, 4)]
    for (method, candidates, evaluations), seed in itertools.product(sizes, range(SEEDS)):
        for task, form in itertools.product(TASKS, forms):
            yield Case(task, form, method, candidates, evaluations, seed)


# --- the experts ----------------------------------------------------------------------------------


def train_experts(folder: Path, plan: Plan) -> None:
    """Train what is not there yet: ``folder/TASK-VARIANT``, and the start, ``folder/start``."""
    wanted = [(task, variant) for variant in range(plan.variants) for task in TASKS]
    with results.Progress("experts", len(wanted)) as progress:
        for task, variant in wanted:
            target = folder / f"{task}-{variant}"
            progress.step(target.name, 1)
            if target.exists():
                continue
            rows = _half(data.load(_config(task, plan)), [TASKS.index(task), variant])
            classifier = model.build(_config(task, plan), rows)
            if not (folder / "start").exists():
                _save(classifier, folder / "start", {})
            trained = training.train(classifier, rows.train, _config(task, plan), seed=variant)
            _save(classifier, target, {"loss": trained.loss})


def _config(task: str, plan: Plan) -> AppConfig:
    return AppConfig(
        data=f"debian-{task}", learning_rate=0.003, batch_size=16, local_steps=plan.steps,
        device="cpu",
    )  # fmt: skip


def _half(task: data.TextData, seed: Sequence[int]) -> data.TextData:
    """The rows of a random half of the classes."""
    count = max(3, len(task.labels) // 2)
    drawn = np.random.default_rng(seed).choice(len(task.labels), count, replace=False)
    chosen = np.sort(drawn)

    def of_them(rows: data.Rows) -> data.Rows:
        kept = rows.take(np.flatnonzero(np.isin(rows.classes, chosen)))
        return data.Rows(kept.texts, np.searchsorted(chosen, kept.classes), kept.groups)

    labels = tuple(task.labels[index] for index in chosen)
    return data.TextData(labels, *map(of_them, (task.train, task.validation, task.test)))


def _save(classifier: model.Classifier, folder: Path, score: dict[str, float]) -> None:
    partial = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    classifier.save(partial)
    (partial / "score.json").write_text(json.dumps(score) + "\n", encoding="utf-8")
    partial.rename(folder)


def stored(folder: Path, start: Path, form: str) -> StoredUpdate:
    """An expert as a pool takes it: its whole task vector, or compressed as a push does it."""
    adapter, init = load_folder(folder), load_folder(start)
    if form == "dense":
        kept = keep_adapter(adapter, init)
    else:
        kept = compress_adapter(adapter, init, density=DENSITY)
    return StoredUpdate(kept.update, adapter.config, kept.start, form, 0, 0, kept.carried)


# --- composing ------------------------------------------------------------------------------------


def measure(out: Path, experts: Path, plan: Plan, wanted: Sequence[Case]) -> list[dict[str, Any]]:
    """Score what has not been scored yet, and return all rows."""
    file = out / _FILE
    rows = _read(file)
    known = {_key(row) for row in rows}
    left = [case for case in wanted if _key(asdict(case)) not in known]
    with results.Progress("compose", len(left)) as progress:
        tasks: dict[str, _Task] = {}
        for case in left:
            progress.step(" ".join(map(str, asdict(case).values())), 1)
            if case.task not in tasks:
                tasks[case.task] = _Task(case.task, experts, plan)
            rows.append({**asdict(case), **tasks[case.task].score(case)})
            results.write_csv(file, rows)
    return rows


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in Case.__dataclass_fields__)


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


class _Task:
    """A task that is left out, with a model, and the other tasks' experts in two pools."""

    def __init__(self, name: str, experts: Path, plan: Plan) -> None:
        self._shots, self._config = plan.shots, _config(name, plan)
        self._data = data.load(self._config)
        order = np.random.default_rng(0).permutation(len(self._data.test))
        self._test = self._data.test.take(order[: plan.test_rows])
        self._classifier = model.build(self._config, self._data)
        self._classifier.eval()
        self._names = sorted(
            folder.name
            for folder in experts.iterdir()
            if folder.name != "start" and not folder.name.startswith((".", f"{name}-"))
        )
        self._pools = {}
        for form in ("dense", "compressed"):
            pool = ExpertPool(self._classifier.network, init=experts / "start")
            for each in self._names:
                pool.add(each, stored(experts / each, experts / "start", form))
            self._pools[form] = pool

    def score(self, case: Case) -> dict[str, Any]:
        """Accuracy on the test rows, in percent, and the loss on the examples."""
        pool = self._pools[case.form]
        rng = np.random.default_rng([case.seed, TASKS.index(case.task)])
        loss = few_shot.loss_on(self._classifier, self._examples(rng))
        count = min(case.candidates, len(self._names))
        drawn = sorted(str(name) for name in rng.choice(self._names, count, replace=False))
        if case.method == "none":
            return {"accuracy": self._accuracy(), "loss": loss()}
        if case.method in ("average", "ties"):
            recipe = Recipe.of(dict.fromkeys(drawn, 1.0), case.method)
        else:
            found = compose(
                pool, drawn, loss, rule=case.method, evaluations=case.evaluations, seed=case.seed
            )
            recipe = found.recipe
        with pool.use(recipe):
            return {"accuracy": self._accuracy(), "loss": loss()}

    def _examples(self, rng: np.random.Generator) -> data.Rows:
        rows = self._data.train
        chosen = [
            rng.choice(np.flatnonzero(rows.classes == label), self._shots, replace=False)
            for label in range(len(self._data.labels))
        ]
        return rows.take(np.concatenate(chosen))

    def _accuracy(self) -> float:
        return 100 * training.evaluate(self._classifier, self._test, self._config).accuracy


# --- the answer -----------------------------------------------------------------------------------


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and size: mean accuracy over tasks and seeds, dense and compressed.

    The standard error is that of the mean over seeds, of each seed's mean over the tasks.
    """
    groups: dict[tuple[str, int, int], dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if row["method"] == "none":
            continue
        key = (str(row["method"]), int(row["candidates"]), int(row["evaluations"]))
        by_seed = groups.setdefault(key, {}).setdefault(str(row["form"]), {})
        by_seed.setdefault(str(row["seed"]), []).append(float(row["accuracy"]))
    found = []
    for (method, candidates, evaluations), forms in groups.items():
        means = {f: [statistics.fmean(v) for v in seeds.values()] for f, seeds in forms.items()}
        errors = {f: _standard_error(values) for f, values in means.items()}
        if not {"dense", "compressed"} <= set(means):
            continue
        dense, compressed = (statistics.fmean(means[form]) for form in ("dense", "compressed"))
        found.append(
            {
                "method": method,
                "candidates": candidates,
                "evaluations": evaluations,
                "dense": dense,
                "dense_error": errors["dense"],
                "compressed": compressed,
                "compressed_error": errors["compressed"],
                "within_one_error": abs(dense - compressed)
                <= max(errors["dense"], errors["compressed"]),
            }
        )
    return found


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
