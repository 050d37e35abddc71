"""A process that outlives a command that was killed, and ends what the command had started.

It reads a pipe whose other end only the command holds. When that closes and the command has not
taken leave, the command is gone, however it ended (kill -9, a crash): the guardian ends the
processes that it was told of, with all their descendants, and removes the command's temporary
folder, which may hold keys. It runs in a session of its own, so that neither Ctrl-C nor a closed
terminal reaches it.

This file is run as a program, by its path: it imports no package but psutil.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

import psutil

__all__ = ["Guardian", "watch"]

_LEAVE: Final = b"leave\n"
_TEMPORARY_PREFIXES: Final = ("cfl-", "compeft-warm-")
_PATIENCE_SECONDS: Final = 3.0
_LEAVE_SECONDS: Final = 10.0
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
        for process in seen.values():
            with contextlib.suppress(psutil.Error):  # neither ends one that has got an old id
                process.kill() if hard else process.terminate()
        _, living = psutil.wait_procs(list(seen.values()), timeout=_PATIENCE_SECONDS)
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
