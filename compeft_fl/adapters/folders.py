"""PEFT adapters and task vectors: models in memory, and the folders that PEFT writes.

A folder is what ``PeftModel.save_pretrained`` writes: ``adapter_config.json`` and
``adapter_model.safetensors``. It holds the adapter after training only, so what fine-tuning changed
is taken against a start:

- 1 for IA3, whose vectors are 1 before training;
- 0 for LoRA and its relatives: the task vector is the adapter itself, LoRA's random A included
  (`compeft_fl.adapters.factors` says what that means for merging and compressing);
- a second folder, the adapter as it was before training. It is the better choice wherever there is
  one, and the only one for tensors that start from weights of the base model (``modules_to_save``,
  biases, DoRA's magnitudes): a folder alone does not hold those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters import factors
from compeft_fl.adapters.carried import carried_names
from compeft_fl.adapters.weights import StoredTensors, float32_pieces, require_torch
from compeft_fl.atomic import replacing
from compeft_fl.errors import AdapterError
from compeft_fl.printable import one_line, quoted
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec, is_torch

__all__ = [
    "Adapter",
    "Start",
    "check_output",
    "load_folder",
    "load_peft_state",
    "open_folder",
    "parse_config",
    "peft_state",
    "require_torch",
    "save_folder",
    "start_of",
    "task_vector",
]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLE_FILE: Final = "adapter_model.bin"
_MAX_CONFIG: Final = 4 << 20  # characters; AdaLoRA's rank patterns are the longest
_MAX_DEPTH: Final = 20
_METHOD: Final = re.compile(r"[A-Za-z0-9_]{1,40}")

_LORA_MATRICES: Final = ("lora_A.weight", "lora_B.weight")
_ADALORA: Final = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # in which dimension the rank is


@dataclass(frozen=True)
class Adapter:
    """An adapter as it stands in a folder.

    Attributes
    ----------
    config : dict
        The content of ``adapter_config.json``.
    state : mapping of str to array
        The tensors, sorted by name: numpy's, and torch's where they are bfloat16. `open_folder`
        reads each when it is asked for.
    """

    config: dict[str, Any]
    state: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The PEFT method in capitals, as ``adapter_config.json`` has it: ``"LORA"``, ``"IA3"``."""
        return str(self.config["peft_type"])


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


# --- folders ----------------------------------------------------------------------------------


def load_folder(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter folder.

    Only ``adapter_model.safetensors`` is read: ``adapter_model.bin`` is a pickle, and loading one
    can run any code that its author put there.

    Raises
    ------
    AdapterError
        A file that is missing or broken, a data type that numpy and torch don't share, or tensors
        without their values, as DeepSpeed's ZeRO-3 leaves them on each of its processes.
    """
    adapter = open_folder(path)
    return Adapter(adapter.config, dict(adapter.state))


def open_folder(path: str | os.PathLike[str]) -> Adapter:
    """`load_folder`, but a tensor is read only when it is asked for.

    Raises
    ------
    AdapterError
        As `load_folder`.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing of that name"
        raise AdapterError(f"{folder}: expected an adapter folder, found {found}")
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not config_file.is_file():
        raise AdapterError(f"{folder}: expected {CONFIG_FILE} in an adapter folder, found none")
    if not weights_file.is_file():
        found = "none"
        if (folder / PICKLE_FILE).is_file():
            found = f"{PICKLE_FILE}, which is not safe to load: save with safe_serialization=True"
        raise AdapterError(f"{folder}: expected {WEIGHTS_FILE}, found {found}")
    try:
        config = parse_config(config_file.read_text(encoding="utf-8"))
    except (AdapterError, UnicodeDecodeError) as error:
        raise AdapterError(f"{config_file}: {error}") from None
    tensors = StoredTensors(weights_file)
    check_names(tensors)
    _check_gathered(weights_file, tensors)
    return Adapter(config, tensors)


def _check_gathered(file: Path, tensors: StoredTensors) -> None:
    """Raise AdapterError where tensors are without their values, or hold a process's part only."""
    for name, tensor in tensors.tensors.items():
        if tensor.shape == (0,) or (len(tensor.shape) == 1 and name.endswith(_LORA_MATRICES)):
            raise AdapterError(
                f"{file}: expected all values of {name!r}, found shape {tensor.shape}: gather the "
                "parameters that ZeRO-3 or FSDP has spread before save_pretrained "
                "(stage3_gather_16bit_weights_on_model_save)"
            )
    if not any(tensor.size for tensor in tensors.tensors.values()):
        raise AdapterError(f"{file}: expected an adapter's tensors, found no parameters")


def save_folder(adapter: Adapter, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write an adapter folder that ``PeftModel.from_pretrained`` reads.

    Parameters
    ----------
    force : bool
        Also into a folder that holds something; files of the same names are replaced, others stay.

    Raises
    ------
    AdapterError
        The folder is there and not empty, or cannot be written.
    """
    folder = Path(path)
    check_output(folder, force=force)
    text = json.dumps(adapter.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    content = text.encode()
    made = _make_folder(folder)
    try:  # both are there, or what was there before
        with (
            replacing(folder / CONFIG_FILE) as config_file,
            replacing(folder / WEIGHTS_FILE) as weights_file,
        ):
            config_file.write_bytes(content)
            _save_tensors(adapter.state, weights_file)
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder with its parents; those that were not there, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _save_tensors(state: Mapping[str, Any], file: Path) -> None:
    from safetensors import SafetensorError

    metadata = {"format": "pt"}  # transformers and peft ask for it
    try:
        if any(is_torch(tensor) for tensor in state.values()):
            import torch
            from safetensors.torch import save_file

            tensors = {name: torch.as_tensor(tensor) for name, tensor in state.items()}
            save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata)
        else:
            from safetensors.numpy import save_file as save_arrays

            arrays = {name: np.asarray(tensor, order="C") for name, tensor in state.items()}
            save_arrays(arrays, file, metadata)
    except SafetensorError as error:  # a full disk, say
        raise AdapterError(f"{file.parent}: cannot be written: {error}") from None


def check_output(folder: Path, *, force: bool = False) -> None:
    """Raise AdapterError where `save_folder` would not write, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder}: expected a folder to write to, found a file")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise AdapterError(f"{folder}: expected an empty folder or none, found files: use --force")


def parse_config(text: str) -> dict[str, Any]:
    """The content of an ``adapter_config.json``.

    Raises
    ------
    AdapterError
        Other text, or what can be read but not written again: numbers of thousands of digits,
        halves of characters, nesting without an end.
    """
    if len(text) > _MAX_CONFIG:
        raise AdapterError(
            f"expected at most {_MAX_CONFIG} characters in {CONFIG_FILE}, found {len(text)}"
        )
    try:
        config = json.loads(text)
        _check_depth(config)
        json.dumps(config, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # not JSON; too many digits; a lone surrogate
        raise AdapterError(
            f"expected JSON in {CONFIG_FILE}, found other text: {one_line(error, 200)}"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f'expected an object with a "peft_type" in {CONFIG_FILE}, found none')
    if not _METHOD.fullmatch(config["peft_type"]):
        raise AdapterError(
            f'expected a "peft_type" such as LORA in {CONFIG_FILE}, found '
            f"{quoted(config['peft_type'])}"
        )
    return config


def check_names(names: Iterable[str]) -> None:
    """Raise AdapterError for a tensor's name that does not print: no parameter of a model has one.

    Libraries cut a name off at a NUL, and terminals act on other control characters.
    """
    for name in names:
        if not name.isprintable():
            raise AdapterError(f"expected tensors' names that print, found {quoted(name)}")


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} levels")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, depth + 1)


# --- task vectors -----------------------------------------------------------------------------


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
    return Start(np.full(layout.num_parameters, value, np.float32), tag)


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


# --- models in memory -------------------------------------------------------------------------


def peft_state(model: Any, adapter_name: str = "default") -> dict[str, Any]:
    """A copy of the adapter's tensors of a PEFT model, in the model's own order.

    Parameters
    ----------
    model : peft.PeftModel
    adapter_name : str

    Raises
    ------
    AdapterError
        A prompt that a network makes while it is trained (p-tuning, prefixes with a projection):
        PEFT's state is what the network makes, and cannot be put back into it.

    Examples
    --------
    A task vector from two states::

        initial = peft_state(model)
        train(model)
        tau = TaskVector.between(initial, peft_state(model))
    """
    from peft import get_peft_model_state_dict

    _check_direct(model, adapter_name)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def load_peft_state(model: Any, state: Mapping[str, Any], adapter_name: str = "default") -> None:
    """Put a state into the adapter of a PEFT model.

    Parameters
    ----------
    model : peft.PeftModel
    state : mapping of str to torch tensor or ndarray
    adapter_name : str

    Raises
    ------
    LayoutError
        Names or shapes other than the adapter's. (PEFT itself would take what fits in silence.)
    AdapterError
        As `peft_state`.
    """
    import torch
    from peft import set_peft_model_state_dict

    own = peft_state(model, adapter_name)
    Layout(TensorSpec(name, tuple(tensor.shape)) for name, tensor in own.items()).check(state)
    tensors = {name: torch.as_tensor(tensor) for name, tensor in state.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)


def _check_direct(model: Any, adapter_name: str) -> None:
    """Raise AdapterError where an adapter's state is not what is trained."""
    config = model.peft_config[adapter_name]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    made = method == "P_TUNING" or getattr(config, "prefix_projection", False)
    if made and not config.inference_mode:
        raise AdapterError(
            f"expected a state that is trained, found {method}, whose state in PEFT is the prompt "
            "that a network makes and cannot be put back into the network: train PROMPT_TUNING, or "
            "PREFIX_TUNING without prefix_projection"
        )
