"""The ledger of a run: every message, both ways, and what it took in bytes and seconds.

``ledger.csv`` in the run's folder has one row a message, appended as it happens. Columns:

- ``time``: seconds since 1970; of a message down, when it was handed to Flower, of a reply, when
  it was read.
- ``attempt``: 1, and one more each time that the run was resumed. What a run sent before it was
  killed, and sent once more afterwards, is in both attempts: it was sent twice.
- ``round``, ``node`` (Flower's id), ``direction`` (down: to a node; up: from it).
- ``kind``: train, evaluate, or resync: a node says that it cannot follow, and is sent what it
  lacks.
- ``parameters``: of the adapter that the message is about, those that are trained; 0 for one that
  is about none.
- ``raw_bytes``: what it takes with dense float32 arrays, and with carried tensors as they are,
  without those that are left to the nodes; 0 for a resync, which a dense exchange does not have.
- ``payload_bytes``: the Updates in it and the tensors carried beside them, or the arrays where
  there is no Update.
- ``message_bytes``: what Flower serialises: every record of the message and its metadata. 0 for an
  error reply that Flower's server made itself, which came from no node; empty where Flower cannot
  be asked.
- ``encode_seconds``: compressing and encoding, where it was done. A delta of the global adapter is
  encoded once a version, not once a node: the first row that carries it has the seconds.
- ``decode_seconds``: of a reply, on the server.
- ``node_decode_seconds``: of a reply: how long the node took to decode the message that it answers.
- ``cosine``, ``relative_error``: of a reply with an Update: how much the node says that it keeps of
  what was compressed, the task vector and the residual.
- ``energy``: the same as a share of its energy, 1 - relative_error^2.
- ``rank``: of a reply: that of the node's adapter; empty where it has all of the server's.
- ``density``: of a reply with an Update: the share of its entries that are not 0.
- ``link_mbps``, ``transfer_seconds``: of a reply, where the server gives each node a density by its
  link: the link's speed in Mbit/s, as stated or seen, and the seconds between request and reply
  less those that the node says it worked.

Times of nodes come with their replies, to three digits, in 13 bytes; so do these two.

A full disk costs rows, and not the run; the sums have all messages. On resuming, a row that is
damaged is passed over, and a file that is no ledger is put aside.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from compeft_fl.disk.lines import Lines
from compeft_fl.exchange.records import LOGGER

__all__ = ["LEDGER_FILE", "Ledger", "NodeTotals", "RoundTotals", "Transfer", "read_ledger"]

LEDGER_FILE: Final = "ledger.csv"
_LONGEST_HEAD: Final = 4096
_MOST_NODES: Final = 1000  # that are summed up one by one


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
    cosine: float | None = None
    relative_error: float | None = None
    energy: float | None = None
    rank: int | None = None
    density: float | None = None
    link_mbps: float | None = None
    transfer_seconds: float | None = None


_SUMMED: Final = (
    "raw_bytes",
    "payload_bytes",
    "message_bytes",
    "encode_seconds",
    "decode_seconds",
    "node_decode_seconds",
)
_COLUMNS: Final = ("time", "attempt", *(f.name for f in fields(Transfer) if f.name != "time"))
_LATER: Final = ("energy", "rank", "density", "link_mbps", "transfer_seconds")


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
    compared : int
        How many said of their update what it keeps.
    cosine, relative_error : float
        What these said, summed.
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
    compared: int = 0
    cosine: float = 0.0
    relative_error: float = 0.0

    def add(self, transfer: Transfer) -> None:
        """Count a message."""
        self.started = self.started or transfer.time
        self.ended = transfer.time
        self.messages += 1
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + (getattr(transfer, name) or 0))
        if transfer.cosine is not None and transfer.relative_error is not None:
            self.compared += 1
            self.cosine += transfer.cosine
            self.relative_error += transfer.relative_error


@dataclass
class NodeTotals:
    """The replies of one node with an Update, summed: what differs between nodes.

    Attributes
    ----------
    updates : int
    payload_bytes : int
    density : float
    rank : int or None
    link_mbps, transfer_seconds : float or None
        Of the last of them.
    """

    updates: int = 0
    payload_bytes: int = 0
    density: float = 0.0
    rank: int | None = None
    link_mbps: float | None = None
    transfer_seconds: float | None = None

    def add(self, transfer: Transfer) -> None:
        """Count a reply."""
        self.updates += 1
        self.payload_bytes += transfer.payload_bytes
        self.density += transfer.density or 0.0
        self.rank = transfer.rank
        self.link_mbps, self.transfer_seconds = transfer.link_mbps, transfer.transfer_seconds

    def summary(self) -> dict[str, Any]:
        """As ``summary.json`` has it: means, but for the rank and the link."""
        return {
            "rank": self.rank,
            "updates": self.updates,
            "payload_bytes": self.payload_bytes,
            "density": round(self.density / max(1, self.updates), 6),
            "link_mbps": self.link_mbps,
            "transfer_seconds": self.transfer_seconds,
        }


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
    nodes : dict of int to NodeTotals
        By node id, of at most 1,000 nodes.

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
        self.nodes: dict[int, NodeTotals] = {}
        self._lines = Lines(self.path, LOGGER)
        self._has_head = False
        try:
            self._go_on()
        except FileNotFoundError:
            pass
        except OSError as error:
            LOGGER.warning("%s cannot be read; the sums begin anew: %s", self.path, error)

    def add(self, transfer: Transfer) -> None:
        """Write a message down."""
        row = {name: getattr(transfer, name) for name in _COLUMNS if name != "attempt"}
        row["attempt"] = self.attempt
        lines = [_line([_shown(row[name]) for name in _COLUMNS])]
        if not self._has_head:
            lines.insert(0, _line(_COLUMNS))
        self._has_head |= self._lines.add(*lines)
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
        up = [self.totals.get((r, "up"), RoundTotals()) for r in range(1, last + 1)]
        for name in ("cosine", "relative_error"):  # the mean of the round's updates
            found[name] = [
                round(getattr(each, name) / each.compared, 4) if each.compared else None
                for each in up
            ]
        both = [
            [self.totals[each] for each in ((r, "down"), (r, "up")) if each in self.totals]
            for r in range(1, last + 1)
        ]
        found["by_node"] = {str(node): each.summary() for node, each in self.nodes.items()}
        found["started"] = [min((t.started for t in each), default=0.0) for each in both]
        found["ended"] = [max((t.ended for t in each), default=0.0) for each in both]
        return found

    def _count(self, transfer: Transfer) -> None:
        where = transfer.round, transfer.direction
        self.totals.setdefault(where, RoundTotals()).add(transfer)
        known = transfer.node in self.nodes or len(self.nodes) < _MOST_NODES
        if transfer.direction == "up" and transfer.parameters and known:
            self.nodes.setdefault(transfer.node, NodeTotals()).add(transfer)

    def _go_on(self) -> None:
        """Sum up what there is, as attempts before this one."""
        with self.path.open("rb") as file:
            head = file.readline(_LONGEST_HEAD)
        self._has_head = bool(head)
        if head != f"{_line(_COLUMNS)}\n".encode():
            if head:
                aside = self.path.with_name(f"{self.path.stem}-damaged{self.path.suffix}")
                self.path.replace(aside)
                LOGGER.warning("%s is no ledger: it is put aside as %s", self.path, aside.name)
                self._has_head = False
            return
        damaged = 0
        for attempt, transfer in _rows(self.path):
            if transfer is None:
                damaged += 1
                continue
            self._count(transfer)
            self.attempt = max(self.attempt, attempt + 1)
        if damaged:
            LOGGER.warning("%s: %d damaged rows are passed over", self.path, damaged)


def read_ledger(path: Path) -> Iterator[tuple[int, Transfer]]:
    """Yield attempt and message of each row of a ``ledger.csv``.

    Raises
    ------
    ValueError
        A row that is none.
    """
    for number, (attempt, transfer) in enumerate(_rows(path), 2):
        if transfer is None:
            raise ValueError(f"expected a row of a ledger in line {number} of {path}")
        yield attempt, transfer


def _rows(path: Path) -> Iterator[tuple[int, Transfer | None]]:
    """Attempt and message of each row; 0 and None for one that is damaged."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "\ufffd") for line in file)
        while True:
            try:
                row = next(rows)
                yield int(row["attempt"]), _transfer_of(row)
            except StopIteration:
                return
            except (ValueError, KeyError, TypeError, csv.Error):
                yield 0, None


def _transfer_of(row: dict[str, str]) -> Transfer:
    for name in _LATER:  # a ledger of an earlier version has not these columns
        row.setdefault(name, "")
    return Transfer(
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
        cosine=_seconds(row["cosine"]),
        relative_error=_seconds(row["relative_error"]),
        energy=_seconds(row["energy"]),
        rank=int(row["rank"]) if row["rank"] else None,
        density=_seconds(row["density"]),
        link_mbps=_seconds(row["link_mbps"]),
        transfer_seconds=_seconds(row["transfer_seconds"]),
    )


def _seconds(text: str) -> float | None:
    return float(text) if text else None


def _shown(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value


def _line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
