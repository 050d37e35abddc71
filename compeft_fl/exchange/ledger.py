"""The ledger of a run: every message, both ways, and what it took in bytes and seconds.

``ledger.csv`` in the run's folder has one row a message, appended as it happens. Columns:

- ``time``: seconds since 1970; of a message down, when it was handed to Flower, of a reply, when
  it was read.
- ``attempt``: 1, and one more each time that the run was resumed. What a run sent before it was
  killed, and sent once more afterwards, is in both attempts: it was sent twice.
- ``round``, ``node`` (Flower's id), ``direction`` (down: to a node; up: from it).
- ``kind``: train, evaluate, or resync: a node says that it cannot follow, and is sent what it
  lacks.
- ``parameters``: of the adapter that the message is about; 0 for one that is about none.
- ``raw_bytes``: what it takes with dense float32 arrays; 0 for a resync, which a dense exchange
  does not have.
- ``payload_bytes``: the Updates in it, or the arrays where there is no Update.
- ``message_bytes``: what Flower serialises: every record of the message and its metadata. 0 for an
  error reply that Flower's server made itself, which came from no node; empty where Flower cannot
  be asked.
- ``encode_seconds``: compressing and encoding, where it was done. A delta of the global adapter is
  encoded once a version, not once a node: the first row that carries it has the seconds.
- ``decode_seconds``: of a reply, on the server.
- ``node_decode_seconds``: of a reply: how long the node took to decode the message that it answers.

Times of nodes come with their replies, to three digits, in 13 bytes.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

__all__ = ["LEDGER_FILE", "Ledger", "RoundTotals", "Transfer", "read_ledger"]

LEDGER_FILE: Final = "ledger.csv"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message of a run: a row of the ledger. What the fields mean, see the module."""

    time: float
    round: int
    node: int
    direction: str
    kind: str
    parameters: int
    raw_bytes: int
    payload_bytes: int
    message_bytes: int | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    node_decode_seconds: float | None = None


_SUMMED: Final = (
    "raw_bytes",
    "payload_bytes",
    "message_bytes",
    "encode_seconds",
    "decode_seconds",
    "node_decode_seconds",
)
_COLUMNS: Final = ("time", "attempt", *(f.name for f in fields(Transfer) if f.name != "time"))


@dataclass
class RoundTotals:
    """The messages of one round and direction, summed.

    Attributes
    ----------
    messages : int
    raw_bytes, payload_bytes, message_bytes : int
    encode_seconds, decode_seconds, node_decode_seconds : float
    started, ended : float
        Times of the first of them and of the last.
    """

    messages: int = 0
    raw_bytes: int = 0
    payload_bytes: int = 0
    message_bytes: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    node_decode_seconds: float = 0.0
    started: float = 0.0
    ended: float = 0.0

    def add(self, transfer: Transfer) -> None:
        """Count a message."""
        self.started = self.started or transfer.time
        self.ended = transfer.time
        self.messages += 1
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + (getattr(transfer, name) or 0))


class Ledger:
    """Writes ``ledger.csv``, and sums it by round; the memory does not grow with the messages.

    Parameters
    ----------
    folder : Path
        The run's folder, which exists. A ledger that lies there is gone on with, as a new attempt.

    Attributes
    ----------
    attempt : int
    totals : dict of (round, direction) to RoundTotals

    Examples
    --------
    >>> import tempfile
    >>> ledger = Ledger(Path(tempfile.mkdtemp()))
    >>> ledger.add(Transfer(0.0, 1, 11, "up", "train", 1000, 4000, 51, 1480))
    >>> ledger.totals[1, "up"].message_bytes
    1480
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self.attempt = 1
        self.totals: dict[tuple[int, str], RoundTotals] = {}
        if self.path.exists():
            self._go_on()

    def add(self, transfer: Transfer) -> None:
        """Write a message down."""
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(_COLUMNS)
            row = {name: getattr(transfer, name) for name in _COLUMNS if name != "attempt"}
            row["attempt"] = self.attempt
            writer.writerow([_shown(row[name]) for name in _COLUMNS])
        self._count(transfer)

    def summary(self) -> dict[str, Any]:
        """Return the sums: lists by round, which begin with round 1, and all in all."""
        last = max((number for number, _ in self.totals), default=0)
        found: dict[str, Any] = {"attempts": self.attempt}
        for direction, way in (("up", "uplink"), ("down", "downlink")):
            rounds = [self.totals.get((r, direction), RoundTotals()) for r in range(1, last + 1)]
            for name in ("messages", *_SUMMED):
                values = [getattr(each, name) for each in rounds]
                found[f"{way}_{name}"] = [
                    round(value, 6) if isinstance(value, float) else value for value in values
                ]
        both = [
            [self.totals[each] for each in ((r, "down"), (r, "up")) if each in self.totals]
            for r in range(1, last + 1)
        ]
        found["started"] = [min((t.started for t in each), default=0.0) for each in both]
        found["ended"] = [max((t.ended for t in each), default=0.0) for each in both]
        return found

    def _count(self, transfer: Transfer) -> None:
        where = transfer.round, transfer.direction
        self.totals.setdefault(where, RoundTotals()).add(transfer)

    def _go_on(self) -> None:
        """Cut off a row that a kill left unfinished, and sum up what there is."""
        _cut_to_whole_lines(self.path)
        for attempt, transfer in read_ledger(self.path):
            self._count(transfer)
            self.attempt = attempt + 1
        if not self.path.stat().st_size:
            self.path.unlink()


def read_ledger(path: Path) -> Iterator[tuple[int, Transfer]]:
    """Yield attempt and message of each row of a ``ledger.csv``.

    Raises
    ------
    ValueError
        A row that is none.
    """
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield (
                int(row["attempt"]),
                Transfer(
                    time=float(row["time"]),
                    round=int(row["round"]),
                    node=int(row["node"]),
                    direction=row["direction"],
                    kind=row["kind"],
                    parameters=int(row["parameters"]),
                    raw_bytes=int(row["raw_bytes"]),
                    payload_bytes=int(row["payload_bytes"]),
                    message_bytes=int(row["message_bytes"]) if row["message_bytes"] else None,
                    encode_seconds=_seconds(row["encode_seconds"]),
                    decode_seconds=_seconds(row["decode_seconds"]),
                    node_decode_seconds=_seconds(row["node_decode_seconds"]),
                ),
            )


def _seconds(text: str) -> float | None:
    return float(text) if text else None


def _shown(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value


def _cut_to_whole_lines(path: Path) -> None:
    with path.open("rb+") as file:
        size = at = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - 4096)
            file.seek(start)
            end = file.read(at - start).rfind(b"\n")
            if end >= 0:
                at = start + end + 1
                break
            at = start
        if at < size:
            file.truncate(at)
