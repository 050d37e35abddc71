"""Parts of an adapter by rank: what is cut, spread, weighed and multiplied, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from compeft_fl.compeft import compress
from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.merging.accumulators import Average
from compeft_fl.merging.coverage import Coverage
from compeft_fl.merging.products import ProductMean, best_product, factors_near
from compeft_fl.parts.ranks import Cut, rank_of
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec

RNG = np.random.default_rng(0)
WHOLE = tiny.layout()


def vector(seed: int = 0) -> TaskVector:
    values = np.random.default_rng(seed).standard_normal(WHOLE.num_parameters)
    return TaskVector(WHOLE, values.astype(np.float32))


def by_hand(state: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    return {
        name: v[:rank] if "lora_A" in name else v[:, :rank] if "lora_B" in name else v
        for name, v in state.items()
    }


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 9])
def test_a_part_is_the_leading_rows_of_a_and_columns_of_b(rank):
    cut, tau = Cut(WHOLE, rank), vector()
    part = cut.of(tau)
    for name, value in by_hand(tau.to_dict(), rank).items():
        np.testing.assert_array_equal(part.to_dict()[name], value)
    spread = cut.spread(part)
    np.testing.assert_array_equal(spread.values, np.where(cut.covered, tau.values, 0))
    assert cut.is_whole == (rank >= 4)
    assert cut.share == cut.covered.mean()


def test_ternary_updates_stay_ternary():
    cut, update = Cut(WHOLE, 2), compress(vector(), 0.3, "mean")
    part = cut.of(update)
    dense = cut.of(update.to_task_vector()).values
    np.testing.assert_array_equal(part.to_task_vector().values, dense)
    assert part.num_nonzeros == np.count_nonzero(dense)
    again = cut.spread(part).to_task_vector().values
    np.testing.assert_array_equal(again, np.where(cut.covered, update.to_task_vector().values, 0))


def test_convolutions_embeddings_and_lower_ranks_of_single_modules():
    layout = Layout(
        [
            TensorSpec("conv.lora_A.weight", (4, 3, 3, 3)),
            TensorSpec("conv.lora_B.weight", (5, 4, 1, 1)),
            TensorSpec("conv.lora_B.bias", (5,)),
            TensorSpec("e.lora_embedding_A", (4, 11)),
            TensorSpec("e.lora_embedding_B", (6, 4)),
            TensorSpec("small.lora_A.weight", (2, 7)),  # a module's own rank
            TensorSpec("x.lora_magnitude_vector", (9,)),
        ]
    )
    shapes = [tensor.shape for tensor in Cut(layout, 3).layout.tensors]
    assert shapes == [(3, 3, 3, 3), (5, 3, 1, 1), (5,), (3, 11), (6, 3), (2, 7), (9,)]
    assert rank_of(layout) == 4


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(LayoutError, match="expected factors with a rank"):
        Cut(Layout([TensorSpec("w", (3, 3))]), 2)
    with pytest.raises(LayoutError, match="AdaLoRA"):
        Cut(Layout([TensorSpec("q.lora_E", (3, 1)), TensorSpec("q.lora_A", (3, 3))]), 2)
    for rank in (0, -1, 1 << 17, True, 2.0):
        with pytest.raises(ParameterError, match="expected a rank"):
            Cut(WHOLE, rank)
    cut = Cut(WHOLE, 2)
    with pytest.raises(LayoutError):
        cut.of(TaskVector.zeros(cut.layout))
    with pytest.raises(LayoutError):
        cut.spread(TaskVector.zeros(WHOLE))


def test_other_names_by_patterns_of_one_s_own():
    layout = Layout([TensorSpec("0", (4, 3)), TensorSpec("1", (3, 4))])
    cut = Cut(layout, 1, {"0": 0, "1": 1})
    assert [tensor.shape for tensor in cut.layout.tensors] == [(1, 3), (3, 1)]


def test_each_entry_is_the_mean_over_those_that_have_it():
    cuts = [Cut(WHOLE, 1), Cut(WHOLE, 2), None, Cut(WHOLE, 2)]
    weights = [1.0, 5.0, 2.0, 3.0]
    mean, coverage = Average(), Coverage(0.0)
    sums = np.zeros(WHOLE.num_parameters)
    behind = np.zeros(WHOLE.num_parameters)
    for index, (cut, weight) in enumerate(zip(cuts, weights, strict=True)):
        update = vector(index) if cut is None else cut.spread(cut.of(vector(index)))
        covered = np.ones(WHOLE.num_parameters, bool) if cut is None else cut.covered
        mean.add(update, weight)
        coverage.add(cut, weight)
        sums += weight * covered * vector(index).values
        behind += weight * covered
    np.testing.assert_allclose(coverage.weighed(mean.result()).values, sums / behind, rtol=2e-6)
    # One of four tenths is not the only one to say what an entry is.
    damped = Coverage(0.5)
    for cut, weight in zip(cuts, weights, strict=True):
        damped.add(cut, weight)
    expected = sums / np.maximum(behind, 0.5 * sum(weights))
    np.testing.assert_allclose(damped.weighed(mean.result()).values, expected, rtol=2e-6)


def test_what_nobody_has_does_not_move():
    cut, coverage = Cut(WHOLE, 1), Coverage(0.0)
    coverage.add(cut, 2.0)
    moved = coverage.weighed(cut.spread(cut.of(vector())))
    assert np.isfinite(moved.values).all()
    np.testing.assert_array_equal(moved.values[~cut.covered], 0)


def test_the_product_of_thin_matrices_is_decomposed_without_it():
    left, right = RNG.standard_normal((40, 12)), RNG.standard_normal((12, 30))
    u, s, v = best_product(left, right, 5)
    expected = np.linalg.svd(left @ right)
    np.testing.assert_allclose(s, expected[1][:5], rtol=1e-10)
    best = (expected[0][:, :5] * expected[1][:5]) @ expected[2][:5]
    np.testing.assert_allclose((u * s) @ v, best, atol=1e-10)
    u, s, v = best_product(left[:, :2], right[:2], 5)  # of rank 2
    assert s.size == 2


def test_factors_of_the_mean_product_lie_near_the_mean_of_the_factors():
    near = RNG.standard_normal((4, 30))
    left = RNG.standard_normal((40, 4))
    u, s, v = best_product(left, near + 0.01 * RNG.standard_normal((4, 30)), 4)
    b, a = factors_near(u, s, v, near)
    np.testing.assert_allclose(b @ a, (u * s) @ v, atol=1e-9)
    assert np.linalg.norm(a - near) < 0.02 * np.linalg.norm(near)
    u, s, v = best_product(left[:, :1], near[:1], 4)  # a product of rank 1: most of A stays
    b, a = factors_near(u, s, v, near)
    np.testing.assert_allclose(b @ a, (u * s) @ v, atol=1e-9)
    assert np.linalg.norm(a - near) < 0.6 * np.linalg.norm(near)
    apart = np.linalg.svd(near)[2][-4:]  # no part in the row space
    assert factors_near(*best_product(left, near, 4), apart) is None


@pytest.mark.parametrize("count", [3, 40])
def test_the_mean_of_products_is_the_best_of_its_rank(count):
    start = TaskVector(WHOLE, vector(99).values.copy())
    start.to_dict()["q.lora_B"][...] = 0
    mean, products = Average(), ProductMean(start)
    dense = np.zeros((24, 24))
    for index in range(count):
        cut = None if index % 3 else Cut(WHOLE, 2)
        tau = TaskVector(WHOLE, 0.3 * vector(index).values)
        update = tau if cut is None else cut.spread(cut.of(tau))
        mean.add(update, 1.0 + index)
        products.add(update, 1.0 + index, None if cut is None else cut.rank)
        ends = {n: v + update.to_dict()[n] for n, v in start.to_dict().items()}
        ends = ends if cut is None else by_hand(ends, 2)
        dense += (1.0 + index) * ends["q.lora_B"].astype(float) @ ends["q.lora_A"].astype(float)
    dense /= sum(1.0 + index for index in range(count))
    moved = products.replaced(mean.result()).apply(start.to_dict())
    found = moved["q.lora_B"].astype(float) @ moved["q.lora_A"].astype(float)
    u, s, v = np.linalg.svd(dense)
    best = (u[:, :4] * s[:4]) @ v[:4]
    # Beyond some columns a sum is kept by its largest singular values: near the best, not it.
    slack = 1e-5 if count == 3 else 0.05
    assert np.linalg.norm(found - best) <= slack * np.linalg.norm(best)
    factors = mean.result().apply(start.to_dict())
    by_factor = factors["q.lora_B"].astype(float) @ factors["q.lora_A"].astype(float)
    assert np.linalg.norm(found - dense) < np.linalg.norm(by_factor - dense)
    np.testing.assert_array_equal(moved["head.bias"], factors["head.bias"])


def test_where_no_factors_are_near_a_is_its_mean_and_b_the_best_for_it():
    start = TaskVector(WHOLE, vector(99).values.copy())
    products, mean = ProductMean(start), Average()
    # Two nodes whose A point apart, and cancel in the mean: its product lies elsewhere.
    dense = np.zeros((24, 24))
    for sign in (1.0, -1.0):
        update = TaskVector(WHOLE, (sign * 50 * vector(1).values).astype("f4"))
        ends = {n: v.astype(float) for n, v in update.apply(start.to_dict()).items()}
        dense += ends["q.lora_B"] @ ends["q.lora_A"] / 2
        mean.add(update)
        products.add(update, 1.0)
    moved = products.replaced(mean.result()).apply(start.to_dict())
    assert products.projected == 1
    np.testing.assert_allclose(moved["q.lora_A"], start.to_dict()["q.lora_A"], atol=1e-5)
    u, s, v = np.linalg.svd(dense)
    best = (u[:, :4] * s[:4]) @ v[:4] @ np.linalg.pinv(moved["q.lora_A"].astype(float))
    np.testing.assert_allclose(moved["q.lora_B"], best, rtol=1e-3, atol=0.1)


def test_products_need_pairs_of_matrices():
    for tensors, said in (
        ([("w", (3, 3))], "none to multiply"),
        ([("q.lora_A", (2, 3))], "beside"),
        ([("q.lora_A", (2, 3, 3, 3)), ("q.lora_B", (3, 2, 1, 1))], "out x rank"),
    ):
        layout = Layout([TensorSpec(*each) for each in tensors])
        with pytest.raises(LayoutError, match=said):
            ProductMean(TaskVector.zeros(layout))
