"""The clients' metrics, aggregated by Flower's rule or the user's, whatever single ones send."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flwr.app import MetricRecord, RecordDict

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import LOGGER, metric_records

__all__ = ["Metrics", "check_metrics", "signature"]

Signature = tuple[Any, ...]

_MAX_BYTES = 1 << 16  # of one client's metrics
_MAX_SIGNATURES = 16
_FOLD = 32


def signature(key: str, metrics: MetricRecord) -> Signature:
    """What must be the same for Flower to aggregate records: keys, and the lengths of lists."""
    kinds = ((name, len(v) if isinstance(v, list) else None) for name, v in metrics.items())
    return (key, *sorted(kinds, key=lambda kind: kind[0]))


def check_metrics(metrics: MetricRecord) -> None:
    """Raise ParameterError for NaN, Inf, or too large a record."""
    size = metrics.count_bytes()
    if size > _MAX_BYTES:
        raise ParameterError(f"expected at most {_MAX_BYTES} bytes of metrics, found {size}")
    for name, value in metrics.items():
        if not all(math.isfinite(v) for v in (value if isinstance(value, list) else [value])):
            raise ParameterError(f"expected finite metrics, found {value} in {name!r}")


class Metrics:
    """Collects metrics of one round; those whose keys differ from most others' are left out.

    Flower's own aggregation raises where keys or lists differ between clients. Here one client's
    odd record costs that client's metrics and nothing else.

    Parameters
    ----------
    aggregate : callable
        Flower's ``train_metrics_aggr_fn``: (list of RecordDict, weight's key) -> MetricRecord.
    weighted_by_key : str
    foldable : bool
        May a mean of some be aggregated with others, as with Flower's own weighted mean? Then the
        memory does not grow with the number of clients.
    """

    def __init__(
        self,
        aggregate: Callable[[list[RecordDict], str], MetricRecord],
        weighted_by_key: str,
        *,
        foldable: bool,
    ) -> None:
        self._aggregate, self._weight_key, self._foldable = aggregate, weighted_by_key, foldable
        self._groups: dict[Signature, list[RecordDict]] = {}
        self._counts: dict[Signature, int] = {}

    def add(self, key: str, metrics: MetricRecord) -> None:
        """Take a client's metrics, which came under ``key``.

        Raises
        ------
        ParameterError
            NaN or Inf, or too large a record.
        """
        check_metrics(metrics)
        kind = signature(key, metrics)
        if kind not in self._groups and len(self._groups) >= _MAX_SIGNATURES:
            raise ParameterError(f"expected at most {_MAX_SIGNATURES} kinds of metrics, found more")
        group = self._groups.setdefault(kind, [])
        group.append(RecordDict({key: MetricRecord(dict(metrics))}))
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._foldable and len(group) >= _FOLD:
            self._groups[kind] = [self._fold(key, group)]

    def result(self) -> MetricRecord | None:
        """The aggregate of the largest group of records with the same keys; None without any."""
        if not self._groups:
            return None
        kind = max(self._counts, key=self._counts.__getitem__)
        others = sum(self._counts.values()) - self._counts[kind]
        if others:
            LOGGER.warning(
                "the metrics of %d replies are left out: their keys differ from those of %d others",
                others,
                self._counts[kind],
            )
        return self._aggregate(self._groups[kind], self._weight_key)

    def _fold(self, key: str, group: list[RecordDict]) -> RecordDict:
        """One record that stands for the group: its mean, with the group's weight."""
        mean = self._aggregate(group, self._weight_key)
        weights: list[Any] = [metric_records(record)[key][self._weight_key] for record in group]
        mean[self._weight_key] = float(sum(weights))
        return RecordDict({key: mean})
