"""Flower's own FedAvg over dense links, observed like the rest: what compression is against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from compeft_fl.exchange.records import array_records
from compeft_fl.strategies import RoundObserver, Transfers

__all__ = ["ObservedFedAvg"]


class ObservedFedAvg(FedAvg):
    """FedAvg as it is; an observer is told of each message and its bytes.

    Parameters
    ----------
    observer : RoundObserver
        Who is told.
    **options
        FedAvg's keywords.
    """

    def __init__(self, *, observer: RoundObserver, **options: Any) -> None:
        super().__init__(**options)
        self._observer = observer
        self._transfers = Transfers(observer)
        self._messages: list[Message] = []  # of this round, to tell of when Flower has taken them
        self._num_parameters = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See FedAvg."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent(server_round, "train", messages)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See FedAvg."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if messages:
            self._sent(server_round, "evaluate", messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See FedAvg."""
        return super().aggregate_train(server_round, self._seen(server_round, "train", replies))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """See FedAvg."""
        seen = self._seen(server_round, "evaluate", replies)
        return super().aggregate_evaluate(server_round, seen)

    def _sent(self, server_round: int, kind: str, messages: list[Message]) -> None:
        nodes = [message.metadata.dst_node_id for message in messages]
        size = _array_bytes(messages[0]) if messages else 0
        self._observer.on_broadcast(server_round, kind, nodes, size)
        self._transfers.begin()
        self._messages = messages
        self._num_parameters = _parameters(messages[0]) if messages else 0
        for node in nodes:
            self._transfers.outgoing(server_round, kind, node, self._num_parameters, size)

    def _seen(self, server_round: int, kind: str, replies: Iterable[Message]) -> Iterator[Message]:
        self._transfers.pushed(self._messages)
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in self._messages}
        self._messages = []
        for reply in replies:
            # Replies that Flower makes for a node that is gone carry the server's id.
            metadata = reply.metadata
            node = asked.get(metadata.reply_to_message_id, metadata.src_node_id)
            if reply.has_error():
                reason = f"error reply, code {reply.error.code}: {reply.error.reason}"
                self._transfers.incoming(server_round, kind, node, reply, 0, 0)
                self._observer.on_reply(server_round, kind, node, 0, None, reason)
            else:
                records = list(reply.content.metric_records.values())
                metrics = records[0] if records else None
                size = _array_bytes(reply)
                parameters = self._num_parameters
                self._transfers.incoming(server_round, kind, node, reply, parameters, size)
                self._observer.on_reply(server_round, kind, node, size, metrics, None)
            yield reply


def _parameters(message: Message) -> int:
    return sum(
        math.prod(array.shape)
        for record in array_records(message.content).values()
        for array in record.values()
    )


def _array_bytes(message: Message) -> int:
    return sum(
        len(array.data)
        for record in message.content.array_records.values()
        for array in record.values()
    )
