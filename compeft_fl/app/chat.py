"""Asking a language model with the adapter that a run has left: ``compeft-fl chat``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from compeft_fl.adapters import load_folder
from compeft_fl.adapters.base_digest import noted_base
from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import language_model
from compeft_fl.app.tasks.conversations import Conversation, Turn
from compeft_fl.app.tasks.formatting import Formatter
from compeft_fl.app.tasks.instruction import TASK_FILE
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line

__all__ = ["Chat", "adapter_folder", "stored_config"]

_ADAPTER: Final = "adapter"
_HEAD_FILE: Final = "head.json"  # of task=classification
_LONGEST: Final = 2048  # tokens, where a folder does not say


def adapter_folder(path: Path) -> Path:
    """Return the adapter folder that a path means: itself, or the one in a run's folder."""
    inner = path / _ADAPTER
    return inner if inner.is_dir() and not (path / "adapter_config.json").exists() else path


def stored_config(folder: Path, **changes: Any) -> AppConfig:
    """Return the configuration by which a folder's adapter is used.

    Parameters
    ----------
    folder : Path
        One that task=instruction has left, or any of PEFT's for a language model.
    **changes
        Fields of the configuration that are to be others; None: as they are.

    Raises
    ------
    ConfigError
        A folder of another task, or one that does not say its base model.
    AdapterError
        Where its files are missing or broken.
    """
    if (folder / _HEAD_FILE).exists():
        raise ConfigError(
            f"{folder}: expected an adapter of task=instruction, found one of task=classification, "
            "which answers nothing"
        )
    config = load_folder(folder).config
    told: dict[str, Any] = {"model": config.get("base_model_name_or_path") or ""}
    try:
        stored = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        told |= {key: stored[key] for key in ("model", "template", "max_length")}
    except FileNotFoundError:
        told["max_length"] = _LONGEST
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / TASK_FILE}: {one_line(error)}") from None
    noted = noted_base(folder)
    told["quantization"] = (noted and noted[1]) or "none"
    told |= {key: value for key, value in changes.items() if value is not None}
    if not told["model"]:
        raise ConfigError(f"{folder}: expected the name of a base model, found none: give --model")
    return AppConfig(task="instruction", **told)


class Chat:
    """A conversation with a model.

    Parameters
    ----------
    folder : Path
        Of the adapter.
    config : AppConfig
        As `stored_config` gives it.
    say : callable
        Takes the answer's pieces as they come.
    max_tokens : int
        Of an answer.
    temperature : float
        0: always the most likely token.
    without : bool
        Ask the base model alone, to compare.

    Raises
    ------
    ConfigError, AdapterError, MissingPackageError
        As `compeft_fl.app.tasks.language_model.with_adapter`.
    """

    def __init__(
        self,
        folder: Path,
        config: AppConfig,
        say: Callable[[str], None],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        without: bool = False,
    ) -> None:
        make = language_model.load_base if without else language_model.with_adapter
        self.model = make(config) if without else make(config, folder)  # type: ignore[call-arg]
        self.model.network.eval()
        self.formatter = Formatter(self.model.tokenizer, config, seq2seq=self.model.seq2seq)
        self._say, self._max_tokens, self._temperature = say, max_tokens, temperature
        self.turns: list[Turn] = []

    @torch.inference_mode()
    def ask(self, prompt: str) -> str:
        """Answer a prompt, and remember both where the model's template has turns.

        Raises
        ------
        ConfigError
            A conversation that is longer than the model reads.
        """
        turns = [*self.turns, Turn("user", prompt)]
        ids = self.formatter.prompt(Conversation((*turns, Turn("assistant", ""))))
        self._check_length(len(ids))
        tokens = torch.tensor([ids], device=self.model.device)
        chance = self._temperature > 0
        options: dict[str, Any] = {"temperature": self._temperature} if chance else {}
        streamer = _streamer(self.model, self._say)
        written = self.model.network.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self._max_tokens,
            do_sample=chance,
            pad_token_id=self.model.tokenizer.pad_token_id,
            streamer=streamer,
            **options,
        )
        new = written[0] if self.model.seq2seq else written[0][len(ids) :]
        answer: str = self.model.tokenizer.decode(new, skip_special_tokens=True)
        if self.formatter.has_chat_template and not self.model.seq2seq:
            self.turns = [*turns, Turn("assistant", answer)]
        return answer

    def _check_length(self, length: int) -> None:
        most = getattr(self.model.network.config, "max_position_embeddings", None)
        if most is not None and length >= most:
            raise ConfigError(
                f"prompt: expected fewer than {most} tokens, which is what the model reads, found "
                f"{length}"
            )


def _streamer(model: language_model.LanguageModel, say: Callable[[str], None]) -> Any:
    """Return what `generate` gives tokens to, and `say` their text as whole words."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                say(text)

    # What comes first is the prompt, or with encoder and decoder a single token to begin with.
    return Streamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
