"""Experts of bench paper: models fine-tuned centrally on one task each, scored on its rows.

An expert is a task vector over the tensors that its method trains. All experts of one method and
one seed have one start, so that they can be merged.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from compeft_fl.app.config import AppConfig
from compeft_fl.bench.paper_pieces import held
from compeft_fl.codecs.base import Update
from compeft_fl.disk.atomic import replacing
from compeft_fl.task_vector import Layout, TaskVector

if TYPE_CHECKING:
    from compeft_fl.app.tasks.data import Rows

__all__ = ["METHODS", "Expert", "Plan", "Scorer", "drawn", "plan_text", "scorer_of", "train"]

_BATCH: Final = 64
_FIRST_SEED: Final = 42
_OF_LOSS: Final = 1e-3

_OF_TRAINING: Final = {
    "seed", "task", "model", "trust-remote-code", "head", "quantization", "max-length", "data",
    "data-config", "text-column", "label-column", "prompt-column", "response-column",
    "messages-column", "template", "long-prompts", "split-column", "train-split",
    "validation-split", "test-split", "limit-rows", "limit-test-rows", "partition-column",
    "peft-method", "peft-options", "trainable", "learning-rate", "weight-decay", "batch-size",
    "accumulation", "checkpointing", "local-steps", "local-epochs", "dtype",
}  # fmt: skip
"""Keys of the app that an expert depends on; the others are a federation's."""

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

LANGUAGE_METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "lora": {"learning-rate": 3e-3, "peft.target_modules": "all-linear"},
    "qlora": {
        "peft-method": "lora",
        "quantization": "4bit",
        "learning-rate": 3e-3,
        "peft.target_modules": "all-linear",
    },
    "ia3": {"learning-rate": 2e-2},
    "full": {"learning-rate": 5e-4},
}
"""The same for language models (task=instruction)."""


@dataclass(frozen=True)
class Plan:
    """How experts are trained and scored.

    Attributes
    ----------
    folder : Path
        Where they are stored.
    tasks : tuple of str
        Values of the app's key ``data``; behind a colon a value of its ``partition-column``, whose
        rows alone are taken.
    keys : mapping
        Keys of the app for all of them.
    steps : int
        Of training.
    rows : int
        Of validation, at most: each point of a sweep scores them.
    tested : int
        Test rows of a language model's kind, at most; 0: all.
    """

    folder: Path
    tasks: tuple[str, ...]
    keys: Mapping[str, Any]
    steps: int = 100
    rows: int = 100
    tested: int = 0

    def config(self, task: str, method: str, seed: int) -> AppConfig:
        """The app's configuration of one expert."""
        methods = LANGUAGE_METHODS if self.keys.get("task") == "instruction" else METHODS
        keys = {
            "device": "cpu",
            "dtype": "float32",
            "data": task.partition(":")[0],
            "peft-method": method,
            "local-steps": self.steps,
            "seed": _FIRST_SEED + seed,
            **methods.get(method, {}),
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
        return f"{Path(self.task).stem.replace(':', '-')}-{self.method}-{self.seed}"

    def file(self, plan: Plan) -> Path:
        """Where its task vector lies."""
        return plan.folder / "experts" / f"{self.key}.safetensors"


class Scorer(ABC):
    """A model, its task's rows in batches, and its start: trains an expert, and scores updates.

    Parameters
    ----------
    plan : Plan
    expert : Expert
    network : nn.Module
        With the adapter at its start.

    Attributes
    ----------
    splits : tuple of str
        What can be scored: ``val``, by which density and scale are chosen, ``test``, and more.
    """

    splits: ClassVar[tuple[str, ...]] = ("val", "test")

    def __init__(self, plan: Plan, expert: Expert, network: Any) -> None:
        from compeft_fl.app.tasks.peft_network import adapter_state

        self.expert, self.network = expert, network
        self.start = {n: t.float().numpy() for n, t in adapter_state(network).items()}
        floats = {n: t for n, t in self.start.items() if t.dtype.kind == "f"}
        self.layout = Layout.of(floats)

    def change(self, update: Update | None) -> None:
        """Set the model to its start plus an update."""
        import torch

        from compeft_fl.app.tasks.peft_network import load_adapter_state

        state = dict(self.start)
        if update is not None:
            floats = {name: state[name] for name in (t.name for t in self.layout.tensors)}
            state |= update.to_task_vector().apply(floats)
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        load_adapter_state(self.network, tensors)

    def trained(self, seed: int) -> dict[str, Any]:
        """Train from the start, and return the change of each tensor."""
        from compeft_fl.app.tasks.peft_network import adapter_state

        self.change(None)
        self.fit(seed)
        after = {n: t.float().numpy() for n, t in adapter_state(self.network).items()}
        return {t.name: after[t.name] - self.start[t.name] for t in self.layout.tensors}

    def score(self, split: str, update: Update | None) -> float:
        """One of `splits`, of the start plus an update; the more the better."""
        self.change(update)
        return self.measure(split)

    @abstractmethod
    def fit(self, seed: int) -> None:
        """Train the model as it is."""

    @abstractmethod
    def measure(self, split: str) -> float:
        """Score the model as it is."""


class ClassifierScorer(Scorer):
    """Text classification: percent of right answers, on both splits.

    ``val`` are rows held out of those to train on: the app's validation rows will not do, since
    the head is made of them. On some hundred rows many points of a sweep are equal, so that the
    loss decides among these: a thousandth of it, in nats, is taken off.
    """

    def __init__(self, plan: Plan, expert: Expert) -> None:
        from compeft_fl.app.tasks import data, model

        self.config = plan.config(expert.task, expert.method, expert.seed)
        self.data = data.load(self.config)
        self.classifier = model.build(self.config, self.data)
        super().__init__(plan, expert, self.classifier.network)
        rows = self.data.train
        held_out = drawn(len(rows), plan.rows, expert.seed)
        self._train = rows.take(np.setdiff1d(np.arange(len(rows)), held_out))
        self._batches = {
            "val": self._batched(rows.take(held_out)),
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

    def fit(self, seed: int) -> None:
        """See `Scorer`."""
        from compeft_fl.app.tasks import training

        training.train(self.classifier, self._train, self.config, seed)

    def measure(self, split: str) -> float:
        """See `Scorer`."""
        import torch

        self.classifier.eval()
        right, loss, total = 0, 0.0, 0
        with torch.inference_mode():
            for batch, classes in self._batches[split]:
                logits = self.classifier(batch).cpu()
                right += int((logits.argmax(1) == classes).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, classes, reduction="sum"))
                total += len(classes)
        return 100 * right / total - (_OF_LOSS * loss / total if split == "val" else 0.0)


def drawn(number: int, most: int, seed: int) -> Any:
    """Indices of the rows that are scored, of so many."""
    return np.sort(np.random.default_rng(seed).permutation(number)[:most])


def scorer_of(plan: Plan, expert: Expert) -> Scorer:
    """The scorer of an expert's kind of task."""
    if plan.keys.get("task") == "instruction":
        from compeft_fl.bench.paper_language import LanguageScorer

        return LanguageScorer(plan, expert)
    return ClassifierScorer(plan, expert)


def train(plan: Plan, expert: Expert) -> TaskVector:
    """The task vector of an expert: the stored one, or trained now and stored."""
    from safetensors.numpy import load_file, save_file

    file = expert.file(plan)
    told = {"plan": plan_text(plan, expert)}
    with held(file):
        if file.is_file() and _metadata(file) == told:
            return TaskVector.from_dict(dict(sorted(load_file(file).items())))
        change = scorer_of(plan, expert).trained(expert.seed)
        with replacing(file) as temporary:
            save_file(change, temporary, told)
    return TaskVector.from_dict(change)


def plan_text(plan: Plan, expert: Expert) -> str:
    """What an expert depends on, for telling whether a stored one is this one."""
    config = plan.config(expert.task, expert.method, expert.seed)
    told = config.to_run_config()
    keys = {n: v for n, v in told.items() if n in _OF_TRAINING or n.startswith("peft.")}
    return json.dumps([dataclasses.asdict(expert), plan.rows, plan.tested, keys], sort_keys=True)


def _metadata(file: Path) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        found: dict[str, str] | None = opened.metadata()
    return found
