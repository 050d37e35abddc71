from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tiny
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from compeft_fl.errors import LayoutError, MalformedError
from compeft_fl.exchange.records import (
    array_records,
    find_update,
    metric_records,
    to_arrays,
    to_state,
    unflatten,
    update_record,
)
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.wire.messages import STYPE


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_states_survive_flowers_records(dtype):
    state = tiny.adapter(dtype)
    back = to_state(to_arrays(state))
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == dtype
        assert back[name].shape == value.shape
        np.testing.assert_array_equal(back[name], value)


def test_an_update_is_one_array_and_is_found():
    record = update_record(b"bytes", 7)
    assert [(array.stype, array.shape) for array in record.values()] == [(STYPE, (7,))]
    content = RecordDict({"other": tiny.arrays(), "model": record})
    assert find_update(content) == ("model", (b"bytes",))
    assert find_update(RecordDict({"other": tiny.arrays()})) is None


def test_two_updates_in_one_message_are_rejected():
    content = RecordDict({"a": update_record(b"1", 1), "b": update_record(b"2", 1)})
    with pytest.raises(MalformedError, match="one Update in a message, found 2"):
        find_update(content)


@pytest.mark.parametrize("data", [b"", b"no numpy", tiny.arrays()["head.bias"].data[:-3]])
def test_broken_numpy_bytes_are_a_layout_error(data):
    with pytest.raises(LayoutError, match="numpy's bytes in 'w'"):
        to_state(ArrayRecord({"w": Array("float32", (7,), "numpy.ndarray", data)}))


def test_a_foreign_stype_is_a_layout_error():
    with pytest.raises(LayoutError, match=r"found 'torch.pickle' in 'w'"):
        to_state(ArrayRecord({"w": Array("float32", (7,), "torch.pickle", b"")}))


def test_the_records_of_a_message_leave_no_cycle_behind():
    """Flower's own properties do: they kept all replies' arrays until the next collection."""
    content = RecordDict({"a": tiny.arrays(), "m": MetricRecord({"x": 1}), "b": tiny.arrays()})
    assert list(array_records(content)) == ["a", "b"]
    assert list(metric_records(content)) == ["m"]
    gc.collect()
    gc.disable()
    try:
        array = weakref.ref(content["a"]["scalar"])
        del content
        assert array() is None
    finally:
        gc.enable()


def test_unflatten_gives_each_tensor_its_data_type():
    layout = Layout([TensorSpec("h", (2,), "f16"), TensorSpec("b", (1, 2), "bf16")])
    state = unflatten(TaskVector(layout, np.array([1, 2, 3, 4], np.float32)))
    assert state["h"].dtype == np.float16
    assert state["b"].dtype == np.float32  # numpy, and so Flower, has no bfloat16
    np.testing.assert_array_equal(state["b"], [[3, 4]])


def test_flower_itself_takes_no_bfloat16():
    """Why the mod's documentation says to cast adapters to float32."""
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord({"w": torch.zeros(2, dtype=torch.bfloat16)})
