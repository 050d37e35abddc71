"""The merge of carried tensors, and their way between server and node."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from compeft_fl.errors import (
    CompeftError,
    LayoutError,
    MalformedError,
    NonFiniteError,
    ParameterError,
    ResyncError,
)
from compeft_fl.exchange.carried import Apart, Versions, follow_apart
from compeft_fl.merging.carried import CarriedAverage
from compeft_fl.parts.tensor_policy import TensorPolicy

BASE = {
    "mean": np.array([1, -2, 3], "f4"),
    "steps": np.array(4),
    "index": np.array([[0, 5], [2, 1]]),
    "mask": np.array([True, False]),
    "wide": np.array([1e-300, 1.0]),
}


def merged(*replies: tuple[dict, float], base: dict | None = None) -> dict:
    average = CarriedAverage(BASE if base is None else base)
    for values, weight in replies:
        average.add(values, weight)
    result = average.result()
    for name, value in result.items():
        old = (BASE if base is None else base)[name]
        assert (value.dtype, value.shape) == (old.dtype, old.shape)
    return result


def test_floats_are_averaged_and_counters_are_rounded():
    result = merged(
        ({"mean": np.array([2, 0, 3], "f4"), "steps": np.array(10)}, 1),
        ({"mean": np.array([6, 0, 3], "f4"), "steps": np.array(15)}, 3),
    )
    np.testing.assert_array_equal(result["mean"], [5, 0, 3])
    assert result["steps"] == 14  # 13.75
    assert result["index"] is BASE["index"]


def test_nothing_added_or_nothing_changed_is_the_base():
    assert all(value is BASE[name] for name, value in merged().items())
    same = {name: value.copy() for name, value in BASE.items()}
    assert all(value is BASE[name] for name, value in merged((same, 3)).items())


def test_what_is_not_sent_counts_as_unchanged_there():
    result = merged(({}, 3), ({"mean": np.array([5, -2, 3], "f4")}, 1))
    np.testing.assert_array_equal(result["mean"], [2, -2, 3])


@given(
    values=st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=6),
    weights=st.lists(st.floats(1e-3, 1e12), min_size=6, max_size=6),
    start=st.floats(0, 2.0**127, width=32),
)
def test_a_mean_lies_within_what_was_sent(values, weights, start):
    base = {"running_var": np.array([start], "f4")}
    replies = [
        ({"running_var": np.array([v], "f4")}, w) for v, w in zip(values, weights, strict=False)
    ]
    result = merged(*replies, base=base)["running_var"]
    assert min(values) <= result[0] <= max(values)


def test_what_all_agree_on_stays_bit_for_bit():
    rng = np.random.default_rng(0)
    agreed = {
        "mean": rng.standard_normal(3).astype("f4"),
        "steps": np.array(2**62 + 1),
        "index": rng.integers(-(2**62), 2**62, (2, 2)),
        "mask": np.array([False, True]),
        "wide": rng.standard_normal(2) * 1e300,
    }
    result = merged(*[({k: v.copy() for k, v in agreed.items()}, w) for w in (1, 1 / 3, 7e11)])
    for name, value in agreed.items():
        assert result[name].tobytes() == value.tobytes()


def test_float64_does_not_overflow_on_the_way():
    big = np.array([1.7e308, -1.7e308])
    result = merged(({"wide": big}, 1e12), ({"wide": -big}, 1e12))["wide"]
    np.testing.assert_allclose(result, 0, atol=1e295)


@pytest.mark.parametrize("name", ["index", "mask"])
def test_indices_and_masks_go_with_the_majority(name):
    one, other = BASE[name][::-1].copy(), BASE[name].copy()
    assert merged(({name: one}, 2), ({name: other}, 1))[name].tolist() == one.tolist()
    assert merged(({name: other}, 1), ({name: one}, 2))[name].tolist() == one.tolist()
    assert merged(({}, 5), ({name: one}, 2))[name].tolist() == BASE[name].tolist()
    assert merged(({name: one}, 1), ({}, 1))[name].tolist() == BASE[name].tolist()


def test_who_disagrees_is_known():
    average = CarriedAverage(BASE)
    average.add({"index": BASE["index"] + 1, "steps": np.array(7)})
    assert average.disputed == []
    average.add({"index": BASE["index"] + 2, "steps": np.array(8)})
    assert average.disputed == ["index"]


def bounded(*changes: float, base: float = 0.0) -> tuple[float, list]:
    average = CarriedAverage({"x": np.full(4, base)}, most=4)
    for who, change in enumerate(changes):
        average.add({"x": np.full(4, base + change)}, who=who)
    return float(average.result()["x"][0]), average.shortened


@pytest.mark.parametrize("at", range(10))
@pytest.mark.parametrize("lie", [1e300, -1e9, 1.7e308])
def test_one_node_of_ten_moves_a_mean_by_little(at, lie):
    honest = [1, 2, 1, 1, 2, 1, 2, 1, 1]
    mean, shortened = bounded(*honest[:at], lie, *honest[at:])
    assert abs(mean - 12 / 10) <= 4 * 1 / 10 * 2
    assert shortened == [(at, "x")]


def test_of_what_hardly_any_node_changes_one_cannot_make_anything():
    mean, shortened = bounded(*[0] * 9, 1e9, base=1.0)
    assert mean == pytest.approx(1.1)
    assert shortened == [(9, "x")]
    assert bounded(*[0] * 9, 1e9) == (0, [(9, "x")])


def test_honest_differences_are_left_alone():
    assert bounded(1, 2, 3, 4, 5) == (3, [])
    assert bounded(1, 100)[0] == 50.5  # too few to say what is usual
    assert bounded(0, 1, 0, 2, 0, 0, 3, 0, 0)[0] == pytest.approx(6 / 9)


def test_memory_does_not_grow_with_the_nodes():
    average = CarriedAverage({"x": np.zeros(4)}, most=4)
    for node in range(1000):
        average.add({"x": np.full(4, 1.0 + node % 3)})
    (total,) = average._sums.values()
    assert not total._first
    assert len(total._distances) == 101


@pytest.mark.parametrize("weight", [0, -1, np.inf, np.nan])
def test_weights(weight):
    with pytest.raises(ParameterError, match="positive"):
        CarriedAverage(BASE).add({}, weight)


# --- the way between server and node ---------------------------------------------------------

STATE = {
    "w": np.ones((2, 2), "f4"),
    "bn.running_var": np.ones(2, "f4"),
    "steps": np.array(3),
    "head": np.zeros(2, "f4"),
    "mask": np.array([True, False, True]),
    "double": np.array([1 / 3]),
}
POLICY = TensorPolicy({"head": "left"})


def apart(**changes: np.ndarray) -> Apart:
    return Apart.of(STATE, POLICY).with_values(changes)


def test_a_state_is_taken_apart_and_put_together():
    found = apart()
    assert [p.name for p in found.places if p.left] == ["head"]
    assert list(found.carried) == ["bn.running_var", "steps", "mask", "double"]
    trained = found.trained(STATE)
    assert list(trained) == ["w"]
    whole = found.whole(trained)
    assert list(whole) == list(STATE)
    assert all(whole[name] is value for name, value in STATE.items())


def test_float64_that_is_trained_is_float32_in_between():
    state = {"coef_": np.array([[1 / 3]]), "n": np.array(1)}
    found = Apart.of(state, TensorPolicy())
    trained = found.trained(state)
    assert trained["coef_"].dtype == np.float32
    assert found.whole(trained)["coef_"].dtype == np.float64


def test_a_node_follows_bit_for_bit():
    server = Versions(apart())
    held = follow_apart(None, server.lacking(-1), server.version, server.digest)
    assert held.places == server.apart.places
    for version in (1, 2, 3):
        server.advance(apart(steps=np.array(version + 10)))
        assert server.version == version
        blob = server.lacking(version - 1)
        assert len(blob) < 100  # the counter alone
        held = follow_apart(held, blob, version, server.digest)
    assert held.digest == server.digest
    assert server.lacking(3) is None
    assert follow_apart(held, None, 3, server.digest) is held
    # of two versions at once, and of one that never was
    assert follow_apart(apart(), server.lacking(0), 3, server.digest).digest == server.digest
    assert len(server.lacking(9)) > 300


def test_an_unchanged_state_makes_no_version():
    server = Versions(apart())
    server.advance(Apart.of({n: v.copy() for n, v in STATE.items()}, POLICY))
    assert server.version == 0


def test_other_tensors_make_no_version_either():
    with pytest.raises(LayoutError, match="same tensors to be carried"):
        Versions(apart()).advance(Apart.of(STATE, TensorPolicy()))


def test_a_checkpoint_keeps_who_lacks_what():
    server = Versions(apart())
    server.advance(apart(steps=np.array(9)))
    again = Versions(apart(steps=np.array(9)))
    again.restore(json.loads(json.dumps(server.state())))
    assert again.version == 1
    assert again.lacking(0) == server.lacking(0)
    assert again.digest == server.digest


def test_a_node_that_lacks_something_says_so():
    server = Versions(apart())
    with pytest.raises(ResyncError, match="no carried tensors"):
        follow_apart(None, None, 0, server.digest)
    with pytest.raises(ResyncError, match="expected digest"):
        follow_apart(apart(steps=np.array(4)), None, 0, server.digest)
    with pytest.raises(ResyncError, match="MalformedError"):
        follow_apart(None, server.lacking(-1)[:-3], 0, server.digest)


def blob(**tensors: np.ndarray) -> bytes:
    """What a reply carries, tensors by their position in `STATE`."""
    return save({name[1:]: value for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("bytes_", "error", "said"),
    [
        (b"", MalformedError, "other bytes"),
        (b"\xff" * 40, MalformedError, "other bytes"),
        (blob(_1=np.ones(2, "f4"))[:-1], MalformedError, "other bytes"),
        (blob(_1=np.ones(3, "f4")), LayoutError, r"shape \(3,\) in tensor 'bn.running_var'"),
        (blob(_1=np.ones(2, "f8")), LayoutError, "found float64"),
        (blob(_0=np.ones((2, 2), "f4")), LayoutError, "no tensor at position 0"),
        (blob(_99=np.ones(1, "f4")), LayoutError, "no tensor at position 99"),
        (blob(_1=np.array([np.nan, 1], "f4")), NonFiniteError, "'bn.running_var'"),
        (blob(_5=np.array([np.inf])), NonFiniteError, "'double'"),
        (blob(_4=np.array([0, 1, 2], "u1").view(bool)), MalformedError, "Booleans"),
        (bytes(100_000), MalformedError, "at most"),
    ],
)
def test_nothing_of_a_reply_is_trusted(bytes_, error, said):
    with pytest.raises(error, match=said):
        apart().read(bytes_)


def test_a_variance_below_zero_counts_as_zero():
    found = apart().read(blob(_1=np.array([-3, 2], "f4"), _5=np.array([-3.0])))
    assert found["bn.running_var"].tolist() == [0, 2]
    assert found["double"].tolist() == [-3]


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_any_bytes_are_read_or_rejected(noise, at, byte):
    whole = bytearray(apart().to_bytes(["steps", "mask"]))
    whole[at % len(whole)] = byte
    for each in (noise, bytes(whole)):
        for read in (apart().read, lambda b: Apart.from_bytes(b, 1)):
            with contextlib.suppress(CompeftError):
                read(each)


@pytest.mark.parametrize(
    "plan",
    [
        "{}",
        "[1]",
        '{"places": 3, "wide": []}',
        '{"places": [[0, "a", false], [0, "b", false]], "wide": []}',
        '{"places": [[-1, "a", false]], "wide": []}',
        '{"places": [[true, "a", false]], "wide": []}',
        '{"places": [], "wide": []}',
        "[" * 5000,
        '{"places": [[' + "9" * 5000 + ', "a", false]], "wide": []}',
    ],
)
def test_a_plan_that_is_none(plan):
    with pytest.raises(MalformedError):
        Apart.from_bytes(save({"0": np.ones(1)}, {"compeft_fl carried 1": plan}), 0)


def test_places_that_do_not_fit_what_is_trained():
    found = Apart.of({"a": np.ones(1, "f4"), "n": np.array(1)}, TensorPolicy())
    with pytest.raises(LayoutError, match="beside 0 trained"):
        found.whole({})
    with pytest.raises(LayoutError, match="names of others"):
        found.whole({"n": np.ones(1, "f4")})


def test_what_is_carried_must_be_finite_and_what_is_left_need_not():
    state = {"w": np.ones(1, "f4"), "running_mean": np.array([np.inf], "f4")}
    with pytest.raises(NonFiniteError, match="running_mean"):
        Apart.of(state, TensorPolicy())
    assert Apart.of(state, TensorPolicy({"running_mean": "left"})).places
