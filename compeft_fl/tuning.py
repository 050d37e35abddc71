"""Density and scale chosen on validation data: the paper's sweep (ComPEFT sections 3.2 and 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from compeft_fl.compeft import keep_top_k, scale_of
from compeft_fl.errors import ParameterError
from compeft_fl.reduction.ablations import variant_of
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = ["ALPHAS", "DENSITIES", "Trial", "Tuned", "tune"]

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


class Trial(NamedTuple):
    """One point of the sweep."""

    density: float
    alpha: float
    score: float


class Tuned(NamedTuple):
    """The best update, how it was made, and every point that was tried."""

    update: TernaryVector | TaskVector
    density: float
    alpha: float
    score: float
    trials: tuple[Trial, ...]


def tune(
    tau: TaskVector,
    metric: Callable[[Any], float],
    *,
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
    maximize: bool = True,
    variant: str = "compeft",
) -> Tuned:
    """Try every density with every scale alpha * sigma(tau), and keep the best by a metric.

    Parameters
    ----------
    tau : TaskVector
    metric : callable
        Takes a compressed update, gives a number: accuracy on validation data, say.
    densities, alphas : sequence of float
        Default: the grids of section 4.1.
    maximize : bool
        False: the smallest number is the best. Of equal ones the smaller density, then the smaller
        alpha.
    variant : str
        Of `compeft_fl.reduction.ablations.VARIANTS`. One without alpha is tried once at each
        density, as alpha 1.

    Raises
    ------
    ParameterError
        An empty grid, a density or alpha out of its range, or a metric that gives NaN everywhere.

    Examples
    --------
    >>> import numpy as np
    >>> tau = TaskVector.from_dict({"w": np.array([4, -4, 4, -4, 0, 0, 0, 0], "f4")})
    >>> best = tune(tau, lambda update: -abs(update.scales[0] - 4), densities=[0.5])
    >>> best.alpha
    1.0
    """
    if not densities or not alphas:
        raise ParameterError("expected at least one density and one alpha to try, found none")
    trials: list[Trial] = []
    best: Tuned | None = None
    chosen = variant_of(variant)
    for density in sorted(densities):
        kept = keep_top_k(tau, density)  # once for all alphas
        for alpha in sorted(alphas) if chosen.tuned else [1.0]:
            if not (alpha > 0 and math.isfinite(alpha)):
                raise ParameterError(f"expected a finite alpha > 0, found {alpha!r}")
            update: Any = (
                kept.with_scales(scale_of(tau, kept, alpha))
                if variant == "compeft"
                else chosen.apply(tau, density, alpha)
            )
            score = float(metric(update))
            trials.append(Trial(density, alpha, score))
            if math.isnan(score):
                continue
            if best is None or (score > best.score if maximize else score < best.score):
                best = Tuned(update, density, alpha, score, ())
    if best is None:
        raise ParameterError("expected a number from the metric, found NaN at every point")
    return best._replace(trials=tuple(trials))
