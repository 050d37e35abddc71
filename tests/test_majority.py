"""majority.py: votes in bit planes against counting in numpy."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.merging.majority import SignMajority, signs_of

LAYOUT = cf.Layout(
    [cf.TensorSpec("a", (9, 7)), cf.TensorSpec("b", (0,)), cf.TensorSpec("c", (70,))]
)


def updates(count, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, LAYOUT.num_parameters)
    taus = [cf.TaskVector(LAYOUT, row) for row in rng.standard_normal(shape).astype(np.float32)]
    kept = [cf.compress(tau, density) for tau in taus]
    kept[1::3] = [update.with_scales([0.5, 1.0, 2.0]) for update in kept[1::3]]
    kept[2::3] = [update.with_scales([0.5, 1.0, 0.0]) for update in kept[2::3]]
    return kept


def signs(update):
    return np.sign(update.to_task_vector().values).astype(np.int64)


def counted(each):
    majority = SignMajority(LAYOUT)
    for update in each:
        majority.add(update)
    return majority


def cosine(a, b):
    norms = np.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norms if norms else 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 14, 15, 16, 17, 63, 64, 65, 300])
def test_the_direction_is_the_sign_of_the_sum_of_signs(count):
    each = updates(count)
    expected = np.sign(sum(signs(update) for update in each))
    direction = counted(each).direction()
    np.testing.assert_array_equal(signs(direction), expected)
    assert direction.scales.tolist() == [1.0]


def test_votes_that_all_agree_fill_every_plane():
    ones = cf.TaskVector(LAYOUT, np.ones(LAYOUT.num_parameters, np.float32))
    for count in (1, 15, 16, 63, 64, 255, 256):
        majority = counted([ones] * count)
        assert majority.direction().num_nonzeros == LAYOUT.num_parameters
        assert majority.count == count
        assert majority.cosine(ones) == (1.0 if count > 1 else 0.0)


def least_cosine(update, direction) -> float:
    """Of the update's signs, and of the update itself."""
    values = update.to_task_vector().values.astype(np.float64)
    return min(cosine(signs(update), direction), cosine(values, direction))


def test_honest_signs_in_tiny_entries_hide_no_few_large_ones():
    rng = np.random.default_rng(0)
    honest = rng.choice([-1.0, 1.0], LAYOUT.num_parameters).astype(np.float32)
    majority = counted([cf.TaskVector(LAYOUT, honest)] * 5)
    attack = honest * np.float32(1e-6)
    attack[:13] = -honest[:13]
    assert cosine(np.sign(attack), honest) > 0.8
    assert majority.cosine(cf.TaskVector(LAYOUT, attack), voted=False) < -0.3
    huge = cf.TaskVector(LAYOUT, attack * np.float32(3e38))
    assert majority.cosine(huge, voted=False) < -0.3


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_the_cosine_leaves_the_update_s_own_vote_out(count):
    each = updates(count, seed=count)
    majority = counted(each)
    for i, update in enumerate(each):
        others = sum((signs(u) for j, u in enumerate(each) if j != i), np.zeros(133, np.int64))
        expected = least_cosine(update, np.sign(others))
        assert majority.cosine(update) == pytest.approx(expected, abs=1e-12)


def test_the_cosine_of_an_update_that_did_not_vote():
    each, (other,) = updates(9), updates(1, seed=77)
    direction = np.sign(sum(signs(update) for update in each))
    expected = least_cosine(other, direction)
    assert counted(each).cosine(other, voted=False) == pytest.approx(expected, abs=1e-12)


def test_removing_an_update_is_as_if_it_had_never_been():
    each = updates(20)
    majority = counted(each)
    for update in each[3:9]:
        majority.remove(update)
    expected = counted(each[:3] + each[9:])
    assert majority.count == expected.count == 14
    np.testing.assert_array_equal(signs(majority.direction()), signs(expected.direction()))
    assert majority.cosine(each[0]) == expected.cosine(each[0])


def test_dense_updates_and_per_tensor_scales_vote_by_sign():
    (update,) = updates(1)
    halves = update.with_scales([0.0, 3.0, 5.0])
    for given in (halves, halves.to_task_vector()):
        np.testing.assert_array_equal(signs(signs_of(given)), signs(halves))
    assert signs(signs_of(halves))[:63].tolist() == [0] * 63
    np.testing.assert_array_equal(signs(signs_of(update.to_task_vector())), signs(update))


def test_a_scale_has_no_vote():
    each = updates(8)
    loud = [*each[:7], each[7].with_scales(1e38)]
    np.testing.assert_array_equal(
        signs(counted(each).direction()), signs(counted(loud).direction())
    )


def test_many_parameters_are_counted_in_threads():
    size = 64 * (1 << 15) + 5
    layout = cf.Layout([cf.TensorSpec("w", (size,))])
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 2, (3, size)).astype(np.float32)
    majority = SignMajority(layout)
    for row in rows:
        majority.add(cf.TaskVector(layout, row))
    direction = majority.direction().to_task_vector().values
    np.testing.assert_array_equal(direction, np.sign(rows.sum(0)))


def test_what_does_not_fit():
    other = cf.TaskVector.from_dict({"w": np.ones(133, np.float32)})
    majority = SignMajority(LAYOUT)
    for call in (majority.add, majority.remove, majority.cosine):
        with pytest.raises(LayoutError):
            call(other)
    with pytest.raises(ParameterError, match="none at all"):
        majority.remove(updates(1)[0])
