"""Flower's ArrayRecords: to adapter states and Updates, and back; for the mod and the strategies.

An *ordinary* ArrayRecord has one Array per tensor, in numpy's format. An *Update's* ArrayRecord
has one Array of stype ``compeft_fl.wire.v1.Update``, whose data are the bytes of
`compeft_fl.encode`: one object on the wire instead of hundreds.

Flower converts through numpy, which has no bfloat16: an adapter in bfloat16 travels as float32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, MalformedError
from compeft_fl.task_vector import TaskVector
from compeft_fl.wire.messages import STYPE

__all__ = [
    "LOGGER",
    "array_records",
    "find_update",
    "metric_records",
    "to_arrays",
    "to_state",
    "unflatten",
    "update_record",
]

# A child of Flower's own logger: shown, formatted and sent where Flower's lines are.
LOGGER = logging.getLogger("flwr.compeft_fl")

_UPDATE_KEY = "update"
_NUMPY_STYPE = "numpy.ndarray"
_NUMPY_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.float32}


def to_state(arrays: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """An ordinary ArrayRecord as numpy arrays, in its order.

    Raises
    ------
    LayoutError
        An Array that is not numpy's, or whose bytes are broken; the message names it.
    """
    state = {}
    for name, array in arrays.items():
        if array.stype != _NUMPY_STYPE:
            raise LayoutError(
                f"expected an Array of stype {_NUMPY_STYPE!r}, found {array.stype!r} in {name!r}"
            )
        try:
            state[name] = array.numpy()
        except (ValueError, EOFError, OSError) as error:
            raise LayoutError(
                f"expected numpy's bytes in {name!r}, found others: {error}"
            ) from None
    return state


def to_arrays(state: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Numpy arrays as an ordinary ArrayRecord, in their order."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in state.items()})


def unflatten(adapter: TaskVector) -> dict[str, NDArray[Any]]:
    """A flat adapter as numpy arrays of its tensors' data types; bfloat16 becomes float32."""
    values: Any = adapter.values
    with np.errstate(over="ignore"):  # float16 makes inf of what it cannot hold
        return {
            tensor.name: values[where]
            .reshape(tensor.shape)
            .astype(_NUMPY_DTYPES[tensor.dtype], copy=False)
            for tensor, where in adapter.layout.slices()
        }


def update_record(blob: bytes, num_parameters: int) -> ArrayRecord:
    """An encoded Update as an ArrayRecord of one Array."""
    return ArrayRecord({_UPDATE_KEY: Array("float32", (num_parameters,), STYPE, blob)})


def find_update(content: RecordDict) -> tuple[str, bytes] | None:
    """The Update that a message carries: the key of its ArrayRecord, and its bytes.

    Raises
    ------
    MalformedError
        More than one.
    """
    found = [
        (key, array.data)
        for key, record in array_records(content).items()
        for array in record.values()
        if array.stype == STYPE
    ]
    if len(found) > 1:
        raise MalformedError(f"expected one Update in a message, found {len(found)}")
    return found[0] if found else None


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """A message's ArrayRecords.

    Flower's own ``content.array_records`` makes a cycle of references through the content, which
    keeps its arrays in memory until Python's garbage collector happens to come by.
    """
    return {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}


def metric_records(content: RecordDict) -> dict[str, MetricRecord]:
    """A message's MetricRecords; see `array_records`."""
    return {key: record for key, record in content.items() if isinstance(record, MetricRecord)}
