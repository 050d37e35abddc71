"""Merging task vectors: accumulators that take one update at a time, straight from its bytes.

Ternary updates wait as bit masks and are summed in batches, in float64. The memory is O(d),
whatever the number of updates; two accumulators combine, in any order and grouping, so a tree of
servers gives what one server gives.

Sources: Task Arithmetic, Ilharco et al., https://arxiv.org/abs/2212.04089; TIES, Yadav et al.,
https://arxiv.org/abs/2306.01708, of which ComPEFT's updates have done the first step (trim)
already.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, NonFiniteError, ParameterError
from compeft_fl.factored import FactoredVector
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode

if TYPE_CHECKING:
    from compeft_fl.kernels.cpu_merge import Pending

__all__ = ["Accumulator", "Average", "TaskArithmetic", "Ties", "merge"]

TIE_RULES = ("zero", "positive", "majority")


class Accumulator(ABC):
    """A way to merge, and what has been merged so far.

    Parameters
    ----------
    layout : Layout, optional
        What the updates are for. Without it the first update's layout is taken, and updates that
        name theirs by id only are an error until then.

    Attributes
    ----------
    count : int
        How many updates have been added, also by way of `combine`.
    total_weight : float
        The sum of their weights.
    """

    _columns: ClassVar[int]  # float64 sums per parameter

    def __init__(self, *, layout: Layout | None = None) -> None:
        self.layout = layout
        self.count = 0
        self.total_weight = 0.0
        self._pending: Pending | None = None  # ternary updates, as masks
        self._sums: NDArray[np.float64] | None = None  # shape (d, columns); all others

    @abstractmethod
    def fresh(self, layout: Layout | None = None) -> Self:
        """An empty accumulator with the same settings."""

    @abstractmethod
    def _settings(self) -> tuple[Any, ...]:
        """What two accumulators must share to combine."""

    @abstractmethod
    def _add_dense(
        self, sums: NDArray[np.float64], values: NDArray[np.float32], weight: float
    ) -> None:
        """Add a dense vector to the sums."""

    @abstractmethod
    def _merge(self, pending: Pending, sums: NDArray[np.float64] | None) -> NDArray[np.float32]:
        """The result of what waits and what has been summed."""

    def add(self, update: bytes | TernaryVector | TaskVector, weight: float = 1.0) -> None:
        """Take one update, whole or not at all.

        Parameters
        ----------
        update : bytes, TernaryVector or TaskVector
            Bytes are decoded and checked first; a ternary update never becomes a dense vector, and
            low-rank signs become one tensor at a time.
        weight : float
            Positive: the client's number of examples, say.

        Raises
        ------
        WireError
            Bytes that a decoder rejects.
        LayoutError, NonFiniteError, ParameterError
            Another layout, NaN or Inf, a weight that is not positive and finite.
        """
        weight = _check_weight(weight)
        if isinstance(update, bytes | bytearray | memoryview):
            update = decode(bytes(update), layout=self.layout)
        if self.layout is not None and update.layout != self.layout:
            raise LayoutError(f"expected {self.layout!r}, found {update.layout!r} in an update")
        if isinstance(update, TaskVector):
            update.check_finite()
        self.layout = update.layout
        if isinstance(update, TernaryVector):
            pending = self._waiting(update.layout)
            if pending.full:
                self._fold(pending)
            pending.add(update.positive, update.negative, update.scales, weight)
        elif isinstance(update, FactoredVector):
            sums = self._summed(update.layout)
            for where, values in update.pieces():
                self._add_dense(sums[where], values, weight)
        else:
            dense: Any = update.values
            values = dense.cpu().numpy() if is_torch(dense) else dense
            self._add_dense(self._summed(update.layout), values, weight)
        self.count += 1
        self.total_weight += weight

    def combine(self, other: Self) -> None:
        """Take all that another accumulator of the same kind and settings has taken.

        Raises
        ------
        ParameterError
            Another kind, or other settings.
        LayoutError
            Another layout.
        """
        if type(other) is not type(self) or other._settings() != self._settings():
            raise ParameterError(f"expected {self!r}, found {other!r}")
        if other.count == 0 or other.layout is None:
            return
        if self.layout is not None and other.layout != self.layout:
            raise LayoutError(f"expected {self.layout!r}, found {other.layout!r}")
        self.layout = other.layout
        sums = self._summed(self.layout)
        sums += other.sums()
        self.count += other.count
        self.total_weight += other.total_weight

    def result(self) -> TaskVector:
        """The merged task vector, float32. More updates can be added afterwards.

        Raises
        ------
        ParameterError
            Nothing has been added.
        NonFiniteError
            A sum that float32 cannot hold.
        """
        if self.count == 0 or self.layout is None:
            raise ParameterError("expected at least one update, found none to merge")
        merged = self._merge(self._waiting(self.layout), self._sums)
        if not np.isfinite(merged).all():
            raise NonFiniteError("expected a finite result, found sums beyond float32")
        return TaskVector(self.layout, merged)

    def sums(self) -> NDArray[np.float64]:
        """All that has been added, as sums of shape (d, columns): the accumulator's own, no copy.

        One column for `Average` and `TaskArithmetic`. Four for `Ties`: P, the weight behind it, N,
        the weight behind it. `compeft_fl.merging.partial` makes bytes of them.

        Raises
        ------
        ParameterError
            No layout is known yet.
        """
        if self.layout is None:
            raise ParameterError("expected an accumulator with a layout, found one without")
        self._fold(self._waiting(self.layout))
        return self._summed(self.layout)

    def with_sums(
        self, sums: NDArray[np.float64], count: int, total_weight: float, layout: Layout
    ) -> Self:
        """An accumulator with these settings that has taken what another one's `sums` say.

        Raises
        ------
        LayoutError
            Sums of another shape.
        """
        shape = (layout.num_parameters, self._columns)
        if sums.shape != shape or sums.dtype != np.float64:
            raise LayoutError(
                f"expected float64 sums of shape {shape}, found {sums.dtype} {sums.shape}"
            )
        taken = self.fresh(layout)
        taken._sums, taken.count, taken.total_weight = sums, count, total_weight
        return taken

    @property
    def columns(self) -> int:
        """How many float64 sums there are per parameter."""
        return self._columns

    def _waiting(self, layout: Layout) -> Pending:
        if self._pending is None:
            from compeft_fl.kernels.cpu_merge import Pending

            self._pending = Pending(layout.num_parameters, layout.offsets)
        return self._pending

    def _summed(self, layout: Layout) -> NDArray[np.float64]:
        if self._sums is None:
            self._sums = np.zeros((layout.num_parameters, self._columns), np.float64)
        return self._sums

    def _fold(self, pending: Pending) -> None:
        """Move what waits into the sums."""
        from compeft_fl.kernels import cpu_merge

        if pending.count and self.layout is not None:
            cpu_merge.fold(pending, self._summed(self.layout))

    def __repr__(self) -> str:
        settings = ", ".join(repr(value) for value in self._settings())
        return f"{type(self).__name__}({settings})"


class _WeightedSum(Accumulator):
    """What averages and task arithmetic share: the sum of weight times update."""

    _columns = 1

    def _add_dense(
        self, sums: NDArray[np.float64], values: NDArray[np.float32], weight: float
    ) -> None:
        sums[:, 0] += weight * values.astype(np.float64)

    @abstractmethod
    def _factor(self) -> float:
        """What the sum is multiplied by."""

    def _merge(self, pending: Pending, sums: NDArray[np.float64] | None) -> NDArray[np.float32]:
        from compeft_fl.kernels import cpu_merge

        return cpu_merge.total(pending, sums, self._factor())


class Average(_WeightedSum):
    """The weighted mean: sum of w_i tau_i over sum of w_i (FedAvg's rule).

    Examples
    --------
    >>> import compeft_fl as cf
    >>> a, b = (cf.TaskVector.from_dict({"w": np.array(v, "f4")}) for v in ([1, 2], [5, 2]))
    >>> cf.merge([a, b], cf.Average(), weights=[3, 1]).values
    array([2., 2.], dtype=float32)
    """

    def fresh(self, layout: Layout | None = None) -> Self:
        """See `Accumulator.fresh`."""
        return type(self)(layout=layout)

    def _settings(self) -> tuple[Any, ...]:
        return ()

    def _factor(self) -> float:
        return 1 / self.total_weight


class TaskArithmetic(_WeightedSum):
    """Task Arithmetic: lambda times the sum of w_i tau_i; the weights are 1 unless given.

    Parameters
    ----------
    scaling : float or None
        lambda, finite and not 0. None: one over the number of updates, which makes equal weights
        their mean.
    """

    def __init__(self, scaling: float | None = 1.0, *, layout: Layout | None = None) -> None:
        super().__init__(layout=layout)
        self.scaling = None if scaling is None else _check_scaling(scaling)

    def fresh(self, layout: Layout | None = None) -> Self:
        """See `Accumulator.fresh`."""
        return type(self)(self.scaling, layout=layout)

    def _settings(self) -> tuple[Any, ...]:
        return (self.scaling,)

    def _factor(self) -> float:
        return 1 / self.count if self.scaling is None else self.scaling


class Ties(Accumulator):
    """TIES: elect each parameter's sign by weighted mass, then average those that agree.

    With P = sum of w_i max(tau_i, 0) and N = sum of w_i max(-tau_i, 0), the sign of P - N is
    elected; the result is lambda times the weighted mean of the entries that have it.

    Parameters
    ----------
    scaling : float
        lambda, finite and not 0.
    tie : {"zero", "positive", "majority"}
        Where P = N > 0. "zero": no consensus, no update. "positive": PEFT's and mergekit's rule.
        "majority": the sign that most parameters elect, which is the TIES authors' rule.
    """

    _columns = 4  # P, the weight behind it, N, the weight behind it

    def __init__(
        self, scaling: float = 1.0, tie: str = "zero", *, layout: Layout | None = None
    ) -> None:
        super().__init__(layout=layout)
        if tie not in TIE_RULES:
            raise ParameterError(f"expected tie among {', '.join(TIE_RULES)}; found {tie!r}")
        self.scaling = _check_scaling(scaling)
        self.tie = tie

    def fresh(self, layout: Layout | None = None) -> Self:
        """See `Accumulator.fresh`."""
        return type(self)(self.scaling, self.tie, layout=layout)

    def _settings(self) -> tuple[Any, ...]:
        return (self.scaling, self.tie)

    def _add_dense(
        self, sums: NDArray[np.float64], values: NDArray[np.float32], weight: float
    ) -> None:
        for column, part in ((0, values), (2, -values)):
            held = part > 0
            sums[:, column] += np.where(held, weight * part.astype(np.float64), 0.0)
            sums[:, column + 1] += weight * held

    def _merge(self, pending: Pending, sums: NDArray[np.float64] | None) -> NDArray[np.float32]:
        from compeft_fl.kernels import cpu_merge

        return cpu_merge.elect(pending, sums, self.scaling, self.tie)


def merge(
    updates: Iterable[bytes | TernaryVector | TaskVector],
    method: Accumulator,
    weights: Sequence[float] | None = None,
) -> TaskVector:
    """Merge updates of one layout; ``method`` gives the rule and its settings and is not changed.

    Parameters
    ----------
    updates : iterable of bytes, TernaryVector or TaskVector
    method : Average, TaskArithmetic or Ties
    weights : sequence of float, optional
        One positive number per update; default: 1 each.

    Raises
    ------
    ParameterError
        No updates, or another number of weights.
    CompeftError
        As `Accumulator.add`.
    """
    updates = list(updates)
    if weights is None:
        weights = [1.0] * len(updates)
    if len(weights) != len(updates):
        raise ParameterError(f"expected {len(updates)} weights, found {len(weights)}")
    accumulator = method.fresh(method.layout)
    for update, weight in zip(updates, weights, strict=True):
        accumulator.add(update, weight)
    return accumulator.result()


def _check_weight(weight: float) -> float:
    number = _as_number(weight)
    if not (math.isfinite(number) and number > 0):
        raise ParameterError(f"expected a positive finite weight, found {weight!r}")
    return number


def _check_scaling(scaling: float) -> float:
    number = _as_number(scaling)
    if not (math.isfinite(number) and number != 0):
        raise ParameterError(f"expected a finite scaling that is not 0, found {scaling!r}")
    return number


def _as_number(value: Any) -> float:
    """A number as float, NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
