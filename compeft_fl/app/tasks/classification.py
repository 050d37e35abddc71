"""Text classification: an encoder with an adapter, and a head on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import card, data, model, training, whole_network
from compeft_fl.app.tasks.base import Score, Task, TrainResult, learning_rate
from compeft_fl.app.tasks.peft_network import tensors_of
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compeft_fl.results.journal import RunRecord

__all__ = ["Classification"]


class Classification(Task):
    """See `compeft_fl.app.tasks.base.Task`; `compeft_fl.app.tasks.model` has the classifier."""

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        plain = AppConfig()
        for key in ("quantization", "accumulation", "checkpointing"):
            if getattr(config, key) != getattr(plain, key):
                raise ConfigError(f"{key}: task=classification has none; task=instruction has")
        self.data = data.load(config)
        self.classifier = model.build(config, self.data)
        self.base_digest = self.classifier.base_digest

    @property
    def device(self) -> torch.device:
        """See `Task`."""
        return self.classifier.device

    def adapter_state(self, *, copy: bool = True) -> dict[str, NDArray[Any]]:
        """See `Task`."""
        state = self.classifier.adapter_state(copy=copy)
        return {name: tensor.numpy() for name, tensor in state.items()}

    def load_adapter_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Task`."""
        self.classifier.load_adapter_state(tensors_of(state))

    def node_rows(self, node_config: Mapping[str, Any]) -> data.Rows:
        """See `Task`."""
        return data.node_rows(self.data, node_config, self.config)

    @property
    def test_rows(self) -> data.Rows:
        """See `Task`."""
        return self.data.test

    def train(self, rows: data.Rows, server_round: int, seed: int) -> TrainResult:
        """See `Task`."""
        rate = learning_rate(self.config, server_round)
        config = dataclasses.replace(self.config, learning_rate=rate)
        return training.train(self.classifier, rows, config, seed)

    def evaluate(self, rows: data.Rows) -> Score:
        """See `Task`."""
        return training.evaluate(self.classifier, rows, self.config)

    def save(self, folder: Path, record: RunRecord) -> None:
        """See `Task`."""
        self.classifier.save(folder)
        network: Any = self.classifier.network
        if whole_network.is_whole(network):
            card.write(folder, self.config.model, record, adapter=False)
        else:
            card.write(folder, network.peft_config["default"].base_model_name_or_path, record)
