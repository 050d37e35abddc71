"""The server's step: how far the global adapter goes along a round's merge, and its momentum.

A merge of two nodes' changes points where these two would go. With few nodes a round, a shorter
step, or one along the mean of the last rounds' merges, keeps the adapter from swinging between
them.

Source: Hsu et al., "FedAvgM", https://arxiv.org/abs/1909.06335; Reddi et al.,
https://arxiv.org/abs/2003.00295.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.replica import on_cpu
from compeft_fl.task_vector import TaskVector

__all__ = ["ServerStep"]


class ServerStep:
    """v = momentum * v + merge; the global adapter moves by learning_rate * v.

    Parameters
    ----------
    learning_rate : float
        Finite and above 0; 1: the adapter becomes what was merged.
    momentum : float
        In [0, 1). With 0.9 the sum of merges counts: a learning rate of 0.1 makes it their mean.

    Raises
    ------
    ParameterError
        One out of its range.

    Examples
    --------
    >>> step = ServerStep(0.5, 0.5)
    >>> merge = TaskVector.from_dict({"w": np.ones(1, "f4")})
    >>> for _ in range(3):
    ...     print(step.next(merge).values)
    ...     step.accept()
    [0.5]
    [0.75]
    [0.875]
    """

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.0) -> None:
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ParameterError(f"expected a server learning rate above 0, found {learning_rate}")
        if not 0 <= momentum < 1:
            raise ParameterError(f"expected a server momentum in [0, 1), found {momentum}")
        self.learning_rate, self.momentum = learning_rate, momentum
        self._velocity: NDArray[np.float32] | None = None
        self._next: NDArray[np.float32] | None = None

    def next(self, merge: TaskVector) -> TaskVector:
        """The step after a round's merge; `accept` says that it was taken."""
        if self.learning_rate == 1 and not self.momentum:
            return merge
        values = on_cpu(merge)
        with np.errstate(over="ignore"):  # found where it is applied
            if self.momentum:
                last = self._velocity
                if last is not None and last.shape == values.shape:
                    values = values + np.float32(self.momentum) * last
                self._next = values
            return TaskVector(merge.layout, values * np.float32(self.learning_rate))

    def accept(self) -> None:
        """The step that `next` gave was taken: go on from it."""
        if self._next is not None:
            self._velocity, self._next = self._next, None

    def describe(self) -> str:
        """Its settings, for the log."""
        return f"Server step: learning rate {self.learning_rate:g}, momentum {self.momentum:g}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; from nothing, at rest."""
        found = state.get("velocity")
        self._velocity = None if found is None else np.asarray(found, np.float32)
        self._next = None
