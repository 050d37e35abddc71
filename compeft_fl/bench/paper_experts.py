"""Experts of bench paper: models fine-tuned centrally on one task each, scored on its rows.

An expert is a task vector over the tensors that its method trains. All experts of one method and
one seed have one start, so that they can be merged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.app.config import AppConfig
from compeft_fl.codecs.base import Update
from compeft_fl.disk.atomic import replacing
from compeft_fl.task_vector import Layout, TaskVector

if TYPE_CHECKING:
    from compeft_fl.app.tasks.data import Rows

__all__ = ["METHODS", "Expert", "Plan", "Scorer", "train"]

_BATCH: Final = 64
_FIRST_SEED: Final = 42

METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "lora": {"learning-rate": 5e-3},
    "ia3": {"learning-rate": 2e-2},
    "full": {"learning-rate": 1e-4},
    "bitfit": {"learning-rate": 5e-3},
    "ln_tuning": {"learning-rate": 5e-3, "peft.target_modules": "LayerNorm"},
    "prompt_tuning": {"learning-rate": 2e-2, "peft-options": '{"num_virtual_tokens": 10}'},
    "prefix_tuning": {"learning-rate": 2e-2, "peft-options": '{"num_virtual_tokens": 10}'},
}
"""Keys of the app by method; learning rates of one order that trains each of them."""


@dataclass(frozen=True)
class Plan:
    """How experts are trained and scored.

    Attributes
    ----------
    folder : Path
        Where they are stored.
    tasks : tuple of str
        Values of the app's key ``data``.
    keys : mapping
        Keys of the app for all of them.
    steps : int
        Of training.
    rows : int
        Of validation, at most: each point of a sweep scores them.
    """

    folder: Path
    tasks: tuple[str, ...]
    keys: Mapping[str, Any]
    steps: int = 100
    rows: int = 150

    def config(self, task: str, method: str, seed: int) -> AppConfig:
        """The app's configuration of one expert."""
        keys = {
            "device": "cpu",
            "data": task,
            "peft-method": method,
            "local-steps": self.steps,
            "seed": _FIRST_SEED + seed,
            **METHODS[method],
            **self.keys,
        }
        return AppConfig.from_run_config(keys)


@dataclass(frozen=True)
class Expert:
    """One task, one method, one seed.

    Attributes
    ----------
    task, method : str
    seed : int
    """

    task: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        """The name of its files."""
        return f"{Path(self.task).stem}-{self.method}-{self.seed}"

    def file(self, plan: Plan) -> Path:
        """Where its task vector lies."""
        return plan.folder / "experts" / f"{self.key}.safetensors"


class Scorer:
    """A model, its task's rows in batches, and its start: scores updates.

    Parameters
    ----------
    plan : Plan
    expert : Expert
    """

    def __init__(self, plan: Plan, expert: Expert) -> None:
        from compeft_fl.app.tasks import data, model

        self.config = plan.config(expert.task, expert.method, expert.seed)
        self.data = data.load(self.config)
        self.classifier = model.build(self.config, self.data)
        self.start = {n: t.numpy() for n, t in self.classifier.adapter_state().items()}
        floats = {n: t for n, t in self.start.items() if t.dtype.kind == "f"}
        self.layout = Layout.of(floats)
        rows = self.data.validation
        drawn = np.random.default_rng(expert.seed).permutation(len(rows))[: plan.rows]
        self._batches = {
            "val": self._batched(rows.take(np.sort(drawn))),
            "test": self._batched(self.data.test),
        }

    def _batched(self, rows: Rows) -> list[tuple[Any, Any]]:
        import torch

        from compeft_fl.app.tasks.model import by_length

        ids = self.classifier.tokenize(rows.texts)
        classes = torch.as_tensor(rows.classes)
        return [
            (self.classifier.batch([ids[i] for i in chunk]), classes[chunk])
            for chunk in by_length(ids, _BATCH)
        ]

    def change(self, update: Update | None) -> None:
        """Set the model to its start plus an update."""
        import torch

        state = dict(self.start)
        if update is not None:
            floats = {name: state[name] for name in (t.name for t in self.layout.tensors)}
            state |= update.to_task_vector().apply(floats)
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        self.classifier.load_adapter_state(tensors)

    def accuracy(self, split: str, update: Update | None) -> float:
        """Percent of right answers on ``"val"`` or ``"test"``."""
        import torch

        self.change(update)
        self.classifier.eval()
        right = total = 0
        with torch.inference_mode():
            for batch, classes in self._batches[split]:
                right += int((self.classifier(batch).argmax(1).cpu() == classes).sum())
                total += len(classes)
        return 100 * right / total


def train(plan: Plan, expert: Expert) -> TaskVector:
    """The task vector of an expert: the stored one, or trained now and stored."""
    from safetensors.numpy import load_file, save_file

    file = expert.file(plan)
    told = {"plan": plan_text(plan, expert)}
    if file.is_file() and _metadata(file) == told:
        return TaskVector.from_dict(dict(sorted(load_file(file).items())))
    from compeft_fl.app.tasks import training

    scorer = Scorer(plan, expert)
    training.train(scorer.classifier, scorer.data.train, scorer.config, expert.seed)
    after = {n: t.numpy() for n, t in scorer.classifier.adapter_state().items()}
    change = {t.name: after[t.name] - scorer.start[t.name] for t in scorer.layout.tensors}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file(change, temporary, told)
    return TaskVector.from_dict(change)


def plan_text(plan: Plan, expert: Expert) -> str:
    """What an expert depends on, for telling whether a stored one is this one."""
    config = plan.config(expert.task, expert.method, expert.seed)
    return json.dumps([dataclasses.asdict(expert), config.to_run_config()], sort_keys=True)


def _metadata(file: Path) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        found: dict[str, str] | None = opened.metadata()
    return found
