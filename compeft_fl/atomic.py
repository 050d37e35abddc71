"""Files that are replaced as a whole: after a crash there is the old one or the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside the file to write to; it takes the file's place when all went well.

    What was written is on the disk before the name changes, and the new name before this returns.

    Raises
    ------
    OSError
        The disk is full, say; the old file is as it was.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "state"
    >>> with replacing(file) as temporary:
    ...     _ = temporary.write_bytes(b"new")
    >>> file.read_bytes()
    b'new'
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(file)
        _sync(file.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # folders cannot be opened there
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
