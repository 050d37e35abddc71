"""LoraHub: weights for many experts from a few examples, without gradients.

Source: Huang et al., "LoraHub", https://arxiv.org/abs/2307.13269: the loss on the examples plus
0.05 times the mean magnitude of the weights is minimised over weights in [-1.5, 1.5], from 0, by
Shiwa, one of nevergrad's optimizers. The experts stay as compressed as the pool holds them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.errors import MissingPackageError, ParameterError
from compeft_fl.experts.held import Recipe

if TYPE_CHECKING:
    from compeft_fl.experts.pool import ExpertPool

__all__ = ["RULES", "Composition", "Trial", "check_budget", "compose"]

RULES: Final = {"factors": "lorahub", "changes": "task-arithmetic"}
"""What a weight multiplies: each of an expert's tensors, as the paper has it, or its change."""

BOUND: Final = 1.5
L1: Final = 0.05
OPTIMIZER: Final = "Shiwa"


@dataclass(frozen=True)
class Trial:
    """Weights that were tried, and what came of them.

    Attributes
    ----------
    weights : tuple of float
        One per expert.
    loss : float
        On the examples.
    objective : float
        The loss plus the L1 term: what is minimised.
    """

    weights: tuple[float, ...]
    loss: float
    objective: float


@dataclass(frozen=True)
class Composition:
    """What a search has found.

    Attributes
    ----------
    recipe : Recipe
        For `ExpertPool.merge`, `use` and `export`.
    best : Trial
    trials : tuple of Trial
        All of them, in order; the first has no expert in it.
    rule : str
        A key of `RULES`.
    seed : int
    """

    recipe: Recipe
    best: Trial
    trials: tuple[Trial, ...]
    rule: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """What is kept beside the result: everything that makes it again."""
        return {
            **self.recipe.to_json(),
            "search": {
                "rule": self.rule,
                "optimizer": OPTIMIZER,
                "evaluations": len(self.trials),
                "seed": self.seed,
                "loss": self.best.loss,
                "loss_without_experts": self.trials[0].loss,
            },
        }


def compose(
    pool: ExpertPool,
    experts: Sequence[str],
    loss: Callable[[], float],
    *,
    rule: str = "factors",
    evaluations: int = 40,
    seed: int = 0,
    progress: Callable[[Trial], None] | None = None,
) -> Composition:
    """Find weights for experts with which a model's loss on a few examples is small.

    Parameters
    ----------
    pool : ExpertPool
    experts : sequence of str
        Names in the pool, or references in its store.
    loss : callable
        The loss of the pool's model on the examples, as the model is when it is called.
    rule : {"factors", "changes"}
        See `RULES`.
    evaluations : int
        How often the loss is asked for.
    seed : int
        Of the search; the same seed gives the same weights.
    progress : callable, optional
        Told of each trial.

    Raises
    ------
    MissingPackageError
        nevergrad is not installed.
    ParameterError
        No experts, one of them twice, an unknown rule, too few evaluations, or a loss that is never
        a number.
    CompeftError
        As `ExpertPool.use`.
    """
    experts = list(experts)
    if rule not in RULES:
        raise ParameterError(f"expected a rule among {', '.join(RULES)}; found {rule!r}")
    if not experts or len(set(experts)) < len(experts):
        raise ParameterError(f"expected experts, each once, found {len(experts)}")
    check_budget(evaluations)
    optimizer = _optimizer(len(experts), evaluations, seed)
    trials: list[Trial] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nevergrad's, of the optimizers that it is made of
        for _ in range(evaluations):
            asked = optimizer.ask()
            weights = tuple(float(weight) for weight in asked.value)
            with pool.use(_recipe(experts, weights, rule)):
                value = float(loss())
            value = value if math.isfinite(value) else math.inf
            penalty = L1 * sum(map(abs, weights)) / len(weights)
            trials.append(Trial(weights, value, value + penalty))
            optimizer.tell(asked, min(value + penalty, 1e9))
            if progress is not None:
                progress(trials[-1])
    best = min(trials, key=lambda trial: trial.objective)
    if not math.isfinite(best.loss):
        raise ParameterError("expected a loss that is a number, found none in any evaluation")
    return Composition(_recipe(experts, best.weights, rule), best, tuple(trials), rule, seed)


def check_budget(evaluations: int) -> None:
    """Raise unless there is a search of so many evaluations, before any work is done.

    Raises
    ------
    MissingPackageError, ParameterError
        As `compose`.
    """
    if not 2 <= evaluations <= 100_000:
        raise ParameterError(f"expected 2 .. 100000 evaluations, found {evaluations}")
    _nevergrad()


def _recipe(experts: Sequence[str], weights: Sequence[float], rule: str) -> Recipe:
    return Recipe(tuple(zip(experts, weights, strict=True)), RULES[rule])


def _nevergrad() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nevergrad
    except ImportError:
        raise MissingPackageError(
            "composing needs nevergrad, which is not installed: pip install 'compeft-fl[compose]'"
        ) from None
    return nevergrad


def _optimizer(dimensions: int, budget: int, seed: int) -> Any:
    import numpy as np

    nevergrad = _nevergrad()
    array = nevergrad.p.Array(init=np.zeros(dimensions)).set_bounds(-BOUND, BOUND)
    array.random_state.seed(seed)
    return nevergrad.optimizers.registry[OPTIMIZER](parametrization=array, budget=budget)
