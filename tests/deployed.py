"""A deployment of `plain_federation` on loopback: real processes, TLS, node authentication."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import plain_federation
import psutil

from compeft_fl.deploy.deployment import Deployment

NODES = 2
SECONDS = 400.0  # the longest wait for anything
_LEVEL = re.compile(r"^(INFO|WARNING|ERROR) *: *")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Federation:
    """A SuperLink and two SuperNodes; runs can be submitted, and processes be ended."""

    def __init__(self, home: Path, timeout: float = 300.0) -> None:
        self.home = home
        self.folder = home / "federation"
        self.state = home / "state"
        for folder in (self.folder, self.state):
            folder.mkdir(exist_ok=True)
        environment = {
            "FEDERATION_FOLDER": str(self.folder),
            "FEDERATION_TIMEOUT": str(timeout),
            "COMPEFT_FL_STATE_DIR": str(self.state),
        }
        self.deployment = Deployment(home, environment, num_nodes=NODES, warm=False)
        self.nodes: list[subprocess.Popen] = []
        self._log: subprocess.Popen

    def __enter__(self) -> Federation:
        self.deployment.__enter__()
        self.nodes = [self.deployment.start_node(index) for index in range(NODES)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.deployment.__exit__(kind, error, trace)

    def submit(self) -> str:
        app = self.home / "app"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(plain_federation.PROJECT, encoding="utf-8")
        shutil.copy(plain_federation.__file__, app)
        run_id = self.deployment.submit(app)
        self._log = self.deployment.stream_log(run_id, self.home / f"run-{run_id}.log")
        return run_id

    def wait_for(self, what: Callable[[], object], said: str) -> None:
        until = time.monotonic() + SECONDS
        while not what():
            assert time.monotonic() < until, f"{said}: not within {SECONDS:g} s\n{self.logs()}"
            time.sleep(0.1)

    def finished(self, run_id: str) -> str:
        """How the run ended, as Flower says."""
        status = [""]

        def ended() -> bool:
            time.sleep(1.0)  # asking takes a second of a core
            status[0], _ = self.deployment.status(run_id)
            return status[0].startswith("finished")

        self.wait_for(ended, "the run's end")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._log.wait(10)
        return status[0]

    def hold(self, partition: int, server_round: int) -> Path:
        """Let this node's training of this round wait, until the file is removed."""
        file = self.folder / f"hold-{partition}-{server_round}"
        file.touch()
        return file

    def in_training(self, partition: int, server_round: int) -> psutil.Process:
        """The ClientApp's process, once it trains."""
        file = self.folder / f"training-{partition}-{server_round}"
        self.wait_for(lambda: file.exists() and file.read_text(), f"training {file.name}")
        return psutil.Process(int(file.read_text()))

    def program(self, name: str) -> psutil.Process:
        """The process that runs a program of Flower's."""
        found = []
        for member in self.deployment.family.members():
            if any(Path(part).name == name for part in member.cmdline()[:2]):
                found.append(member)
        assert len(found) == 1, (name, found)
        return found[0]

    def events(self) -> list[dict]:
        file = self.folder / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def final(self) -> np.ndarray:
        return np.load(self.folder / "final.npy")

    def logs(self) -> str:
        texts = [
            f"--- {log.name}\n" + log.read_text(errors="replace")
            for log in sorted(self.home.glob("*.log"))
        ]
        return _COLOUR.sub("", "\n".join(texts))

    def said(self, *words: str) -> str:
        """The first line of the logs that has the words; it must be there."""
        for line in self.logs().splitlines():
            if all(word in line for word in words):
                return _LEVEL.sub("", line.strip())
        raise AssertionError(f"no line with {words} in\n{self.logs()}")
