"""ternary.py: the algebra on bit masks against dense vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compeft_fl import Layout, TaskVector, TensorSpec, TernaryVector
from compeft_fl.errors import LayoutError, NonFiniteError, ParameterError


def random_update(seed, sizes=(70, 1, 0, 200), density=0.3, per_tensor=False):
    rng = np.random.default_rng(seed)
    layout = Layout([TensorSpec(f"t{i}", (size,)) for i, size in enumerate(sizes)])
    signs = rng.choice([-1, 0, 1], layout.num_parameters, p=[density / 2, 1 - density, density / 2])
    one = TernaryVector.from_task_vector(TaskVector(layout, signs.astype(np.float32)))
    return one.with_scales(rng.random(len(sizes) if per_tensor else 1) + 0.1)


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    per_tensor=st.tuples(st.booleans(), st.booleans()),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5).filter(sum),
    density=st.floats(0, 1),
)
def test_the_algebra_equals_the_dense_one(seeds, per_tensor, sizes, density):
    a, b = (
        random_update(seed, sizes, density, each)
        for seed, each in zip(seeds, per_tensor, strict=True)
    )
    x, y = (u.to_task_vector().values.astype(np.float64) for u in (a, b))
    assert a.dot(b) == pytest.approx(x @ y, abs=1e-9)
    assert a.squared_distance(b) == pytest.approx(np.sum((x - y) ** 2), abs=1e-9)
    assert a.distance(b) == pytest.approx(np.linalg.norm(x - y), abs=1e-6)
    assert a.hamming_distance(b) == np.count_nonzero(np.sign(x) != np.sign(y))
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    assert a.cosine(b) == pytest.approx(x @ y / norms if norms else 0.0, abs=1e-9)
    both = (x != 0) & (y != 0)
    if both.any():
        assert a.sign_agreement(b) == pytest.approx(np.mean((x * y)[both] > 0))
    else:
        assert math.isnan(a.sign_agreement(b))


def test_identity_and_opposition():
    a = random_update(0)
    opposite = TernaryVector(a.layout, a.negative, a.positive, a.scales)
    assert a.distance(a) == 0
    assert a.cosine(a) == pytest.approx(1)
    assert a.cosine(opposite) == pytest.approx(-1)
    assert a.sign_agreement(opposite) == 0
    assert a.hamming_distance(opposite) == a.num_nonzeros


@pytest.mark.parametrize("per_tensor", [False, True])
def test_to_and_from_task_vectors(per_tensor):
    a = random_update(3, per_tensor=per_tensor)
    b = TernaryVector.from_task_vector(a.to_task_vector())
    assert np.array_equal(a.positive, b.positive)
    assert np.array_equal(a.negative, b.negative)
    assert np.array_equal(a.to_task_vector().values, b.to_task_vector().values)


def test_more_than_one_magnitude_is_not_ternary():
    tau = TaskVector.from_dict({"fine": np.ones(2, "f4"), "bad": np.array([1, 2], "f4")})
    with pytest.raises(ParameterError, match="'bad'"):
        TernaryVector.from_task_vector(tau)
    tau.values[0] = np.nan
    with pytest.raises(NonFiniteError, match="'fine'"):
        TernaryVector.from_task_vector(tau)


def test_density_counts_entries():
    tau = TaskVector.from_dict({"w": np.array([0, 2, 0, -2], "f4")})
    update = TernaryVector.from_task_vector(tau)
    assert (update.num_nonzeros, update.density, update.scales.tolist()) == (2, 0.5, [2.0])


def test_other_layouts_do_not_meet():
    a, b = random_update(0), random_update(0, sizes=(71, 200))
    for method in ("dot", "distance", "hamming_distance", "cosine", "sign_agreement"):
        with pytest.raises(LayoutError, match="expected Layout"):
            getattr(a, method)(b)


@pytest.mark.parametrize("scales", [[-1.0], [np.nan], [np.inf], [1.0, 2.0], []])
def test_scales_are_checked(scales):
    with pytest.raises(ParameterError, match="scale"):
        random_update(0).with_scales(scales)


def test_masks_are_checked():
    a = random_update(0)
    with pytest.raises(LayoutError, match="mask"):
        TernaryVector(a.layout, a.positive[:-1], a.negative, 1.0)
