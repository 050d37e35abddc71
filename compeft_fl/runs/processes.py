"""Processes that end together: what a run starts, and what those start in turn.

Ray detaches its processes from whoever started them, and some of them overwrite their environment
with their name, so no single trace finds them all. A process belongs to the family where its
environment carries the family's mark, where it descends from a member, or where it is in the
session of one. Ids of processes and of sessions are given again, so none is taken for a trace
without a look at who held it in between.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from compeft_fl.runs.guardian import Guardian, alive, end_servers, wait_until_ended

__all__ = ["ProcessFamily"]

_MARK: Final = "COMPEFT_FL_FAMILY"
_WAIT_SECONDS: Final = 0.02
_HAS_PROC: Final = hasattr(time, "CLOCK_BOOTTIME") and Path("/proc/self/stat").exists()


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
        self._born = _now()
        self._started: list[_Child] = []
        self._sessions: dict[int, _Session] = {}
        self._guardian: Guardian | None = None

    def guard(self) -> None:
        """Let the family, and its folder, not outlive this process, however that ends."""
        self._guardian = Guardian(self._folder, f"{_MARK}={self._mark}")

    def unguard(self) -> None:
        """Say that the family has ended and the folder is gone."""
        if self._guardian is not None:
            self._guardian.leave()
            self._guardian = None

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own (Ctrl-C does not reach it); output goes to `log`.

        Raises
        ------
        FileNotFoundError
            Where there is no such program.
        """
        with log.open("ab") as output:
            process = _Child(
                command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        self._sessions[process.pid] = _Session(process)
        if self._guardian is not None:
            with contextlib.suppress(psutil.Error):  # it has ended already
                self._guardian.tell([psutil.Process(process.pid)])
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
        in_session: list[tuple[psutil.Process, _Session]] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid in family or not alive(process):
                    continue
                if _birth(process) > self._born - 1 and self._is_marked(process):
                    family[process.pid] = process
                elif (session := self._sessions.get(os.getsid(process.pid))) is not None:
                    in_session.append((process, session))
        for process, session in in_session:
            with contextlib.suppress(psutil.Error, OSError):
                if session.holds(process):
                    family[process.pid] = process
        family.pop(os.getpid(), None)
        self._remember(family.values())
        return list(family.values())

    def end(self, patience: float = 10.0) -> None:
        """End the family: ServerApps, then politely those that were started here, then the others.

        After `patience`, hard, as ServerApps at once: see `compeft_fl.runs.guardian`.

        Parameters
        ----------
        patience : float
            Seconds that processes have to end by themselves.
        """
        members = self.members()
        end_servers(members)
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience / 2)
        members = _living([*members, *self.members()])
        _send(members, hard=False)
        wait_until_ended(members, patience / 2)
        while members := _living([*members, *self.members()]):  # again, for what was born meanwhile
            _send(members, hard=True)
            wait_until_ended(members, 1.0)
        for process in self._started:
            process.wait()

    def _descendants(self) -> list[psutil.Process]:
        """Return the living descendants of what was started, and remember their sessions."""
        found: list[psutil.Process] = []
        for process in self._started:
            if process.poll() is None:  # else its id may be another's by now
                with contextlib.suppress(psutil.Error):
                    parent = psutil.Process(process.pid)
                    found += [parent, *parent.children(recursive=True)]
        living = _living(found)
        self._remember(living)
        return living

    def _remember(self, processes: Iterable[psutil.Process]) -> None:
        """Note who is in which session, so that what they leave behind there is found."""
        processes = list(processes)
        if self._guardian is not None:
            self._guardian.tell(processes)
        for process in processes:
            with contextlib.suppress(OSError):
                session = os.getsid(process.pid)
                if session != os.getsid(0):
                    self._sessions.setdefault(session, _Session()).known[process.pid] = process

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(_MARK) == self._mark)
        except psutil.Error:  # of another user, or gone
            return False


class _Child(subprocess.Popen[bytes]):
    """A process that notes until when its id was its own: until it was waited for."""

    held_until: float = math.inf

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        if self.returncode is None and self.held_until == math.inf:
            now = _now()
            try:
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return None
                now = _now()
            except ChildProcessError:  # somebody else has waited for it
                pass
            self.held_until = now
        return super().poll()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it has ended; see `subprocess.Popen.wait`."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(_WAIT_SECONDS)
        return code


class _Session:
    """A session that members of the family are, or were, in.

    The system gives its id to nobody else while a process is in it, the dead that were not waited
    for included. So whoever is in it belongs to the family if a member that was seen there still
    is, or if it was born while that was so.
    """

    def __init__(self, leader: _Child | None = None) -> None:
        self.known: dict[int, psutil.Process] = {}
        self._leader = leader
        self._held_until = _now()

    def holds(self, process: psutil.Process) -> bool:
        """Whether a process that was just seen in a session of this id belongs to the family."""
        now = _now()
        self.known = {pid: known for pid, known in self.known.items() if known.is_running()}
        if self.known:
            self._held_until = now
            return True
        leader_until = self._leader.held_until if self._leader is not None else 0.0
        return _birth(process) <= max(self._held_until, leader_until)


def _now() -> float:
    """The time on the clock of `_birth`, which nobody can set where there is such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if _HAS_PROC else time.time()


def _birth(process: psutil.Process) -> float:
    """When a process was made, in seconds, rounded down to a hundredth or so."""
    if not _HAS_PROC:
        return float(process.create_time())
    fields = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime


def _send(processes: Iterable[psutil.Process], *, hard: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if hard else process.terminate()


def _living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return list({process.pid: process for process in processes if alive(process)}.values())
