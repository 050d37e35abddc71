"""Adapters over a base model that is run once per text: federations in seconds.

What lies below an adapter is not trained. Where the adapter is on top of the base model's
embedding, a step costs a thousandth; where it is in the upper layers of a BERT, it is as much
cheaper as layers lie below. No dropout there: what is kept is what evaluation sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compeft_fl.app.tasks.model import Classifier

__all__ = ["keep_below_adapter", "put_on_top"]

Text = tuple[int, ...]  # a text's tokens
_AT_ONCE: Final = 256


def keep_below_adapter(network: nn.Module) -> int:
    """Let a PEFT model over a BERT remember what lies below its adapter, by text.

    Returns
    -------
    int
        How many layers lie below; 0: nothing was changed, also where the model is no BERT.
    """
    base: Any = getattr(getattr(network, "base_model", None), "model", None)
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(base, "embeddings"):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    below = trained.index(True) if True in trained else 0
    if below:
        embeddings, *lower = (base.embeddings, *layers[:below])

        def run(texts: Tensor) -> Tensor:
            hidden: Tensor = embeddings(input_ids=texts)
            for layer in lower:
                hidden = layer(hidden, None)
            return hidden

        base.embeddings = _Below(_Kept(run, (embeddings, *lower), base.config.pad_token_id))
        for number in range(below):
            layers[number] = _Pass()
    return below


def put_on_top(
    classifier: Classifier, rank: int, seed: int, texts: Sequence[str], file: Path | None = None
) -> None:
    """Give a classifier another adapter: LoRA on a linear map of the base model's embedding.

    The map is the identity, so the start is that of the app's adapter.

    Parameters
    ----------
    classifier : Classifier
        With an adapter at its start, and class prototypes for a head.
    rank : int
    seed : int
        Of the adapter's start.
    texts : sequence of str
        All that will be seen; embedded at once.
    file : Path, optional
        Where embeddings are kept for other runs with the same model.
    """
    from peft import LoraConfig, get_peft_model

    network: Any = classifier.network

    def run(texts: Tensor) -> Tensor:
        hidden: Tensor = network(input_ids=texts, attention_mask=torch.ones_like(texts))[0].mean(1)
        return hidden

    kept = _Kept(run, (network,), classifier.tokenizer.pad_token_id, file)
    tokens = classifier.tokenize(texts)
    for start in range(0, len(tokens), _AT_ONCE):
        kept.of(classifier.batch(tokens[start : start + _AT_ONCE])["input_ids"])
    kept.save()
    torch.manual_seed(seed)
    top: Any = _Top(kept, network.config.hidden_size)
    options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["map"])
    classifier.network = get_peft_model(top, options)


class _Kept:
    """What frozen modules make of texts, one tensor for each."""

    def __init__(
        self, run: Any, modules: tuple[nn.Module, ...], padding: int | None,
        file: Path | None = None,
    ) -> None:  # fmt: skip
        self._run, self._padding, self._file = run, padding or 0, file
        for module in modules:
            module.eval().requires_grad_(False)
        self._known: dict[Text, Tensor] = {}
        self._stored = 0
        if file is not None and file.exists():
            with np.load(file) as held:
                vectors = torch.from_numpy(held["vectors"])
                self._known = dict(zip(self._texts(held["tokens"]), vectors, strict=True))
            self._stored = len(self._known)

    def of(self, input_ids: Tensor) -> list[Tensor]:
        """For each row of padded tokens."""
        texts = self._texts(input_ids.numpy())
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for length in {len(text) for text in new}:
            alike = [text for text in new if len(text) == length]
            with torch.no_grad():
                made = self._run(torch.tensor(alike))
            self._known.update(zip(alike, made.clone().unbind(0), strict=True))
        return [self._known[text] for text in texts]

    def _texts(self, tokens: Any) -> list[Text]:
        lengths = (tokens != self._padding).sum(1).tolist()
        return [tuple(row[:n]) for row, n in zip(tokens.tolist(), lengths, strict=True)]

    def save(self) -> None:
        """Write what is known, for the next run."""
        if self._file is None or len(self._known) == self._stored:
            return
        longest = max(map(len, self._known))
        tokens = np.full((len(self._known), longest), self._padding, np.int32)
        for row, text in zip(tokens, self._known, strict=True):
            row[: len(text)] = text
        vectors = torch.stack(list(self._known.values())).numpy()
        fresh = self._file.with_name(f".{self._file.name}")
        with fresh.open("wb") as written:
            np.savez(written, tokens=tokens, vectors=vectors)
        fresh.replace(self._file)


class _Below(nn.Module):
    """In the place of a BERT's embeddings: they, and the layers above them that are not trained."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
        """Hidden states, shape (rows, longest, hidden), 0 beyond a text's end."""
        return nn.utils.rnn.pad_sequence(self._kept.of(input_ids), batch_first=True)


class _Pass(nn.Module):
    """A layer whose work `_Below` has done."""

    def forward(self, hidden: Tensor, *others: Any, **more: Any) -> Tensor:
        """As it came."""
        return hidden


class _Top(nn.Module):
    """A linear map of embeddings that are known, in the form of a base model."""

    def __init__(self, kept: _Kept, hidden: int) -> None:
        super().__init__()
        self.kept = kept
        self.map = nn.Linear(hidden, hidden, bias=False)
        nn.init.eye_(self.map.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The same state for each token, so that their mean is the mapped embedding."""
        mapped = self.map(torch.stack(self.kept.of(input_ids)))
        states = mapped[:, None].expand(-1, input_ids.shape[1], -1)
        return SimpleNamespace(last_hidden_state=states)
