"""Connections to the SQLite file of an index: one that writes, and a few that read.

Threads take a connection for as long as a question takes, and the one used last is taken first: its
pages and statements are at hand. One for each thread would map the whole file as often as there
are threads.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from compeft_fl.errors import ExpertError, StoreFullError

__all__ = ["Connections"]

_BUSY_SECONDS: Final = 30.0
_READERS: Final = min(4, os.cpu_count() or 1)  # at a time: more than cores gain nothing
_MAPPED: Final = 1 << 30  # bytes of the file that all connections read in one place


class Connections:
    """Connections to one file, for all threads of a process.

    Parameters
    ----------
    file : Path
        Is made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._readers: queue.LifoQueue[sqlite3.Connection | None] = queue.LifoQueue()
        for _ in range(_READERS):
            self._readers.put(None)  # opened when it is needed

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()

    def _connect(self) -> sqlite3.Connection:
        found = sqlite3.connect(
            self._file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        found.execute("PRAGMA synchronous = FULL")
        found.execute(f"PRAGMA mmap_size = {_MAPPED}")
        found.execute("PRAGMA foreign_keys = ON")
        with self._lock:
            self._open.append(found)
        return found

    @contextlib.contextmanager
    def writer(self) -> Iterator[sqlite3.Connection]:
        """The connection that writes, for one thread at a time.

        Raises
        ------
        ExpertError
            SQLite's complaints, as this package's.
        """
        with _errors(), self._writing:
            if self._writer is None:
                self._writer = self._connect()
            yield self._writer

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer's transaction: all of it is on the disk when the block ends, or none."""
        with self.writer() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """All rows of one question, as of the last transaction that has ended."""
        connection = self._readers.get()
        try:
            with _errors():
                if connection is None:
                    connection = self._connect()
                return connection.execute(sql, values).fetchall()
        finally:
            self._readers.put(connection)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """SQLite's complaints as this package's."""
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR_WRITE,
        )
        kind = StoreFullError if full else ExpertError
        # No path: who is told may be on another machine.
        raise kind(f"the store's index cannot be used: {error}") from None
