"""A process that outlives a command that was killed, and ends what the command had started.

It reads a pipe whose other end only the command holds. When that closes and the command has not
taken leave, the command is gone, however it ended (kill -9, a crash): the guardian ends the
processes that it was told of, with all their descendants, and removes the command's temporary
folder, which may hold keys. It runs in a session of its own, so that neither Ctrl-C nor a closed
terminal reaches it.

A ServerApp takes nodes that are ended for nodes that fail: it would merge the round without them,
write a checkpoint, and a run that is resumed would not be the one that it was. So it is ended
first, and at once; its files are replaced as a whole.

This file is run as a program, by its path: it imports no package but psutil.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

import psutil

__all__ = ["Guardian", "alive", "end_servers", "wait_until_ended", "watch"]

_SERVER_PROGRAMS: Final = frozenset({"flwr-serverapp", "flwr-simulation"})
_LEAVE: Final = b"leave\n"
_TEMPORARY_PREFIXES: Final = ("cfl-", "compeft-warm-")
_PATIENCE_SECONDS: Final = 3.0
_SERVER_SECONDS: Final = 5.0
_LEAVE_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.02
_SAME_SECONDS: Final = 1.0  # births are computed from a clock that may be set


class Guardian:
    """The command's side: starts the guardian, tells it of processes, and takes leave of it.

    Parameters
    ----------
    folder : Path
        The command's temporary folder.
    mark : str, optional
        ``NAME=value``, which the environment of what the command starts carries.
    """

    def __init__(self, folder: Path, mark: str = "") -> None:
        self._told: set[tuple[int, float]] = set()
        self._process: subprocess.Popen[bytes] | None = None
        program = [sys.executable, "-P", str(Path(__file__).resolve()), str(folder), mark]
        with contextlib.suppress(OSError):  # a command that cannot be guarded works all the same
            self._process = subprocess.Popen(
                program,
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def tell(self, processes: Iterable[psutil.Process]) -> None:
        """Tell of processes that shall not outlive the command."""
        new = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                known = process.pid, process.create_time()
                if known not in self._told:
                    self._told.add(known)
                    new.append(known)
        self._send("".join(json.dumps(known) + "\n" for known in new).encode())

    def leave(self) -> None:
        """Say that all is ended and removed, and wait for the guardian's end."""
        self._send(_LEAVE)
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVE_SECONDS)

    def _send(self, message: bytes) -> None:
        if message and self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # somebody has ended it
                self._process.stdin.write(message)
                self._process.stdin.flush()


def watch(pipe: IO[bytes], folder: Path, mark: str = "") -> None:
    """The guardian's side: read until the pipe ends, and end what there is then.

    Parameters
    ----------
    pipe : binary file
        Lines with the id of a process each, and when it was born; or one that says that nothing is
        left to do.
    folder, mark
        As of `Guardian`.
    """
    known: dict[int, psutil.Process] = {}
    for line in pipe:
        if line == _LEAVE:
            return
        with contextlib.suppress(ValueError, psutil.Error):
            pid, born = json.loads(line)
            process = psutil.Process(pid)
            if abs(process.create_time() - born) < _SAME_SECONDS:
                known[pid] = process
    _end(list(known.values()), mark)
    if folder.name.startswith(_TEMPORARY_PREFIXES):
        shutil.rmtree(folder, ignore_errors=True)


def end_servers(processes: Iterable[psutil.Process]) -> None:
    """End those of some processes in which a ServerApp runs, and wait until they are gone."""
    servers = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if _SERVER_PROGRAMS.intersection(Path(part).name for part in process.cmdline()[:2]):
                process.kill()
                servers.append(process)
    wait_until_ended(servers, _SERVER_SECONDS)


def wait_until_ended(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Wait so many seconds at most until processes have ended; return those that have not.

    One that ended counts also where its parent has not asked for it: in a container without an
    init, nobody asks for orphans.
    """
    until = time.monotonic() + timeout
    living = [process for process in processes if alive(process)]
    while living and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        living = [process for process in living if alive(process)]
    return living


def alive(process: psutil.Process) -> bool:
    """Whether a process runs still."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(known: list[psutil.Process], mark: str) -> None:
    """End processes and all that comes of them: politely, and what is left after a while, hard."""
    seen: dict[int, psutil.Process] = {}
    for hard in (False, True, True):
        for process in [*known, *_marked(mark)]:
            with contextlib.suppress(psutil.Error):
                if process.is_running():
                    seen.setdefault(process.pid, process)
                    for child in process.children(recursive=True):
                        seen.setdefault(child.pid, child)
        seen.pop(os.getpid(), None)
        end_servers(seen.values())
        for process in seen.values():
            with contextlib.suppress(psutil.Error):  # neither ends one that has got an old id
                process.kill() if hard else process.terminate()
        living = wait_until_ended(seen.values(), _PATIENCE_SECONDS)
        known = list(seen.values())
        seen = {process.pid: process for process in living}


def _marked(mark: str) -> list[psutil.Process]:
    name, _, value = mark.partition("=")
    found = []
    for process in psutil.process_iter() if value else ():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value:
                found.append(process)
    return found


if __name__ == "__main__":
    watch(sys.stdin.buffer, Path(sys.argv[1]), sys.argv[2])
