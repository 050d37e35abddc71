"""How much of a task vector to send, and in which form: terms by energy for their bits.

`factorize` spends the bits that top-k of a density would take on low-rank signs, where these keep
more. `keep_energy` takes a floor on the energy instead, and of three forms the one that reaches it
with the fewest bits: support (ComPEFT's Algorithm 1 at whatever density it takes), signs of all
parameters, low-rank signs.

Figures: ``simulations/results/factored.md``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.compeft import check_density, compress
from compeft_fl.errors import ParameterError
from compeft_fl.factored import (
    HIGHEST,
    LOWEST,
    MAX_SCALE,
    MAX_TERMS,
    FactoredVector,
    Terms,
    shapes_of,
)
from compeft_fl.reduction.quality import Quality
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

__all__ = ["check_energy", "factorize", "keep_energy", "kept_energy", "ternary_bits"]

FACTOR_BITS = 5  # of a factor; `cpu_factored.MAX_FACTOR` is the largest
_TERM_BITS = 8 + 8  # exponent and count
_SHORTEST = 4  # a matrix with a shorter side below that has no form worth the name
_WIDEST = 64  # and a shorter side above that only up to so many parameters
_LARGEST_WIDE = 1 << 20
_DENSITIES = [2.0 ** (step / 2) / 256 for step in range(15)]  # to 1/2: of what has no form
_LARGEST = 2.0**100  # values beyond are not written as terms
_SEARCHES = 7  # of a density that reaches a floor


def ternary_bits(density: float) -> float:
    """Bits a parameter of ternary values at a density: the entropy of the support, and signs."""
    if density >= 1:
        return 1.0
    return -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)


def check_energy(energy: float) -> None:
    """Raise ParameterError unless 0 < energy < 1."""
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy < 1:
        raise ParameterError(f"expected a share of energy in (0, 1), found {energy!r}")


def kept_energy(tau: TaskVector, update: TernaryVector | TaskVector) -> float:
    """The share of a task vector's energy that an update keeps: 1 - ||tau - u||^2 / ||tau||^2."""
    error = Quality.of(tau, update).relative_error
    return 1 - error * error


def factorize(tau: TaskVector, density: float = 0.1, *, lowest: int = LOWEST) -> FactoredVector:
    """Low-rank signs in as many bits as top-k of a density takes.

    In each tensor the next term is the outer product that takes most off what is left; of all
    tensors, the one is taken that keeps most for its bits. Tensors with a side below 4 (biases,
    IA3) compete as ternary values of their own, at the density that pays as well.

    Parameters
    ----------
    tau : TaskVector
    density : float
        In (0, 1]: the bits are those of ternary values at this density, `ternary_bits`.
    lowest : int
        The smallest exponent of a factor's step: of a grid that the values have to lie on.

    Returns
    -------
    FactoredVector
        On the device of ``tau``.

    Raises
    ------
    ParameterError
        A density out of its range, or no parameters.
    NonFiniteError
        NaN or Inf in ``tau``; the message names the tensor.

    Examples
    --------
    >>> values = np.outer(np.arange(1, 9), np.sign(np.sin(np.arange(400)) + 0.1)).astype("f4")
    >>> tau = TaskVector.from_dict({"w": values})
    >>> update = factorize(tau, density=0.05)
    >>> update.num_terms, round(kept_energy(tau, update), 3)
    (1, 1.0)
    """
    check_density(density)
    search = _Search(tau, lowest)
    found, _ = search.run(search.mixed(), bits=ternary_bits(density) * tau.num_parameters)
    assert found is not None  # a budget in bits is always kept
    return found


def keep_energy(
    tau: TaskVector,
    energy: float,
    scale: str | float = "mean",
    *,
    lowest: int = LOWEST,
    low_rank: bool = True,
) -> TernaryVector | FactoredVector:
    """The cheapest update that keeps a share of the energy: support, signs, or low-rank signs.

    Parameters
    ----------
    tau : TaskVector
    energy : float
        In (0, 1): 1 - ||tau - u||^2 / ||tau||^2 is to be this or more.
    scale : "mean", "norm" or float
        Of the support, see `compeft_fl.compress`.
    lowest : int
        See `factorize`.
    low_rank : bool
        False: support alone.

    Returns
    -------
    TernaryVector or FactoredVector
        Where nothing reaches the floor, what comes nearest.

    Raises
    ------
    ParameterError, NonFiniteError
        As `factorize`.

    Examples
    --------
    >>> values = np.zeros(1000, "f4")
    >>> values[::100] = 1
    >>> keep_energy(TaskVector.from_dict({"w": values}), 0.9)
    TernaryVector(Layout(1 tensors, 1000 parameters), 9 nonzeros)
    """
    check_energy(energy)
    if not low_rank:
        return _support(tau, energy, scale, math.inf) or compress(tau, 1.0, scale, "best")
    search = _Search(tau, lowest)
    best, bits = None, math.inf
    for forms in (search.mixed, search.terms, search.signs):
        found, cost = search.run(forms(), energy=energy, bits=bits)
        if found is not None and cost < bits:
            best, bits = found, cost
    support = _support(tau, energy, scale, bits)
    if support is not None:
        return support
    if best is None:
        best, _ = search.run(search.terms())
    assert best is not None  # without a floor
    return best


def _support(
    tau: TaskVector, energy: float, scale: str | float, bits: float
) -> TernaryVector | None:
    """Top-k at the lowest density that keeps the energy; None where that is ``bits`` or more."""
    high = _density_of(bits / tau.num_parameters)
    found = compress(tau, high, scale, "best")
    if _kept(tau, found) < energy:
        return None
    low = 0.0
    for _ in range(_SEARCHES):
        middle = math.sqrt(max(low, high / 64) * high)
        tried = compress(tau, middle, scale, "best")
        if _kept(tau, tried) >= energy:
            high, found = middle, tried
        else:
            low = middle
    return found


def _kept(tau: TaskVector, update: TernaryVector) -> float:
    error = Quality.of_compressed(tau, update).relative_error
    return 1 - error * error


def _density_of(bits: float) -> float:
    """The density at which ternary values take so many bits a parameter; at most 2/3."""
    low, high = 0.0, 2 / 3  # where they take most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ternary_bits(middle) < bits else (low, middle)
    return high


class _Search:
    """The search for terms over the tensors of one task vector."""

    def __init__(self, tau: TaskVector, lowest: int) -> None:
        from compeft_fl.kernels import cpu_factored

        self.kernels: Any = cpu_factored
        if is_torch(tau.values):
            from compeft_fl.kernels import torch_factored

            self.kernels = torch_factored
        if tau.num_parameters == 0:
            raise ParameterError("expected a task vector with parameters, found none")
        tau.check_finite()
        self.tau, self.lowest = tau, max(lowest, LOWEST)
        empty = FactoredVector(tau.layout, [None] * sum(1 for size in tau.layout.sizes if size))
        self.shapes = empty.shapes
        starts = np.cumsum([0, *(rows * columns for rows, columns in self.shapes)])
        self.ranges = [slice(a, b) for a, b in itertools.pairwise(starts.tolist())]
        self.given = _sum_squares(tau.values)

    def mixed(self) -> list[_Form]:
        """Terms for matrices, ternary values for all others."""
        low_rank = [_has_low_rank(*shape) for shape in self.shapes]
        forms: list[_Form] = [
            _Matrix(self, i, flat=False) for i, is_so in enumerate(low_rank) if is_so
        ]
        others = [i for i, is_so in enumerate(low_rank) if not is_so]
        return [*forms, _Others(self, others)] if others else forms

    def terms(self) -> list[_Form]:
        """Terms for all; those of a vector, or of what is too large, are signs and one scale."""
        return [
            _Matrix(self, i, flat=not _has_low_rank(*shape)) for i, shape in enumerate(self.shapes)
        ]

    def signs(self) -> list[_Form]:
        """Signs and one scale for each tensor, and again for what they leave."""
        return [_Matrix(self, i, flat=True) for i in range(len(self.shapes))]

    def run(
        self, forms: Sequence[_Form], *, bits: float = math.inf, energy: float = math.inf
    ) -> tuple[FactoredVector | None, float]:
        """Take what keeps most for its bits, until bits or a share of energy are reached.

        Returns the update and its bits; None where the energy is not reached within the bits.
        """
        spent, kept = 0.0, 0.0
        heap: list[tuple[float, int, float, float]] = []

        def offer(index: int) -> None:
            found = forms[index].next()
            if found is not None:
                gain, cost = found
                heapq.heappush(heap, (-gain / cost, index, gain, cost))

        for index in range(len(forms)):
            offer(index)
        while heap and kept < energy * self.given:
            _, index, gain, cost = heapq.heappop(heap)
            if spent and spent + cost > bits:  # one is taken, as top-k keeps one parameter
                continue  # a smaller one may still fit
            spent, kept = spent + cost, kept + gain
            forms[index].take()
            offer(index)
        if kept < energy * self.given < math.inf:
            return None, spent
        return self._vector(forms), spent

    def _vector(self, forms: Sequence[_Form]) -> FactoredVector:
        terms: list[Terms | None] = [None] * len(self.shapes)
        rest = None
        for form in forms:
            if isinstance(form, _Matrix):
                terms[form.index] = form.terms()
            elif isinstance(form, _Others):
                rest = form.ternary()
        device = self.tau.values.device if is_torch(self.tau.values) else None
        return FactoredVector(self.tau.layout, terms, rest, device)


class _Form:
    """A source of candidates, each worth less for its bits than the one before."""

    def next(self) -> tuple[float, float] | None:
        """What the next candidate takes off the energy, and its bits; None: there is none."""
        raise NotImplementedError

    def take(self) -> None:
        """The next candidate is chosen."""
        raise NotImplementedError


class _Matrix(_Form):
    """The terms of one matrix."""

    def __init__(self, search: _Search, index: int, flat: bool) -> None:
        self.index, self.flat, self._kernels = index, flat, search.kernels
        rows, columns = search.shapes[index]
        self.size, self.lines = shapes_of(rows, columns, flat)
        self._values: Any = search.tau.values[search.ranges[index]]
        self._by_line = not flat and columns <= rows
        self._shape = rows, columns
        self._lowest = search.lowest
        self._left: Any = None
        self._unit = 0
        self._found: list[Any] = []
        self._next: Any = None

    def next(self) -> tuple[float, float] | None:
        """See `_Form.next`."""
        if self._left is None:
            self._begin()
        if self._left is None or len(self._found) == MAX_TERMS:
            return None
        self._next = self._kernels.find_term(self._left)
        if self._next is None:
            return None
        # In two steps: the square of a unit can be beyond float64.
        gain = math.ldexp(self._next[3], 2 * self._unit)
        return gain, self.lines + FACTOR_BITS * self.size + _TERM_BITS

    def _begin(self) -> None:
        if float(abs(self._values).max()) >= _LARGEST:
            return
        integers, self._unit = self._kernels.to_integers(self._values, self._lowest)
        if self.flat:
            self._left = integers.reshape(1, -1)
        elif self._by_line:
            turned = integers.reshape(self._shape).T
            self._left = turned.contiguous() if is_torch(turned) else np.ascontiguousarray(turned)
        else:
            self._left = integers.reshape(self._shape)

    def take(self) -> None:
        """See `_Form.take`."""
        self._kernels.subtract(self._left, self._next)
        factors, exponent, negative, _ = self._next
        self._found.append((factors, exponent + self._unit, negative))

    def terms(self) -> Terms | None:
        """What was taken."""
        if not self._found:
            return None
        factors, exponents, negative = zip(*self._found, strict=True)
        assert max(exponents) <= HIGHEST
        signs: NDArray[np.bool_] = np.array(negative, bool)
        return Terms(np.array(factors, np.int16), np.array(exponents, np.int32), signs, self.flat)


class _Others(_Form):
    """Ternary values of tensors without a low-rank form, at one density for all of them."""

    def __init__(self, search: _Search, indices: Sequence[int]) -> None:
        from compeft_fl.kernels import cpu_factored

        self._tau = search.tau
        self._lowest = search.lowest
        values: Any = search.tau.values
        self._ranges = [search.ranges[i] for i in indices]
        parts = [values[where] for where in self._ranges]
        host = [part.cpu().numpy() if is_torch(part) else part for part in parts]
        integers, unit = cpu_factored.to_integers(np.concatenate(host), LOWEST)
        sorted_ = np.sort(np.abs(integers))[::-1].astype(np.float64)
        self._size = sorted_.size
        self._steps = self._worth(np.cumsum(sorted_), unit)
        self._count = 0

    def _worth(self, sums: NDArray[np.float64], unit: int) -> Iterator[tuple[int, float, float]]:
        """Numbers of nonzeros, each with what it takes off and costs more than the one before.

        The corners of the concave hull, so that each is worth less for its bits than the last.
        """
        points = [(0.0, 0.0, 0)]
        for density in _DENSITIES:
            count = max(1, int(density * self._size))
            energy = math.ldexp(float(sums[count - 1]) ** 2 / count, 2 * unit)
            bits = ternary_bits(count / self._size) * self._size
            if count <= points[-1][2] or energy <= points[-1][1]:
                continue
            while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(
                points[-1], (bits, energy, count)
            ):
                points.pop()
            points.append((bits, energy, count))
        for before, after in itertools.pairwise(points):
            yield after[2], after[1] - before[1], after[0] - before[0]

    def next(self) -> tuple[float, float] | None:
        """See `_Form.next`."""
        self._next = next(self._steps, None)
        return None if self._next is None else self._next[1:]

    def take(self) -> None:
        """See `_Form.take`."""
        assert self._next is not None
        self._count = self._next[0]

    def ternary(self) -> TernaryVector | None:
        """What was taken."""
        if not self._count:
            return None
        values: Any = self._tau.values
        alone: Any = values * 0
        for where in self._ranges:
            alone[where] = values[where]
        only = TaskVector(self._tau.layout, alone)
        density = min(1.0, (self._count + 0.5) / only.num_parameters)
        update = compress(only, density, "mean")
        if self._lowest == LOWEST:
            return update.with_scales(np.minimum(update.scales, MAX_SCALE))
        mantissa, exponent = math.frexp(float(update.scales[0]))  # the nearest on the grid
        exponent = max(exponent if mantissa > 0.75 else exponent - 1, self._lowest)
        return update.with_scales(math.ldexp(1.0, exponent))


def _has_low_rank(rows: int, columns: int) -> bool:
    """Whether a matrix is searched for terms.

    A full weight of millions of parameters is none that changes by few terms, and the search
    would take many minutes to find that out.
    """
    shortest = min(rows, columns)
    return shortest >= _SHORTEST and (shortest <= _WIDEST or rows * columns <= _LARGEST_WIDE)


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _sum_squares(values: Any) -> float:
    """The squared norm, in float64, alike on every device."""
    if is_torch(values):
        from compeft_fl.kernels import torch_ops as kernels
    else:
        from compeft_fl.kernels import cpu as kernels  # type: ignore[no-redef]
    return kernels.sum_squares(values)
