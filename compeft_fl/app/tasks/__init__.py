"""What the ready-made app trains: its tasks, by name.

A task is one file: a subclass of `compeft_fl.app.tasks.base.Task`, and its line here. Nothing is
imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from compeft_fl.app.imports import at_once, import_peft

if TYPE_CHECKING:
    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.tasks.base import Task

__all__ = ["TASKS", "prepare"]

TASKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "classification": "compeft_fl.app.tasks.classification:Classification",
        "instruction": "compeft_fl.app.tasks.instruction:InstructionTuning",
    }
)
"""Name of a task -> where its class is."""


def prepare(config: AppConfig) -> Task:
    """Return the task of a configuration, its data loaded and its model built.

    Raises
    ------
    ConfigError
        Where data, model or a key of theirs does not fit.
    """
    module, _, name = TASKS[config.task].partition(":")
    with at_once():
        found = import_module(module)
        from compeft_fl.app.tasks.whole_network import METHODS

        if config.peft_method not in METHODS:
            import_peft()
    task: Task = getattr(found, name)(config)
    return task
