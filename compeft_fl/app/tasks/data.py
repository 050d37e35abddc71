"""Labelled text for the app: where rows come from, and which of them a node holds.

Everything here is decided by the configuration and its seed alone, so that every node and the
server see the same splits and the same partition without exchanging a byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.app.config import AppConfig, suggestion
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EMBEDDED", "Rows", "TextData", "load", "node_rows", "partition"]

EMBEDDED: Final = {
    f"debian-{task}": f"debian-{task}.jsonl" for task in ("section", "role", "interface", "lang")
}
"""Data sets inside the package: name -> file under ``compeft_fl/app/embedded``."""

_FORMATS: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TEST_PART: Final = 0.2
_VALIDATION_PART: Final = 0.1


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

    A split that the data does not have is cut off the training rows by the seed: 20 % for test,
    then 10 % of the rest for validation.

    Raises
    ------
    ConfigError
        Where the file, a column, a split or the data set does not exist, or a split is empty.
    """
    if config.data in EMBEDDED:
        table = _embedded(EMBEDDED[config.data])
        splits = _by_column(table, config)
    elif Path(config.data).suffix in _FORMATS:
        splits = _by_column(_file(Path(config.data)), config)
    else:
        splits = _hub(config)
    return _text_data(splits, config)


def partition(rows: Rows, num_nodes: int, config: AppConfig) -> list[NDArray[np.int64]]:
    """Return the row indices of every node: disjoint, all rows, by the configuration's seed.

    ``iid`` deals shuffled rows out evenly. ``dirichlet`` draws, for every class, how its rows
    spread over the nodes (Dirichlet with `alpha`; the smaller, the more uneven). ``column`` keeps
    the rows of one value of the partition column together. Where ``dirichlet`` leaves a node with
    fewer than `min_rows` rows, rows move to it from the largest.

    Raises
    ------
    ConfigError
        Where there are too few rows, or too few values of the column, for so many nodes.
    """
    if num_nodes < 1 or len(rows) < num_nodes * config.min_rows:
        raise ConfigError(
            f"min-rows: {len(rows)} rows are too few for {num_nodes} nodes with at least "
            f"{config.min_rows} each"
        )
    rng = np.random.default_rng([config.seed, num_nodes])
    if config.partition == "column":
        return _by_group(rows, num_nodes, config)
    if config.partition == "iid":
        shuffled = rng.permutation(len(rows))
        return [np.sort(part) for part in np.array_split(shuffled, num_nodes)]
    parts: list[list[int]] = [[] for _ in range(num_nodes)]
    for index in range(int(rows.classes.max()) + 1):
        members = rng.permutation(np.flatnonzero(rows.classes == index))
        shares = rng.dirichlet(np.full(num_nodes, config.alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(np.int64)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.extend(chunk.tolist())
    while min(map(len, parts)) < config.min_rows:
        largest, smallest = max(parts, key=len), min(parts, key=len)
        smallest.append(largest.pop(int(rng.integers(len(largest)))))
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def node_rows(data: TextData, node_config: Mapping[str, Any], config: AppConfig) -> Rows:
    """Return the training rows of the node that Flower describes by `node_config`.

    Raises
    ------
    ConfigError
        Where ``partition-id`` or ``num-partitions`` is missing or out of range.
    """
    index, count = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(index, int) or not isinstance(count, int) or not 0 <= index < count:
        raise ConfigError(
            "the node's configuration needs partition-id and num-partitions, as in "
            f'--node-config "partition-id=0 num-partitions=2"; found {dict(node_config)}'
        )
    return data.train.take(partition(data.train, count, config)[index])


Table = dict[str, list[Any]]


def _embedded(file: str) -> Table:
    text = resources.files("compeft_fl.app").joinpath("embedded", file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {column: [row[column] for row in rows] for column in rows[0]}


def _file(path: Path) -> Table:
    """Return a file's columns, read by the `datasets` library, without a copy in its cache."""
    if not path.is_file():
        raise ConfigError(f"data: no file {path}")
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    readers = {"json": Dataset.from_json, "csv": Dataset.from_csv, "parquet": Dataset.from_parquet}
    try:
        dataset = readers[_FORMATS[path.suffix]](str(path), keep_in_memory=True)
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"data: {path} cannot be read as {path.suffix}: {reason}") from None
    return {column: list(dataset[column]) for column in dataset.column_names}


def _hub(config: AppConfig) -> dict[str, Table]:
    """Return the splits of a Hugging Face dataset, labels as names."""
    from datasets import ClassLabel, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        loaded = load_dataset(config.data, config.data_config or None)
    except (DatasetNotFoundError, FileNotFoundError, ValueError, ConnectionError) as error:
        choices = suggestion(config.data, EMBEDDED)
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f'data: "{config.data}" is no file and no dataset that loads ({reason}){choices}'
        ) from None
    splits: dict[str, Table] = {}
    for name, dataset in loaded.items():
        table: Table = {column: list(dataset[column]) for column in dataset.column_names}
        feature = dataset.features.get(config.label_column)
        if isinstance(feature, ClassLabel):
            table[config.label_column] = [feature.int2str(i) for i in table[config.label_column]]
        splits[name] = table
    return splits


def _by_column(table: Table, config: AppConfig) -> dict[str, Table]:
    """Return a table's rows by the value of its split column, or all of them as training rows."""
    if config.split_column not in table:
        return {config.train_split: table}
    splits: dict[str, Table] = {}
    for row, name in enumerate(table[config.split_column]):
        split = splits.setdefault(str(name), {column: [] for column in table})
        for column, values in table.items():
            split[column].append(values[row])
    return splits


def _text_data(splits: dict[str, Table], config: AppConfig) -> TextData:
    if config.train_split not in splits:
        raise ConfigError(
            f'train-split: no split "{config.train_split}"{suggestion(config.train_split, splits)}'
        )
    names = (config.train_split, config.validation_split, config.test_split)
    wanted = {name: _clean(splits[name], config) for name in names if name in splits}
    labels = tuple(sorted({label for _, column, _ in wanted.values() for label in column}))
    index = {label: i for i, label in enumerate(labels)}
    if len(labels) < 2:
        raise ConfigError(f"label-column: at least two classes are needed, found {list(labels)}")
    rows = {
        name: Rows(tuple(texts), np.array([index[c] for c in column], np.int64), tuple(groups))
        for name, (texts, column, groups) in wanted.items()
    }
    rng = np.random.default_rng(config.seed)
    train = rows[config.train_split]
    for name, part in (
        (config.test_split, _TEST_PART),
        (config.validation_split, _VALIDATION_PART),
    ):
        if name not in rows:
            order = rng.permutation(len(train))
            size = int(part * len(train))
            rows[name] = train.take(np.sort(order[:size]))
            train = train.take(np.sort(order[size:]))
    rows[config.train_split] = train
    limited = []
    for name in names:
        split = rows[name]
        if config.limit_rows and len(split) > config.limit_rows:
            split = split.take(np.sort(rng.permutation(len(split))[: config.limit_rows]))
        if not len(split):
            raise ConfigError(f'data: the split "{name}" of {config.data} has no rows')
        limited.append(split)
    return TextData(labels, *limited)


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


def _by_group(rows: Rows, num_nodes: int, config: AppConfig) -> list[NDArray[np.int64]]:
    """Return parts that keep each value together: the largest first, to the smallest node."""
    members: dict[str, list[int]] = {}
    for row, value in enumerate(rows.groups):
        members.setdefault(value, []).append(row)
    if len(members) < num_nodes:
        raise ConfigError(
            f'partition-column: "{config.partition_column}" has {len(members)} values, '
            f"too few for {num_nodes} nodes"
        )
    parts: list[list[int]] = [[] for _ in range(num_nodes)]
    for value in sorted(members, key=lambda value: (-len(members[value]), value)):
        min(parts, key=len).extend(members[value])
    if min(map(len, parts)) < config.min_rows:
        raise ConfigError(
            f'partition-column: by "{config.partition_column}" a node gets '
            f"{min(map(len, parts))} rows, fewer than min-rows={config.min_rows}"
        )
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]
