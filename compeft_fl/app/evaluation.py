"""Tasks of lm-evaluation-harness, answered by a language model with an adapter.

A task is a name of the harness's own (``mmlu``, ``bbh``, ...), a YAML file, or one of those that
the package carries (``debian_section``, ...). Those of the kind ``multiple_choice`` are rank
classification: the answer is the choice of the largest log-likelihood, as T-Few and ComPEFT's paper
have it.
"""

from __future__ import annotations

import difflib
import functools
import logging
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from compeft_fl.app import embedded
from compeft_fl.app.imports import at_once
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line

__all__ = ["Figure", "Harness", "Scores", "require_harness", "uses_chat"]

_EMBEDDED_TASKS: Final = "evaluation"  # a folder of compeft_fl/app/embedded
_LOGGERS: Final = ("lm_eval", "lm_eval.models.huggingface", "datasets")
_INVENTORY: Final = ("add_env_info", "get_git_commit_hash")  # of its results, which nobody reads
_NAMED: Final = re.compile(r"""^["']?(?:task|group|tag)["']?: *["']?([\w.-]+)""", re.MULTILINE)
_SEED: Final = 1234  # the harness's own, of the examples in front of a question
_BOOTSTRAP: Final = 1000


@dataclass(frozen=True)
class Figure:
    """A metric of a task: its value, and its standard error where the harness knows one."""

    value: float
    error: float | None = None


Scores = Mapping[str, Mapping[str, Figure]]
"""Task or group of tasks -> metric -> figure."""


def require_harness() -> None:
    """Raise where lm-eval is not installed.

    Raises
    ------
    ConfigError
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed: pip install 'compeft-fl[llm]'")


class Harness:
    """Some tasks, loaded and ready to be put to models.

    Parameters
    ----------
    tasks : str
        Names of tasks, groups or tags, or YAML files, by comma.
    limit : int, optional
        Questions of each task, the first ones; 0: all.
    shots : int, optional
        Examples in front of each question; None: as the task says.
    batch_size : int, optional
        Questions that a model is given at once.

    Raises
    ------
    ConfigError
        Where lm-eval is missing, a task is unknown, or its data cannot be had.
    """

    def __init__(
        self, tasks: str, *, limit: int = 0, shots: int | None = None, batch_size: int = 16
    ) -> None:
        require_harness()
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names:
            raise ConfigError("tasks: expected names by comma, as in debian,mmlu; found none")
        self.limit = limit
        self.shots = shots
        self.batch_size = batch_size
        with _quiet():
            self._manager = _manager(names)
            self._tasks, self._specs = _load(self._manager, names)

    @property
    def names(self) -> list[str]:
        """The names of the single tasks."""
        return list(self._tasks)

    def score(self, model: Any, tokenizer: Any, *, chat: bool | None = None) -> Scores:
        """Return what a model reaches in the tasks.

        The generators of random numbers are left as they were.

        Parameters
        ----------
        model : transformers or PEFT model
        tokenizer : transformers tokenizer
        chat : bool, optional
            Whether questions are put in the chat format; None: where the tokenizer has one.

        Raises
        ------
        ConfigError
            Where the model cannot answer such tasks.
        """
        with _quiet(), _randomness_kept(), _without_inventory():
            with at_once():
                from lm_eval import simple_evaluate
                from lm_eval.models.huggingface import HFLM

            was_training = bool(model.training)
            model.eval()
            try:
                answering = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
                found = simple_evaluate(
                    answering,
                    tasks=self._specs,
                    num_fewshot=self.shots,
                    limit=self.limit or None,
                    bootstrap_iters=_BOOTSTRAP,
                    log_samples=False,
                    apply_chat_template=uses_chat(tokenizer, chat),
                    task_manager=self._manager,
                    random_seed=None,
                    numpy_random_seed=None,
                    torch_random_seed=None,
                    fewshot_random_seed=_SEED,
                )
            except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
                raise ConfigError(
                    f"tasks: the model cannot be put to them: {type(error).__name__}: "
                    f"{one_line(error, 300)}"
                ) from error
            finally:
                model.train(was_training)
        assert found is not None
        return {name: _figures(row) for name, row in found["results"].items() if _figures(row)}


def uses_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Return whether questions are put in the chat format.

    Raises
    ------
    ConfigError
        Where that is asked for and the tokenizer has no template.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise ConfigError("chat: the tokenizer has no chat template; leave chat=true out")
    return has if chat is None else chat


def _manager(names: Sequence[str]) -> Any:
    """Return a manager that knows the names, and reads the harness's thousands where it must."""
    own = _tasks_known(False)
    others = [name for name in names if name not in own.task_index and not _is_file(name)]
    if not others:
        return own
    texts = _task_files()
    unknown = [name for name in others if not any(name in text for text in texts.values())]
    if not unknown:  # to read all of their includes takes ten times as long as to look for a name
        mixed = any(_is_file(name) for name in names)  # a group of one's own, of any tasks
        found = _tasks_known(True, () if mixed else _folders(others, texts))
        unknown = [name for name in others if name not in found.task_index]
        if not unknown:
            return found
    said = {name for text in texts.values() for name in _NAMED.findall(text)}
    near = difflib.get_close_matches(unknown[0], [*own.all_tasks, *sorted(said)], n=1)
    hint = f': did you mean "{near[0]}"?' if near else "; lm-eval ls tasks names all"
    raise ConfigError(
        f'tasks: lm-eval has no task "{one_line(unknown[0], 80)}", and there is no such YAML '
        f"file{hint}"
    )


def _folders(names: Sequence[str], texts: Mapping[Path, str]) -> tuple[Path, ...]:
    """Return the folders of some single tasks; empty where one of them may be a group or a tag."""
    found: set[Path] = set()
    for name in names:
        line = re.compile(rf"""^["']?task["']?: *(["']?){re.escape(name)}\1 *$""", re.MULTILINE)
        files = [file for file, text in texts.items() if line.search(text)]
        if not files:
            return ()
        found |= {file.parent for file in files}
    return tuple(sorted(found))


@functools.cache
def _task_files() -> dict[Path, str]:
    """Return the texts of the harness's own tasks, and of what they include."""
    found = find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "tasks"
    files = [file for file in folder.rglob("*") if file.suffix in ("", ".yaml") and file.is_file()]
    return {file: file.read_text(encoding="utf-8", errors="replace") for file in files}


@functools.cache
def _tasks_known(of_harness: bool, folders: tuple[Path, ...] = ()) -> Any:
    """Return a manager of the package's own tasks, or also of the harness's: all, or a folder's."""
    with at_once():
        from lm_eval.tasks import TaskManager

    paths = [str(path) for path in (embedded.path(_EMBEDDED_TASKS), *folders)]
    return TaskManager(include_path=paths, include_defaults=of_harness and not folders)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _load(manager: Any, names: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Return the names of the single tasks, and the tasks and groups to ask for, data loaded."""
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a YAML file, its functions or the hub raise
            raise ConfigError(
                f'tasks: "{one_line(name, 80)}" cannot be loaded: {type(error).__name__}: '
                f"{one_line(error, 300)}"
            ) from error
        tasks.update(loaded["tasks"])
        groups.update(loaded.get("groups", {}))
    inner = {name for group in groups.values() for name in group.child_names}
    specs = [found for name, found in {**groups, **tasks}.items() if name not in inner]
    return sorted(tasks), specs


def _figures(row: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the metrics of a row of the harness's results, its filters' names left out."""
    figures: dict[str, Figure] = {}
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        known = isinstance(error, int | float) and np.isfinite(error)
        name = metric if kind == "none" else f"{metric} ({kind})"
        figures[name] = Figure(float(value), float(error or 0.0) if known else None)
    return figures


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Leave the generators of random numbers as they were: Flower draws nodes with one of them."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        torch.set_rng_state(kept[2])


@contextmanager
def _without_inventory() -> Iterator[None]:
    """Keep the harness from asking pip, git and compilers what is here: a second for each score."""
    with at_once():
        from lm_eval import evaluator

    kept = {name: getattr(evaluator, name) for name in _INVENTORY if hasattr(evaluator, name)}
    for name in kept:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(evaluator, name, function)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's advice, warnings, and bars over rows out of the terminal.

    Its bar over the questions stays: they take minutes.
    """
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            datasets.enable_progress_bars()
