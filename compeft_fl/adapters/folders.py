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
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.adapters.weights import StoredTensors, require_torch
from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import AdapterError
from compeft_fl.printable import one_line, quoted
from compeft_fl.task_vector import Layout, TensorSpec, is_torch

__all__ = [
    "Adapter",
    "check_output",
    "load_folder",
    "load_peft_state",
    "open_folder",
    "parse_config",
    "peft_state",
    "require_torch",
    "save_folder",
]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLE_FILE: Final = "adapter_model.bin"
_MAX_CONFIG: Final = 4 << 20  # characters; AdaLoRA's rank patterns are the longest
_MAX_DEPTH: Final = 20
_METHOD: Final = re.compile(r"[A-Za-z0-9_]{1,40}")

_LORA_MATRICES: Final = ("lora_A.weight", "lora_B.weight")


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
        A prompt that is made of other parameters while these are trained (p-tuning, CPT, prefixes
        with a projection): PEFT's state is what is made, and cannot be put back.

    Examples
    --------
    A task vector from two states::

        initial = peft_state(model)
        train(model)
        tau = TaskVector.between(initial, peft_state(model))
    """
    from peft import get_peft_model_state_dict

    check_direct(model, adapter_name)
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


def check_direct(model: Any, adapter_name: str) -> None:
    """Raise AdapterError where an adapter's state is not what is trained."""
    config = model.peft_config[adapter_name]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    made = method in ("P_TUNING", "CPT") or getattr(config, "prefix_projection", False)
    if made and not config.inference_mode:
        raise AdapterError(
            f"expected a state that is trained, found {method}, whose state in PEFT is the prompt "
            "that is made of what is trained, and cannot be put back: train PROMPT_TUNING, or "
            "PREFIX_TUNING without prefix_projection"
        )
