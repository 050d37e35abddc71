"""A grid whose replies come one at a time, so that a server can merge each and let it go.

Flower's own grids collect the replies of a round in a list before the strategy sees the first:
memory in proportion to the number of clients. `StreamingGrid` wraps any of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from compeft_fl.exchange.records import LOGGER

__all__ = ["GridAround", "ReplyStream", "StreamingGrid", "name_nodes"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks at all who have not answered

# What Flower raises when a reply's bytes are no message. Errors of the connection are others.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, DecodeError)


class GridAround(Grid):
    """A grid around another, whose methods it has.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `flwr.serverapp.Grid.send_and_receive`."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def set_run(self, run: Any) -> None:
        """See `flwr.serverapp.Grid.set_run`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """See `flwr.serverapp.Grid.run`."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid.create_message`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `flwr.serverapp.Grid.get_node_ids`."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Any:
        """See `flwr.serverapp.Grid.get_nodes`."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `flwr.serverapp.Grid.push_messages`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `flwr.serverapp.Grid.pull_messages`."""
        return self._grid.pull_messages(message_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class StreamingGrid(GridAround):
    """Any grid, but `send_and_receive` gives an iterator that pulls one reply at a time.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    """

    @classmethod
    def around(cls, grid: Grid) -> StreamingGrid:
        """The grid itself where it streams already."""
        return grid if isinstance(grid, cls) else cls(grid)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> ReplyStream:
        """Push the messages now; pull the replies as the iterator is read.

        Parameters
        ----------
        messages : iterable of flwr.app.Message
        timeout : float, optional
            Seconds from now after which the iterator ends; default: when all have answered.
        """
        messages = list(messages)
        message_ids = list(self._grid.push_messages(messages))
        if len(message_ids) == len(messages):
            sent = dict(zip(message_ids, messages, strict=True))
        else:  # a grid that leaves out what it could not push
            by_id = {message.metadata.message_id: message for message in messages}
            sent = {each: by_id[each] for each in message_ids if each in by_id}
        sent = {message_id: message for message_id, message in sent.items() if message_id}
        lost = sorted(_nodes(messages) - _nodes(sent.values()))
        if lost:
            LOGGER.warning("the message to %s could not be sent", name_nodes(lost))
        return ReplyStream(self._grid, sent, timeout, lost)


class ReplyStream(Iterator[Message]):
    """The replies to a round's messages, pulled one by one.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    sent : dict of str to flwr.app.Message
        The messages, by their ids.
    timeout : float or None
        Seconds from now.
    lost : sequence of int
        The nodes whose message could not be sent.

    Attributes
    ----------
    lost : sequence of int
    missing : list of int
        The nodes that have not answered (yet).
    unreadable : list of (node id, reason)
        Replies that Flower could not read.
    """

    def __init__(
        self, grid: Grid, sent: dict[str, Message], timeout: float | None, lost: Sequence[int] = ()
    ) -> None:
        self._grid, self._sent, self._timeout, self.lost = grid, sent, timeout, lost
        self._pending = dict(sent)
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._replies = self._pull_all()
        self.unreadable: list[tuple[int, str]] = []

    def __next__(self) -> Message:
        return next(self._replies)

    @property
    def missing(self) -> list[int]:
        """The nodes that have not answered (yet)."""
        return sorted(message.metadata.dst_node_id for message in self._pending.values())

    def push(self, message: Message) -> bool:
        """Send one more message, whose reply is waited for like the others'; whether it went."""
        message_ids = [each for each in self._grid.push_messages([message]) if each]
        for message_id in message_ids:
            self._sent[message_id] = self._pending[message_id] = message
        return bool(message_ids)

    def question(self, reply: Message) -> Message | None:
        """The message that a reply answers, as it was sent."""
        return self._sent.get(reply.metadata.reply_to_message_id)

    def node_id(self, reply: Message) -> int:
        """The node that a reply is from: the one that was asked.

        Replies that Flower makes for a node that is gone carry the server's id as their sender.
        """
        asked = self.question(reply)
        return asked.metadata.dst_node_id if asked else reply.metadata.src_node_id

    def _pull_all(self) -> Iterator[Message]:
        pause = _FIRST_PAUSE
        while True:
            before = len(self._pending)
            for message_id in list(self._pending):
                replies = self._pull(message_id)
                while replies:  # no name here holds a reply that the reader has let go
                    yield replies.pop(0)
            if not self._pending:
                return
            left = self._deadline - time.monotonic()
            if left <= 0:
                LOGGER.warning(
                    "no reply from %s after %g s", name_nodes(self.missing), self._timeout
                )
                return
            pause = _FIRST_PAUSE if len(self._pending) < before else min(2 * pause, _LONGEST_PAUSE)
            time.sleep(min(pause, left))

    def _pull(self, message_id: str) -> list[Message]:
        """The reply to one message, if it has come."""
        try:
            replies = list(self._grid.pull_messages([message_id]))
        except _UNREADABLE as error:
            node = self._pending.pop(message_id).metadata.dst_node_id
            LOGGER.debug("the reply of node %d cannot be read", node, exc_info=True)
            self.unreadable.append((node, f"unreadable reply: {type(error).__name__}: {error}"))
            return []
        if replies:
            del self._pending[message_id]
        return replies


def _nodes(messages: Iterable[Message]) -> set[int]:
    return {message.metadata.dst_node_id for message in messages}


def name_nodes(node_ids: list[int], most: int = 20) -> str:
    """Node ids for a log line, the first of them where they are many."""
    more = f" and {len(node_ids) - most} more" if len(node_ids) > most else ""
    return f"node{'s' if len(node_ids) > 1 else ''} {', '.join(map(str, node_ids[:most]))}{more}"
