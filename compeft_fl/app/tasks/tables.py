"""Tables of rows: the package's own, files of JSON lines, CSV and Parquet, and Hugging Face's.

Everything here is decided by the configuration and its seed alone, so that every node and the
server see the same splits without exchanging a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

import numpy as np

from compeft_fl.app import embedded
from compeft_fl.app.config import AppConfig, suggestion
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EMBEDDED", "Table", "check_file", "load_tables", "three_splits"]

EMBEDDED: Final = {
    f"debian-{task}": f"debian-{task}.jsonl" for task in ("section", "role", "interface", "lang")
} | {"debian-instructions": "debian-instructions.parquet"}
"""Data sets inside the package: name -> file under ``compeft_fl/app/embedded``."""

_FORMATS: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TEST_PART: Final = 0.2
_VALIDATION_PART: Final = 0.1

Table = dict[str, list[Any]]
"""Columns by name, all of one length."""


class _Rows(Protocol):
    """Rows of which some can be taken."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the rows at `indices`, in that order."""


_R = TypeVar("_R", bound=_Rows)


def check_file(config: AppConfig) -> None:
    """Raise where the data is a file that does not exist; anybody can ask, before all imports.

    Raises
    ------
    ConfigError
        There is no such file.
    """
    path = Path(config.data)
    if config.data not in EMBEDDED and path.suffix in _FORMATS and not path.is_file():
        raise ConfigError(f"data: no file {path}")


def load_tables(config: AppConfig) -> dict[str, Table]:
    """Return the tables of the data that the configuration names, by split.

    Only the splits that the configuration names; one that is not there is left out.

    Raises
    ------
    ConfigError
        Where the file, the data set or the split to train on does not exist.
    """
    check_file(config)
    if config.data in EMBEDDED:
        splits = _by_column(_embedded(embedded.path(EMBEDDED[config.data])), config)
    elif Path(config.data).suffix in _FORMATS:
        splits = _by_column(_file(Path(config.data)), config)
    else:
        splits = _hub(config)
    if config.train_split not in splits:
        raise ConfigError(
            f'train-split: no split "{config.train_split}"{suggestion(config.train_split, splits)}'
        )
    names = (config.train_split, config.validation_split, config.test_split)
    return {name: splits[name] for name in names if name in splits}


def three_splits(rows: Mapping[str, _R], config: AppConfig) -> tuple[_R, _R, _R]:
    """Return the rows to train on, to calibrate with and to score, of those that there are.

    A split that the data does not have is cut off the training rows by the seed: 20 % for test,
    then 10 % of the rest for validation. ``limit-rows`` and
    ``limit-test-rows`` draw from each.

    Raises
    ------
    ConfigError
        Where a split is empty.
    """
    rows = dict(rows)
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
    for name in (config.train_split, config.validation_split, config.test_split):
        split, most = rows[name], config.limit_rows
        if name == config.test_split:
            most = config.limit_test_rows or most
        if most and len(split) > most:
            split = split.take(np.sort(rng.permutation(len(split))[:most]))
        if not len(split):
            raise ConfigError(f'data: the split "{name}" of {config.data} has no rows')
        limited.append(split)
    return limited[0], limited[1], limited[2]


def _embedded(path: Path) -> Table:
    if path.suffix != ".jsonl":
        return _file(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {column: [row[column] for row in rows] for column in rows[0]}


def _file(path: Path) -> Table:
    """Return a file's columns, read by the `datasets` library, without a copy in its cache."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    readers = {"json": Dataset.from_json, "csv": Dataset.from_csv, "parquet": Dataset.from_parquet}
    try:
        dataset = readers[_FORMATS[path.suffix]](str(path), keep_in_memory=True)
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"data: {path} cannot be read as {path.suffix}: {reason}") from None
    return dict(dataset[:])  # by the column: row by row it takes many times as long


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
        table: Table = dict(dataset[:])
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
