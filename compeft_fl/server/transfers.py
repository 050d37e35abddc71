"""What an observer is told of each message that crosses the wire: its bytes and its seconds."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from flwr.app import Message

from compeft_fl.exchange.ledger import Transfer
from compeft_fl.exchange.message_size import MessageSizes
from compeft_fl.server.observer import RoundObserver, TransferObserver

__all__ = ["Sender", "Transfers"]

_BYTES_PER_PARAMETER = 4  # of the dense comparison: float32


class Sender(NamedTuple):
    """What is known of the node that a reply is from.

    Attributes
    ----------
    rank : int or None
        Of its adapter; None: it has all of the server's.
    density : float or None
        The share of its update's entries that are not 0.
    mbps : float or None
        The speed of its link, stated or seen.
    seconds : float or None
        Between request and reply, less what it says that it worked.
    """

    rank: int | None = None
    density: float | None = None
    mbps: float | None = None
    seconds: float | None = None


class Transfers:
    """Tells an observer that has `TransferObserver`'s method; does nothing for others.

    Parameters
    ----------
    observer : RoundObserver
    """

    def __init__(self, observer: RoundObserver) -> None:
        self._observer = observer if isinstance(observer, TransferObserver) else None
        self._sizes = MessageSizes()
        self._outgoing: dict[int, list[Transfer]] = {}  # by node id, in order
        self._encode_seconds = 0.0
        self.carried_bytes = 0  # of the tensors beside the task vector, in the dense comparison too

    def _raw(self, kind: str, parameters: int) -> int:
        """What a message takes with dense arrays."""
        if kind == "resync" or not parameters:
            return 0
        return _BYTES_PER_PARAMETER * parameters + self.carried_bytes

    def encoded(self, seconds: float) -> None:
        """Note time that was spent on encoding; the next message down carries it."""
        self._encode_seconds += seconds

    def begin(self) -> None:
        """Forget the messages of the round before."""
        self._outgoing.clear()
        self._sizes.clear()

    def outgoing(
        self, server_round: int, kind: str, node_id: int, parameters: int, payload_bytes: int
    ) -> None:
        """Note a message that is about to be pushed."""
        if self._observer is None:
            return
        raw = self._raw(kind, parameters)
        transfer = Transfer(
            time.time(), server_round, node_id, "down", kind, parameters, raw, payload_bytes
        )
        self._outgoing.setdefault(node_id, []).append(transfer)

    def pushed(self, messages: Iterable[Message], lost: Collection[int] = ()) -> None:
        """Tell of messages that Flower has taken, which has filled in their metadata.

        Parameters
        ----------
        messages : iterable of flwr.app.Message
            Those that `outgoing` has noted, those of one node in the same order.
        lost : collection of int
            Nodes whose message could not be sent.
        """
        if self._observer is None:
            return
        for message in messages:
            node_id = message.metadata.dst_node_id
            if not self._outgoing.get(node_id):
                continue
            noted = self._outgoing[node_id].pop(0)
            if node_id in lost:
                continue
            size, seconds = self._sizes.of(message), self._encode_seconds
            self._encode_seconds = 0.0
            self._observer.on_transfer(replace(noted, message_bytes=size, encode_seconds=seconds))

    def incoming(
        self,
        server_round: int,
        kind: str,
        node_id: int,
        message: Message | None,
        parameters: int,
        payload_bytes: int,
        decode_seconds: float | None = None,
        node_seconds: tuple[float, float] | None = None,
        quality: tuple[float, float] | None = None,
        sender: Sender | None = None,
    ) -> None:
        """Tell of a reply that has been read.

        Parameters
        ----------
        server_round, kind, node_id
        message : flwr.app.Message or None
            None where Flower could not read it.
        parameters : int
            Of the adapter; they count where the reply brought an Update or arrays.
        payload_bytes : int
        decode_seconds : float, optional
        node_seconds : (float, float), optional
            What the node says that decoding and encoding took there.
        quality : (float, float), optional
            Cosine and relative error of its update, as the node says.
        sender : Sender, optional
            What is known of the node and of its update.
        """
        if self._observer is None:
            return
        size: int | None = None
        if message is not None:
            # Flower's server answers itself for a node that is gone.
            came = message.metadata.src_node_id == node_id
            size = MessageSizes().of(message) if came else 0
        decoding, encoding = node_seconds or (None, None)
        cosine, error = quality or (None, None)
        parameters = parameters if payload_bytes else 0
        sender = sender or Sender()
        self._observer.on_transfer(
            Transfer(
                time.time(),
                server_round,
                node_id,
                "up",
                kind,
                parameters,
                self._raw(kind, parameters),
                payload_bytes,
                size,
                encoding if payload_bytes else None,
                decode_seconds if payload_bytes else None,
                decoding,
                cosine,
                error,
                None if error is None else energy_of(error),
                sender.rank,
                sender.density if payload_bytes else None,
                sender.mbps,
                sender.seconds,
            )
        )


def energy_of(relative_error: float) -> float:
    """The share of energy that an update of this relative error keeps."""
    return 1 - relative_error * relative_error
