"""merging.py: the rules against their formulas, and against PEFT's own functions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import task_arithmetic, ties

import compeft_fl as cf
from compeft_fl.errors import LayoutError, NonFiniteError, ParameterError, WireError
from compeft_fl.kernels.cpu_merge import Pending

LAYOUT = cf.Layout([cf.TensorSpec("a", (20, 11)), cf.TensorSpec("b", (130,))])
METHODS = [
    cf.Average(),
    cf.TaskArithmetic(0.3),
    cf.TaskArithmetic(None),
    cf.Ties(0.4),
    cf.Ties(1.0, "positive"),
    cf.Ties(0.7, "majority"),
]


def task_vectors(count, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, LAYOUT.num_parameters)
    return [cf.TaskVector(LAYOUT, row) for row in rng.standard_normal(shape).astype(np.float32)]


def updates(count, seed=0, density=0.3):
    kept = [cf.compress(tau, density) for tau in task_vectors(count, seed)]
    per_tensor = [[0.5 + i, 1.0 / (i + 1)] for i in range(count)]
    kept[1::2] = [u.with_scales(s) for u, s in zip(kept[1::2], per_tensor[1::2], strict=True)]
    return kept


def dense(each):
    return np.stack([u.to_task_vector().values.astype(np.float64) for u in each])


def ties_by_formula(rows, weights, scaling, tie):
    """The definition of DESIGN, in numpy."""
    w = np.asarray(weights)[:, None]
    plus, minus = (w * np.maximum(rows, 0)).sum(0), (w * np.maximum(-rows, 0)).sum(0)
    sign = np.sign(plus - minus)
    other = {"zero": 0, "positive": 1, "majority": np.sign(sign.sum())}[tie]
    sign = np.where(sign == 0, other, sign)
    agrees = (np.sign(rows) == sign) & (rows != 0)
    weight = (w * agrees).sum(0)
    mean = (w * rows * agrees).sum(0) / np.where(weight > 0, weight, 1)
    return scaling * mean


WEIGHTS = [3.0, 1.0, 2.5, 7.0, 0.25]


def test_average_by_its_formula():
    each = updates(5)
    expected = np.average(dense(each), axis=0, weights=WEIGHTS)
    merged = cf.merge(each, cf.Average(), WEIGHTS).values
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-9)


def test_task_arithmetic_by_its_formula():
    each = updates(5)
    merged = cf.merge(each, cf.TaskArithmetic(0.3)).values
    np.testing.assert_allclose(merged, 0.3 * dense(each).sum(0), rtol=1e-6, atol=1e-9)
    merged = cf.merge(each, cf.TaskArithmetic(None)).values
    np.testing.assert_allclose(merged, dense(each).mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tie", ["zero", "positive", "majority"])
@pytest.mark.parametrize("as_dense", [False, True])
def test_ties_by_its_formula(tie, as_dense):
    each = updates(5)
    given = [u.to_task_vector() for u in each] if as_dense else each
    merged = cf.merge(given, cf.Ties(0.4, tie), WEIGHTS).values
    expected = ties_by_formula(dense(each), WEIGHTS, 0.4, tie)
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("tie", "expected"), [("zero", [0, 2, 2]), ("positive", [2, 2, 2]), ("majority", [2, 2, 2])]
)
def test_ties_where_the_masses_are_equal(tie, expected):
    rows = [[2, 2, 2], [-2, 0, 2]]
    each = [cf.TaskVector.from_dict({"w": np.array(row, "f4")}) for row in rows]
    assert cf.merge(each, cf.Ties(tie=tie)).values.tolist() == expected
    negated = [cf.TaskVector(tau.layout, -tau.values) for tau in each]
    mirrored = cf.merge(negated, cf.Ties(tie=tie)).values.tolist()
    assert mirrored == ([2, -2, -2] if tie == "positive" else [-x for x in expected])


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning:peft")
def test_ties_equals_peft_s_with_equal_weights():
    """PEFT trims by itself; at density 1 it does not, and warns. Its tie rule is "positive"."""
    for seed, as_dense in itertools.product(range(3), (False, True)):
        each = task_vectors(6, seed) if as_dense else updates(6, seed)
        tensors = [torch.from_numpy(u.to_task_vector().values) for u in each]
        expected = ties(tensors, torch.ones(6), density=1.0, majority_sign_method="total")
        merged = cf.merge(each, cf.Ties(1.0, "positive")).values
        np.testing.assert_allclose(merged, expected.numpy(), rtol=2e-5, atol=1e-6)


def test_task_arithmetic_equals_peft_s():
    each = updates(6)
    weights = [0.1, 0.5, 1.0, 2.0, 0.3, 0.7]
    tensors = [torch.from_numpy(u.to_task_vector().values) for u in each]
    expected = task_arithmetic(tensors, torch.tensor(weights))
    merged = cf.merge(each, cf.TaskArithmetic(), weights).values
    np.testing.assert_allclose(merged, expected.numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_bytes_ternary_and_dense_updates_merge_alike(method):
    each = updates(5)
    expected = cf.merge(each, method, WEIGHTS).values
    blobs = [cf.encode(u, "bitmask" if i == 2 else "golomb") for i, u in enumerate(each)]
    assert np.array_equal(cf.merge(blobs, method, WEIGHTS).values, expected)
    tensors = [u.to_task_vector() for u in each]
    np.testing.assert_allclose(cf.merge(tensors, method, WEIGHTS).values, expected, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_combine_equals_one_accumulator(method):
    each = updates(6)
    flat = method.fresh()
    for update, weight in zip(each, [*WEIGHTS, 1.0], strict=True):
        flat.add(update, weight)
    leaves = []
    for i in range(0, 6, 2):
        leaf = method.fresh()
        for update, weight in zip(each[i : i + 2], [*WEIGHTS, 1.0][i : i + 2], strict=True):
            leaf.add(update, weight)
        leaves.append(leaf)
    root = method.fresh()
    for leaf in reversed(leaves):
        root.combine(leaf)
    root.combine(method.fresh())  # of nothing: nothing
    assert root.count == flat.count == 6
    np.testing.assert_allclose(root.result().values, flat.result().values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_more_updates_than_wait_at_once(method):
    each = updates(Pending.CAPACITY * 2 + 3)
    weights = list(np.random.default_rng(0).random(len(each)) + 0.5)
    rows = dense(each)
    merged = cf.merge(each, method, weights).values
    if isinstance(method, cf.Ties):
        expected = ties_by_formula(rows, weights, method.scaling, method.tie)
    else:
        factors = {"Average()": 1 / sum(weights), "TaskArithmetic(None)": 1 / len(each)}
        factor = factors.get(repr(method), 0.3)
        expected = factor * (np.array(weights)[:, None] * rows).sum(0)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_result_halfway_changes_nothing(method):
    each = updates(40)
    accumulator = method.fresh()
    for update in each:
        accumulator.add(update)
        accumulator.result()
    assert np.array_equal(accumulator.result().values, cf.merge(each, method).values)


def test_combine_wants_its_own_kind():
    with pytest.raises(ParameterError, match="Average"):
        cf.Average().combine(cf.Ties())
    with pytest.raises(ParameterError, match=r"Ties\(0.4, 'zero'\)"):
        cf.Ties(0.4).combine(cf.Ties(0.5))
    one, two = cf.Average(), cf.Average()
    one.add(updates(1)[0])
    two.add(cf.TaskVector.from_dict({"w": np.ones(3, "f4")}))
    with pytest.raises(LayoutError):
        one.combine(two)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_add_takes_an_update_whole_or_not_at_all(method):
    first, second = updates(2)
    accumulator = method.fresh()
    accumulator.add(first, 2.0)
    before = accumulator.result().values.copy()
    blob = bytearray(cf.encode(second))
    blob[len(blob) // 2] ^= 1
    with pytest.raises(WireError):
        accumulator.add(bytes(blob))
    with pytest.raises(LayoutError):
        accumulator.add(cf.TaskVector.from_dict({"w": np.ones(3, "f4")}))
    nan = second.to_task_vector()
    nan.values[-1] = np.nan
    with pytest.raises(NonFiniteError, match="'b'"):
        accumulator.add(nan)
    for weight in (0, -1, float("nan"), float("inf"), "1", None, True, 10**400):
        with pytest.raises(ParameterError, match="weight"):
            accumulator.add(second, weight)
    assert accumulator.count == 1
    assert np.array_equal(accumulator.result().values, before)


def test_the_first_update_may_be_rejected():
    accumulator = cf.Average()
    with pytest.raises(WireError):
        accumulator.add(b"nothing")
    with pytest.raises(ParameterError, match="none to merge"):
        accumulator.result()
    accumulator.add(updates(1)[0])
    assert accumulator.count == 1


def test_merge_leaves_the_method_as_it_was():
    method = cf.Ties(0.4)
    merged = cf.merge(updates(3), method)
    assert method.count == 0
    assert np.array_equal(cf.merge(updates(3), method).values, merged.values)


def test_a_known_layout_lets_updates_name_theirs_by_id():
    blobs = [cf.encode(u, layout_by_id=True) for u in updates(3)]
    merged = cf.merge(blobs, cf.Average(layout=LAYOUT))
    assert np.array_equal(merged.values, cf.merge(updates(3), cf.Average()).values)
    with pytest.raises(WireError):
        cf.merge(blobs, cf.Average())


def test_an_entry_of_scale_zero_votes_for_nothing():
    one, two = updates(2, density=0.9)
    merged = cf.merge([one, two.with_scales(0.0)], cf.Ties()).values
    assert np.array_equal(merged, one.to_task_vector().values)


def test_a_sum_beyond_float32_is_an_error():
    big = cf.TaskVector.from_dict({"w": np.full(3, 3e38, "f4")})
    with pytest.raises(NonFiniteError, match="float32"):
        cf.merge([big, big], cf.TaskArithmetic(1.0))


@pytest.mark.parametrize("scaling", [0, float("nan"), float("inf"), "1"])
def test_scaling_out_of_range(scaling):
    for method in (cf.Ties, cf.TaskArithmetic):
        with pytest.raises(ParameterError, match="scaling"):
            method(scaling)


def test_arguments_of_merge():
    with pytest.raises(ParameterError, match="2 weights, found 1"):
        cf.merge(updates(2), cf.Average(), [1.0])
    with pytest.raises(ParameterError, match="none to merge"):
        cf.merge([], cf.Average())
    with pytest.raises(ParameterError, match="zero, positive, majority"):
        cf.Ties(tie="random")
