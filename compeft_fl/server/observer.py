"""Who is told of each message of a round: counters here, a ledger or a display elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from flwr.app import MetricRecord

from compeft_fl.exchange.ledger import Transfer

__all__ = ["BoundsObserver", "RoundCount", "RoundCounts", "RoundObserver", "TransferObserver"]


class RoundObserver(Protocol):
    """What a strategy calls as messages go out and come in."""

    def on_broadcast(
        self, server_round: int, kind: str, node_ids: Sequence[int], num_bytes: int
    ) -> None:
        """The same Updates are about to go to these nodes.

        Parameters
        ----------
        server_round : int
        kind : "train", "evaluate" or "resync"
            The last: a node that could not follow is sent what it lacks.
        node_ids : sequence of int
        num_bytes : int
            The Updates' bytes, for each node; 0 where the nodes have the version.
        """

    def on_reply(
        self,
        server_round: int,
        kind: str,
        node_id: int,
        num_bytes: int,
        metrics: MetricRecord | None,
        reason: str | None,
    ) -> None:
        """A reply has been taken, set aside, or has not come in time.

        Parameters
        ----------
        server_round : int
        kind : "train" or "evaluate"
        node_id : int
        num_bytes : int
            The bytes of the Update that came with it, whatever they are worth; 0 where none came.
        metrics : MetricRecord or None
            The client's metrics; None where the reply was set aside.
        reason : str or None
            Why it was set aside; None where it was taken.
        """


@runtime_checkable
class TransferObserver(Protocol):
    """What an observer may have besides `RoundObserver`'s methods."""

    def on_transfer(self, transfer: Transfer) -> None:
        """A message has gone out, or a reply has come in and been read, whatever it is worth.

        Measuring what Flower serialises costs a hash of each reply's bytes, so it is done only for
        observers with this method.
        """


@runtime_checkable
class BoundsObserver(Protocol):
    """What an observer may have besides `RoundObserver`'s methods."""

    def on_bounds(self, server_round: int, bounded: Mapping[int, str]) -> None:
        """Replies of a round count within bounds: the nodes, and what counts as what."""


@dataclass
class RoundCount:
    """The messages of one round and kind.

    Attributes
    ----------
    nodes : int
        Messages sent.
    resyncs : int
        Nodes that were sent what they lacked when they said so.
    replies : int
        Replies taken.
    set_aside : list of (node id, reason)
    down_bytes, up_bytes : int
        Bytes of Updates, summed over nodes.
    bounded : dict of int to str
        Nodes whose replies count within bounds, and how.
    """

    nodes: int = 0
    resyncs: int = 0
    replies: int = 0
    set_aside: list[tuple[int, str]] = field(default_factory=list)
    down_bytes: int = 0
    up_bytes: int = 0
    bounded: dict[int, str] = field(default_factory=dict)


class RoundCounts:
    """The default observer: counts and bytes by round.

    Attributes
    ----------
    train, evaluate : dict of int to RoundCount
        By round.

    Examples
    --------
    >>> counts = RoundCounts()
    >>> counts.on_broadcast(1, "train", [11, 12], 400)
    >>> counts.on_reply(1, "train", 12, 31, None, None)
    >>> counts.train[1].down_bytes, counts.train[1].up_bytes
    (800, 31)
    """

    def __init__(self) -> None:
        self.train: dict[int, RoundCount] = {}
        self.evaluate: dict[int, RoundCount] = {}
        self._last_kind = "train"  # what a resync belongs to

    def on_broadcast(
        self, server_round: int, kind: str, node_ids: Sequence[int], num_bytes: int
    ) -> None:
        """See `RoundObserver.on_broadcast`."""
        count = self._count(server_round, kind)
        if kind == "resync":
            count.resyncs += len(node_ids)
        else:
            count.nodes += len(node_ids)
        count.down_bytes += len(node_ids) * num_bytes

    def on_reply(
        self,
        server_round: int,
        kind: str,
        node_id: int,
        num_bytes: int,
        metrics: MetricRecord | None,
        reason: str | None,
    ) -> None:
        """See `RoundObserver.on_reply`."""
        count = self._count(server_round, kind)
        count.up_bytes += num_bytes
        if reason is None:
            count.replies += 1
        else:
            count.set_aside.append((node_id, reason))

    def on_bounds(self, server_round: int, bounded: Mapping[int, str]) -> None:
        """See `BoundsObserver.on_bounds`."""
        self._count(server_round, "train").bounded.update(bounded)

    def _count(self, server_round: int, kind: str) -> RoundCount:
        if kind == "resync":
            kind = self._last_kind
        self._last_kind = kind
        rounds = self.train if kind == "train" else self.evaluate
        return rounds.setdefault(server_round, RoundCount())
