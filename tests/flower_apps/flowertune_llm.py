"""After FlowerTune's apps: LoRA of a small model, a strategy that counts bytes against a budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from flower_apps import quickstart_pytorch

client_app, main = quickstart_pytorch.client_app, quickstart_pytorch.main


class CommunicationTracker:
    """Bytes of all messages, in MB."""

    def __init__(self) -> None:
        self.curr_comm_cost = 0.0

    def track(self, messages: Iterable[Message]) -> None:
        self.curr_comm_cost += sum(
            record.count_bytes() / (1024**2)
            for msg in messages
            if msg.has_content()
            for record in msg.content.array_records.values()
        )


def flowertune(base: type = FedAvg) -> type:
    """The template's strategy, on a base."""

    class FlowerTuneLlm(base):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.comm_tracker = CommunicationTracker()

        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            messages = super().configure_train(server_round, arrays, config, grid)
            self.comm_tracker.track(messages)
            return messages

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            self.comm_tracker.track(replies)
            return super().aggregate_train(server_round, replies)

    return FlowerTuneLlm


def whisper(base: type = FedAvg) -> type:
    """As the speech example's, which counts replies, and looks at them when they are merged."""

    class WhisperStrategy(base):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.counted: list[int] = []
            self.losses: list[float] = []

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            self.counted.append(len(replies))
            good = [reply for reply in replies if not reply.has_error()]
            arrays, metrics = super().aggregate_train(server_round, good)
            self.losses += [r.content["metrics"]["train_loss"] for r in replies]
            return arrays, metrics

    return WhisperStrategy


def strategy() -> FedAvg:
    return flowertune()(fraction_evaluate=0.0)
