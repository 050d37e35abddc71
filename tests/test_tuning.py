"""tuning.py: the paper's sweep."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.errors import ParameterError
from compeft_fl.tuning import ALPHAS, DENSITIES, tune


def task_vector():
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    return cf.TaskVector.from_dict({"w": values})


def test_the_sweep_is_the_paper_s_and_finds_the_best():
    tau = task_vector()

    def fit(update):
        return -float(np.sum((update.to_task_vector().values - tau.values) ** 2))

    best = tune(tau, fit)
    assert {(t.density, t.alpha) for t in best.trials} == {
        (k, a) for k in DENSITIES for a in ALPHAS
    }
    assert best.score == max(trial.score for trial in best.trials) == fit(best.update)
    expected = cf.compress(tau, best.density, best.alpha)
    assert cf.encode(best.update) == cf.encode(expected)


def test_minimize_and_any_metric():
    best = tune(task_vector(), lambda u: u.density, maximize=False)
    assert (best.density, best.alpha) == (min(DENSITIES), min(ALPHAS))  # of equal ones the smaller


def test_points_without_a_number_are_passed_over():
    best = tune(task_vector(), lambda u: float("nan") if u.density < 0.4 else 1.0)
    assert best.density == 0.5
    with pytest.raises(ParameterError, match="NaN at every point"):
        tune(task_vector(), lambda u: float("nan"))


@pytest.mark.parametrize(
    "grid", [{"densities": []}, {"alphas": []}, {"alphas": [-1.0]}, {"densities": [2]}]
)
def test_grids_are_checked(grid):
    with pytest.raises(ParameterError):
        tune(task_vector(), lambda u: 1.0, **grid)
