"""Local training and scoring: a plain loop, since each is a few dozen small steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import torch
from torch import nn

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks.base import Score, TrainResult, round_seed
from compeft_fl.app.tasks.data import Rows
from compeft_fl.app.tasks.model import Classifier, by_length
from compeft_fl.errors import ConfigError

__all__ = ["Score", "TrainResult", "evaluate", "round_seed", "train"]

_EVALUATION_BATCH: Final = 64
_WINDOW: Final = 16


def train(classifier: Classifier, rows: Rows, config: AppConfig, seed: int) -> TrainResult:
    """Fine-tune the adapter in place on `rows`, for the configured steps or epochs.

    AdamW without a schedule; batches are drawn without replacement, shuffled by `seed`.

    Raises
    ------
    ConfigError
        Where the loss is no longer finite.
    """
    started = time.perf_counter()
    device = classifier.device
    trainable = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    token_ids = classifier.tokenize(rows.texts)
    classes = torch.as_tensor(rows.classes)
    total, steps = 0.0, 0
    torch.manual_seed(seed)  # dropout
    classifier.train()
    for chunk in _batches(token_ids, config, np.random.default_rng(seed)):
        optimizer.zero_grad(set_to_none=True)
        with _autocast(device, config):
            logits = classifier(classifier.batch([token_ids[i] for i in chunk]))
            loss = nn.functional.cross_entropy(logits, classes[chunk].to(device))
        value = float(loss.detach())
        if not np.isfinite(value):
            raise ConfigError(
                f"the loss became {value} at step {steps + 1}: lower learning-rate "
                f"(it is {config.learning_rate:g})"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total, steps = total + value, steps + 1
    return TrainResult(total / steps, steps, len(rows), time.perf_counter() - started)


def evaluate(classifier: Classifier, rows: Rows, config: AppConfig) -> Score:
    """Return accuracy and loss of the classifier on `rows`."""
    classifier.eval()
    token_ids = classifier.tokenize(rows.texts)
    classes = torch.as_tensor(rows.classes)
    correct, loss = 0, 0.0
    with torch.inference_mode(), _autocast(classifier.device, config):
        for chunk in by_length(token_ids, _EVALUATION_BATCH):
            logits = classifier(classifier.batch([token_ids[i] for i in chunk])).cpu()
            loss += float(nn.functional.cross_entropy(logits, classes[chunk], reduction="sum"))
            correct += int((logits.argmax(1) == classes[chunk]).sum())
    return Score(correct / len(rows), loss / len(rows), len(rows))


def _batches(
    token_ids: Sequence[Sequence[int]], config: AppConfig, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Yield the row indices of every step: reshuffled passes over the rows.

    Within a window of shuffled rows, rows of like length share a batch: a third less padding.
    """
    num_rows = len(token_ids)
    size = min(config.batch_size, num_rows)
    steps = config.local_steps or config.local_epochs * -(-num_rows // size)
    while True:
        order = rng.permutation(num_rows).tolist()
        for start in range(0, num_rows, size * _WINDOW):
            window = sorted(order[start : start + size * _WINDOW], key=lambda i: len(token_ids[i]))
            batches = [window[first : first + size] for first in range(0, len(window), size)]
            for index in rng.permutation(len(batches)):
                if steps == 0:
                    return
                yield batches[index]
                steps -= 1


def _autocast(device: torch.device, config: AppConfig) -> AbstractContextManager[object]:
    """Return bfloat16 arithmetic on CUDA, where the base model has it; else nothing special."""
    if device.type == "cuda" and config.dtype in ("auto", "bfloat16"):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
