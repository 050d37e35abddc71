"""How much of an update a node sends, where the server says so: a density, or bits a parameter.

Up to about 1.6 bits a parameter a ternary update says most. Where a link can carry more than that
within the time that slow ones take for less, an update is rounded to whole multiples of a power of
two, of so many bits a parameter, and goes as steps. What is rounded off stays in the residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ParameterError
from compeft_fl.task_vector import TaskVector, is_torch

__all__ = ["MOST_BITS", "Rate", "on_host_memory", "rounded_to"]

MOST_BITS: Final = 16
_LOWEST, _HIGHEST = -149, 104  # exponents of a steps body
_SAMPLE = 1 << 18  # entries that an entropy is measured on
_LARGEST = 1 << 23  # magnitude of an integer


@dataclass(frozen=True)
class Rate:
    """A density of ternary updates, or bits a parameter of finer ones.

    Parameters
    ----------
    density : float
        In (0, 1]; 0 where ``bits`` says it, or where the node decides.
    bits : int
        2 .. 16; 0: a ternary update.

    Raises
    ------
    ParameterError
        A number out of its range.
    """

    density: float = 0.0
    bits: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.density, float | int) and 0 <= self.density <= 1):
            raise ParameterError(f"expected a density in [0, 1], found {self.density!r}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise ParameterError(f"expected bits as an integer, found {self.bits!r}")
        if self.bits and not 2 <= self.bits <= MOST_BITS:
            raise ParameterError(f"expected bits in 2 .. {MOST_BITS}, found {self.bits}")

    @classmethod
    def of_tier(cls, tier: float) -> Rate:
        """A tier in one number: below 1, or 1, a density; from 2 on, whole bits a parameter.

        Raises
        ------
        ParameterError
            Neither.

        Examples
        --------
        >>> Rate.of_tier(0.1).density, Rate.of_tier(4).bits
        (0.1, 4)
        """
        if isinstance(tier, bool) or not isinstance(tier, int | float):
            raise ParameterError(f"expected a tier as a number, found {tier!r}")
        if 0 < tier <= 1:
            return cls(density=float(tier))
        if tier == int(tier) and 2 <= tier <= MOST_BITS:
            return cls(bits=int(tier))
        raise ParameterError(
            f"expected a tier in (0, 1], or whole bits in 2 .. {MOST_BITS}, found {tier!r}"
        )

    @property
    def bits_a_parameter(self) -> float:
        """What an update is expected to take: the entropy of its places and signs, or its bits.

        Examples
        --------
        >>> round(Rate(density=0.1).bits_a_parameter, 2), Rate(bits=4).bits_a_parameter
        (0.58, 4.0)
        """
        if self.bits:
            return float(self.bits)
        p = self.density
        places = sum(-x * math.log2(x) for x in (p, 1 - p) if x > 0)
        return _OVER_ENTROPY * (places + p)

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.bits else f"{self.density:g}"


_OVER_ENTROPY = 1.02  # of Golomb codes


def on_host_memory(tau: TaskVector) -> TaskVector:
    """The same task vector on the CPU."""
    values: Any = tau.values
    return TaskVector(tau.layout, values.cpu().numpy()) if is_torch(values) else tau


def rounded_to(tau: TaskVector, bits: int) -> TaskVector:
    """The nearest multiples of a power of two that take at most so many bits a parameter.

    The entropy of the integers, as independent ones, is what counts; an encoder with contexts is
    below it.

    Parameters
    ----------
    tau : TaskVector
    bits : int
        2 .. 16.

    Returns
    -------
    TaskVector
        On the CPU.

    Raises
    ------
    NonFiniteError
        NaN or Inf.

    Examples
    --------
    >>> tau = TaskVector.from_dict({"w": np.linspace(-1, 1, 9, dtype="f4")})
    >>> rounded_to(tau, 2).values
    array([-1., -1.,  0.,  0.,  0.,  0.,  0.,  1.,  1.], dtype=float32)
    """
    tau.check_finite()
    values: Any = on_host_memory(tau).values
    host: NDArray[np.float32] = values
    largest = float(np.abs(host).max(initial=0.0))
    if not largest:
        return TaskVector(tau.layout, np.zeros_like(host))
    sample = host[:: max(1, host.size // _SAMPLE)]
    lowest = max(_LOWEST, math.frexp(largest / _LARGEST)[1])
    low, high = lowest, min(_HIGHEST, math.frexp(largest)[1] + 1)
    while low < high:  # entropy falls as the step grows
        middle = (low + high) // 2
        low, high = (low, middle) if _entropy(sample, middle) <= bits else (middle + 1, high)
    integers = np.rint(np.ldexp(host, -low)) + np.float32(0)  # no -0
    return TaskVector(tau.layout, np.ldexp(integers, low).astype(np.float32))


def _entropy(values: NDArray[np.float32], exponent: int) -> float:
    """Bits a value of the integers that a step makes, as independent ones."""
    integers = np.rint(np.ldexp(values.astype(np.float64), -exponent))
    counts = np.unique(integers, return_counts=True)[1]
    shares = counts / values.size
    return float(-(shares * np.log2(shares)).sum())
