"""What bench paper measures, piece by piece: each stored once, whoever measures it.

A piece's result is JSON in the folder. Several processes can work at the same folder, on this
machine or on several that share it: who measures a piece, or trains an expert, holds its lock.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compeft_fl.bench import results
from compeft_fl.disk.atomic import locked, replacing
from compeft_fl.errors import CompeftError, ParameterError

__all__ = ["Piece", "chosen", "held", "measure"]


@dataclass(frozen=True)
class Piece:
    """Something to measure.

    Attributes
    ----------
    part, name : str
        A name of the benchmark's parts, and one within it.
    measure : callable
        Gives what is stored, as JSON has it.
    depends : str
        What it depends on: another text, and it is measured anew.
    """

    part: str
    name: str
    measure: Callable[[], dict[str, Any]]
    depends: str

    @property
    def key(self) -> str:
        """The name of its file, and what ``--pieces`` is compared with."""
        return f"{self.part}-{self.name}"

    def file(self, folder: Path) -> Path:
        """Where its result lies."""
        return folder / f"{self.key}.json"

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What has been measured; None: nothing yet, or something else."""
        try:
            found: dict[str, Any] = json.loads(self.file(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("depends") == self.depends else None

    def measured(self, folder: Path) -> dict[str, Any]:
        """Its result: the stored one, or measured now and stored."""
        with held(self.file(folder)):
            if (known := self.result(folder)) is not None:
                return known
            started = time.process_time()
            found = self.measure()
            found |= {"depends": self.depends, "seconds": round(time.process_time() - started, 1)}
            with replacing(self.file(folder)) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the lock of a file that is being made; another process waits for it."""
    folder = file.parent / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / file.name):
        yield


def chosen(pieces: Sequence[Piece], patterns: str | None) -> list[Piece]:
    """The pieces whose keys fit one of several patterns with ``*``, by comma; None: all.

    Raises
    ------
    ParameterError
        None of them does.
    """
    if patterns is None:
        return list(pieces)
    wanted = patterns.split(",")
    found = [p for p in pieces if any(fnmatch.fnmatchcase(p.key, each) for each in wanted)]
    if not found:
        known = ", ".join(piece.key for piece in pieces[:4])
        raise ParameterError(f"expected a pattern of pieces, as {known}, ...; found {patterns!r}")
    return found


def measure(pieces: Sequence[Piece], folder: Path, workers: int = 1) -> None:
    """Measure what is missing, so many at a time, each in one thread.

    A piece that cannot be measured, as a method that does not fit the model, is said and left out.
    """
    missing = [piece for piece in pieces if piece.result(folder) is None]
    results.say(
        f"{len(pieces)} pieces, {len(pieces) - len(missing)} of them measured before. "
        "Stop it when you like: what is measured stays."
    )
    failed: list[str] = []
    with results.Progress("paper", len(missing)) as progress:
        for key, error in _errors(missing, folder, workers, progress):
            if error:
                failed.append(f"{key}: {error}")
                results.say(failed[-1])
    if failed:
        results.say(f"{len(failed)} pieces could not be measured; the page leaves them out")


def _errors(
    pieces: Sequence[Piece], folder: Path, workers: int, progress: results.Progress
) -> Iterator[tuple[str, str]]:
    """Each piece's key as it is done, and what went wrong with it."""
    if workers == 1:
        for piece in pieces:
            progress.step(piece.key, 1)
            yield piece.key, _error_of(piece, folder)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = {pool.submit(_error_of, piece, folder): piece for piece in pieces}
        try:
            for done in as_completed(running):
                progress.note(f"{running[done].key} is measured")
                progress.advance(1)
                yield running[done].key, done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _error_of(piece: Piece, folder: Path) -> str:
    import torch

    torch.set_num_threads(1)  # small matrices gain nothing from more
    try:
        piece.measured(folder)
    except CompeftError as error:
        return str(error)
    return ""
