"""A few labelled examples: as the data of a classifier, and as a loss to compose experts by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.app.tasks.data import Rows, TextData
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line, quoted

if TYPE_CHECKING:
    from compeft_fl.app.tasks.model import Classifier

__all__ = ["examples", "loss_on"]

_MOST: Final = 10_000  # rows: they are looked at in one batch, again and again


def examples(file: Path) -> TextData:
    """The rows of a JSON lines file, ``{"text": ..., "label": ...}`` each, as every split.

    Raises
    ------
    ConfigError
        No such file, other lines, one class only, or more than 10,000 rows.
    """
    texts, labels = [], []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                text, label = row["text"], row["label"]
                if not isinstance(text, str) or not isinstance(label, str) or number > _MOST:
                    raise ValueError(f"not two texts, or more than {_MOST} rows")
                texts.append(text)
                labels.append(label)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f'{file}: expected lines of {{"text": ..., "label": ...}}: {one_line(error, 200)}'
        ) from None
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise ConfigError(f"{file}: expected examples of two classes or more, found {len(names)}")
    if odd := next((name for name in names if not name.isprintable()), None):
        raise ConfigError(f"{file}: expected labels that print, found {quoted(odd)}")
    classes = np.array([names.index(label) for label in labels], np.int64)
    rows = Rows(tuple(texts), classes)
    return TextData(names, rows, rows, rows)


def loss_on(classifier: Classifier, rows: Rows) -> Callable[[], float]:
    """The mean cross-entropy on rows, of a classifier as it is when the result is called."""
    import torch

    batch = classifier.batch(classifier.tokenize(rows.texts))
    classes = torch.as_tensor(rows.classes, device=classifier.device)

    def loss() -> float:
        with torch.inference_mode():
            logits: Any = classifier(batch)
        return float(torch.nn.functional.cross_entropy(logits, classes))

    return loss
