"""Conversations as token ids, with the labels that put the loss on responses alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks.conversations import Conversation, Turn
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Piece = tuple[NDArray[np.int32], bool]  # ids, and whether they are learned

__all__ = ["IGNORED", "Formatter", "TokenRow"]

IGNORED: Final = -100
"""The label of what is not learned."""

_ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
)


@dataclass(frozen=True)
class TokenRow:
    """One row as a model takes it.

    Parameters
    ----------
    input_ids : ndarray of int32, shape (tokens,)
    labels : ndarray of int32
        Causal models: shape (tokens,), `IGNORED` on all but responses. Sequence-to-sequence
        models: the response's ids.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def num_learned(self) -> int:
        """Tokens that the loss is on."""
        return int((self.labels != IGNORED).sum())


class Formatter:
    """Writes conversations as a model reads them.

    ``template``: ``chat`` is the tokenizer's own chat template; ``alpaca`` Alpaca's two headings;
    ``plain`` the prompt and then the response, as they are; ``auto`` the first where the tokenizer
    has a template, else what suits the data's shape. Each piece is tokenised by itself, so that a
    prompt's ids are in training what they are in use.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    config : AppConfig
        ``template``, ``max-length``, ``long-prompts`` and, for errors, ``model``.
    seq2seq : bool
        Prompt and response go to encoder and decoder.

    Raises
    ------
    ConfigError
        ``template=chat`` with a tokenizer that has none.
    """

    def __init__(self, tokenizer: Any, config: AppConfig, *, seq2seq: bool = False) -> None:
        self.tokenizer, self.config, self.seq2seq = tokenizer, config, seq2seq
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self._ends = _ends_of(tokenizer)
        if config.template == "chat" and not self.has_chat_template:
            raise ConfigError(
                f"template: the tokenizer of {config.model} has no chat template: set template to "
                "alpaca or plain, or take a model that was tuned to chat"
            )

    def encode(self, conversations: Sequence[Conversation]) -> list[TokenRow]:
        """Return token ids and labels of conversations, cut off at ``max-length``.

        Raises
        ------
        ConfigError
            Where a prompt leaves no room for its response (unless ``long-prompts=drop``), or the
            template does not fit; the error names the row.
        """
        written = [self._written(conversation) for conversation in conversations]
        tokens = iter(self._tokens([text for pieces in written for text, _ in pieces]))
        rows = []
        for conversation, pieces in zip(conversations, written, strict=True):
            ids = [(next(tokens), learned) for _, learned in pieces]
            if self.template_of(conversation) != "chat":
                ids = self._ended(ids)
            row = self._paired(ids) if self.seq2seq else self._joined(ids)
            if self._fits(conversation, len(ids[0][0]), row):
                rows.append(row)
        return rows

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids after which a model is to give a conversation's last turn."""
        if self.template_of(conversation) == "chat":
            text = self._rendered(conversation.turns[:-1], conversation.where, to_answer=True)
            ids: list[int] = self._tokens([text])[0].tolist()
            return ids
        (text, _), *_ = self._written(conversation)
        ids = self._ended([(self._tokens([text])[0], False)])[0][0].tolist()
        return ids

    def _fits(self, conversation: Conversation, length: int, row: TokenRow) -> bool:
        """Is there something to learn within the limit?"""
        limit = self.config.max_length
        if row.num_learned and (not self.seq2seq or length <= limit):
            return True
        if self.config.long_prompts == "drop":
            return False
        raise ConfigError(
            f"max-length: {conversation.where}: the prompt has {length} tokens, which leaves no "
            f"room for its response within {limit}: raise max-length, or leave such rows out with "
            "long-prompts=drop"
        )

    def _joined(self, pieces: list[_Piece]) -> TokenRow:
        """One sequence, for a causal model."""
        limit = self.config.max_length
        labels = [np.where(learned, tokens, np.int32(IGNORED)) for tokens, learned in pieces]
        ids = np.concatenate([tokens for tokens, _ in pieces])
        return TokenRow(ids[:limit], np.concatenate(labels)[:limit])

    def _paired(self, pieces: list[_Piece]) -> TokenRow:
        """Two sequences, for encoder and decoder."""
        limit = self.config.max_length
        (prompt, _), (response, _) = pieces
        return TokenRow(prompt[:limit], response[:limit])

    def _ended(self, pieces: list[_Piece]) -> list[_Piece]:
        """Add what the tokenizer begins and ends a text with, which a chat template does itself."""
        first, end = self._ends
        if self.seq2seq:
            return [(np.concatenate([tokens, end]), learned) for tokens, learned in pieces]
        (prompt, _), *rest = pieces
        begun = [(np.concatenate([first, prompt]), False)]
        return begun + [(np.concatenate([tokens, end]), learned) for tokens, learned in rest]

    def _tokens(self, texts: list[str]) -> list[NDArray[np.int32]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    def template_of(self, conversation: Conversation) -> str:
        """Which template writes a conversation."""
        alone = conversation.shape != "messages"
        if self.seq2seq:
            chosen = "plain" if self.config.template == "auto" else self.config.template
            return chosen if chosen != "chat" else "plain"
        if self.config.template != "auto":
            return self.config.template
        if self.has_chat_template:
            return "chat"
        if not alone:
            raise ConfigError(
                f"template: {conversation.where}: messages need a chat template, which the "
                f"tokenizer of {self.config.model} has not: set template to alpaca or plain for "
                "single turns, or take a model that was tuned to chat"
            )
        return "alpaca" if conversation.shape == "alpaca" else "plain"

    def _written(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """Return texts and whether they are learned: in turns; or a prompt and a response."""
        template = self.template_of(conversation)
        if template == "chat":
            return list(self._chat(conversation))
        turns = conversation.turns
        if len(turns) > 2 or turns[0].role != "user":
            raise ConfigError(
                f"template: {conversation.where}: expected one prompt and one response for "
                f"template={template}, found {len(turns)} turns: template=chat takes them, with a "
                "causal model whose tokenizer has a chat template"
            )
        prompt = turns[0].content
        if template == "alpaca":
            about = conversation.shape == "alpaca"
            instruction, given = conversation.alpaca if about else (prompt, "")
            form = _ALPACA_INPUT if given else _ALPACA
            prompt = form.format(instruction=instruction, given=given)
        return [(prompt, False), (turns[1].content, True)]

    def _chat(self, conversation: Conversation) -> Iterator[tuple[str, bool]]:
        """Yield a conversation's text by the chat template, cut where the assistant speaks.

        A turn before the last counts as learned only where the template writes it at the end as it
        writes it in the middle, which some do not (they leave out what was thought).
        """
        turns, where = conversation.turns, conversation.where
        whole, done = self._rendered(turns, where), 0
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            last = index == len(turns) - 1
            begins = self._rendered(turns[:index], where, to_answer=True)
            ends = whole if last else self._rendered(turns[: index + 1], where)
            if not (whole.startswith(begins) and whole.startswith(ends)):
                if not last:
                    continue
                raise ConfigError(
                    f"template: {where}: the chat template of {self.config.model} does not go on "
                    "from its own prompt: set template to alpaca or plain"
                )
            ends = ends.rstrip()
            yield whole[done : len(begins)], False
            yield whole[len(begins) : len(ends)], True
            done = len(ends)

    def _rendered(self, turns: Sequence[Turn], where: str, *, to_answer: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=to_answer
            )
        except Exception as error:  # a template is a stranger's program
            raise ConfigError(
                f"template: {where}: the chat template of {self.config.model} does not take it: "
                f"{one_line(error, 200)}"
            ) from None
        return text


def _ends_of(tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return what a tokenizer begins a text with, and what ends one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = tokenizer("a")["input_ids"][:1]
    first = begins if bos is not None and begins == [bos] else []
    return np.asarray(first, np.int32), np.asarray([] if eos is None else [eos], np.int32)
