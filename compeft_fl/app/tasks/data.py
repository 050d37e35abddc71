"""Labelled text for classification: from the columns of a table to rows with classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compeft_fl.app.config import AppConfig, suggestion
from compeft_fl.app.tasks.partition import node_indices, partition
from compeft_fl.app.tasks.tables import EMBEDDED, Table, load_tables, three_splits
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EMBEDDED", "Rows", "TextData", "load", "node_rows", "partition"]


@dataclass(frozen=True)
class Rows:
    """Texts with their classes.

    Parameters
    ----------
    texts : tuple of str
        One text per row.
    classes : ndarray of int64
        Index of each row's class, shape ``(len(texts),)``.
    groups : tuple of str
        Each row's value of the partition column; empty where there is none.
    """

    texts: tuple[str, ...]
    classes: NDArray[np.int64]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Rows:
        """Return the rows at `indices`, in that order."""
        return Rows(
            tuple(self.texts[i] for i in indices),
            self.classes[np.asarray(indices, dtype=np.int64)],
            tuple(self.groups[i] for i in indices) if self.groups else (),
        )


@dataclass(frozen=True)
class TextData:
    """The three splits of a text classification task.

    Parameters
    ----------
    labels : tuple of str
        The classes' names, sorted; a row's class is an index into them.
    train, validation, test : Rows
        Rows to train on (partitioned over the nodes), to calibrate with (public), and to score.
    """

    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows


def load(config: AppConfig) -> TextData:
    """Return the data that the configuration names.

    A split that the data does not have is cut off the training rows by the seed, see
    `compeft_fl.app.tasks.tables.three_splits`.

    Raises
    ------
    ConfigError
        Where the file, a column, a split or the data set does not exist, or a split is empty.
    """
    wanted = {name: _clean(table, config) for name, table in load_tables(config).items()}
    labels = tuple(sorted({label for _, column, _ in wanted.values() for label in column}))
    index = {label: i for i, label in enumerate(labels)}
    if len(labels) < 2:
        raise ConfigError(f"label-column: at least two classes are needed, found {list(labels)}")
    rows = {
        name: Rows(tuple(texts), np.array([index[c] for c in column], np.int64), tuple(groups))
        for name, (texts, column, groups) in wanted.items()
    }
    return TextData(labels, *three_splits(rows, config))


def node_rows(data: TextData, node_config: Mapping[str, Any], config: AppConfig) -> Rows:
    """Return the training rows of the node that Flower describes by `node_config`.

    Raises
    ------
    ConfigError
        Where ``partition-id`` or ``num-partitions`` is missing or out of range.
    """
    return data.train.take(node_indices(data.train, node_config, config))


def _clean(table: Table, config: AppConfig) -> tuple[list[str], list[str], list[str]]:
    """Return texts, labels and groups of a split, without rows that lack a text or a label."""
    needed = {"text-column": config.text_column, "label-column": config.label_column}
    if config.partition == "column":
        needed["partition-column"] = config.partition_column
    for key, column in needed.items():
        if column not in table:
            raise ConfigError(
                f'{key}: {config.data} has no column "{column}"{suggestion(column, table)}'
            )
    groups: Iterable[Any] = table.get(config.partition_column, [])
    texts = table[config.text_column]
    classes = table[config.label_column]
    keep = [i for i, text in enumerate(texts) if text and classes[i] is not None]
    grouped = list(groups)
    return (
        [str(texts[i]) for i in keep],
        [str(classes[i]) for i in keep],
        [str(grouped[i]) for i in keep] if grouped else [],
    )
