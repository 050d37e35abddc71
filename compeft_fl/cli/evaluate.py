"""``compeft-fl evaluate``: reads its arguments here, and imports the rest when it is called."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from compeft_fl.errors import ConfigError

__all__ = ["add_parser", "run"]

_DESCRIPTION: Final = """\
Put a language model to tasks of lm-evaluation-harness: the base alone, then with the adapter of
FOLDER.

Tasks are names of the harness's own (mmlu, bbh, glue, hellaswag, ...), YAML files, or those that
come with the package, on held-out packages of Debian: debian_language, debian_role, debian_section
(rank classification), debian_synopsis, or debian for all of them.
"""
_EPILOG: Final = """\
keys:
  tasks=NAME,...            the tasks, by comma
  limit=N                   the first N questions of each task (default all)
  shots=N                   examples in front of each question (default: as the task has it)
  chat=true|false           questions in the chat format (default: where the tokenizer has one)
  batch-size=N              questions at once (default 16)
  model=NAME                another place of the base: a hub id, a folder
  quantization=none|8bit|4bit  how the base is loaded (default: as the adapter was trained)
  device=DEVICE             auto, cpu, cuda, ... (default auto)
  trust-remote-code=true    run the Python code that comes with the base model

examples:
  compeft-fl evaluate runs/latest/adapter tasks=debian limit=100
  compeft-fl evaluate my-lora tasks=mmlu,bbh shots=5 -o scores.json
  compeft-fl evaluate my-lora tasks=my_task.yaml
"""


def add_parser(commands: Any) -> None:
    """Add ``evaluate`` to the command line's subparsers."""
    parser = commands.add_parser(
        "evaluate",
        help="put an adapter of a language model to lm-eval's tasks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an adapter folder")
    parser.add_argument("assignments", metavar="key=value", nargs="+", help="see below")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path,
        help="the JSON file to write (FOLDER/evaluation.json)",
    )  # fmt: skip
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments of ``evaluate`` say and return the exit code."""
    from compeft_fl.app import comparison
    from compeft_fl.cli.tables import Table, say

    settings = comparison.Settings.of(options.assignments)
    output = options.output or options.folder / "evaluation.json"
    if not output.parent.is_dir():
        raise ConfigError(f"expected a folder to write to, found none: {output.parent}")
    found = comparison.compare(options.folder, settings)
    output.write_text(json.dumps(found.to_plain(), indent=2) + "\n", encoding="utf-8")
    table = Table(
        f"{found.base}: base against adapter",
        ["task", "metric", "base", "adapter", "change", "± adapter"],
        left=["task", "metric"],
    )
    for task, metrics in found.adapter.items():
        for metric, figure in metrics.items():
            base = found.base_scores[task][metric]
            error = "-" if figure.error is None else f"{figure.error:.4f}"
            change = f"{figure.value - base.value:+.4f}"
            table.add_row(task, metric, f"{base.value:.4f}", f"{figure.value:.4f}", change, error)
    table.print()
    say(f"{found.questions}; written to {output}")
    return 0
