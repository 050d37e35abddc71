"""Cosine and relative error, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.errors import LayoutError
from compeft_fl.reduction.quality import Quality


def vector(size, seed=0):
    values = np.random.default_rng(seed).standard_normal(size).astype("f4")
    return cf.TaskVector.from_dict({"w": values})


def expected(tau, update):
    x, y = (v.to_task_vector().values.astype(np.float64) for v in (tau, update))
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    return pytest.approx((cosine, np.linalg.norm(x - y) / np.linalg.norm(x)), rel=1e-6)


@pytest.mark.parametrize("scale", ["norm", "mean", 2.0])
@pytest.mark.parametrize("size", [7, 5000, (1 << 20) + 9])
def test_both_ways_are_numpys(size, scale):
    tau = vector(size)
    update = cf.compress(tau, density=0.3, scale=scale)
    for found in (Quality.of(tau, update), Quality.of_compressed(tau, update)):
        assert (found.cosine, found.relative_error) == expected(tau, update)


def test_scales_per_tensor_and_dense_updates():
    rng = np.random.default_rng(0)
    tau = cf.TaskVector.from_dict({name: rng.standard_normal(40).astype("f4") for name in "ab"})
    update = cf.compress(tau, density=0.5).with_scales([0.5, 2])
    assert (Quality.of(tau, update).cosine, Quality.of(tau, update).relative_error) == expected(
        tau, update
    )
    assert (Quality.of(tau, tau).cosine, Quality.of(tau, tau).relative_error) == (1, 0)


def test_parts_add_up_to_the_whole():
    taus = [vector(100, seed) for seed in (1, 2)]
    updates = [cf.compress(tau, density=0.2) for tau in taus]
    whole = cf.TaskVector.from_dict({"w": np.concatenate([tau.values for tau in taus])})
    dense = np.concatenate([update.to_task_vector().values for update in updates])
    found = sum(map(Quality.of_compressed, taus, updates), Quality(0, 0, 0))
    target = Quality.of(whole, cf.TaskVector(whole.layout, dense))
    assert found.cosine == pytest.approx(target.cosine)
    assert found.relative_error == pytest.approx(target.relative_error)


def test_of_nothing():
    zero = cf.TaskVector.from_dict({"w": np.zeros(4, "f4")})
    one = cf.TaskVector.from_dict({"w": np.ones(4, "f4")})
    assert (Quality.of(zero, zero).cosine, Quality.of(zero, zero).relative_error) == (1, 0)
    assert (Quality.of(one, zero).cosine, Quality.of(one, zero).relative_error) == (0, 1)
    assert Quality.of(zero, one).relative_error == np.inf
    with pytest.raises(LayoutError):
        Quality.of(zero, cf.TaskVector.from_dict({"v": np.ones(4, "f4")}))
