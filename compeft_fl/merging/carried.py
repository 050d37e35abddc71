"""The merge of what is carried and not trained: statistics, counters, indices, masks.

One pass, O(d) memory, whatever the number of nodes. A result lies between the smallest and the
largest value that was sent, in each place: variances stay positive, and what all agree on stays
what it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ParameterError

__all__ = ["CarriedAverage", "same"]

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

    Examples
    --------
    >>> average = CarriedAverage({"mean": np.zeros(2, "f4"), "steps": np.array(0)})
    >>> average.add({"mean": np.ones(2, "f4"), "steps": np.array(10)}, weight=3)
    >>> average.add({"steps": np.array(5)}, weight=1)
    >>> average.result()
    {'mean': array([0.75, 0.75], dtype=float32), 'steps': array(9)}
    """

    def __init__(self, base: Values) -> None:
        self._sums = {
            name: _Vote(value) if _is_voted_on(value) else _Mean(value)
            for name, value in base.items()
        }

    def add(self, values: Values, weight: float = 1.0) -> None:
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
            total.add(total.base if value is None else value, weight)

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

    def __init__(self, base: NDArray[Any]) -> None:
        self.base = base
        self._weight = 0.0
        self._mean: NDArray[np.float64] | None = None  # None: all were the base's
        self._low = self._high = base

    def add(self, value: NDArray[Any], weight: float) -> None:
        total = self._weight + weight
        if self._mean is None and not same(value, self.base):
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
        if self._weight and same(np.asarray(self._low), np.asarray(self._high)):
            return self.base if self._mean is None else np.asarray(self._low)
        low, high = np.minimum(self._low, self.base), np.maximum(self._high, self.base)
        return np.asarray(np.clip(value, low, high).astype(self.base.dtype))

    def result(self) -> NDArray[Any]:
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

    def add(self, value: NDArray[Any], weight: float) -> None:
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
