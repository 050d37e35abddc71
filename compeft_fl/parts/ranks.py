"""Adapters of a lower rank as parts of one: the leading rows of A and the leading columns of B.

LoRA's change of a weight is B A, a sum over its rank. A node that can afford rank 2 of the server's
8 holds the first two summands: the first two rows of A and columns of B. Everything else of the
adapter (biases, heads) is the same on all nodes. What such a node holds, gets and sends is a `Cut`
of the whole, entry for entry, so that bits, digests and sums stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.printable import quoted
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec, is_torch
from compeft_fl.ternary import TernaryVector, pack, unpack

__all__ = ["AXES", "MAX_RANK", "Cut", "check_rank", "leading", "rank_axis", "rank_of"]

Floats = NDArray[np.float32]

MAX_RANK: Final = 1 << 16  # more than any adapter has

AXES: Final[Mapping[str, int]] = MappingProxyType(
    {"*lora_A*": 0, "*lora_B*": 1, "*lora_embedding_A*": 0, "*lora_embedding_B*": 1}
)
"""Patterns of names to the axis that is the rank: LoRA's, as PEFT names them."""

_OWN_RANKS: Final = "lora_E"  # AdaLoRA's: which of the ranks count, training decides


def check_rank(rank: Any) -> int:
    """Return a rank.

    Raises
    ------
    ParameterError
        None in 1 .. 65536.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ParameterError(f"expected a rank in 1 .. {MAX_RANK}, found {rank!r}")
    return rank


def rank_axis(name: str, shape: tuple[int, ...], axes: Mapping[str, int] = AXES) -> int | None:
    """Which axis of a tensor is the rank, by its name; None: it is the same at every rank.

    Raises
    ------
    LayoutError
        A tensor of a method whose ranks are not in order.
    """
    if _OWN_RANKS in name and axes is AXES:
        raise LayoutError(
            f"expected factors whose leading ranks stand for themselves, found AdaLoRA's "
            f"{quoted(name)}"
        )
    for pattern, axis in axes.items():
        if fnmatchcase(name, pattern):
            return axis if axis < len(shape) else None  # lora_B.bias has none
    return None


def rank_of(layout: Layout, axes: Mapping[str, int] = AXES) -> int:
    """The largest rank of an adapter's factors.

    Raises
    ------
    LayoutError
        It has none.
    """
    found = 0
    for tensor in layout.tensors:
        axis = rank_axis(tensor.name, tensor.shape, axes)
        if axis is not None:
            found = max(found, tensor.shape[axis])
    if not found:
        raise LayoutError(
            f"expected factors with a rank ({', '.join(axes)}), found none among "
            f"{len(layout.tensors)} tensors"
        )
    return found


def leading(values: Any, axis: int, rank: int) -> Any:
    """The leading entries of an array along the axis that is its rank; a view."""
    return values[(slice(None),) * axis + (slice(0, rank),)]


class Cut:
    """How an adapter of a lower rank lies in the whole one.

    Parameters
    ----------
    whole : Layout
    rank : int
        Factors of a higher rank are cut to it; those of a lower one stay whole.
    axes : mapping of str to int
        Patterns of names to the axis that is the rank.

    Attributes
    ----------
    whole, layout : Layout
        Of the whole, and of the part.
    rank : int

    Raises
    ------
    ParameterError
        No rank.
    LayoutError
        Nothing in the whole has a rank.

    Examples
    --------
    >>> whole = Layout([TensorSpec("lora_A", (2, 3)), TensorSpec("lora_B", (2, 2))])
    >>> cut = Cut(whole, 1)
    >>> cut.values(np.arange(10, dtype="f4"))
    array([0., 1., 2., 6., 8.], dtype=float32)
    """

    def __init__(self, whole: Layout, rank: int, axes: Mapping[str, int] = AXES) -> None:
        self.rank, self.whole = check_rank(rank), whole
        rank_of(whole, axes)
        self._keeps: list[tuple[slice, ...] | None] = []  # of each tensor; None: all of it
        tensors = []
        for tensor in whole.tensors:
            axis = rank_axis(tensor.name, tensor.shape, axes)
            if axis is None or tensor.shape[axis] <= rank:
                self._keeps.append(None)
                tensors.append(tensor)
                continue
            self._keeps.append((slice(None),) * axis + (slice(0, rank),))
            shape = (*tensor.shape[:axis], rank, *tensor.shape[axis + 1 :])
            tensors.append(TensorSpec(tensor.name, shape, tensor.dtype))
        self.layout = Layout(tensors)

    @property
    def is_whole(self) -> bool:
        """Is nothing cut off?"""
        return all(keep is None for keep in self._keeps)

    @property
    def share(self) -> float:
        """The part's share of the whole's parameters."""
        return self.layout.num_parameters / max(1, self.whole.num_parameters)

    @functools.cached_property
    def covered(self) -> NDArray[np.bool_]:
        """Which entries of the whole the part has, shape (d,)."""
        return self.spread_values(np.ones(self.layout.num_parameters, np.bool_))

    def values(self, values: NDArray[Any]) -> NDArray[Any]:
        """The part's entries of a flat vector over the whole, shape (d,)."""
        found = np.empty(self.layout.num_parameters, values.dtype)
        for (spec, there), here, keep in self._places():
            piece = values[there]
            if keep is not None:
                piece = piece.reshape(spec.shape)[keep].reshape(-1)
            found[here] = piece
        return found

    def spread_values(self, values: NDArray[Any]) -> NDArray[Any]:
        """A flat vector over the whole with the part's entries, and 0 elsewhere."""
        found = np.zeros(self.whole.num_parameters, values.dtype)
        for (spec, there), here, keep in self._places():
            if keep is None:
                found[there] = values[here]
            else:
                target = found[there].reshape(spec.shape)[keep]  # a view
                target[...] = values[here].reshape(target.shape)
        return found

    def of(self, update: TernaryVector | TaskVector) -> TernaryVector | TaskVector:
        """The part of an update over the whole; a ternary one stays so, others become dense.

        Raises
        ------
        LayoutError
            An update over another layout.
        """
        if update.layout != self.whole:
            raise LayoutError(f"expected {self.whole!r}, found {update.layout!r}")
        return self._mapped(update, self.layout, self.values)

    def spread(self, update: TernaryVector | TaskVector) -> TernaryVector | TaskVector:
        """An update over the part as one over the whole, 0 elsewhere.

        Raises
        ------
        LayoutError
            An update over another layout.
        """
        if update.layout != self.layout:
            raise LayoutError(f"expected {self.layout!r}, found {update.layout!r}")
        return self._mapped(update, self.whole, self.spread_values)

    def _mapped(
        self, update: TernaryVector | TaskVector, layout: Layout, moved: Any
    ) -> TernaryVector | TaskVector:
        if isinstance(update, TernaryVector):
            size = update.num_parameters
            plus, minus = (
                pack(moved(unpack(mask, size))) for mask in (update.positive, update.negative)
            )
            return TernaryVector(layout, plus, minus, update.scales)
        values: Any = update.to_task_vector().values
        return TaskVector(layout, moved(values.cpu().numpy() if is_torch(values) else values))

    def _places(self) -> Iterator[tuple[tuple[TensorSpec, slice], slice, tuple[slice, ...] | None]]:
        """Each tensor in the whole, its place in the part, and what is kept of it."""
        here = (where for _, where in self.layout.slices())
        yield from zip(self.whole.slices(), here, self._keeps, strict=True)

    def __repr__(self) -> str:
        return f"Cut(rank {self.rank}, {self.layout.num_parameters} of {self.whole!r})"
