"""ComPEFT without one of its steps, by name: what Figure 5 of the paper compares with.

Each variant is a function of a task vector, a density and alpha; `compeft_fl.tuning.tune` sweeps
over any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from compeft_fl.compeft import compress, keep_top_k, scale_of
from compeft_fl.errors import ParameterError
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector

Update = TernaryVector | TaskVector

__all__ = ["VARIANTS", "Variant", "ablate", "prune", "variant_of"]


@dataclass(frozen=True)
class Variant:
    """One way to compress.

    Attributes
    ----------
    text : str
        What it does, in a line.
    apply : callable
        Takes a task vector, a density and alpha; gives an update.
    tuned : bool
        Alpha counts. Where it does not, there is nothing to sweep but the density.
    """

    text: str
    apply: Callable[[TaskVector, float, float], Update]
    tuned: bool = False


def prune(tau: TaskVector, density: float, support: str = "fixed") -> TaskVector:
    """The values of the largest magnitudes as they are, and 0 elsewhere: "Pruned" of section 5.1.

    Parameters
    ----------
    tau : TaskVector
    density, support
        As for `compeft_fl.compress`.

    Examples
    --------
    >>> import numpy as np
    >>> tau = TaskVector.from_dict({"w": np.array([3, -1, 0.5, -5], "f4")})
    >>> prune(tau, 0.5).values
    array([ 3.,  0.,  0., -5.], dtype=float32)
    """
    kept: Any = keep_top_k(tau, density, support).to_task_vector().values
    values: Any = tau.values
    return TaskVector(tau.layout, values * abs(kept) + 0.0)  # no -0


def _unsigned(tau: TaskVector, density: float, alpha: float) -> TernaryVector:
    """Where the largest magnitudes are, without their signs."""
    kept = keep_top_k(tau, density)
    places = kept.positive | kept.negative
    return TernaryVector(tau.layout, places, places ^ places, scale_of(tau, kept, alpha))


VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType(
    {
        "compeft": Variant("signs of the top k, alpha sigma (Algorithm 1)", compress, tuned=True),
        "norm": Variant(
            "signs of the top k, one scale that keeps the vector's length",
            lambda tau, density, _: compress(tau, density, "norm"),
        ),
        "stc": Variant(
            "signs of the top k, the mean of their magnitudes (sparse ternary compression)",
            lambda tau, density, _: compress(tau, density, "mean"),
        ),
        "pruned": Variant(
            "the top k with their values: no ternarisation",
            lambda tau, density, _: prune(tau, density),
        ),
        "signs": Variant(
            "all signs, alpha sigma: no sparsification",
            lambda tau, _, alpha: compress(tau, 1.0, alpha),
            tuned=True,
        ),
        "unsigned": Variant(
            "the places of the top k, alpha sigma: no signs", _unsigned, tuned=True
        ),
    }
)


def variant_of(name: str) -> Variant:
    """The variant of a name.

    Raises
    ------
    ParameterError
        No variant has it.
    """
    if name not in VARIANTS:
        raise ParameterError(f"expected a variant among {', '.join(VARIANTS)}; found {name!r}")
    return VARIANTS[name]


def ablate(tau: TaskVector, variant: str, density: float = 0.05, alpha: float = 1.0) -> Update:
    """Compress a task vector by one of `VARIANTS`.

    Parameters
    ----------
    tau : TaskVector
    variant : str
    density : float
        In (0, 1].
    alpha : float
        In units of sigma, where the variant has it.

    Raises
    ------
    ParameterError
        An unknown variant, or a number out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> tau = TaskVector.from_dict({"w": np.array([3, -1, 0.5, -5], "f4")})
    >>> ablate(tau, "stc", 0.5).to_task_vector().values
    array([ 4.,  0.,  0., -4.], dtype=float32)
    >>> ablate(tau, "unsigned", 0.5).to_task_vector().values > 0
    array([ True, False, False,  True])
    """
    return variant_of(variant).apply(tau, density, alpha)
