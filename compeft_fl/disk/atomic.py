"""Files that are replaced as a whole, and locks that the kernel lets go when their holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["PRIVATE_FILE", "PRIVATE_FOLDER", "locked", "replacing"]

PRIVATE_FILE: Final = 0o600
PRIVATE_FOLDER: Final = 0o700


@contextlib.contextmanager
def replacing(file: Path, *, private: bool = False, synced: bool = True) -> Iterator[Path]:
    """A name beside the file to write to; it takes the file's place when all went well.

    What was written is on the disk before the name changes, and the new name before this returns.

    Parameters
    ----------
    file : Path
    private : bool
        For its owner only, at every moment.
    synced : bool
        False: the disk need not have it yet. After a power cut the name may stand for other bytes,
        which is for files whose readers find that out.

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
        if private:
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
        yield temporary
        if synced:
            _sync(temporary, os.O_RDWR)
        temporary.replace(file)
        if synced:
            _sync(file.parent, os.O_RDONLY)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True, make: bool = True) -> Iterator[None]:
    """Hold the lock that a file is, until the end of the block.

    It is a lock among processes, and among those who take it within one process. A process that
    is killed holds nothing any more.

    Parameters
    ----------
    file : Path
        In a folder that exists.
    wait : bool
        Until whoever holds it lets it go.
    make : bool
        The file, where it is missing.

    Raises
    ------
    BlockingIOError
        Somebody else holds it, and `wait` is False.
    OSError
        It cannot be opened; FileNotFoundError where it, or its folder, is gone.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0)
    while True:
        handle = os.open(file, flags, PRIVATE_FILE)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_still(file, handle):
                yield
                return
        finally:
            os.close(handle)  # somebody has removed the file meanwhile: what is held is no lock


def _is_still(file: Path, handle: int) -> bool:
    """Whether a name still stands for an open file."""
    try:
        return os.path.samestat(os.lstat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sync(path: Path, flags: int) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # folders cannot be opened there
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
