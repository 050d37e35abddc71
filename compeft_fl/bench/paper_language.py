"""Experts of bench paper on language models: one kind of instruction each.

A kind with few different answers is scored by rank classification, as lm-eval does it: all answers
are choices, and the likeliest is the model's. Others by how many of the response's tokens are the
likeliest (teacher-forced). Density and scale are chosen by the loss on validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from compeft_fl.app.tasks import conversations, fine_tuning, language_model, whole_network
from compeft_fl.app.tasks.base import learning_rate
from compeft_fl.app.tasks.conversations import Conversation, Conversations, Turn
from compeft_fl.app.tasks.formatting import IGNORED, Formatter
from compeft_fl.bench.paper_experts import Expert, Plan, Scorer, drawn

__all__ = ["LanguageScorer"]

_MOST_CHOICES: Final = 50
_BATCH_CHOICES: Final = 16  # prompts whose answers are compared at a time


class LanguageScorer(Scorer):
    """A language model on the instructions of one kind.

    ``val``: minus the loss, in nats a token. ``test``: percent. ``loss``: nats a token, on the test
    rows.

    Parameters
    ----------
    plan : Plan
    expert : Expert
    """

    splits: ClassVar[tuple[str, ...]] = ("val", "test", "loss")

    def __init__(self, plan: Plan, expert: Expert) -> None:
        self.config = plan.config(expert.task, expert.method, expert.seed)
        data = conversations.load(self.config)
        kind = expert.task.partition(":")[2]
        train, val, test = (
            _of_kind(rows, kind) for rows in (data.train, data.validation, data.test)
        )
        test = test.take(drawn(len(test), plan.tested or len(test), expert.seed))
        self.model = _build(self.config)
        super().__init__(plan, expert, self.model.network)
        self._formatter = Formatter(self.model.tokenizer, self.config, seq2seq=self.model.seq2seq)
        self._train = self._formatter.encode(train.rows)
        self._rows = {
            "val": self._formatter.encode(val.take(drawn(len(val), plan.rows, expert.seed)).rows),
            "loss": self._formatter.encode(test.rows),
        }
        answers = sorted({row.response for row in test.rows})
        self._choices: list[list[int]] = []
        if not self.model.seq2seq and 1 < len(answers) <= _MOST_CHOICES:
            self._choices = [self._answer(test.rows[0], answer) for answer in answers]
            self._asked = [
                (self._formatter.prompt(row), answers.index(row.response)) for row in test.rows
            ]

    def _answer(self, row: Conversation, answer: str) -> list[int]:
        """The tokens of another response, with what ends it."""
        turns = (*row.turns[:-1], Turn("assistant", answer))
        made = self._formatter.encode([Conversation(turns, row.where, row.shape, row.alpaca)])
        labels: list[int] = made[0].labels[made[0].labels != IGNORED].tolist()
        return labels

    def fit(self, seed: int) -> None:
        """See `Scorer`."""
        fine_tuning.train(self.model, self._train, self.config, learning_rate(self.config, 1), seed)

    @torch.inference_mode()
    def measure(self, split: str) -> float:
        """See `Scorer`."""
        self.network.eval()
        if split == "test" and self._choices:
            chosen = self._ranked([prompt for prompt, _ in self._asked])
            right = np.equal(chosen, [answer for _, answer in self._asked])
            return 100 * float(right.mean())
        rows = self._rows["loss" if split == "test" else split]
        found = fine_tuning.evaluate(self.model, rows, self.config)
        if split == "test":
            return 100 * found.accuracy
        return -found.loss if split == "val" else found.loss

    def _ranked(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest choice of each prompt."""
        chosen = [0] * len(prompts)
        for indices in _batches([len(prompt) for prompt in prompts]):
            totals = self._likelihoods([prompts[i] for i in indices])
            for index, best in zip(indices, totals.argmax(1).tolist(), strict=True):
                chosen[index] = best
        return chosen

    def _likelihoods(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Log-likelihood of every choice after each prompt, shape (prompts, choices).

        A prompt is run once, and its keys and values are what all of its choices go on from.
        Prompts are padded in front, so that choices begin where prompts end.
        """
        device, number = self.model.device, len(self._choices)
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        begun = self.network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        first = begun.logits[:, -1].float().log_softmax(1)
        width = max(map(len, self._choices))
        answers = torch.zeros((number, width), dtype=torch.long, device=device)
        there = torch.zeros((number, width), dtype=torch.bool, device=device)
        for row, choice in enumerate(self._choices):
            answers[row, : len(choice)] = torch.tensor(choice)
            there[row, : len(choice)] = True
        totals: Tensor = first[:, answers[:, 0]]
        if width == 1:
            return totals
        cache = begun.past_key_values
        cache.batch_repeat_interleave(number)
        fed = answers[:, :-1].repeat(len(prompts), 1)
        whole = torch.cat(
            [mask.repeat_interleave(number, 0), there[:, :-1].long().repeat(len(prompts), 1)], 1
        )
        logits = self.network(
            input_ids=fed,
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1)[:, longest:].clamp(min=0),
            past_key_values=cache,
        ).logits
        rest = logits.float().log_softmax(2)
        taken = rest.gather(2, answers[:, 1:].repeat(len(prompts), 1)[..., None])[..., 0]
        taken = taken * there[:, 1:].repeat(len(prompts), 1)
        totals = totals + taken.sum(1).view(len(prompts), number)
        return totals


def _build(config: Any) -> Any:
    """The language model, with an adapter or to be trained as a whole."""
    method = config.peft_method.lower()
    if method not in whole_network.METHODS:
        return language_model.build(config)
    model = language_model.load_base(config)
    network: nn.Module = whole_network.prepare(model.network, method)
    model.network = network
    return model


def _of_kind(rows: Conversations, kind: str) -> Conversations:
    """The rows of one group; of all, where no kind is named."""
    return rows.take([i for i, group in enumerate(rows.groups) if group == kind]) if kind else rows


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of prompts of like length, so many at a time."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(order), _BATCH_CHOICES):
        yield order[start : start + _BATCH_CHOICES]
