"""How benchmarks show and keep their figures: a table on the terminal, CSV and Markdown files."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import compeft_fl

__all__ = ["Progress", "machine", "say", "show_table", "write_csv", "write_markdown"]


def say(text: str) -> None:
    """One line on stderr: what will be done, and what is left out."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar with the time that is left, on stderr; where that is no terminal, a line per step.

    Parameters
    ----------
    title : str
    total : float
        Of all steps.
    """

    def __init__(self, title: str, total: float) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar
        from rich.progress import TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (*Bar.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._title, self._lines = title, not console.is_terminal
        self._task = self._bar.add_task(title, total=total)
        self._pending = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.advance(self._pending)
        self._bar.stop()

    def step(self, text: str, weight: float) -> None:
        """The next step begins, and the one before is done."""
        self.advance(self._pending)
        self._pending = weight
        self.note(text)

    def note(self, text: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=f"{self._title}: {text}")
        if self._lines:
            say(f"{self._title}: {text}")

    def advance(self, weight: float) -> None:
        """So much of the total is done."""
        self._bar.advance(self._task, weight)


def machine() -> str:
    """The line above every table: version, machine, date."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"compeft-fl {compeft_fl.__version__}, {platform.machine()}, {cores} cores, "
        f"Python {platform.python_version()}, {datetime.date.today()}"
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as a CSV file, as a whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(path)


def write_markdown(
    path: Path, command: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: str = ""
) -> None:
    """Write a table with the command, the date and the machine that made it."""
    lines = [f"`{command}`: {machine()}", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if notes:
        lines += ["", notes]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns of numbers stand right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=machine(), title_justify="left", caption_justify="left")
    for index, head in enumerate(heads):
        numeric = all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        justify: Any = "right" if numeric else "left"
        table.add_column(head, justify=justify, no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
