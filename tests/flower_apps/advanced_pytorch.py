"""After Flower's advanced-pytorch: a strategy with a `start` of its own, which saves and tracks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flower_apps import quickstart_pytorch

client_app, main = quickstart_pytorch.client_app, quickstart_pytorch.main


class CustomFedAvg(FedAvg):
    """Saves results and the best model, tells a tracker, lowers the learning rate."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.best_acc_so_far = 0.0
        self.tracked: list[dict[str, float]] = []
        self.save_path: Path | None = None

    def set_save_path(self, path: Path) -> None:
        self.save_path = path

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if server_round % 4 == 0:
            config["lr"] *= 0.5
        return super().configure_train(server_round, arrays, config, grid)

    def _update_best_acc(self, server_round: int, accuracy: float, arrays: ArrayRecord) -> None:
        if accuracy > self.best_acc_so_far:
            self.best_acc_so_far = accuracy
            name = self.save_path / f"model_round_{server_round}.pth"
            torch.save(arrays.to_torch_state_dict(), name)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result, arrays = Result(), initial_arrays
        for current_round in range(1, num_rounds + 1):
            replies = grid.send_and_receive(
                messages=self.configure_train(current_round, arrays, train_config, grid),
                timeout=timeout,
            )
            agg_arrays, agg_metrics = self.aggregate_train(current_round, replies)
            if agg_arrays is not None:
                result.arrays = arrays = agg_arrays
            if agg_metrics is not None:
                result.train_metrics_clientapp[current_round] = agg_metrics
                self.tracked.append(dict(agg_metrics))
            replies = grid.send_and_receive(
                messages=self.configure_evaluate(current_round, arrays, evaluate_config, grid),
                timeout=timeout,
            )
            agg_metrics = self.aggregate_evaluate(current_round, replies)
            if agg_metrics is not None:
                result.evaluate_metrics_clientapp[current_round] = agg_metrics
                self.tracked.append(dict(agg_metrics))
            if evaluate_fn:
                scores = evaluate_fn(current_round, arrays)
                self._update_best_acc(current_round, scores["accuracy"], arrays)
                result.evaluate_metrics_serverapp[current_round] = scores
        (self.save_path / "results.json").write_text(json.dumps(self.tracked), encoding="utf-8")
        return result


def strategy() -> CustomFedAvg:
    return CustomFedAvg(fraction_evaluate=0.5)
