"""A piece of work for other processes, in a module that they import at once."""

from __future__ import annotations

from pathlib import Path

from compeft_fl.errors import CompeftError


def count(file: Path, result: dict | None) -> dict:
    with file.open("a") as opened:
        opened.write("x")
    if result is None:
        raise CompeftError("this method does not fit")
    return dict(result)
