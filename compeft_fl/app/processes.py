"""Processes that end together: what a run starts, and what those start in turn.

Ray detaches its processes from whoever started them, and some of them overwrite their environment
with their name, so no single trace finds them all. A process belongs to the family where its
environment carries the family's mark, where it descends from a member, or where it is in the
session of one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

__all__ = ["ProcessFamily"]

_MARK: Final = "COMPEFT_FL_FAMILY"


class ProcessFamily:
    """Starts processes, and ends them with all their descendants.

    Parameters
    ----------
    environment : mapping of str to str
        What the processes see, whole.
    folder : Path
        Where they run.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._environment = {**environment, _MARK: self._mark}
        self._folder = folder
        self._born = time.time()
        self._started: list[subprocess.Popen[bytes]] = []
        self._sessions: set[int] = set()

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own (Ctrl-C does not reach it); output goes to `log`.

        Raises
        ------
        FileNotFoundError
            Where there is no such program.
        """
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        self._sessions.add(process.pid)
        return process

    def call(self, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return its output.

        Raises
        ------
        subprocess.TimeoutExpired
            Where it takes longer than `timeout` seconds; it is ended.
        """
        return subprocess.run(
            command,
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            start_new_session=True,
            check=False,
        )

    def running(self, program: str) -> bool:
        """Return whether a descendant of a started process runs `program` (its file's name)."""
        found = False
        for child in self._descendants():
            with contextlib.suppress(psutil.Error):
                found |= any(Path(part).name == program for part in child.cmdline()[:2])
        return found

    def members(self) -> list[psutil.Process]:
        """Return all living processes of the family."""
        family = {process.pid: process for process in self._descendants()}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
                if process.create_time() < self._born - 1 or not _alive(process):
                    continue
                if self._session(process) in self._sessions or self._is_marked(process):
                    family[process.pid] = process
        family.pop(os.getpid(), None)
        return list(family.values())

    def end(self, patience: float = 10.0) -> None:
        """End the family: politely, those that were started here first; after `patience`, hard.

        Parameters
        ----------
        patience : float
            Seconds that processes have to end by themselves.
        """
        members = self.members()
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience / 2)
        members = _living([*members, *self.members()])
        _send(members, hard=False)
        psutil.wait_procs(members, timeout=patience / 2)
        while members := _living([*members, *self.members()]):  # again, for what was born meanwhile
            _send(members, hard=True)
            psutil.wait_procs(members, timeout=1.0)
        for process in self._started:
            process.wait()

    def _descendants(self) -> list[psutil.Process]:
        """Return the living descendants of what was started, and remember their sessions."""
        found: list[psutil.Process] = []
        for process in self._started:
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                found += [parent, *parent.children(recursive=True)]
        living = _living(found)
        for child in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self._sessions.add(self._session(child))
        self._sessions.discard(0)
        return living

    def _session(self, process: psutil.Process) -> int:
        """Return the id of a process's session; that of this very process counts for nothing."""
        session = os.getsid(process.pid)
        return 0 if session == os.getsid(0) else session

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(_MARK) == self._mark)
        except psutil.Error:  # of another user, or gone
            return False


def _send(processes: Iterable[psutil.Process], *, hard: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if hard else process.terminate()


def _living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return list({process.pid: process for process in processes if _alive(process)}.values())


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
