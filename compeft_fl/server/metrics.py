"""The clients' metrics, aggregated by Flower's rule or the user's, whatever single ones send."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import MetricRecord, RecordDict

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import LOGGER, metric_records

__all__ = ["Metrics", "check_metrics", "mended", "signature", "spoiled"]

Signature = tuple[Any, ...]

_MAX_BYTES = 1 << 16  # of one client's metrics
_MAX_SIGNATURES = 16
_FOLD = 32
_MAX_MENDED = 64  # records that wait for the others' means
_MOST = 1e24  # no measurement is beyond, and sums of what is below are finite


def signature(key: str, metrics: MetricRecord) -> Signature:
    """What must be the same for Flower to aggregate records: keys, and the lengths of lists."""
    kinds = ((name, len(v) if isinstance(v, list) else None) for name, v in metrics.items())
    return (key, *sorted(kinds, key=lambda kind: kind[0]))


def check_metrics(metrics: MetricRecord) -> None:
    """Raise ParameterError for too large a record."""
    size = metrics.count_bytes()
    if size > _MAX_BYTES:
        raise ParameterError(f"expected at most {_MAX_BYTES} bytes of metrics, found {size}")


def spoiled(metrics: MetricRecord) -> list[str]:
    """The names under which a mean would be spoiled: NaN, Inf, or a value that none measures."""
    return [name for name, value in metrics.items() if not all(map(_is_sane, _numbers(value)))]


def mended(
    sound: Iterable[MetricRecord], odd: MetricRecord, weighted_by_key: str
) -> MetricRecord | None:
    """A record whose spoiled values are the others' weighted means, which change no mean.

    Parameters
    ----------
    sound : iterable of MetricRecord
        Others, of the same signature.
    odd : MetricRecord
    weighted_by_key : str

    Returns
    -------
    MetricRecord or None
        None where there is no other.
    """
    others = list(sound)
    if not others:
        return None
    weights = [_weight(record, weighted_by_key) for record in others]
    mend: dict[str, Any] = dict(odd)
    for name in spoiled(odd):
        values = [record[name] for record in others]
        if isinstance(values[0], list):
            columns = zip(*(_numbers(value) for value in values), strict=True)
            mend[name] = [_mean(column, weights) for column in columns]
        else:
            mend[name] = _mean([_numbers(value)[0] for value in values], weights)
    return MetricRecord(mend)


def _mean(values: Iterable[float], weights: list[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _weight(record: MetricRecord, key: str) -> float:
    weight = record.get(key, 1.0)
    return float(weight) if isinstance(weight, int | float) and weight > 0 else 1.0


def _numbers(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _is_sane(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= _MOST


class Metrics:
    """Collects metrics of one round; those whose keys differ from most others' are left out.

    Flower's own aggregation raises where keys or lists differ between clients. Here one client's
    odd record costs that client's metrics and nothing else, and a NaN that one metric of that
    client: it counts as the mean of the others'.

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
        self._odd: list[tuple[Signature, str, MetricRecord]] = []

    def add(self, key: str, metrics: MetricRecord) -> None:
        """Take a client's metrics, which came under ``key``.

        Raises
        ------
        ParameterError
            Too large a record, or too many kinds of them, or of such with values that spoil a mean.
        """
        check_metrics(metrics)
        kind = signature(key, metrics)
        if spoiled(metrics):
            if len(self._odd) >= _MAX_MENDED:
                raise ParameterError(
                    f"expected at most {_MAX_MENDED} replies with NaN or absurd metrics, found more"
                )
            self._odd.append((kind, key, MetricRecord(dict(metrics))))
            return
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
        self._mend()
        kind = max(self._counts, key=self._counts.__getitem__)
        others = sum(self._counts.values()) - self._counts[kind]
        if others:
            LOGGER.warning(
                "the metrics of %d replies are left out: their keys differ from those of %d others",
                others,
                self._counts[kind],
            )
        return self._aggregate(self._groups[kind], self._weight_key)

    def _mend(self) -> None:
        """Add the records that waited, what is odd in them as the mean of the others."""
        sound = {
            kind: [record for each in group for record in metric_records(each).values()]
            for kind, group in self._groups.items()
        }
        if self._odd:
            LOGGER.warning(
                "metrics of %d replies are left out, NaN or absurd: %s",
                len(self._odd),
                ", ".join(sorted({repr(n) for _, _, odd in self._odd for n in spoiled(odd)})[:8]),
            )
        for kind, key, odd in self._odd:
            record = mended(sound.get(kind, ()), odd, self._weight_key)
            if record is not None:
                self._groups[kind].append(RecordDict({key: record}))
                self._counts[kind] += 1
        self._odd.clear()

    def _fold(self, key: str, group: list[RecordDict]) -> RecordDict:
        """One record that stands for the group: its mean, with the group's weight."""
        mean = self._aggregate(group, self._weight_key)
        weights: list[Any] = [metric_records(record)[key][self._weight_key] for record in group]
        mean[self._weight_key] = float(sum(weights))
        return RecordDict({key: mean})
