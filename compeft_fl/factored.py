"""Low-rank signs: a task vector as a sum of outer products of small integers and signs.

What a round changes in a LoRA's factor is nearly of low rank. A matrix whose shorter side is S and
whose longer side is L is written as a sum of terms u q^T, with u of S small integers and q of L
signs: about 1 / S bits a parameter and term. Beside it there may be ternary values, for tensors
that have no such form.

Sources: PowerSGD, https://arxiv.org/abs/1905.13727, for changes of low rank; EF-SignSGD,
https://arxiv.org/abs/1901.09847, for signs whose error comes back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

__all__ = [
    "HIGHEST",
    "LOWEST",
    "MAX_SCALE",
    "MAX_TERMS",
    "FactoredVector",
    "Terms",
    "add_all",
    "shapes_of",
]

LOWEST, HIGHEST = -149, 96  # exponents: float32 holds what is below, and sums stay finite above
MAX_TERMS = 255  # of a tensor: a reader adds so often to a parameter at most
MAX_SCALE = math.ldexp(1.0, 126)  # of ternary values beside terms

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of one matrix, in the order in which they are added.

    Parameters
    ----------
    factors : ndarray of int16, shape (T, S)
    exponents : ndarray of int32, shape (T,)
        A factor's value is its integer times 2^exponent.
    negative : ndarray of bool, shape (T, L)
        Where a term's signs are -.
    flat : bool
        The tensor counts as one row of all its parameters: S is 1.
    """

    factors: NDArray[np.int16]
    exponents: NDArray[np.int32]
    negative: NDArray[np.bool_]
    flat: bool = False

    @property
    def count(self) -> int:
        """T."""
        return self.exponents.size

    @property
    def steps(self) -> NDArray[np.float32]:
        """The factors' values, shape (T, S)."""
        return np.ldexp(self.factors.astype(np.float32), self.exponents[:, None])


def shapes_of(rows: int, columns: int, flat: bool) -> tuple[int, int]:
    """S and L of a matrix: its shorter and its longer side; 1 and its size where it is flat."""
    return (1, rows * columns) if flat else (min(rows, columns), max(rows, columns))


def add_all(values: Any, shapes: Shapes, terms: Sequence[Terms | None]) -> None:
    """Add the terms of matrices that lie one after the other, to values of shape (d,), in place.

    Parameters
    ----------
    values : ndarray or torch tensor of float32
    shapes : sequence of (rows, columns)
    terms : sequence of Terms or None, one for each matrix
    """
    from compeft_fl.kernels import cpu_factored

    kernels: Any = cpu_factored
    if is_torch(values):
        from compeft_fl.kernels import torch_factored

        kernels = torch_factored
    start = 0
    for (rows, columns), each in zip(shapes, terms, strict=True):
        stop = start + rows * columns
        if each is not None and each.count:
            lies = (1, stop - start) if each.flat else (rows, columns)
            by_line = lies[1] <= lies[0]
            kernels.add_terms(values[start:stop].reshape(lies), each.steps, each.negative, by_line)
        start = stop


class FactoredVector(TaskVector):
    """A task vector as terms of its matrices, and ternary values beside them.

    It is a `TaskVector` whose dense values are made when they are first asked for.

    Parameters
    ----------
    layout : Layout
    terms : sequence of Terms or None
        One for each tensor of the layout that has parameters, in order.
    rest : TernaryVector, optional
        Is added after the terms.
    device : torch.device or str, optional
        Where the values are made; default: on the CPU, in numpy.

    Raises
    ------
    LayoutError
        Terms of other shapes or of another number, or a rest of another layout.
    ParameterError
        More than 255 terms of a tensor, an exponent outside -149 .. 96, a scale of more than 2^126
        in the rest.
    """

    def __init__(
        self,
        layout: Layout,
        terms: Sequence[Terms | None],
        rest: TernaryVector | None = None,
        device: Any = None,
    ) -> None:
        self.layout, self.terms, self.rest, self.device = layout, tuple(terms), rest, device
        self.shapes = _matrices(layout)
        if len(self.terms) != len(self.shapes):
            raise LayoutError(
                f"expected terms of {len(self.shapes)} tensors, found {len(self.terms)}"
            )
        for shape, each in zip(self.shapes, self.terms, strict=True):
            if each is not None:
                _check(each, shape)
        if rest is not None and rest.layout != layout:
            raise LayoutError(f"expected {layout!r}, found {rest.layout!r} beside the terms")
        if rest is not None and rest.scales.size and rest.scales.max() > MAX_SCALE:
            raise ParameterError(f"expected scales of at most 2^126, found {rest.scales.max()}")

    @functools.cached_property
    def values(self) -> Any:  # type: ignore[override]
        """The dense values, float32, shape (d,): each sum rounded in the order of its terms."""
        values: Any = np.zeros(self.num_parameters, np.float32)
        if self.device is not None:
            import torch

            values = torch.zeros(self.num_parameters, device=self.device)
        add_all(values, self.shapes, self.terms)
        if self.rest is not None:
            beside: Any = self.rest.to_task_vector().values
            if self.device is not None:
                beside = torch.as_tensor(beside).to(self.device)
            values += beside
        return values

    def pieces(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The values tensor by tensor, on the CPU: where they lie, and what they are.

        All that is taken is memory for one tensor, and for the ternary values beside the terms.
        """
        rest = None if self.rest is None else _Nonzeros(self.rest)
        start = 0
        for shape, each in zip(self.shapes, self.terms, strict=True):
            stop = start + shape[0] * shape[1]
            values = np.zeros(stop - start, np.float32)
            add_all(values, [shape], [each])
            if rest is not None:
                rest.add(values, start)
            yield slice(start, stop), values
            start = stop

    def halved(self, times: int = 1) -> FactoredVector:
        """The same with every value divided by 2^times; terms below float32's range are 0."""
        terms: list[Terms | None] = []
        for each in self.terms:
            if each is not None:
                factors = np.where(each.exponents[:, None] - times < LOWEST, 0, each.factors)
                exponents = np.maximum(each.exponents - times, LOWEST)
                each = Terms(factors.astype(np.int16), exponents, each.negative, each.flat)
            terms.append(each)
        rest = self.rest
        if rest is not None:
            rest = rest.with_scales(np.ldexp(rest.scales, -times))
        return FactoredVector(self.layout, terms, rest, self.device)

    @property
    def num_terms(self) -> int:
        """How many terms there are in all."""
        return sum(each.count for each in self.terms if each is not None)

    def check_finite(self) -> None:
        """Nothing to check: exponents and factors are bounded."""

    def __repr__(self) -> str:
        return f"FactoredVector({self.layout!r}, {self.num_terms} terms)"


class _Nonzeros:
    """The entries of a ternary vector that are not 0, to be had in ranges."""

    def __init__(self, update: TernaryVector) -> None:
        masks = [mask.view(np.uint8) for mask in (update.positive, update.negative)]
        d = update.num_parameters
        plus, minus = (
            np.flatnonzero(np.unpackbits(mask, count=d, bitorder="little")) for mask in masks
        )
        self._at = np.concatenate([plus, minus])
        scales = update.scales
        if scales.size > 1:
            tensors = np.searchsorted(update.layout.offsets, self._at, side="right") - 1
            each = scales[tensors]
        else:
            each = np.broadcast_to(scales, self._at.shape)
        self._values = np.where(np.arange(self._at.size) < plus.size, each, -each)
        order = np.argsort(self._at)
        self._at, self._values = self._at[order], self._values[order]

    def add(self, values: NDArray[np.float32], start: int) -> None:
        first, last = np.searchsorted(self._at, (start, start + values.size))
        values[self._at[first:last] - start] += self._values[first:last]


def _matrices(layout: Layout) -> list[tuple[int, int]]:
    """Rows and columns of each tensor that has parameters; columns are the last axis."""
    found = []
    for tensor in layout.tensors:
        if tensor.size:
            columns = tensor.shape[-1] if tensor.shape else 1
            found.append((tensor.size // columns, columns))
    return found


def _check(terms: Terms, shape: tuple[int, int]) -> None:
    """Raise for terms that are not of a matrix's shape, or out of range."""
    size, lines = shapes_of(*shape, terms.flat)
    found = terms.factors.shape, terms.exponents.shape, terms.negative.shape
    count = terms.count
    if found != ((count, size), (count,), (count, lines)):
        raise LayoutError(f"expected terms of {size} factors and {lines} signs, found {found}")
    if count > MAX_TERMS:
        raise ParameterError(f"expected at most {MAX_TERMS} terms of a tensor, found {count}")
    if count and not (terms.exponents.min() >= LOWEST and terms.exponents.max() <= HIGHEST):
        raise ParameterError(
            f"expected exponents in {LOWEST} .. {HIGHEST}, found {terms.exponents.min()} .. "
            f"{terms.exponents.max()}"
        )
