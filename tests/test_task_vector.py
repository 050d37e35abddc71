"""task_vector.py: layouts, differences, and applying them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compeft_fl import Layout, TaskVector, TensorSpec
from compeft_fl.errors import LayoutError, NonFiniteError


def torch_state(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "a.weight": torch.randn(5, generator=generator).to(dtype),
    }


def test_the_order_of_the_state_is_the_order_of_the_vector():
    state = torch_state()
    tau = TaskVector.from_dict(state)
    assert [tensor.name for tensor in tau.layout.tensors] == ["b.weight", "a.weight"]
    expected = torch.cat([state["b.weight"].reshape(-1), state["a.weight"]]).numpy()
    assert np.array_equal(tau.values, expected)
    assert tau.layout.offsets.tolist() == [0, 12, 17]


def test_between_takes_the_order_of_the_initial_state():
    initial, finetuned = torch_state(seed=0), torch_state(seed=1)
    shuffled = dict(reversed(finetuned.items()))
    tau = TaskVector.between(initial, shuffled)
    for name, part in tau.to_dict().items():
        assert np.array_equal(part, (finetuned[name] - initial[name]).numpy())


def test_apply_undoes_between_and_leaves_the_state_alone():
    initial, finetuned = torch_state(seed=0), torch_state(seed=1)
    before = {name: tensor.clone() for name, tensor in initial.items()}
    changed = TaskVector.between(initial, finetuned).apply(initial)
    for name in initial:
        torch.testing.assert_close(changed[name], finetuned[name])
        assert torch.equal(initial[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_apply_keeps_data_types_and_kinds(dtype):
    state = torch_state(dtype)
    changed = TaskVector.zeros(Layout.of(state)).apply(state)
    for name in state:
        assert changed[name].dtype == dtype
        assert torch.equal(changed[name], state[name])


def test_apply_keeps_numpy():
    state = {"w": np.ones((2, 2), np.float16)}
    changed = TaskVector(Layout.of(state), np.full(4, 0.5, np.float32)).apply(state)
    assert isinstance(changed["w"], np.ndarray)
    assert changed["w"].dtype == np.float16
    assert np.array_equal(changed["w"], np.full((2, 2), 1.5))


def test_apply_goes_by_name_and_not_by_order():
    state = torch_state()
    tau = TaskVector.from_dict(state)
    shuffled = dict(reversed(state.items()))
    for name, tensor in tau.apply(shuffled).items():
        assert torch.equal(tensor, 2 * state[name])


def test_a_difference_is_taken_in_float32():
    initial = {"w": torch.tensor([256.0], dtype=torch.bfloat16)}
    finetuned = {"w": torch.tensor([258.0], dtype=torch.bfloat16)}
    tau = TaskVector.between(initial, finetuned)
    assert tau.values.dtype == np.float32
    assert tau.values.tolist() == [2.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("a.weight"), "a.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"a.weight": torch.zeros(6)}), r"\(6,\)"),
    ],
)
def test_states_that_differ_are_named(change, words):
    initial, finetuned = torch_state(), torch_state()
    change(finetuned)
    with pytest.raises(LayoutError, match=words):
        TaskVector.between(initial, finetuned)
    with pytest.raises(LayoutError, match=words):
        TaskVector.zeros(Layout.of(initial)).apply(finetuned)


def test_data_types_that_adapters_do_not_have():
    with pytest.raises(LayoutError, match="int64 in tensor 'w'"):
        Layout.of({"w": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(LayoutError, match="f64"):
        Layout([TensorSpec("w", (2,), "f64")])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([TensorSpec("w", (2,)), TensorSpec("w", (3,))], "twice"),
        ([TensorSpec("w", (2, -1))], "-1"),
        ([TensorSpec("w", (0, 1 << 64))], r"2\^64"),
        ([TensorSpec("\ud800", (2,))], "UTF-8"),
        ([TensorSpec("w", (1 << 40, 1 << 40))], r"2\^62"),
    ],
)
def test_impossible_layouts(tensors, words):
    with pytest.raises(LayoutError, match=words):
        Layout(tensors)


def test_values_must_have_the_layout_s_length():
    with pytest.raises(LayoutError, match=r"\(3,\)"):
        TaskVector(Layout([TensorSpec("w", (2,))]), np.zeros(3, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_tensor(value):
    tau = TaskVector.from_dict({"a": np.zeros(3, "f4"), "b": np.array([0, value], "f4")})
    with pytest.raises(NonFiniteError, match=r"tensor 'b' \(parameter 4"):
        tau.check_finite()


def test_empty_and_scalar_tensors_have_a_place():
    layout = Layout([TensorSpec("none", (0, 3)), TensorSpec("scalar", ()), TensorSpec("w", (2,))])
    assert layout.sizes == (0, 1, 2)
    assert layout.tensor_at(0).name == "scalar"
    assert layout.tensor_at(2).name == "w"


def test_layouts_compare_by_content():
    one, two = (Layout([TensorSpec("w", (2,), dtype)]) for dtype in ("f32", "f16"))
    assert one != two
    assert one == Layout([TensorSpec("w", (2,))])
    assert len({one, two, Layout([TensorSpec("w", (2,))])}) == 2


def test_a_name_is_a_text():
    with pytest.raises(LayoutError, match="expected a tensor's name, found '1000'"):
        Layout([TensorSpec(1000, (3,))])
