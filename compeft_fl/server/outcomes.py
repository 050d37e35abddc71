"""What came of each reply: the one place that tells the observer, the ledger and the broadcaster.

A round goes one way. `Outcomes.send` pushes its messages and gives the replies as they come, nodes
that could not follow having been sent what they lack; `Outcomes.read` has each read, and hands on
those that can be used; whoever merges them says of each, by `take` or `set_aside`, what came of it.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp.strategy import Result

from compeft_fl.errors import CompeftError, NoUsableReplyError, ResyncError
from compeft_fl.exchange.records import LOGGER, metric_records
from compeft_fl.server.broadcast import Broadcaster
from compeft_fl.server.intake import Reply, describe, one_line, received
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.privacy import check_mods
from compeft_fl.server.replies import Replies
from compeft_fl.server.robustness import Candidate
from compeft_fl.server.streaming_grid import ReplyStream, StreamingGrid
from compeft_fl.server.transfers import Sender, energy_of

__all__ = ["Outcomes"]

_LEFT_OUT = "left out by the strategy's own code"
_NO_REPLY = "no reply in time"

T = TypeVar("T")


@dataclass
class _Tally:
    """One round and kind, as far as it has come."""

    kind: str
    server_round: int
    taken: int = 0
    missing: int = 0
    num_bytes: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)  # keys of replies
    kept: list[float] = field(default_factory=list)  # shares of energy, as the nodes say


class Outcomes:
    """What came of the replies of a federation.

    Parameters
    ----------
    observer : RoundObserver
    broadcaster : Broadcaster
    """

    def __init__(self, observer: RoundObserver, broadcaster: Broadcaster) -> None:
        self.observer, self.broadcaster = observer, broadcaster
        self._replies: Replies | None = None  # of the round that is on its way
        self._tally = _Tally("train", 0)
        self._messages = self._taken = 0  # of training, in all rounds
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    @property
    def failed(self) -> list[tuple[int, str]]:
        """The replies of this round that were set aside: nodes and reasons."""
        return self._tally.failed

    def begin(self) -> None:
        """Another federation begins."""
        self.broadcaster.begin()
        self._replies = None
        self._messages = self._taken = 0
        self._reasons.clear()
        self._examples.clear()

    def send(
        self, grid: StreamingGrid, kind: str, server_round: int, messages: Iterable[Message],
        timeout: float | None, *, keep: bool,
    ) -> Replies:  # fmt: skip
        """Push a round's messages.

        Parameters
        ----------
        grid : StreamingGrid
        kind : "train" or "evaluate"
        server_round : int
        messages : iterable of flwr.app.Message
        timeout : float or None
            Seconds, see `StreamingGrid.send_and_receive`.
        keep : bool
            See `Replies`.
        """
        messages = list(messages)
        self.broadcaster.restore_offers(messages)
        stream = grid.send_and_receive(messages, timeout=timeout)
        self.broadcaster.transfers.pushed(messages, stream.lost)
        self.broadcaster.pushed(messages)
        if kind == "train":
            self._messages += len(messages)
        self._tally = _Tally(kind, server_round)
        self._replies = Replies(self._arrivals(stream), keep=keep)
        return self._replies

    def read(
        self, kind: str, server_round: int, replies: Iterable[Message], read: Callable[[Reply], T]
    ) -> Iterator[tuple[Reply, T]]:
        """Have each reply read, and hand on those that can be used. Holds one at a time.

        Parameters
        ----------
        kind : "train" or "evaluate"
        server_round : int
        replies : iterable of flwr.app.Message
            Those of `send`, some of them, or others.
        read : callable
            Checks and decodes, and changes nothing. Whatever it raises sets the reply aside.
        """
        if self._replies is None:
            self._tally = _Tally(kind, server_round)
        for reply in self._known(replies):
            value, seconds, problem = None, None, reply.problem
            if problem is None:
                started = time.perf_counter()
                value, problem = _guarded(read, reply)
                seconds = time.perf_counter() - started
            candidate = value[0] if value is not None else None
            self._crossed(reply, kind, seconds if problem is None else None, candidate)
            if problem is not None or value is None:
                self.set_aside(reply, problem or "")
            else:
                yield reply, value[0]
            del reply, value, candidate  # before the next one is pulled

    def take(self, reply: Reply) -> None:
        """Count a reply as taken."""
        if not self._settles(reply):
            return
        tally = self._tally
        tally.taken += 1
        tally.num_bytes += reply.num_bytes
        if tally.kind == "train":
            self._taken += 1
            self.broadcaster.took(reply.node_id)
            if reply.answer is not None and reply.answer.quality is not None:
                tally.kept.append(energy_of(reply.answer.quality[1]))
        metrics = next(iter(metric_records(reply.message.content).values()), None)
        self.observer.on_reply(
            tally.server_round, tally.kind, reply.node_id, reply.num_bytes, metrics, None
        )

    def set_aside(self, reply: Reply, reason: str) -> None:
        """Leave a reply out of the round, and say so."""
        if self._settles(reply):
            self._fail(reply.node_id, reply.num_bytes, reason)

    def log(self) -> None:
        """Say how the round went."""
        tally = self._tally
        LOGGER.info(
            "aggregate_%s: %d replies taken (%d bytes of arrays in all), %d set aside, %d missing",
            tally.kind,
            tally.taken,
            tally.num_bytes,
            len(tally.failed),
            tally.missing,
        )
        if tally.kept:
            LOGGER.info(
                "\t├──> of their energy the updates keep %.2f (%.2f to %.2f)",
                statistics.fmean(tally.kept),
                min(tally.kept),
                max(tally.kept),
            )

    def close(self) -> None:
        """The strategy is done with the round's replies; what it has left out is said.

        Raises
        ------
        ParameterError
            No node could train, because its mods do not go together.
        """
        replies, self._replies = self._replies, None
        if replies is None:
            return
        for reply in replies.rest():
            if reply.key not in self._tally.settled:
                self._crossed(reply, self._tally.kind, None)
                self.set_aside(reply, reply.problem or _LEFT_OUT)
            del reply
        if self._tally.kind == "train" and not self._tally.taken:
            check_mods(reason for _, reason in self._tally.failed)

    def check(self, result: Result) -> None:
        """Raise where messages were sent to be trained with, and no reply was of any use.

        Parameters
        ----------
        result : flwr.serverapp.strategy.Result
            Goes with the error.

        Raises
        ------
        NoUsableReplyError
            With the reason that most replies had.
        """
        if not self._messages or self._taken:
            return
        kind, count = max(self._reasons.items(), key=lambda each: each[1], default=("", 0))
        error = NoUsableReplyError(
            f"no reply of any node could be used: {self._messages} training messages; "
            f"of {count}: {self._examples.get(kind, _NO_REPLY)}"
        )
        error.result = result
        raise error

    def _known(self, replies: Iterable[Message]) -> Iterator[Reply]:
        """Replies with what is known of them, whatever a strategy has made of the sequence."""
        if isinstance(replies, Replies):
            yield from replies.read()
            return
        answered: set[str] = set()
        for message in replies:
            known = self._replies.find(message) if self._replies is not None else None
            if known is None:
                known = self._heard(received(message, None, answered))
                if known.answer is not None and known.answer.resync:
                    error = ResyncError(f"the node cannot follow: {known.answer.resync}")
                    known = replace(known, problem=describe(error))
            del message
            yield known
            del known

    def _arrivals(self, stream: ReplyStream) -> Iterator[Reply]:
        """Replies as they come; those that ask for what they lack are answered at once."""
        tally, answered = self._tally, set[str]()
        for message in stream:
            reply = self._heard(received(message, stream.question(message), answered))
            del message
            if reply.answer is not None and reply.answer.resync and reply.problem is None:
                self._crossed(reply, "resync", None)
                problem = self._resync(reply, stream)
                if problem is None:
                    continue
                reply = replace(reply, problem=problem)
            yield reply
            del reply
        for node_id, reason in stream.unreadable:
            transfers = self.broadcaster.transfers
            transfers.incoming(tally.server_round, tally.kind, node_id, None, 0, 0)
            self._fail(node_id, 0, reason)
        for node_id in stream.missing:  # which the stream has logged
            tally.missing += 1
            self._remember(_NO_REPLY)
            self.observer.on_reply(tally.server_round, tally.kind, node_id, 0, None, _NO_REPLY)

    def _heard(self, reply: Reply) -> Reply:
        if reply.answer is not None:
            self.broadcaster.heard(reply.node_id, reply.answer, reply.num_bytes)
        return reply

    def _resync(self, reply: Reply, stream: ReplyStream) -> str | None:
        """Send a node that cannot follow what it lacks; why that was not possible."""
        answer, more, server_round = reply.answer, None, self._tally.server_round
        if answer is None:
            return None
        refusal = self.broadcaster.refusal(answer)
        if refusal is not None:
            return refusal
        if reply.question is not None:
            more = self.broadcaster.resync(reply.question, answer, server_round)
        if more is None or not stream.push(more):
            return describe(ResyncError(f"the node cannot follow: {answer.resync}"))
        self.broadcaster.transfers.pushed([more])
        self.broadcaster.pushed([more])
        LOGGER.info(
            "round %d: node %d is sent what it lacks: %s",
            server_round,
            reply.node_id,
            one_line(answer.resync),
        )
        return None

    def _crossed(
        self, reply: Reply, kind: str, seconds: float | None, value: object = None
    ) -> None:
        """Tell the ledger that a reply has crossed the wire, whatever it is worth."""
        if reply.key in self._tally.settled:
            return
        resync = reply.answer is not None and reply.answer.resync
        self.broadcaster.transfers.incoming(
            self._tally.server_round,
            "resync" if resync else kind,
            reply.node_id,
            reply.message,
            self.broadcaster.parameters_of(reply.node_id),
            reply.num_bytes,
            seconds,
            reply.answer.seconds if reply.answer is not None else None,
            reply.answer.quality if reply.answer is not None else None,
            self._sender(reply, value),
        )

    def _sender(self, reply: Reply, value: object) -> Sender:
        """What the ledger says of the node that a reply is from."""
        known = self.broadcaster.node(reply.node_id)
        density = value.density if isinstance(value, Candidate) else None
        if known is None:
            return Sender(density=density)
        asked = self.broadcaster.upload is not None
        link = (known.link.mbps, known.link.seconds) if asked else (None, None)
        return Sender(known.rank or None, density, *link)

    def _settles(self, reply: Reply) -> bool:
        """Whether this is the first that is said of it; a strategy may merge replies twice."""
        new = reply.key not in self._tally.settled
        self._tally.settled.add(reply.key)
        return new

    def _fail(self, node_id: int, num_bytes: int, reason: str) -> None:
        tally, reason = self._tally, one_line(reason)
        LOGGER.warning(
            "round %d: the %s reply of node %d is set aside: %s",
            tally.server_round,
            tally.kind,
            node_id,
            reason,
        )
        tally.failed.append((node_id, reason))
        tally.num_bytes += num_bytes
        self._remember(reason)
        self.observer.on_reply(tally.server_round, tally.kind, node_id, num_bytes, None, reason)

    def _remember(self, reason: str) -> None:
        """Count a reason, whatever numbers are in it."""
        if self._tally.kind == "train" and not self._taken:
            kind = re.sub(r"[0-9]+", "#", reason)
            if kind in self._examples or len(self._examples) < _MAX_REASONS:
                self._reasons[kind] += 1
                self._examples.setdefault(kind, reason)


_MAX_REASONS = 64  # kinds of them that are counted


def _guarded(read: Callable[[Reply], T], reply: Reply) -> tuple[tuple[T] | None, str | None]:
    """What was read, in a tuple; or why it was not."""
    try:
        return (read(reply),), None
    except CompeftError as error:
        return None, describe(error)
    except Exception as error:
        # No client may stop the round, not even by way of a mistake of this program. Nothing
        # has been merged yet; the traceback is for whoever mends it.
        LOGGER.exception("an unexpected error while reading the reply of node %d", reply.node_id)
        return None, describe(error)
