"""Flower's own FedAvg over dense links, observed like the rest: what compression is against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from compeft_fl.strategies import RoundObserver

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

    def _seen(self, server_round: int, kind: str, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                reason = f"error reply, code {reply.error.code}: {reply.error.reason}"
                self._observer.on_reply(server_round, kind, node, 0, None, reason)
            else:
                records = list(reply.content.metric_records.values())
                metrics = records[0] if records else None
                size = _array_bytes(reply)
                self._observer.on_reply(server_round, kind, node, size, metrics, None)
            yield reply


def _array_bytes(message: Message) -> int:
    return sum(
        len(array.data)
        for record in message.content.array_records.values()
        for array in record.values()
    )
