"""The grid that the global adapter moves on: sums of steps on it are exact, in any order.

Every value of theta_shared is a whole multiple of one power of two, `unit`, and of magnitude below
2^23 of it: where values outgrow that, another grid is laid. So the sum and the difference of two
such values are exact in float32, and what a node has missed is one vector of small integers,
however many versions it took.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compeft_fl.task_vector import Layout

__all__ = ["Grid", "start_bits", "step_near"]

Floats = NDArray[np.float32]

_BITS = 23  # of a value in units; one less than float32's, so that differences are exact too
_HEADROOM = 3  # bits: values may grow to 4 times the largest, and then there is another grid
_FRESH_HEADROOM = 7  # to 64 times, where nothing has been trained: a LoRA's factors grow so far
_NO_START = 1.0  # stands for the largest value of a start that is all zeros
_LOWEST, _HIGHEST = -149, 104  # exponents of units that float32 and a steps body hold
COARSE_BITS = 10  # of a coarse start's values, without the sign
AUTO_BITS = 8  # and where the first versions are dense enough to bring the rest
FRESH_BITS = 6  # and where nothing has been trained
_FRESH_SHARE = 0.25  # of an adapter's parameters that are 0: those of a LoRA's B
_PIECE = 1 << 20  # values at a time


@dataclass(frozen=True)
class Grid:
    """The whole multiples of 2^exponent whose magnitude is below `limit`.

    Examples
    --------
    >>> grid = Grid.of(np.array([0.1, -1.0], "f4"))
    >>> grid.unit, grid.limit
    (9.5367431640625e-07, 8.0)
    >>> grid.nearest(np.array([0.1], "f4"))
    array([0.10000038], dtype=float32)
    """

    exponent: int

    @classmethod
    def of_start(cls, start: Floats) -> Grid:
        """The grid of a federation that starts from these values, float32, shape (d,)."""
        zeros = start.size - np.count_nonzero(start)
        fresh = zeros >= _FRESH_SHARE * max(1, start.size)
        return cls.of(start, _FRESH_HEADROOM if fresh else _HEADROOM)

    @classmethod
    def of(cls, values: Floats, headroom: int = _HEADROOM) -> Grid:
        """The grid whose limit is so many bits above the largest of these values, rounded up."""
        highest, lowest = values.max(initial=0.0), values.min(initial=0.0)
        largest = max(float(highest), -float(lowest)) or _NO_START
        exponent = math.frexp(largest)[1] + headroom - _BITS
        if math.frexp(largest)[0] == 0.5:  # a power of two
            exponent -= 1
        return cls(min(max(exponent, _LOWEST), _HIGHEST))

    @property
    def unit(self) -> float:
        """The distance between two neighbours."""
        return math.ldexp(1.0, self.exponent)

    @property
    def limit(self) -> float:
        """All magnitudes are below."""
        return math.ldexp(1.0, self.exponent + _BITS)

    def nearest(self, values: Floats) -> Floats:
        """The values rounded to the grid, of two equally near the even multiple; no -0."""
        rounded = np.empty_like(values)
        for begin in range(0, values.size, _PIECE):  # nothing else of the adapter's size
            steps = np.rint(np.ldexp(values[begin : begin + _PIECE], -self.exponent))
            rounded[begin : begin + _PIECE] = _no_minus_zero(np.ldexp(steps, self.exponent))
        return rounded

    def coarse(
        self, values: Floats, layout: Layout, bits: int = COARSE_BITS
    ) -> tuple[Floats, list[int]]:
        """The values in so many bits and a sign: each tensor on a step of its own, in whole units.

        Returns
        -------
        values : ndarray of float32, shape (d,)
        cuts : list of int
            Where the step changes: parameters at which an encoder cuts, to give each part its own.
        """
        rounded, cuts, last = np.zeros_like(values), [], None
        most = (1 << bits) - 1
        for _, where in layout.slices():
            piece = values[where]
            largest = float(np.abs(piece).max(initial=0.0))
            if not largest:
                continue
            exponent = max(math.frexp(largest)[1] - bits, self.exponent)
            steps = np.clip(np.rint(np.ldexp(piece, -exponent)), -most, most)
            rounded[where] = np.ldexp(steps, exponent)
            if last is not None and exponent != last:
                cuts.append(where.start)
            last = exponent
        return _no_minus_zero(rounded), cuts


def start_bits(values: Floats, layout: Layout) -> int:
    """How finely a coarse start is sent: of an adapter that was never trained, less is needed.

    Of a LoRA's two factors one is 0 then, and the other random: a coarser one is as random.
    """
    zeros = sum(tensor.size for tensor, where in layout.slices() if not values[where].any())
    return FRESH_BITS if zeros >= _FRESH_SHARE * max(1, values.size) else COARSE_BITS


def _no_minus_zero(values: Floats) -> Floats:
    """Adding 0 makes 0 of -0, on some ways to a version and not on others: digests would differ."""
    return values + np.float32(0)


def step_near(scale: float, unit: float) -> float:
    """The power of two that is nearest to a scale > 0; the unit where that is larger.

    Examples
    --------
    >>> step_near(0.7, 2**-20), step_near(0.8, 2**-20), step_near(1e-9, 2**-20) == 2**-20
    (0.5, 1.0, True)
    """
    mantissa, exponent = math.frexp(scale)
    return max(math.ldexp(1.0, exponent if mantissa > 0.75 else exponent - 1), unit)
