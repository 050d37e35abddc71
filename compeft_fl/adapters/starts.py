"""What an adapter's task vector is relative to, and the task vector.

1 for IA3, 0 for LoRA and its relatives, or the values of a second folder: see
`compeft_fl.adapters.folders`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters import factors
from compeft_fl.adapters.carried import carried_names
from compeft_fl.adapters.folders import Adapter
from compeft_fl.adapters.weights import StoredTensors, float32_pieces
from compeft_fl.errors import AdapterError
from compeft_fl.task_vector import Layout, TaskVector

__all__ = ["Start", "resized_start", "shapes_of", "start_of", "tag_of", "task_vector"]

_ADALORA: Final = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # in which dimension the rank is


@dataclass(frozen=True)
class Start:
    """What a task vector is relative to.

    Attributes
    ----------
    values : ndarray of float32, shape (d,)
    tag : str
        What a file says of it: ``"0"``, ``"1"``, or ``"blake2b:"`` and the digest of the values.
    """

    values: NDArray[np.float32]
    tag: str


def start_of(
    config: Mapping[str, Any],
    layout: Layout,
    init: Adapter | None = None,
    carried: Collection[str] = (),
) -> Start:
    """What an adapter's task vector is relative to.

    Parameters
    ----------
    config : mapping
        The adapter's configuration.
    layout : Layout, d parameters
        Of the tensors in the task vector.
    init : Adapter, optional
        The adapter as it was before training. AdaLoRA's is cut to the ranks that training left.
    carried : collection of str
        Tensors beside those of the layout.

    Raises
    ------
    AdapterError
        No ``init``, and a tensor or a method whose start is not known.
    LayoutError
        An ``init`` with other tensors.
    """
    if init is not None:
        init = resized_start(config, init)
        tag, _ = tag_of(config, layout, init, carried)
        values = np.empty(layout.num_parameters, np.float32)
        digest = hashlib.blake2b(digest_size=16)
        for tensor, where in layout.slices():
            for start, piece in float32_pieces(init.state, tensor.name):
                values[where][start : start + piece.size] = piece
                digest.update(piece.astype("<f4", copy=False).tobytes())
        return Start(values, f"{tag}{digest.hexdigest()}")
    tag, value = tag_of(config, layout)
    # One number, seen d times: it takes no memory.
    return Start(np.broadcast_to(np.float32(value), layout.num_parameters), tag)


def tag_of(
    config: Mapping[str, Any],
    layout: Layout,
    init: Adapter | None = None,
    carried: Collection[str] = (),
) -> tuple[str, int]:
    """The tag of a start without its values, and the one value that it has where it has one.

    With ``init``: ``"blake2b:"``, to which the digest is still due. Raises as `start_of`.
    """
    if init is not None:
        shapes = shapes_of(init.state)
        layout.check({name: tensor for name, tensor in shapes.items() if name not in carried})
        return "blake2b:", 0
    method = str(config["peft_type"])
    value = factors.start_value(method)
    if value is None:
        raise AdapterError(
            f"expected a folder of {', '.join(factors.METHODS)}, whose start is known, found "
            f"{method}: give the adapter as it was before training with --init DIR"
        )
    for tensor in layout.tensors:
        if factors.factor_of(method, tensor.name) is None:
            raise AdapterError(
                f"tensor {tensor.name!r} starts from weights that the folder does not hold: "
                "give the adapter as it was before training with --init DIR"
            )
    return str(value), value


def shapes_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state's tensors, of which only shapes and data types are asked for."""
    return state.tensors if isinstance(state, StoredTensors) else state


def resized_start(config: Mapping[str, Any], init: Adapter) -> Adapter:
    """An AdaLoRA adapter before training, cut to the ranks that training has left.

    PEFT saves a pruned adapter without the ranks that it gave up, and says in ``rank_pattern``
    which are left. Any other adapter is returned as it is.

    Raises
    ------
    AdapterError
        A ``rank_pattern`` that is none of this adapter's.
    """
    pattern = config.get("rank_pattern")
    if str(config.get("peft_type")) != "ADALORA" or not isinstance(pattern, Mapping):
        return init
    shapes = shapes_of(init.state)
    state: dict[str, Any] = {}
    for name in shapes:
        tensor = init.state[name]
        module, _, factor = name.rpartition(".")
        kept = pattern.get(f"{module.removeprefix('base_model.model.')}.lora_E")
        if factor in _ADALORA and kept is not None:
            rank = tuple(tensor.shape)[_ADALORA[factor]]
            if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
                raise AdapterError("expected a rank_pattern of true and false, found another")
            if rank not in (len(kept), sum(kept)):
                raise AdapterError(
                    f"expected a start of rank {len(kept)} as in rank_pattern, found {rank} in "
                    f"tensor {name!r}"
                )
            if rank == len(kept):
                where = [index for index, one in enumerate(kept) if one]
                tensor = tensor[where] if _ADALORA[factor] == 0 else tensor[:, where]
        state[name] = tensor
    return Adapter(init.config, state)


def task_vector(adapter: Adapter, init: Adapter | None = None) -> tuple[TaskVector, Start]:
    """What fine-tuning changed in an adapter, and what that is relative to.

    Integers, statistics and float64 are no part of it: see `compeft_fl.adapters.carried`.

    Parameters
    ----------
    adapter : Adapter
    init : Adapter, optional
        The adapter as it was before training; without it see `start_of`.

    Raises
    ------
    AdapterError, LayoutError
        As `start_of`.
    """
    init = None if init is None else resized_start(adapter.config, init)
    carried = carried_names(adapter.state, None if init is None else init.state)
    finetuned = TaskVector.from_dict({n: t for n, t in adapter.state.items() if n not in carried})
    start = start_of(adapter.config, finetuned.layout, init, carried)
    return TaskVector(finetuned.layout, finetuned.values - start.values), start
