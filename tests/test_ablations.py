"""ComPEFT without one of its steps."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.compeft import standard_deviation
from compeft_fl.errors import ParameterError
from compeft_fl.reduction.ablations import VARIANTS, ablate, prune
from compeft_fl.tuning import tune


@pytest.fixture
def tau():
    rng = np.random.default_rng(0)
    return cf.TaskVector.from_dict({"w": rng.standard_normal((40, 25)).astype("f4")})


def kept(update):
    return np.asarray(update.to_task_vector().values)


def test_each_variant_is_what_it_says(tau):
    values = np.asarray(tau.values)
    top = np.argsort(-np.abs(values))[:100]
    sigma = standard_deviation(tau)
    found = {name: kept(ablate(tau, name, 0.1, 2.0)) for name in VARIANTS}
    for name, update in found.items():
        places = np.flatnonzero(update)
        assert set(places) == (set(range(1000)) if name == "signs" else set(top)), name
    np.testing.assert_array_equal(found["pruned"][top], values[top])
    np.testing.assert_allclose(found["compeft"][top], 2 * sigma * np.sign(values[top]), rtol=1e-6)
    np.testing.assert_allclose(found["unsigned"][top], 2 * sigma, rtol=1e-6)
    np.testing.assert_allclose(found["signs"], 2 * sigma * np.sign(values), rtol=1e-6)
    np.testing.assert_allclose(np.abs(found["stc"][top]), np.abs(values[top]).mean(), rtol=1e-6)
    assert np.linalg.norm(found["norm"]) == pytest.approx(np.linalg.norm(values), rel=1e-5)


def test_pruning_is_the_nearest_vector_of_its_density(tau):
    errors = {n: np.linalg.norm(kept(ablate(tau, n, 0.1)) - tau.values) for n in VARIANTS}
    assert min(errors, key=errors.get) in ("pruned", "signs")
    assert errors["pruned"] < errors["stc"]  # the mean is the best single magnitude
    assert errors["stc"] < errors["norm"]
    assert errors["stc"] < errors["compeft"]


def test_sweeps_take_any_variant(tau):
    def metric(update):
        return -float(np.abs(kept(update) - tau.values).sum())

    found = tune(tau, metric, densities=[0.1, 0.5], variant="pruned")
    assert [(trial.density, trial.alpha) for trial in found.trials] == [(0.1, 1.0), (0.5, 1.0)]
    np.testing.assert_array_equal(kept(found.update), prune(tau, 0.5).values)
    assert len(tune(tau, metric, densities=[0.1], alphas=[1, 2, 3]).trials) == 3
    assert len(tune(tau, metric, densities=[0.1], alphas=[1, 2], variant="unsigned").trials) == 2
    with pytest.raises(ParameterError, match="among compeft, norm, stc"):
        tune(tau, metric, variant="magic")


def test_torch_gives_the_same():
    torch = pytest.importorskip("torch")
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    tau = cf.TaskVector.from_dict({"w": values})
    np.testing.assert_array_equal(prune(tau, 0.2).values, prune(cf.TaskVector.from_dict(
        {"w": values.numpy()}), 0.2).values)  # fmt: skip
