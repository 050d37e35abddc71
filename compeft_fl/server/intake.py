"""The replies of a round, each checked on its own: what is wrong with one stops no other."""

from __future__ import annotations

import re
import reprlib
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from flwr.app import Message, MetricRecord, RecordDict

from compeft_fl.errors import CompeftError, MalformedError, ParameterError, ResyncError
from compeft_fl.exchange.protocol import Answer
from compeft_fl.exchange.records import (
    LOGGER,
    array_records,
    find_answer,
    find_update,
    metric_records,
)
from compeft_fl.server.broadcast import Broadcaster
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.streaming_grid import ReplyStream

__all__ = ["MAX_WEIGHT", "Intake", "Reply", "update_of", "weight_of"]

MAX_WEIGHT = 1e12  # no client has more examples; plausible lies are another matter
_MAX_REASON = 400  # characters of a reason in the log
_MAX_READ = 1 << 16
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

T = TypeVar("T")


class Reply(NamedTuple):
    """A reply, the node that it is from, and the bytes of its Arrays, whatever they are worth."""

    node_id: int
    message: Message
    num_bytes: int


class Intake:
    """Takes a round's replies one by one; says which are set aside, and why.

    A node that asks for what it lacks is sent it, and its next reply is waited for.

    Parameters
    ----------
    kind : "train" or "evaluate"
    server_round : int
    observer : RoundObserver
    broadcaster : Broadcaster
        Is told what the nodes say of themselves, and which updates are taken.

    Attributes
    ----------
    taken : int
        Replies that were accepted.
    failed : list of (node id, reason)
        Replies that were set aside.
    """

    def __init__(
        self, kind: str, server_round: int, observer: RoundObserver, broadcaster: Broadcaster
    ) -> None:
        self.kind, self.server_round, self._observer = kind, server_round, observer
        self._broadcaster = broadcaster
        self.taken = 0
        self.failed: list[tuple[int, str]] = []
        self._missing = 0
        self._num_bytes = 0
        self._answered: set[str] = set()

    def take(
        self,
        replies: Iterable[Message],
        read: Callable[[Reply], T],
        add: Callable[[Reply, T], None],
    ) -> None:
        """Read each reply, and add what was read. Holds one reply at a time.

        Parameters
        ----------
        replies : iterable of flwr.app.Message
        read : callable
            Checks and decodes, and changes nothing. Whatever it raises sets the reply aside.
        add : callable
            Uses what was read, and accepts the reply now or later. A CompeftError sets it aside.
        """
        stream = replies if isinstance(replies, ReplyStream) else None
        for message in replies:
            node_id = stream.node_id(message) if stream else message.metadata.src_node_id
            self._take_one(Reply(node_id, message, 0), stream, read, add)
            del message  # before the next one is pulled
        if stream:
            for node_id, reason in stream.unreadable:
                transfers = self._broadcaster.transfers
                transfers.incoming(self.server_round, self.kind, node_id, None, 0, 0)
                self.set_aside(node_id, 0, reason)
            for node_id in stream.missing:  # which the stream has logged
                self._missing += 1
                self._observer.on_reply(
                    self.server_round, self.kind, node_id, 0, None, "no reply in time"
                )

    def accept(self, reply: Reply) -> None:
        """Count a reply as taken."""
        self.taken += 1
        self._num_bytes += reply.num_bytes
        if self.kind == "train":
            self._broadcaster.took(reply.node_id)
        metrics = next(iter(metric_records(reply.message.content).values()), None)
        self._observer.on_reply(
            self.server_round, self.kind, reply.node_id, reply.num_bytes, metrics, None
        )

    def set_aside(self, node_id: int, num_bytes: int, reason: str) -> None:
        """Leave a reply out of the round, and say so."""
        reason = _one_line(reason)
        LOGGER.warning(
            "round %d: the %s reply of node %d is set aside: %s",
            self.server_round,
            self.kind,
            node_id,
            reason,
        )
        self.failed.append((node_id, reason))
        self._num_bytes += num_bytes
        self._observer.on_reply(self.server_round, self.kind, node_id, num_bytes, None, reason)

    def log(self) -> None:
        """Say how the round went."""
        LOGGER.info(
            "aggregate_%s: %d replies taken (%d bytes of arrays in all), %d set aside, %d missing",
            self.kind,
            self.taken,
            self._num_bytes,
            len(self.failed),
            self._missing,
        )

    def _take_one(
        self,
        reply: Reply,
        stream: ReplyStream | None,
        read: Callable[[Reply], T],
        add: Callable[[Reply, T], None],
    ) -> None:
        answer, seconds = None, None
        try:
            try:
                self._check(reply.message)
                reply = reply._replace(num_bytes=num_array_bytes(reply.message.content))
                answer = find_answer(reply.message.content)
                if answer is not None:
                    self._broadcaster.heard(reply.node_id, answer)
                if answer is None or not answer.resync:
                    started = time.perf_counter()
                    value = read(reply)
                    seconds = time.perf_counter() - started
            finally:
                self._tell(reply, answer, seconds)
            if answer is not None and answer.resync:
                self._resync(reply, answer, stream)
                return
        except CompeftError as error:
            self.set_aside(reply.node_id, reply.num_bytes, _describe(error))
            return
        except Exception as error:
            # No client may stop the round, not even by way of a mistake of this program. Nothing
            # has been merged yet; the traceback is for whoever mends it.
            LOGGER.exception("an unexpected error while reading the reply of node %d", reply[0])
            self.set_aside(reply.node_id, reply.num_bytes, _describe(error))
            return
        try:
            add(reply, value)
        except CompeftError as error:
            self.set_aside(reply.node_id, reply.num_bytes, _describe(error))

    def _check(self, message: Message) -> None:
        """Raise for what is no answer at all."""
        message_id = message.metadata.reply_to_message_id
        if message_id and message_id in self._answered:
            raise MalformedError("expected one reply to a message, found a second")
        self._answered.add(message_id)
        if message.has_error():
            raise CompeftError(f"error reply, code {message.error.code}: {message.error.reason}")
        if not message.has_content():
            raise MalformedError("expected a reply with content, found none")

    def _tell(self, reply: Reply, answer: Answer | None, seconds: float | None) -> None:
        """Tell the observer that a reply has crossed the wire."""
        self._broadcaster.transfers.incoming(
            self.server_round,
            "resync" if answer is not None and answer.resync else self.kind,
            reply.node_id,
            reply.message,
            self._broadcaster.num_parameters,
            reply.num_bytes,
            seconds,
            answer.seconds if answer is not None else None,
        )

    def _resync(self, reply: Reply, answer: Answer, stream: ReplyStream | None) -> None:
        """Send a node that cannot follow what it lacks."""
        more = self._broadcaster.resync(reply.node_id, answer, self.server_round)
        if more is None or stream is None or not stream.push(more):
            raise ResyncError(f"the node cannot follow: {answer.resync}")
        self._broadcaster.transfers.pushed([more])
        LOGGER.info(
            "round %d: node %d is sent what it lacks: %s",
            self.server_round,
            reply.node_id,
            _one_line(answer.resync),
        )


def num_array_bytes(content: RecordDict) -> int:
    """The bytes of all Arrays of a message."""
    return sum(
        len(array.data) for record in array_records(content).values() for array in record.values()
    )


def update_of(content: RecordDict) -> tuple[str, bytes]:
    """The Update of a reply: the key of its ArrayRecord, and its bytes.

    Raises
    ------
    MalformedError
        None, or more than one.
    """
    found = find_update(content)
    if found is None:
        raise MalformedError(
            "expected an Update in the reply, found none: does the ClientApp use CompressionMod?"
        )
    return found


def weight_of(content: RecordDict, weighted_by_key: str) -> tuple[str, MetricRecord, float]:
    """A reply's one MetricRecord, its key, and the weight in it.

    Raises
    ------
    MalformedError
        Not exactly one MetricRecord.
    ParameterError
        A weight that is missing, no number, not positive, or beyond `MAX_WEIGHT`.
    """
    records = metric_records(content)
    if len(records) != 1:
        raise MalformedError(f"expected one MetricRecord in the reply, found {len(records)}")
    key, metrics = next(iter(records.items()))
    weight = metrics.get(weighted_by_key)
    if not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise ParameterError(
            f"expected a weight in (0, {MAX_WEIGHT:g}] under {weighted_by_key!r} of the metrics, "
            f"found {reprlib.repr(weight)}"
        )
    return key, metrics, float(weight)


def _describe(error: Exception) -> str:
    """The error's class, where it says more than the message, and the message."""
    return str(error) if type(error) is CompeftError else f"{type(error).__name__}: {error}"


def _one_line(text: str) -> str:
    """A reason for the log: what clients write can be long, in colour, and have line breaks.

    Of a long one, its beginning and its end: Python's tracebacks end with the error.
    """
    text = " ".join(_COLOUR.sub("", text[:_MAX_READ]).split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    half = _MAX_REASON // 2
    return text if len(text) <= _MAX_REASON else f"{text[:half]} ... {text[-half:]}"
