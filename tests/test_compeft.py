"""compeft.py: Algorithm 1 against its definition, written out in numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compeft_fl import Layout, TaskVector, TensorSpec, compress
from compeft_fl.compeft import standard_deviation
from compeft_fl.errors import NonFiniteError, ParameterError


def vector(values):
    values = np.asarray(values, np.float32)
    return TaskVector(Layout([TensorSpec("w", values.shape)]), values)


def kept_by_definition(values, density):
    """Indices of the k largest magnitudes: of equal ones the lower index, and no zero."""
    k = max(1, int(density * values.size))
    order = np.lexsort((np.arange(values.size), -np.abs(values)))[:k]
    return np.sort(order[values[order] != 0])


VECTORS = {
    "normal": lambda rng, d: rng.standard_normal(d),
    "heavy-tailed": lambda rng, d: rng.standard_t(2, d),
    "many ties": lambda rng, d: rng.integers(-3, 4, d),
    "one value": lambda rng, d: np.full(d, -0.25),
    "mostly zeros": lambda rng, d: np.where(rng.random(d) < 0.01, rng.standard_normal(d), 0),
    "all zeros": lambda rng, d: np.zeros(d),
    "subnormal": lambda rng, d: rng.standard_normal(d) * 1e-40,
    "sorted": lambda rng, d: np.sort(rng.standard_normal(d)),
    "two halves": lambda rng, d: np.r_[
        rng.standard_normal(d // 2), 100 * rng.standard_normal(d - d // 2)
    ],
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("d", [1, 2, 63, 64, 65, 1000, 150_001])
def test_what_is_kept(kind, d):
    values = VECTORS[kind](np.random.default_rng(d), d).astype(np.float32)
    for density in (1e-6, 0.05, 0.3, 1.0):
        update = compress(vector(values), density, "mean")
        dense = update.to_task_vector().values
        kept = kept_by_definition(values, density)
        assert np.array_equal(np.flatnonzero(dense), kept if update.scales[0] > 0 else [])
        assert np.array_equal(np.sign(dense[kept]), np.sign(values[kept]))
        assert update.num_nonzeros == kept.size


def test_a_sample_that_misleads_is_noticed():
    """Every sampled entry is 0, so the bracket from the sample is wrong."""
    d = 1 << 20
    values = np.zeros(d, np.float32)
    step = d // max(1 << 16, d >> 9)
    rng = np.random.default_rng(0)
    others = np.arange(d) % step != step // 2
    values[others] = rng.standard_normal(others.sum())
    update = compress(vector(values), 0.05, "mean")
    kept = np.flatnonzero(update.to_task_vector().values)
    assert np.array_equal(kept, kept_by_definition(values, 0.05))


def test_scale_number_is_alpha_times_torch_std():
    values = np.random.default_rng(0).standard_normal(10_007).astype(np.float32) + 3
    tau = vector(values)
    sigma = torch.std(torch.from_numpy(values).double(), correction=1).item()
    assert standard_deviation(tau) == pytest.approx(sigma, rel=1e-12)
    assert compress(tau, 0.1, 4).scales[0] == np.float32(4 * standard_deviation(tau))


def test_scale_norm_keeps_the_length():
    values = np.random.default_rng(1).standard_normal(10_007).astype(np.float32)
    update = compress(vector(values), 0.05, "norm")
    dense = update.to_task_vector().values
    assert np.linalg.norm(dense) == pytest.approx(np.linalg.norm(values), rel=1e-6)
    # which for a zero-mean vector is alpha = 1 / sqrt(density)
    assert update.scales[0] == pytest.approx(values.std() / np.sqrt(0.05), rel=1e-2)


def test_scale_mean_is_the_least_squares_choice():
    values = np.random.default_rng(2).standard_normal(10_007).astype(np.float32)
    update = compress(vector(values), 0.05, "mean")
    kept = kept_by_definition(values, 0.05)
    assert update.scales[0] == pytest.approx(np.abs(values[kept]).mean(), rel=1e-6)
    error = [
        np.sum((values - update.with_scales([s]).to_task_vector().values) ** 2)
        for s in update.scales[0] * np.array([0.99, 1.0, 1.01])
    ]
    assert error[1] < min(error[0], error[2])


def test_the_top_k_is_over_all_tensors():
    tau = TaskVector.from_dict({"small": np.full(10, 0.1, "f4"), "large": np.full(10, 1.0, "f4")})
    update = compress(tau, 0.5)
    assert np.array_equal(np.flatnonzero(update.to_task_vector().values), np.arange(10, 20))


def test_all_zeros_has_scale_zero():
    for scale in ("norm", "mean", 3.0):
        update = compress(vector(np.zeros(100)), 0.05, scale)
        assert update.scales.tolist() == [0.0]
        assert update.num_nonzeros == 0


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), True, "0.1", None])
def test_density_out_of_range(density):
    with pytest.raises(ParameterError, match="density"):
        compress(vector([1, 2]), density)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "median", True])
def test_scale_out_of_range(scale):
    with pytest.raises(ParameterError, match="scale"):
        compress(vector([1, 2]), 0.5, scale)


def test_validated_points_to_tuning():
    with pytest.raises(ParameterError, match=r"tuning\.tune"):
        compress(vector([1, 2]), 0.5, "validated")


def test_sigma_of_one_parameter_is_refused():
    with pytest.raises(ParameterError, match="at least 2"):
        compress(vector([1]), 1.0, 2.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [3, 64, 1000, 300_001])
@pytest.mark.parametrize("where", [0, -1])
def test_not_finite_is_named(value, d, where):
    tau = TaskVector.from_dict({"fine": np.ones(7, "f4"), "bad": np.ones(d, "f4")})
    tau.values[7 if where == 0 else where] = value
    with pytest.raises(NonFiniteError, match="'bad'"):
        compress(tau, 0.05)


def test_the_input_is_left_alone():
    values = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    before = values.copy()
    compress(vector(values), 0.05)
    assert np.array_equal(values, before)
