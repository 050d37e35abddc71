"""The merge of what is carried and not trained: statistics, counters, indices, masks.

One pass, O(d) memory, whatever the number of nodes. A result lies between the smallest and the
largest value that was sent, in each place: variances stay positive, and what all agree on stays
what it is, bit for bit.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ParameterError

__all__ = ["CarriedAverage", "same"]

_FEWEST_NODES = 5  # whose median says what is usual
_NODES_OF_MEDIAN = 101  # the first of them, so that the memory does not grow with their number

Values = Mapping[str, NDArray[Any]]


class CarriedAverage:
    """The weighted mean of what nodes send, tensor by tensor.

    - Floats: the weighted mean, in float64, rounded to the tensor's own type.
    - Integers of one element, as counters are: the same, rounded to the nearest integer.
    - Other integers, and Booleans: they are indices and masks, of which there is no mean. The
      whole tensor that has more than half of the weight; the old one where none has.

    A tensor that a node does not send counts as unchanged there.

    Parameters
    ----------
    base : mapping of str to ndarray
        What the values were.
    most : float, optional
        How far a node may move a tensor that is averaged, in medians of how far nodes do (the norm
        of the change); what goes further is shortened. A tensor that hardly any node changes moves
        by its own norm at most. With fewer than five nodes there is no such bound; None: never.

    Attributes
    ----------
    shortened : list of (who, str)
        Nodes, as `add` was told, and their tensors.

    Examples
    --------
    >>> average = CarriedAverage({"mean": np.zeros(2, "f4"), "steps": np.array(0)})
    >>> average.add({"mean": np.ones(2, "f4"), "steps": np.array(10)}, weight=3)
    >>> average.add({"steps": np.array(5)}, weight=1)
    >>> average.result()
    {'mean': array([0.75, 0.75], dtype=float32), 'steps': array(9)}
    """

    def __init__(self, base: Values, *, most: float | None = None) -> None:
        self.shortened: list[tuple[Any, str]] = []
        self._sums: dict[str, _Vote | _Mean] = {
            name: _Vote(value) if _is_voted_on(value) else _Mean(name, value, most, self.shortened)
            for name, value in base.items()
        }

    def add(self, values: Values, weight: float = 1.0, who: Any = None) -> None:
        """Take one node's values, of the shapes and types of the base's.

        Raises
        ------
        ParameterError
            A weight that is not positive and finite.
        """
        if not 0 < weight < np.inf:
            raise ParameterError(f"expected a positive, finite weight, found {weight}")
        for name, total in self._sums.items():
            value = values.get(name)
            total.add(total.base if value is None else value, weight, who)

    def result(self) -> dict[str, NDArray[Any]]:
        """The merged values; the base's, the same objects, where nothing was changed."""
        return {name: total.result() for name, total in self._sums.items()}

    def within(self, values: Values) -> dict[str, NDArray[Any]]:
        """What another rule has made of the same replies, bounded by what was sent.

        Floats and counters: neither below the least nor above the largest value, the base's
        included. Indices and masks: as in `result`, of which no other rule makes sense.
        """
        return {name: total.within(values[name]) for name, total in self._sums.items()}

    @property
    def disputed(self) -> list[str]:
        """Indices and masks that nodes do not agree on."""
        return [
            name
            for name, total in self._sums.items()
            if isinstance(total, _Vote) and total.disputed
        ]


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Are these the same tensor, bit for bit?"""
    if one is other:
        return True
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def _is_voted_on(value: NDArray[Any]) -> bool:
    return value.dtype.kind == "b" or (value.dtype.kind in "iu" and value.size != 1)


class _Mean:
    """A running mean, with the least and the largest value in each place."""

    def __init__(
        self, name: str, base: NDArray[Any], most: float | None, shortened: list[tuple[Any, str]]
    ) -> None:
        self.base = base
        self._name, self._most, self._shortened = name, most, shortened
        self._first: list[tuple[NDArray[Any], float, Any]] = []  # until there is a median
        self._distances: list[float] = []  # from the base, sorted; of the first nodes
        self._weight = 0.0
        self._mean: NDArray[np.float64] | None = None  # None: all were the base's
        self._low = self._high = base

    def add(self, value: NDArray[Any], weight: float, who: Any) -> None:
        if same(value, self.base):
            value = self.base
        if self._most is None:
            self._take(value, weight)
            return
        if len(self._distances) < _NODES_OF_MEDIAN:
            bisect.insort(self._distances, self._distance(value))
        self._first.append((value, weight, who))
        if len(self._distances) >= _FEWEST_NODES:
            self._take_first()

    def _take_first(self) -> None:
        """Take the values that have waited, within bounds where there are enough to compare."""
        for value, weight, who in self._first:
            if len(self._distances) >= _FEWEST_NODES:
                value = self._within_bounds(value, who)
            self._take(value, weight)
        self._first.clear()

    def _within_bounds(self, value: NDArray[Any], who: Any) -> NDArray[Any]:
        changed = [distance for distance in self._distances if distance]
        if self._most is None or value is self.base:
            return value
        if 3 * len(changed) >= len(self._distances):
            bound = self._most * statistics.median_low(changed)
        else:
            bound = float(np.linalg.norm(self.base.astype(np.float64)))
        distance = self._distance(value)
        if distance <= bound:
            return value
        self._shortened.append((who, self._name))
        part = bound / distance
        near = self.base * np.float64(1 - part) + value * np.float64(part)
        return near if self.base.dtype.kind == "f" else np.rint(near)

    def _distance(self, value: NDArray[Any]) -> float:
        if value is self.base:
            return 0.0
        with np.errstate(over="ignore"):
            change = value.astype(np.float64) - self.base.astype(np.float64)
            return float(np.linalg.norm(change))

    def _take(self, value: NDArray[Any], weight: float) -> None:
        total = self._weight + weight
        if self._mean is None and value is not self.base:
            self._mean = self.base.astype(np.float64)
            if not self._weight:
                self._low = self._high = value
        if self._mean is not None:
            # A convex sum, which cannot overflow.
            self._mean *= self._weight / total
            self._mean += value * np.float64(weight / total)
            self._low = np.minimum(self._low, value)
            self._high = np.maximum(self._high, value)
        self._weight = total

    def within(self, value: NDArray[Any]) -> NDArray[Any]:
        self._take_first()
        if self._weight and same(np.asarray(self._low), np.asarray(self._high)):
            return self.base if self._mean is None else np.asarray(self._low)
        low, high = np.minimum(self._low, self.base), np.maximum(self._high, self.base)
        if self.base.dtype.kind != "f":
            value = np.rint(value)
        return np.asarray(np.clip(value, low, high).astype(self.base.dtype))

    def result(self) -> NDArray[Any]:
        self._take_first()
        if self._mean is None:
            return self.base
        dtype = self.base.dtype
        if dtype.kind == "f":
            mean = self._mean.astype(dtype)  # within the range of what was sent: no overflow
            return np.asarray(np.clip(mean, self._low, self._high))
        # Python's integers: a float64 has not all of those of 64 bits.
        low, high = int(self._low.item()), int(self._high.item())
        rounded = min(max(round(float(self._mean.item())), low), high)
        return np.full(self.base.shape, rounded, dtype)


class _Vote:
    """Which whole tensor has more than half of the weight (Boyer and Moore, MJRTY, 1981)."""

    def __init__(self, base: NDArray[Any]) -> None:
        self.base = base
        self.disputed = False
        self._leader: NDArray[Any] = base
        self._lead = 0.0

    def add(self, value: NDArray[Any], weight: float, who: Any) -> None:
        if self._lead and not same(value, self._leader):
            self.disputed = True
            if weight > self._lead:
                self._leader, self._lead = value, weight - self._lead
            else:
                self._lead -= weight
            return
        self._leader = value
        self._lead += weight

    def within(self, value: NDArray[Any]) -> NDArray[Any]:
        return self.result()

    def result(self) -> NDArray[Any]:
        return self._leader if self._lead and not same(self._leader, self.base) else self.base
