"""Updates of nodes that have a part of the adapter: each entry by those that have it.

A merge over all entries takes what a node does not have for 0, and so draws what few nodes have
towards 0. `Coverage` knows the weight behind each entry, by rank, in a few numbers, and gives back
what the mean over those that have it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ParameterError
from compeft_fl.parts.ranks import Cut
from compeft_fl.task_vector import TaskVector

__all__ = ["Coverage"]


class Coverage:
    """The weight of a round's updates behind each entry.

    Parameters
    ----------
    least : float
        In [0, 1]: an entry counts as covered by at least this share of all weight.

    Raises
    ------
    ParameterError
        A share out of its range.

    Examples
    --------
    >>> from compeft_fl.task_vector import Layout, TensorSpec
    >>> whole = Layout([TensorSpec("lora_A", (2, 1)), TensorSpec("lora_B", (1, 2))])
    >>> coverage = Coverage(least=0.0)
    >>> coverage.add(None, 1.0)
    >>> coverage.add(Cut(whole, 1), 3.0)
    >>> mean = TaskVector(whole, np.array([1, 0.25, 1, 0.25], "f4"))  # of ones, and of ones and 0
    >>> coverage.weighed(mean).values
    array([1., 1., 1., 1.], dtype=float32)
    """

    def __init__(self, least: float) -> None:
        if not 0 <= least <= 1:
            raise ParameterError(f"expected a share in [0, 1], found {least!r}")
        self._least = least
        self._total = 0.0
        self._weights: dict[int, float] = {}  # of what is cut, by rank
        self._cuts: dict[int, Cut] = {}

    def add(self, cut: Cut | None, weight: float) -> None:
        """Count an update.

        Parameters
        ----------
        cut : Cut or None
            What its node has; None: all.
        weight : float
        """
        self._total += weight
        if cut is not None:
            self._cuts[cut.rank] = cut
            self._weights[cut.rank] = self._weights.get(cut.rank, 0.0) + weight

    @property
    def mixed(self) -> bool:
        """Does any update cover a part only?"""
        return bool(self._cuts)

    def factors(self, size: int) -> NDArray[np.float64]:
        """What each entry of a mean over all is to be multiplied by, shape (d,)."""
        covered = np.full(size, self._total)
        for rank, cut in self._cuts.items():
            covered -= self._weights[rank] * ~cut.covered
        factors: NDArray[np.float64] = self._total / np.maximum(covered, self._least * self._total)
        return factors

    def weighed(self, merged: TaskVector) -> TaskVector:
        """A merge over all entries, each by the weight behind it.

        Parameters
        ----------
        merged : TaskVector
            Sums of weight times update over sums of weights, or a multiple.
        """
        if not self.mixed:
            return merged
        values: Any = merged.values
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = values * self.factors(merged.num_parameters)
        # What nobody has does not move: 0 times infinity.
        return TaskVector(merged.layout, np.where(values == 0, 0, moved).astype(np.float32))
