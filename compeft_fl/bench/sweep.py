"""Runs of a sweep, each in a process of its own and stored when it has finished.

A folder holds ``NAME-SEED.json`` per finished run and, beside it, ``NAME-SEED.updates`` with the
run's ternary Updates. What is there is not run again, so a sweep can be stopped at any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench.federation import Federation, Setting, timed
from compeft_fl.errors import CompeftError

__all__ = ["Job", "read_updates", "run_jobs", "seeds_of", "show_jobs", "work"]

EMBEDDINGS: Final = "embeddings.npz"
_LOOK_SECONDS: Final = 0.5
_HEAD_BYTES: Final = 13  # of an update in a file: direction, round, nodes, size


@dataclass(frozen=True)
class Job:
    """One run: a setting, a seed, and the app's keys that differ from their defaults."""

    setting: Setting
    seed: int
    num_nodes: int
    keys: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """The name of its files."""
        return f"{self.setting.name}-{self.seed}"

    def file(self, folder: Path) -> Path:
        """Where its result lies."""
        return folder / f"{self.key}.json"

    def finished(self, folder: Path) -> dict[str, Any] | None:
        """Its result; None where there is none, or one of another setting under this name."""
        try:
            found: dict[str, Any] = json.loads(self.file(folder).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return found if found["job"] == self.plain() else None

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "setting": asdict(self.setting),
            "seed": self.seed,
            "num_nodes": self.num_nodes,
            "keys": dict(self.keys),
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Job:
        """The job that `plain` gave."""
        keys = tuple(plain["keys"].items())
        return cls(Setting(**plain["setting"]), plain["seed"], plain["num_nodes"], keys)


def run_jobs(jobs: Iterable[Job], folder: Path, workers: int) -> Iterator[dict[str, list[str]]]:
    """Run what is missing, several at a time; yields what runs and its last line, now and then.

    Raises
    ------
    CompeftError
        When all others have finished: some failed; what the first wrote last is in the message.
    """
    waiting = [job for job in jobs if job.finished(folder) is None]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                if job.finished(folder) is None:  # by another sweep into this folder
                    running[job.key] = _start(job, folder)
            time.sleep(_LOOK_SECONDS)
            for key, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[key]
                log = folder / f"{key}.log"
                if code:
                    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                    last = lines[-1] if lines else "nothing"
                    failed.append(f"the run {key} ended with {code}; {log} ends: {last}")
                else:
                    log.unlink()
            yield {key: _progress(folder / f"{key}.log") for key in running}
        if failed:
            more = f" ({len(failed)} runs failed)" if len(failed) > 1 else ""
            raise CompeftError(failed[0] + more)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def seeds_of(text: str | None) -> list[int] | None:
    """The numbers of ``--seeds``; None where it is not given.

    Raises
    ------
    CompeftError
        No numbers.
    """
    try:
        return [int(seed) for seed in text.split(",")] if text else None
    except ValueError:
        raise CompeftError(f"--seeds: expected numbers as in 42,43; found {text}") from None


def show_jobs(
    jobs: Sequence[Job], folder: Path, workers: int | None, cpu_seconds: Sequence[float]
) -> None:
    """Run what is missing, and show how far it is.

    Parameters
    ----------
    jobs : sequence of Job
    folder : Path
    workers : int, optional
        Runs at a time. Default: the cores.
    cpu_seconds : sequence of float
        What each takes, about.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    workers = workers or _cores()
    missing = [job for job in jobs if job.finished(folder) is None]
    seconds = sum(s for job, s in zip(jobs, cpu_seconds, strict=True) if job in missing)
    console = Console(stderr=True)
    console.print(
        f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done before; about "
        f"{-(-seconds // (60 * workers)):.0f} minutes with {workers} at a time. Stop it when you "
        "like: finished runs stay."
    )
    rounds = {job.key: dict(job.keys).get("rounds", 10) + 1 for job in missing}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("all runs", total=sum(rounds.values()))
        for running in run_jobs(missing, folder, workers):
            done = {job.key for job in missing if job.finished(folder) is not None}
            finished = sum(rounds[key] for key in done) + sum(map(len, running.values()))
            now = [f"{key}: {lines[-1] if lines else 'starting'}" for key, lines in running.items()]
            progress.update(
                whole,
                completed=finished,
                description=f"{len(done)}/{len(missing)} runs; " + "; ".join(now),
            )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with (folder / f"{job.key}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "compeft_fl.bench.sweep", json.dumps(job.plain()), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _progress(log: Path) -> list[str]:
    """The rounds that a run has told of."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith("round ")]


def work(job: Job, folder: Path) -> None:
    """Do one job in this process, and store its result."""
    import torch

    from compeft_fl.app.config import AppConfig

    torch.set_num_threads(1)
    config = AppConfig.from_run_config({**dict(job.keys), "seed": job.seed})
    federation = Federation(job.setting, config, job.num_nodes, folder / EMBEDDINGS)
    rounds: list[dict[str, Any]] = []
    updates: list[bytes] = []
    seconds = 0.0
    for score, taken in timed(federation.run()):
        number = len(rounds)
        seconds += taken
        rounds.append({**score.numbers(), "cpu_seconds": round(taken, 2)})
        updates += [_packed(number, *update) for update in score.updates]
        told = "" if score.accuracy is None else f" accuracy {100 * score.accuracy:.1f} %"
        print(f"round {number}/{config.rounds}{told}", flush=True)
    _replace(folder / f"{job.key}.updates", b"".join(updates))
    result = {
        "job": job.plain(),
        "num_parameters": federation.adapter.num_parameters,
        "layout": [[t.name, list(t.shape)] for t in federation.adapter.layout.tensors],
        "cpu_seconds": round(seconds, 1),
        "rounds": rounds,
    }
    _replace(job.file(folder), (json.dumps(result, indent=1) + "\n").encode())


def read_updates(file: Path) -> Iterator[tuple[int, str, int, bytes]]:
    """The Updates of a run: round, direction ("up" or "down"), nodes, and the Update's bytes."""
    data = file.read_bytes()
    at = 0
    while at < len(data):
        head = data[at : at + _HEAD_BYTES]
        number, nodes, size = (int.from_bytes(head[i : i + 4], "little") for i in (1, 5, 9))
        at += _HEAD_BYTES
        yield number, "up" if head[:1] == b"u" else "down", nodes, data[at : at + size]
        at += size


def _packed(number: int, direction: str, nodes: int, blob: bytes) -> bytes:
    numbers = b"".join(value.to_bytes(4, "little") for value in (number, nodes, len(blob)))
    return direction[:1].encode() + numbers + blob


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.replace(path)


if __name__ == "__main__":
    work(Job.of(json.loads(sys.argv[1])), Path(sys.argv[2]))
