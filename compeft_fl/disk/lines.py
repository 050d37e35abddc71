"""Text files that grow line by line: a full disk costs lines, and a cut-off line is taken away."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

__all__ = ["Lines"]

_BLOCK = 4096


class Lines:
    r"""Appends whole lines to a file; what cannot be written is missing, with one line in the log.

    Parameters
    ----------
    path : Path
        In a folder that exists. What a kill left after its last whole line is cut off.
    logger : logging.Logger

    Attributes
    ----------
    broken : bool
        Whether a line is missing.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "journal"
    >>> _ = path.write_text("whole\ncut o")
    >>> Lines(path, logging.getLogger()).add("next")
    True
    >>> path.read_text()
    'whole\nnext\n'
    """

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        self.path = path
        self.broken = False
        self._logger = logger
        try:
            _cut_to_whole_lines(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain(error)

    def add(self, *lines: str) -> bool:
        """Append lines, which have no ends, and return whether all are there; else none is."""
        data = "".join(line + "\n" for line in lines).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(before)  # no half line that the next one would go on with
                    raise
        except OSError as error:
            self._complain(error)
            return False
        return True

    def _complain(self, error: OSError) -> None:
        if not self.broken:
            self.broken = True
            self._logger.warning("%s has gaps from here on: %s", self.path.name, error)


def _cut_to_whole_lines(path: Path) -> None:
    with path.open("rb+") as file:
        size = at = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - _BLOCK)
            file.seek(start)
            end = file.read(at - start).rfind(b"\n")
            if end >= 0:
                at = start + end + 1
                break
            at = start
        if at < size:
            file.truncate(at)
