from __future__ import annotations

import numpy as np
import pytest

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.parts.tensor_policy import CARRIED, LEFT, TRAINED, TensorPolicy


def zeros(dtype: str, *shape: int) -> np.ndarray:
    return np.zeros(shape, dtype)


def kinds(policy: TensorPolicy | None = None, **state: np.ndarray) -> dict[str, str]:
    return (policy or TensorPolicy()).kinds({k.replace("__", "."): v for k, v in state.items()})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats_of_training_are_trained(dtype):
    assert kinds(w=zeros(dtype, 3)) == {"w": TRAINED}


@pytest.mark.parametrize(
    "name",
    [
        "bn.running_mean",
        "bn.running_var",
        "running_var",
        "m.moving_variance",
        "batch_stats/bn/mean",
    ],
)
def test_statistics_are_carried_by_name(name):
    assert TensorPolicy().kinds({"w": zeros("f4", 2), name: zeros("f4", 2)})[name] == CARRIED


@pytest.mark.parametrize("name", ["outrunning_mean", "long_running.weight", "mean", "var.weight"])
def test_other_names_are_not_taken_for_statistics(name):
    assert TensorPolicy().kinds({name: zeros("f4", 2)}) == {name: TRAINED}


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "uint64"])
def test_integers_and_booleans_are_carried(dtype):
    assert kinds(w=zeros("f4", 2), n=zeros(dtype, 2))["n"] == CARRIED


def test_float64_is_carried_beside_what_is_trained_and_trained_where_it_is_all():
    assert kinds(w=zeros("f4", 2), x=zeros("f8", 2)) == {"w": TRAINED, "x": CARRIED}
    assert kinds(coef_=zeros("f8", 2), intercept_=zeros("f8", 1)) == {
        "coef_": TRAINED,
        "intercept_": TRAINED,
    }
    found = kinds(coef_=zeros("f8", 2), bn__running_var=zeros("f4", 2), n=zeros("i8"))
    assert found == {"coef_": TRAINED, "bn.running_var": CARRIED, "n": CARRIED}


def test_batch_norm_without_names_is_known_by_its_counter():
    """Flower's tutorials send ``list(state_dict().values())``."""
    conv, vector, counter = zeros("f4", 3, 3), zeros("f4", 3), zeros("i8")
    state = [conv, vector, vector, vector, vector, counter, zeros("f4", 10, 3), zeros("f4", 10)]
    found = TensorPolicy().kinds({str(index): value for index, value in enumerate(state)})
    assert [name for name, kind in found.items() if kind == CARRIED] == ["3", "4", "5"]


def test_the_first_rule_that_matches_holds():
    policy = TensorPolicy({"head.bias": "trained", "head.*": "left", "*": "carried"})
    found = policy.kinds({n: zeros("f4", 1) for n in ("head.bias", "head.w", "body")})
    assert found == {"head.bias": TRAINED, "head.w": LEFT, "body": CARRIED}
    assert policy.rule("head.w") == LEFT
    assert TensorPolicy().rule("head.w") is None


def test_a_rule_can_train_a_statistic_and_float64():
    policy = TensorPolicy({"*": "trained"})
    assert set(kinds(policy, running_mean=zeros("f4", 1), x=zeros("f8", 1)).values()) == {TRAINED}


def test_what_is_no_float_cannot_be_trained():
    with pytest.raises(LayoutError, match="expected floats to train, found int64 in tensor 'n'"):
        kinds(TensorPolicy({"*": "trained"}), n=zeros("i8", 2))


@pytest.mark.parametrize("dtype", ["complex64", "U3", "object"])
def test_a_data_type_that_cannot_be_sent_is_named(dtype):
    with pytest.raises(LayoutError, match=r"found \S+ in tensor 'x'"):
        kinds(x=zeros(dtype, 2))


@pytest.mark.parametrize("rules", [{"*": "frozen"}, {1: "left"}, "left", ["left"]])
def test_rules_that_are_none(rules):
    with pytest.raises(ParameterError, match="expected"):
        TensorPolicy(rules)


def test_a_policy_is_what_a_person_may_give_for_one():
    policy = TensorPolicy({"a": "left"})
    assert TensorPolicy.of(policy) is policy
    assert TensorPolicy.of({"a": "left"}).rules == policy.rules
    assert TensorPolicy.of(None).rules == {}


def test_torch_tensors_too():
    torch = pytest.importorskip("torch")
    state = {"w": torch.zeros(2, dtype=torch.bfloat16), "n": torch.zeros(2, dtype=torch.int64)}
    assert TensorPolicy().kinds(state) == {"w": TRAINED, "n": CARRIED}
