"""What is sent of a task vector: ternary or as low-rank signs, by density or by energy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compeft_fl.compeft import check_density, check_scale, check_support, compress
from compeft_fl.errors import ParameterError
from compeft_fl.factored import LOWEST, FactoredVector
from compeft_fl.reduction.factorize import check_energy, factorize, keep_energy
from compeft_fl.reduction.quality import Quality
from compeft_fl.reduction.rates import Rate, on_host_memory, rounded_to
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = ["AUTO", "DOWN_ENERGY", "ENERGY", "Reduction", "floor_after", "quality_of"]

AUTO = "auto"
ENERGY = 0.7  # of an update
DOWN_ENERGY = 0.6  # of a version: a fifth of the parameters, as they are later on
_FIRST = 4  # versions
_LONGEST = 2  # versions: an absence counts as no longer


def floor_after(energy: float, version: int, absence: int = 1) -> float:
    """The share of energy to keep of an update, or of a version of the global adapter.

    In the first versions optimisers make all steps alike, and everything else builds on them: there
    a quarter, a third, half as much is left out. Half as much also by a node that was not asked
    before the last version: what it leaves out waits for long.

    Parameters
    ----------
    energy : float
        The share that is kept in every round of a long run.
    version : int
        Of the global adapter, from 0.
    absence : int
        Versions since the node's last update.

    Examples
    --------
    >>> [round(floor_after(0.7, version), 3) for version in range(5)]
    [0.925, 0.9, 0.85, 0.7, 0.7]
    >>> floor_after(0.7, 100, absence=10)
    0.85
    """
    return 1 - (1 - energy) / max(1, min(absence, _LONGEST), _FIRST - version)


@dataclass(frozen=True)
class Reduction:
    """How a task vector is made small.

    Parameters
    ----------
    density : float or "auto"
        In (0, 1]: the greatest share of parameters that is sent. "auto": whatever keeps a share of
        the energy, in the cheapest of three forms: `compeft_fl.reduction.factorize.keep_energy`.
    scale : "norm", "mean" or float
    support : "best" or "fixed"
        See `compeft_fl.compress`.
    factored : bool
        Low-rank signs in the bits that ternary values of that density take, see
        `compeft_fl.reduction.factorize.factorize`.
    energy : float
        In (0, 1): the least share of the energy that "auto" keeps.
    low_rank : bool
        Whether "auto" may take low-rank signs.
    bits : int
        2 .. 16: multiples of a power of two, of so many bits a parameter, see
        `compeft_fl.reduction.rates.rounded_to`. 0: one of the forms above.

    Raises
    ------
    ParameterError
        A setting out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> tau = TaskVector.from_dict({"w": np.array([3, -1, 0.5, -5], "f4")})
    >>> Reduction(0.5)(tau).num_nonzeros, Reduction("auto", energy=0.9)(tau).num_nonzeros
    (2, 2)
    """

    density: float | str = 0.1
    scale: str | float = "mean"
    support: str = "best"
    factored: bool = False
    energy: float = ENERGY
    low_rank: bool = True
    bits: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.density, str):
            if self.density != AUTO:
                raise ParameterError(
                    f'expected a density in (0, 1] or "auto", found {self.density!r}'
                )
        else:
            check_density(self.density)
        check_scale(self.scale)
        check_support(self.support)
        check_energy(self.energy)

    def after(self, version: int, absence: int = 1) -> Reduction:
        """The same with the share of energy that `floor_after` says."""
        return replace(self, energy=floor_after(self.energy, version, absence))

    def at(self, rate: Rate, *, ternary: bool = False) -> Reduction:
        """The same at the rate that somebody else asks for; ``ternary``: finer ones are not taken.

        Where nothing is asked for, the same.
        """
        if rate.density:
            return replace(self, density=rate.density)
        return replace(self, bits=0 if ternary else rate.bits)

    def __call__(self, tau: TaskVector, lowest: int = LOWEST) -> TernaryVector | TaskVector:
        """What is sent of a task vector.

        ``lowest`` is the smallest exponent of low-rank signs, where they have to lie on a grid.

        Raises
        ------
        ParameterError, NonFiniteError
            No parameters; NaN or Inf.
        """
        if self.bits:
            return rounded_to(tau, self.bits)
        if isinstance(self.density, str):
            return keep_energy(tau, self.energy, self.scale, lowest=lowest, low_rank=self.low_rank)
        if self.factored:
            return factorize(tau, self.density, lowest=lowest)
        return compress(tau, self.density, self.scale, self.support)


def quality_of(tau: TaskVector, update: TernaryVector | TaskVector) -> Quality:
    """How much of a task vector is sent."""
    if isinstance(update, TernaryVector):
        return Quality.of_compressed(tau, update)
    if not isinstance(update, FactoredVector):  # made on the CPU
        tau = on_host_memory(tau)
    return Quality.of(tau, update)
