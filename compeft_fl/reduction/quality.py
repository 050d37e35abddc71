"""How much of a task vector its compressed form keeps: cosine and relative error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compeft_fl.errors import LayoutError
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Quality"]

_PIECE = 1 << 20  # parameters that are compared at once


@dataclass(frozen=True)
class Quality:
    """The inner products of a task vector and what it became; those of parts can be added.

    Attributes
    ----------
    dot : float
        Of the two.
    given, kept : float
        The squared norms of the task vector and of what it became.

    Examples
    --------
    >>> import compeft_fl as cf
    >>> tau = cf.TaskVector.from_dict({"w": np.array([3, -1, 0.5, -5], "f4")})
    >>> found = Quality.of(tau, cf.compress(tau, density=0.5))
    >>> round(found.cosine, 3), round(found.relative_error, 3)
    (0.953, 0.307)
    """

    dot: float
    given: float
    kept: float

    @classmethod
    def of(cls, tau: TaskVector, update: TernaryVector | TaskVector) -> Quality:
        """Compare a task vector with any form of it, on the device that both live on.

        Raises
        ------
        LayoutError
            Two layouts.
        """
        if tau.layout != update.layout:
            raise LayoutError(f"expected {tau.layout!r}, found {update.layout!r}")
        values: Any = tau.values
        other: Any = update.to_task_vector().values
        sums = np.zeros(3)
        for start in range(0, tau.num_parameters, _PIECE):
            sums += _products(values[start : start + _PIECE], other[start : start + _PIECE])
        return cls(*(float(value) for value in sums))

    @classmethod
    def of_compressed(cls, tau: TaskVector, update: TernaryVector) -> Quality:
        """The same for what `compeft_fl.compress` made of this task vector, without a dense copy.

        Each entry that is kept has the task vector's sign, and all have one scale.
        """
        kernels: ModuleType
        if is_torch(tau.values):
            from compeft_fl.kernels import torch_ops as kernels
        else:
            from compeft_fl.kernels import cpu as kernels
        scale = float(update.scales[0])
        return cls(
            dot=scale * kernels.sum_kept(tau.values, *update.masks),
            given=kernels.sum_squares(tau.values),
            kept=scale * scale * update.num_nonzeros,
        )

    def __add__(self, other: Quality) -> Quality:
        return Quality(self.dot + other.dot, self.given + other.given, self.kept + other.kept)

    @property
    def cosine(self) -> float:
        """Of the angle between the two, in -1 .. 1; 1 where both are 0, 0 where one is."""
        norms = math.sqrt(self.given) * math.sqrt(self.kept)
        if norms > 0:
            return max(-1.0, min(1.0, self.dot / norms))
        return 1.0 if self.given == self.kept else 0.0

    @property
    def relative_error(self) -> float:
        """The norm of the difference over the norm of the task vector; 0 where both are 0."""
        squared = max(0.0, self.given - 2 * self.dot + self.kept)
        if self.given > 0:
            return math.sqrt(squared / self.given)
        return 0.0 if self.kept == 0 else math.inf


def _products(x: Any, y: Any) -> tuple[float, float, float]:
    """The inner product of two pieces, and of each with itself, in float64."""
    a, b = (v.double().cpu().numpy() if is_torch(v) else v.astype(np.float64) for v in (x, y))
    return float(a @ b), float(a @ a), float(b @ b)
