"""What the app asks of a task: data and model of one run, in this process.

The ServerApp scores and saves, the ClientApp trains; both build the same from the configuration and
its seed, so that only the adapter's tensors travel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compeft_fl.app.config import AppConfig
from compeft_fl.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from compeft_fl.results.journal import RunRecord

__all__ = ["Score", "Task", "TrainResult", "check_packages", "learning_rate", "round_seed"]


@dataclass(frozen=True)
class TrainResult:
    """What a node's training in one round came to.

    Parameters
    ----------
    loss : float
        Mean cross-entropy over the steps.
    steps : int
        Optimiser steps.
    num_examples : int
        Rows that the node holds: its weight in a merge.
    seconds : float
        Wall time.
    """

    loss: float
    steps: int
    num_examples: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """How good an adapter is on some rows.

    Parameters
    ----------
    accuracy : float
        Part of what was right, 0 to 1: of the rows, or of the response's tokens.
    loss : float
        Mean cross-entropy.
    num_examples : int
        Rows.
    more : mapping of str to float
        Further figures of the task, such as ``perplexity``.
    """

    accuracy: float
    loss: float
    num_examples: int
    more: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """Data and model of one run, and what is done with them.

    Building one loads both, and leaves the adapter at the start that the seed gives. Rows are the
    task's own affair: what `node_rows` and `test_rows` give, `train` and `evaluate` take.

    Parameters
    ----------
    config : AppConfig

    Attributes
    ----------
    config : AppConfig
    base_digest : bytes
        Of the base model's weights, see `compeft_fl.adapters.base_digest.base_digest`.

    Raises
    ------
    ConfigError
        Where data, model or a key of theirs does not fit.
    """

    base_digest: bytes

    def __init__(self, config: AppConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    @abstractmethod
    def adapter_state(self, *, copy: bool = True) -> dict[str, NDArray[Any]]:
        """Return the adapter's tensors under PEFT's names, in alphabetical order.

        ``copy=False``: where they are on the CPU, they are the model's own memory.
        """

    @abstractmethod
    def load_adapter_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Set the adapter's tensors.

        Raises
        ------
        ConfigError
            Where names or shapes are not this adapter's.
        """

    @abstractmethod
    def node_rows(self, node_config: Mapping[str, Any]) -> Any:
        """Return the training rows of the node that Flower describes by `node_config`."""

    @property
    @abstractmethod
    def test_rows(self) -> Any:
        """What the server scores on."""

    @abstractmethod
    def train(self, rows: Any, server_round: int, seed: int) -> TrainResult:
        """Fine-tune the adapter in place on a node's rows.

        Parameters
        ----------
        rows : what `node_rows` gave
        server_round : int
            From 1 on.
        seed : int
            Of this node in this round, see `round_seed`.

        Raises
        ------
        ConfigError
            Where the loss is no longer finite.
        """

    @abstractmethod
    def evaluate(self, rows: Any) -> Score:
        """Return how good the adapter is on some rows."""

    @abstractmethod
    def save(self, folder: Path, record: RunRecord) -> None:
        """Write an adapter folder, with what the run was in its card."""

    def check(self) -> None:
        """Look at what would end the run later, before it begins; the server calls it.

        Raises
        ------
        ConfigError
            A row, say, that does not fit.
        """
        return None

    def answering(self) -> tuple[Any, Any]:
        """Return the model with its adapter and its tokenizer, for lm-eval's tasks.

        Raises
        ------
        ConfigError
            Where it is no language model.
        """
        raise ConfigError(
            f"evaluate-tasks: expected a language model (task=instruction), found "
            f"task={self.config.task}"
        )

    def check_base(self, digest: object) -> None:
        """Raise ConfigError unless `digest`, the server's, is that of the base model here."""
        if digest == self.base_digest:
            return
        found = digest.hex() if isinstance(digest, bytes) else str(digest)
        raise ConfigError(
            f"model: expected the base model that the server has, digest {found}, found another of "
            f"digest {self.base_digest.hex()}: {self.config.model} must have the same weights and "
            "the same quantization everywhere"
        )


def check_packages(config: AppConfig) -> None:
    """Raise MissingPackageError where ``quantization`` needs what is not installed."""
    if config.quantization != "none" and find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"quantization: {config.quantization} needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes"
        )


def learning_rate(config: AppConfig, server_round: int) -> float:
    """Return the learning rate of a round (from 1 on).

    ``schedule=cosine``: half a cosine from ``learning-rate`` down to ``min-learning-rate``, which
    the last round has; by round, as in FlowerTune.

    Examples
    --------
    >>> config = AppConfig(schedule="cosine", rounds=4, learning_rate=1.0, min_learning_rate=0.2)
    >>> [round(learning_rate(config, each), 3) for each in (1, 2, 3, 4)]
    [0.883, 0.6, 0.317, 0.2]
    """
    if config.schedule == "constant":
        return config.learning_rate
    low, high = config.min_learning_rate, config.learning_rate
    part = min(server_round / max(config.rounds, 1), 1.0)
    return low + (high - low) * (1 + math.cos(math.pi * part)) / 2


def round_seed(config: AppConfig, server_round: int, partition_id: int) -> int:
    """Return the seed of one node's training in one round: another for each, always the same."""
    sequence = np.random.SeedSequence([config.seed, server_round, partition_id])
    return int(sequence.generate_state(1)[0])
