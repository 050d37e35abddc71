"""Tensors that a file carries as they are: indices, counters, statistics, float64.

A sign and a scale make no sense of them. They are kept bit for bit, as the bytes of a safetensors
file in front of the update (`compeft_fl.adapters.files`). Which they are, `TensorPolicy` says, as
in a federation.

Floats whose places are indices, such as SHiRA's, can be compared with a start only where the start
has the same indices. Where it has others, they are carried as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from compeft_fl.adapters.weights import StoredTensors, require_torch
from compeft_fl.errors import AdapterError, MalformedError
from compeft_fl.merging.carried import CarriedAverage
from compeft_fl.parts.tensor_policy import TRAINED, TensorPolicy, is_statistic
from compeft_fl.task_vector import is_torch

__all__ = ["carried_names", "digest", "from_bytes", "merge_carried", "to_bytes"]

_TYPES: Final = ("float32", "float16", "bfloat16")  # a layout's


def carried_names(state: Mapping[str, Any], init: Mapping[str, Any] | None = None) -> set[str]:
    """Which of an adapter's tensors are carried, and not part of its task vector.

    Parameters
    ----------
    state : mapping
        The adapter's tensors.
    init : mapping, optional
        The start's.

    Raises
    ------
    AdapterError
        A start with other indices, where it is not seen which tensors they are for.
    """
    tensors: Any = state.tensors if isinstance(state, StoredTensors) else state
    kinds = TensorPolicy().kinds(tensors)
    carried = {
        name
        for name, kind in kinds.items()
        if kind != TRAINED or _dtype(tensors[name]) not in _TYPES
    }
    if init is None:
        return carried
    for name in sorted(carried):
        if not _is_index(name, tensors[name]) or name not in init or _same(state[name], init[name]):
            continue
        module = name.rpartition(".")[0]
        bound = {other for other in kinds if other.rpartition(".")[0] == module} - {name}
        if not bound:
            raise AdapterError(
                f"expected a start with the adapter's own {name!r}, found other indices in it"
            )
        carried |= bound
    return carried


def _is_index(name: str, tensor: Any) -> bool:
    """Indices and masks, rather than counters and statistics."""
    dtype = _dtype(tensor)
    return (
        not dtype.startswith(("float", "bfloat")) and not is_statistic(name) and _size(tensor) != 1
    )


def _size(tensor: Any) -> int:
    return int(np.prod(tuple(tensor.shape), dtype=object))


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def _same(one: Any, other: Any) -> bool:
    return (
        _dtype(one) == _dtype(other)
        and tuple(one.shape) == tuple(other.shape)
        and bool((one == other).all())
    )


def to_bytes(tensors: Mapping[str, Any]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    ordered = {name: tensors[name] for name in sorted(tensors)}
    if any(is_torch(tensor) for tensor in ordered.values()):
        import torch
        from safetensors.torch import save

        return bytes(save({n: torch.as_tensor(t).contiguous() for n, t in ordered.items()}))
    from safetensors.numpy import save as save_arrays

    return bytes(save_arrays({n: np.asarray(t, order="C") for n, t in ordered.items()}))


def from_bytes(data: bytes) -> dict[str, Any]:
    """The tensors of `to_bytes`.

    Raises
    ------
    MalformedError
        Other bytes.
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries: Any = deserialize(data)  # type: ignore[no-untyped-call]
        if any(entry["dtype"] == "BF16" for _, entry in entries):
            require_torch("bfloat16 tensors")
            from safetensors.torch import load

            return dict(sorted(load(data).items()))
        from safetensors.numpy import load as load_arrays

        return dict(sorted(load_arrays(data).items()))
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise MalformedError(f"expected carried tensors, found other bytes: {error}") from None


def digest(data: bytes) -> str:
    """What an update's metadata say of the tensors that stand before it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def merge_carried(carried: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The carried tensors of merged adapters: floats and counters averaged, indices as they are.

    Parameters
    ----------
    carried : sequence of mappings
        One per adapter; not empty.
    weights : sequence of float
        Their sizes count, not their signs: a statistic is never subtracted.

    Raises
    ------
    AdapterError
        Other tensors, or indices that differ: their adapters' values are for other places.
    """
    first = carried[0]
    for other in carried[1:]:
        if set(other) != set(first):
            name = min(set(other) ^ set(first))
            raise AdapterError(f"differ in their tensors: only one carries {name!r}")
        for name, tensor in first.items():
            if tuple(other[name].shape) != tuple(tensor.shape):
                raise AdapterError(
                    f"differ in the shape of {name!r}: {tuple(tensor.shape)} and "
                    f"{tuple(other[name].shape)}"
                )
            if _is_index(name, tensor) and not _same(tensor, other[name]):
                raise AdapterError(f"differ in {name!r}: their values are for other places")
    if not first:
        return {}
    average = CarriedAverage({name: _on_host(tensor) for name, tensor in first.items()})
    for values, weight in zip(carried, weights, strict=True):
        average.add({name: _on_host(tensor) for name, tensor in values.items()}, abs(weight))
    merged: dict[str, Any] = average.result()
    return {name: _as(first[name], values) for name, values in merged.items()}


def _on_host(tensor: Any) -> Any:
    return tensor.float().numpy() if is_torch(tensor) else tensor


def _as(like: Any, values: Any) -> Any:
    if not is_torch(like):
        return values
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(like.dtype)
