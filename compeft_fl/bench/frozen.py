"""Below the first layer with an adapter nothing is trained: computed once per text, and kept.

A benchmark with many runs has its adapters in the upper layers of a BERT; a step is then as much
cheaper as layers lie below. No dropout there: what is kept is what evaluation sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_below_adapter"]


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
        padding = int(base.config.pad_token_id or 0)
        base.embeddings = _Below((base.embeddings, *layers[:below]), padding)
        for number in range(below):
            layers[number] = _Pass()
    return below


class _Below(nn.Module):
    """In the place of a BERT's embeddings: they, and the layers above them that are not trained."""

    def __init__(self, modules: tuple[nn.Module, ...], padding: int) -> None:
        super().__init__()
        self._run = tuple(module.eval() for module in modules)  # a tuple: no children of this
        self._padding = padding
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
        """Hidden states, shape (rows, longest, hidden), 0 beyond a text's end."""
        lengths = (input_ids != self._padding).sum(1).tolist()
        texts = [tuple(ids[:n]) for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        for length in set(lengths):
            self._compute([text for text in dict.fromkeys(texts) if len(text) == length])
        return nn.utils.rnn.pad_sequence([self._known[text] for text in texts], batch_first=True)

    def _compute(self, texts: list[tuple[int, ...]]) -> None:
        """Add texts of one length."""
        new = [text for text in texts if text not in self._known]
        if not new:
            return
        embeddings, *layers = self._run
        with torch.no_grad():
            hidden = embeddings(input_ids=torch.tensor(new))
            for layer in layers:
                hidden = layer(hidden, None)
        self._known.update(zip(new, hidden.clone().unbind(0), strict=True))


class _Pass(nn.Module):
    """A layer whose work `_Below` has done."""

    def forward(self, hidden: Tensor, *others: Any, **more: Any) -> Tensor:
        """As it came."""
        return hidden
