"""The global adapter of a round: what its replies are relative to, and how it moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, NonFiniteError, WireError
from compeft_fl.exchange.carried import Apart, check_like
from compeft_fl.exchange.records import to_arrays, to_state
from compeft_fl.merging.carried import CarriedAverage
from compeft_fl.parts.ranks import Cut
from compeft_fl.parts.tensor_policy import TensorPolicy, is_variance
from compeft_fl.server.mixed_ranks import check_stated, stated_rank
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode_parts

__all__ = ["Base", "conform"]


class Base:
    """The global adapter that a round's replies are relative to.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
        One Array per tensor: theta.
    version : int
        What the nodes hold of it; replies must be relative to that version.
    policy : TensorPolicy, optional
        Which of its tensors are trained, carried or left.

    Attributes
    ----------
    adapter : TaskVector
        What is trained.
    apart : Apart
        What is not.
    cuts : mapping of int to Cut or None
        How the ranks that replies may be of lie in it, see `MixedRanks.cuts`; empty: all nodes have
        all of it.
    shared : ndarray of float32, shape (d,), or None
        What nodes have of the adapter, until the next version; None: they have it as it is.

    Raises
    ------
    LayoutError
        Arrays that are no adapter's: not numpy's, of a data type that cannot be sent, or none to
        train.
    NonFiniteError
        NaN or Inf; the message names the tensor.
    """

    def __init__(
        self, arrays: ArrayRecord, version: int, policy: TensorPolicy | None = None
    ) -> None:
        self.arrays, self.version = arrays, version
        self.state: dict[str, NDArray[Any]] = to_state(arrays)
        self.apart = Apart.of(self.state, TensorPolicy.of(policy))
        with np.errstate(over="ignore"):  # float64 beyond float32, which is found here
            self.adapter = TaskVector.from_dict(self.apart.trained(self.state))
        if not self.adapter.num_parameters:
            raise LayoutError("expected a global adapter with parameters, found none to train")
        self.adapter.check_finite()
        self.layout: Layout = self.adapter.layout
        self.cuts: Mapping[int, Cut | None] = {}
        self.shared: NDArray[np.float32] | None = None

    def read(
        self, parts: Sequence[bytes], said: int = 0
    ) -> tuple[TernaryVector | TaskVector, Cut | None]:
        """A reply's Update, which must be for this adapter and relative to this version.

        Parameters
        ----------
        parts : sequence of bytes
        said : int
            The rank that its node states of itself; 0: all of the adapter's.

        Returns
        -------
        update : TernaryVector or TaskVector
            Over all of the adapter.
        cut : Cut or None
            What of it the node has; None: all.

        Raises
        ------
        WireError
            Also for a rank that is not taken, or another than the node states.
        """
        cut = None
        if self.cuts:
            rank = stated_rank(parts)
            check_stated(rank, self.cuts, said)
            cut = self.cuts.get(rank)
        try:
            layout = self.layout if cut is None else cut.layout
            update = decode_parts(parts, layout=layout, base_version=self.version)
        except WireError:
            if not self.cuts:  # it may be of a rank, which says more than that its layout differs
                check_stated(stated_rank(parts), self.cuts, said)
            raise
        return (update, None) if cut is None else (cut.spread(update), cut)

    def read_carried(self, blob: bytes) -> dict[str, NDArray[Any]]:
        """The carried tensors of a reply that training has changed.

        Raises
        ------
        MalformedError, LayoutError, NonFiniteError
            Tensors that are not this adapter's carried ones; NaN or Inf.
        """
        return {n: v for n, v in self.apart.read(blob).items() if not self.apart.is_left(n)}

    def moved_by(
        self, change: TaskVector, carried: Mapping[str, NDArray[Any]] | None = None
    ) -> ArrayRecord:
        """The adapter plus a task vector, one Array per tensor, of the data types that it had.

        Parameters
        ----------
        change : TaskVector
        carried : mapping of str to ndarray, optional
            New values of carried tensors.

        Raises
        ------
        NonFiniteError
            A value beyond what its tensor's data type holds; the message names the tensor.
        """
        trained = {n: value for n, value in self.state.items() if n not in self.apart.values}
        with np.errstate(over="ignore"):
            moved = change.apply(trained)
            TaskVector.from_dict(self.apart.trained(moved)).check_finite()
        others = {**self.apart.values, **(carried or {})}
        return to_arrays({n: moved[n] if n in moved else others[n] for n in self.state})

    def of_nodes(self) -> ArrayRecord:
        """The adapter as nodes have it, one Array per tensor, of the data types that it had."""
        if not self.version or self.shared is None:  # the start is what it is
            return self.arrays
        had = TaskVector(self.layout, self.shared).to_dict()
        return to_arrays(
            {n: had[n].astype(old.dtype) if n in had else old for n, old in self.state.items()}
        )

    def norm_to(self, arrays: ArrayRecord) -> float:
        """How far arrays that `moved_by` made are from the adapter, rounded as they are."""
        total = 0.0
        for name, value in to_state(arrays).items():
            with np.errstate(over="ignore"):
                change = value.astype(np.float64) - self.state[name].astype(np.float64)
                total += float(np.sum(change * change))
        return math.sqrt(total)


def conform(
    arrays: ArrayRecord,
    base: Base,
    average: CarriedAverage | None = None,
    *,
    exact: bool = True,
    touched: NDArray[np.bool_] | None = None,
) -> ArrayRecord:
    """What another strategy has made, in the order and data types of the adapter that it had.

    Flower's adaptive strategies make float64, its means float64 of integers.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
    base : Base
    average : CarriedAverage, optional
        What the replies carried, of which no carried tensor may leave the range.
    exact : bool
        False: floats may leave it, by noise for privacy, say; variances are still not negative.
    touched : ndarray of bool, shape (d,), optional
        The trained parameters that a reply has changed. A tensor without any, a personal layer say,
        keeps its values where they moved by rounding alone: a mean of equal numbers is not always
        the same number.

    Raises
    ------
    LayoutError, NonFiniteError
        Other names or shapes; values that are no numbers, or beyond their data type.
    """
    found = to_state(arrays)
    check_like(found, base.state)
    average = average or CarriedAverage(base.apart.carried)
    carried = average.within({name: found[name] for name in base.apart.carried})
    where = {tensor.name: part for tensor, part in base.layout.slices()}
    state = {}
    for name, old in base.state.items():
        if base.apart.is_left(name):
            value = old
        elif name in carried and (exact or old.dtype.kind != "f"):
            value = carried[name]
        else:
            with np.errstate(over="ignore"):
                value = found[name].astype(old.dtype)
            if name in carried:
                value = np.maximum(value, 0) if is_variance(name) else value
            elif touched is not None and not touched[where[name]].any():
                value = np.where(np.abs(value - old) <= _rounding(old), old, value)
        if not base.apart.is_left(name) and not np.isfinite(value).all():
            raise NonFiniteError(f"expected finite values, found NaN or Inf in tensor {name!r}")
        state[name] = value
    return to_arrays(state)


def _rounding(values: NDArray[Any]) -> NDArray[Any]:
    """How far a mean of equal numbers can be from them."""
    return np.asarray(np.abs(values) * (_ROUNDINGS * np.finfo(values.dtype).eps))


_ROUNDINGS = 8  # in units of the last place
