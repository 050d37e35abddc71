"""Instruction tuning: a language model learns responses to prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from compeft_fl.adapters.base_digest import note_base
from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import card, conversations, fine_tuning, language_model
from compeft_fl.app.tasks.base import Score, Task, TrainResult, learning_rate
from compeft_fl.app.tasks.conversations import Conversations
from compeft_fl.app.tasks.formatting import Formatter, TokenRow
from compeft_fl.app.tasks.partition import node_indices
from compeft_fl.app.tasks.peft_network import (
    adapter_state,
    load_adapter_state,
    save_network,
    tensors_of,
)
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compeft_fl.results.journal import RunRecord

__all__ = ["TASK_FILE", "InstructionTuning"]

TASK_FILE: Final = "task.json"
"""In an adapter folder: how conversations were written for the model."""


class InstructionTuning(Task):
    """See `compeft_fl.app.tasks.base.Task`; rows are lists of `TokenRow`.

    Attributes
    ----------
    data : Instructions
        What the rows are made of.
    model : LanguageModel
    formatter : Formatter
    """

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        if config.batch_size % config.accumulation:
            raise ConfigError(
                f"accumulation: expected a divisor of batch-size ({config.batch_size}), found "
                f"{config.accumulation}"
            )
        self.data = conversations.load(config)
        self.model = language_model.build(config)
        self.base_digest = self.model.digest
        self.formatter = Formatter(self.model.tokenizer, config, seq2seq=self.model.seq2seq)
        self._test: list[TokenRow] | None = None
        self._of_nodes: dict[tuple[Any, Any], list[TokenRow]] = {}

    @property
    def device(self) -> torch.device:
        """See `Task`."""
        return self.model.device

    def check(self) -> None:
        """Tokenise all rows once, so that a row that does not fit is named before any training."""
        for rows in (self.data.train, self.data.validation):
            self.formatter.encode(rows.rows)
        assert self.test_rows

    def adapter_state(self, *, copy: bool = True) -> dict[str, NDArray[Any]]:
        """See `Task`."""
        state = adapter_state(self.model.network, copy=copy)
        return {name: tensor.float().numpy() for name, tensor in state.items()}

    def load_adapter_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Task`."""
        load_adapter_state(self.model.network, tensors_of(state))

    def node_rows(self, node_config: Mapping[str, Any]) -> list[TokenRow]:
        """See `Task`; tokenised once in a process."""
        node = node_config.get("partition-id"), node_config.get("num-partitions")
        if node not in self._of_nodes:
            indices = node_indices(self.data.train, node_config, self.config)
            self._of_nodes[node] = self._encoded(self.data.train.take(indices), "this node")
        return self._of_nodes[node]

    @property
    def test_rows(self) -> list[TokenRow]:
        """See `Task`; tokenised once in a process."""
        if self._test is None:
            self._test = self._encoded(self.data.test, f'the split "{self.config.test_split}"')
        return self._test

    def train(self, rows: Sequence[TokenRow], server_round: int, seed: int) -> TrainResult:
        """See `Task`."""
        rate = learning_rate(self.config, server_round)
        return fine_tuning.train(self.model, rows, self.config, rate, seed)

    def evaluate(self, rows: Sequence[TokenRow]) -> Score:
        """See `Task`: accuracy and loss are over the tokens of responses."""
        return fine_tuning.evaluate(self.model, rows, self.config)

    def answering(self) -> tuple[Any, Any]:
        """See `Task`."""
        return self.model.network, self.model.tokenizer

    def save(self, folder: Path, record: RunRecord) -> None:
        """See `Task`: also the tokenizer with its chat template, and how prompts are written."""
        config, quantized = self.config, self.config.quantization
        save_network(self.model.network, folder)
        self.model.tokenizer.save_pretrained(folder)
        note_base(folder, self.base_digest, quantization="" if quantized == "none" else quantized)
        told = {
            "task": config.task,
            "model": config.model,
            "template": self.formatter.template_of(self.data.train.rows[0]),
            "max_length": config.max_length,
        }
        (folder / TASK_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        card.write(folder, config.model, record)

    def _encoded(self, rows: Conversations, whose: str) -> list[TokenRow]:
        encoded = self.formatter.encode(rows.rows)
        if not encoded:
            raise ConfigError(
                f"max-length: all {len(rows)} prompts of {whose} have {self.config.max_length} "
                "tokens or more: raise it"
            )
        return encoded
