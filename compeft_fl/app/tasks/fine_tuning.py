"""A round of fine-tuning a language model by transformers' Trainer, and its loss elsewhere.

The Trainer, and not TRL's SFTTrainer: rows come here with their labels, which is most of what
SFTTrainer adds; it takes causal models alone, works on its data again each time that it is built,
and each node of each round builds one. ``simulations/results/trainers.md`` has what either costs.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks.base import Score, TrainResult
from compeft_fl.app.tasks.formatting import IGNORED, TokenRow
from compeft_fl.app.tasks.language_model import LanguageModel
from compeft_fl.app.tasks.peft_network import quiet
from compeft_fl.errors import ConfigError

__all__ = ["evaluate", "train"]

_CLIP_NORM: Final = 1.0  # of the gradient, as transformers has it
_LARGEST_LOSS: Final = 80.0  # whose perplexity is still a number to print


def train(
    model: LanguageModel, rows: Sequence[TokenRow], config: AppConfig, rate: float, seed: int
) -> TrainResult:
    """Fine-tune the adapter in place on `rows`, for the configured steps or epochs.

    AdamW, gradients clipped to norm 1; rows are shuffled by `seed`, and a step's rows are taken in
    ``accumulation`` parts, whose tokens count alike.

    Parameters
    ----------
    model : LanguageModel
    rows : sequence of TokenRow
    config : AppConfig
    rate : float
        The learning rate of this round.
    seed : int

    Raises
    ------
    ConfigError
        Where the loss is no longer finite.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compeft-fl-") as folder, quiet(), _no_garbage():
        trainer = Trainer(
            model=model.network,
            args=_arguments(model, config, rate, seed, folder),
            train_dataset=_Rows(rows),
            data_collator=_collator(model),
        )
        trainer.remove_callback(PrinterCallback)
        found = trainer.train()
    loss = float(found.training_loss)
    if not math.isfinite(loss):
        raise ConfigError(
            f"the loss became {loss} within {found.global_step} steps: lower learning-rate "
            f"(it is {rate:g})"
        )
    return TrainResult(loss, found.global_step, len(rows), time.perf_counter() - started)


_seen = {"aside": False}  # whether anything is put aside: to ask takes longer the more there is


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Put aside what there is now: a Trainer looks through all for garbage, for half a second."""
    _seen["aside"] = _seen["aside"] or gc.get_freeze_count() > 0
    if _seen["aside"]:  # somebody has done so for good
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@torch.inference_mode()
def evaluate(model: LanguageModel, rows: Sequence[TokenRow], config: AppConfig) -> Score:
    """Return loss and accuracy over the tokens of all responses, and the perplexity.

    The accuracy is teacher-forced: how often the most likely token is the response's next one.
    """
    model.network.eval()
    loss, right, count = 0.0, 0, 0
    for batch in _batches(model, rows, _part(config)):
        labels = batch["labels"] if model.seq2seq else batch["labels"][:, 1:]
        logits = model.network(**batch, use_cache=False).logits
        # Prompt methods put virtual tokens in front; a causal model's last token has no next one.
        logits = logits[:, -batch["labels"].shape[1] :]
        logits = logits if model.seq2seq else logits[:, :-1]
        learned = labels != IGNORED
        chosen, expected = logits[learned].float(), labels[learned]
        loss += float(nn.functional.cross_entropy(chosen, expected, reduction="sum"))
        right += int((chosen.argmax(1) == expected).sum())
        count += len(expected)
    loss /= count
    perplexity = math.exp(min(loss, _LARGEST_LOSS))
    return Score(right / count, loss, len(rows), {"perplexity": perplexity})


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Token rows as a Trainer reads them."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {
            "input_ids": row.input_ids.tolist(),
            "attention_mask": [1] * len(row.input_ids),
            "labels": row.labels.tolist(),
        }


def _part(config: AppConfig) -> int:
    """Rows that are computed at a time."""
    return -(-config.batch_size // config.accumulation)


def _arguments(
    model: LanguageModel, config: AppConfig, rate: float, seed: int, folder: str
) -> TrainingArguments:
    """What the keys of a run are for the Trainer."""
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(model.device)  # where the Trainer puts batches
    made = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=_part(config),
        gradient_accumulation_steps=config.accumulation,
        max_steps=config.local_steps or -1,
        num_train_epochs=config.local_epochs,
        learning_rate=rate,
        lr_scheduler_type="constant",  # the schedule is one over the rounds
        weight_decay=config.weight_decay,
        max_grad_norm=_CLIP_NORM,
        optim="adamw_torch",
        bf16=on_cuda and config.dtype in ("auto", "bfloat16"),
        gradient_checkpointing=config.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=seed % (1 << 32),
        data_seed=seed % (1 << 32),
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=on_cuda,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # which would hide that the loss ran away
        report_to="none",
        disable_tqdm=True,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # a node's own, and not all of the machine's
    return made


def _collator(model: LanguageModel) -> DataCollatorForSeq2Seq:
    """Pads ids with pad tokens and labels with what is not learned."""
    multiple = 8 if model.device.type == "cuda" else None
    decoder = model.network if model.seq2seq else None
    return DataCollatorForSeq2Seq(
        model.tokenizer, model=decoder, label_pad_token_id=IGNORED, pad_to_multiple_of=multiple
    )


def _batches(
    model: LanguageModel, rows: Sequence[TokenRow], size: int
) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches on the model's device, rows of like length together."""
    collate, known = _collator(model), _Rows(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for start in range(0, len(order), size):
        batch = collate([known[i] for i in order[start : start + size]])
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}
