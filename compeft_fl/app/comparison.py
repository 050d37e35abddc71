"""``compeft-fl evaluate``: a base model in some tasks, alone and with the adapter of a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from compeft_fl.app.chat import adapter_folder, stored_config
from compeft_fl.app.config import parse_assignment, suggestion
from compeft_fl.app.config_values import checked, key
from compeft_fl.app.evaluation import Harness, Scores, uses_chat
from compeft_fl.app.tasks import language_model
from compeft_fl.errors import ConfigError

__all__ = ["Comparison", "Settings", "compare"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``compeft-fl evaluate`` can be told; its help says what each key means.

    Raises
    ------
    ConfigError
        Where a value does not fit.
    """

    tasks: str = key("", "names of tasks, groups or tags, or YAML files, by comma")
    limit: int = key(0, "the first questions of each task; 0: all", low=0)
    shots: int = key(-1, "examples in front of each question; -1: as the task has it", low=-1)
    chat: str = key("auto", "questions in the chat format", choices=("auto", "true", "false"))
    batch_size: int = key(16, "questions at once", low=1)
    model: str = key("", "another place of the base model")
    quantization: str = key("", "how it is loaded", choices=("none", "4bit", "8bit"))
    device: str = key("auto", "auto, cpu, cuda, ...")
    trust_remote_code: bool = key(False, "run the Python code that comes with the base model")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                checked(field.name.replace("_", "-"), value, field.metadata)

    @classmethod
    def of(cls, assignments: Sequence[str]) -> Self:
        """Return the settings of ``key=value`` as typed on a command line.

        Examples
        --------
        >>> Settings.of(["tasks=debian", "limit=20"]).limit
        20
        """
        known = {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for assignment in assignments:
            name, value = parse_assignment(assignment)
            if name not in known:
                raise ConfigError(f'unknown key "{name}"{suggestion(name, known)}')
            if known[name].metadata["kind"] == "text":
                value = str(value).lower() if isinstance(value, bool) else str(value)
            values[known[name].name] = value
        return cls(**values)


@dataclass(frozen=True)
class Comparison:
    """What a base model reaches in some tasks alone, and with an adapter."""

    folder: str
    base: str
    settings: Settings
    chat: bool
    base_scores: Scores
    adapter: Scores

    @property
    def questions(self) -> str:
        """One line of how it was asked."""
        how = "in the chat format" if self.chat else "as plain text"
        shots = "" if self.settings.shots < 0 else f", {self.settings.shots} examples before each"
        most = (
            f"the first {self.settings.limit} questions" if self.settings.limit else "all questions"
        )
        return f"{most} of each task, {how}{shots}"

    def to_plain(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        return {
            "adapter": self.folder,
            "base": self.base,
            "settings": dataclasses.asdict(self.settings),
            "chat": self.chat,
            "lm_eval": version("lm_eval"),
            "results": {
                task: {
                    metric: {
                        "base": self.base_scores[task][metric].value,
                        "base_stderr": self.base_scores[task][metric].error,
                        "adapter": figure.value,
                        "adapter_stderr": figure.error,
                    }
                    for metric, figure in metrics.items()
                }
                for task, metrics in self.adapter.items()
            },
        }


def compare(folder: Path, settings: Settings) -> Comparison:
    """Put a base model to tasks, alone and with the adapter of a folder or run.

    Raises
    ------
    ConfigError
        Where lm-eval is missing, a task is unknown or its data cannot be had, the folder's adapter
        is none of a language model, or does not fit the base.
    AdapterError
        Where the folder's files are missing or broken, or the adapter is one of another base.
    MissingPackageError
        Where the base is to be quantised and bitsandbytes is not installed.
    """
    folder = adapter_folder(folder)
    config = stored_config(
        folder,
        model=settings.model or None,
        quantization=settings.quantization or None,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    harness = Harness(
        settings.tasks,
        limit=settings.limit,
        shots=None if settings.shots < 0 else settings.shots,
        batch_size=settings.batch_size,
    )
    model = language_model.with_adapter(config, folder)
    wanted = {"auto": None, "true": True, "false": False}[settings.chat]
    chat = not model.seq2seq and uses_chat(model.tokenizer, wanted)
    with model.network.disable_adapter():
        base = harness.score(model.network, model.tokenizer, chat=chat)
    adapter = harness.score(model.network, model.tokenizer, chat=chat)
    return Comparison(str(folder), config.model, settings, chat, base, adapter)
