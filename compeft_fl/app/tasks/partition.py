"""Which of the training rows a node holds: decided by the configuration and its seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compeft_fl.app.config import AppConfig
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Partitioned", "node_indices", "partition"]


class Partitioned(Protocol):
    """Rows as a partition sees them."""

    @property
    def classes(self) -> NDArray[np.int64]:
        """What a Dirichlet partition is uneven in, an index for each row."""

    @property
    def groups(self) -> Sequence[str]:
        """Each row's value of the partition column; empty where there is none."""

    def __len__(self) -> int: ...


def partition(rows: Partitioned, num_nodes: int, config: AppConfig) -> list[NDArray[np.int64]]:
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


def node_indices(
    rows: Partitioned, node_config: Mapping[str, Any], config: AppConfig
) -> NDArray[np.int64]:
    """Return the row indices of the node that Flower describes by `node_config`.

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
    return partition(rows, count, config)[index]


def _by_group(rows: Partitioned, num_nodes: int, config: AppConfig) -> list[NDArray[np.int64]]:
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
