"""PEFT adapters and task vectors: models in memory, and the folders that PEFT writes.

A folder is what ``PeftModel.save_pretrained`` writes: ``adapter_config.json`` and
``adapter_model.safetensors``. It holds the adapter after training only, so what fine-tuning changed
is taken against a start:

- 1 for IA3, whose vectors are 1 before training;
- 0 for LoRA and its relatives: the task vector is the adapter itself, LoRA's random A included;
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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.atomic import replacing
from compeft_fl.errors import AdapterError
from compeft_fl.printable import one_line, quoted
from compeft_fl.task_vector import Layout, TaskVector, is_torch

__all__ = [
    "Adapter",
    "Start",
    "check_output",
    "load_folder",
    "load_peft_state",
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

# Per PEFT method: what its tensors start from, and the parts of names by which they are known.
_STARTS: Final[Mapping[str, tuple[int, tuple[str, ...]]]] = {
    "LORA": (0, ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")),
    "ADALORA": (0, ("lora_A", "lora_B", "lora_E")),
    "LOHA": (0, ("hada_",)),
    "LOKR": (0, ("lokr_",)),
    "IA3": (1, ("ia3_l",)),
}
_DTYPES: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Adapter:
    """An adapter as it stands in a folder.

    Attributes
    ----------
    config : dict
        The content of ``adapter_config.json``.
    state : dict of str to array
        The tensors, sorted by name: numpy's, and torch's where they are bfloat16.
    """

    config: dict[str, Any]
    state: dict[str, Any]

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
        A file that is missing or broken, or a tensor that is not float32, float16 or bfloat16.
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
    state = _load_tensors(weights_file)
    check_names(state)
    return Adapter(config, state)


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


def _load_tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            names = sorted(tensors.keys())
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in names}
            for name, dtype in dtypes.items():
                if dtype not in _DTYPES:
                    raise AdapterError(
                        f"{file}: expected F32, F16 or BF16, found {dtype} in tensor {name!r}"
                    )
            state: dict[str, Any] = {
                name: tensors.get_tensor(name) for name in names if dtypes[name] != "BF16"
            }
        if len(state) < len(names):
            require_torch(f"{file}: bfloat16 tensors")
            with safe_open(file, framework="pt") as tensors:
                state |= {n: tensors.get_tensor(n) for n in names if dtypes[n] == "BF16"}
    except (SafetensorError, ValueError, OverflowError) as error:  # a shape of 100 dimensions, say
        raise AdapterError(
            f"{file}: expected safetensors, found other bytes: {one_line(error, 200)}"
        ) from None
    if not any(
        tensor.size if isinstance(tensor, np.ndarray) else tensor.numel()
        for tensor in state.values()
    ):
        raise AdapterError(f"{file}: expected an adapter's tensors, found no parameters")
    return {name: state[name] for name in names}


def require_torch(what: str) -> None:
    """Raise AdapterError where torch is not installed; ``what`` needs it."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise AdapterError(
            f"{what} need torch, which is not installed: pip install torch"
        ) from None


# --- task vectors -----------------------------------------------------------------------------


def start_of(config: Mapping[str, Any], layout: Layout, init: Adapter | None = None) -> Start:
    """What an adapter's task vector is relative to.

    Parameters
    ----------
    config : mapping
        The adapter's configuration.
    layout : Layout, d parameters
    init : Adapter, optional
        The adapter as it was before training.

    Raises
    ------
    AdapterError
        No ``init``, and a tensor or a method whose start is not known.
    LayoutError
        An ``init`` with other tensors.
    """
    if init is not None:
        layout.check(init.state)
        ordered = {tensor.name: init.state[tensor.name] for tensor in layout.tensors}
        values: Any = TaskVector.from_dict(ordered).values
        digest = hashlib.blake2b(values.astype("<f4").tobytes(), digest_size=16)
        return Start(values, f"blake2b:{digest.hexdigest()}")
    method = str(config["peft_type"])
    if method not in _STARTS:
        raise AdapterError(
            f"expected a folder of {', '.join(_STARTS)}, whose start is known, found {method}: "
            "give the adapter as it was before training with --init DIR"
        )
    value, marks = _STARTS[method]
    for tensor in layout.tensors:
        if not any(part.startswith(marks) for part in tensor.name.split(".")):
            raise AdapterError(
                f"tensor {tensor.name!r} starts from weights that the folder does not hold: "
                "give the adapter as it was before training with --init DIR"
            )
    return Start(np.full(layout.num_parameters, value, np.float32), str(value))


def task_vector(adapter: Adapter, init: Adapter | None = None) -> tuple[TaskVector, Start]:
    """What fine-tuning changed in an adapter, and what that is relative to.

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
    finetuned = TaskVector.from_dict(adapter.state)
    start = start_of(adapter.config, finetuned.layout, init)
    return TaskVector(finetuned.layout, finetuned.values - start.values), start


# --- models in memory -------------------------------------------------------------------------


def peft_state(model: Any, adapter_name: str = "default") -> dict[str, Any]:
    """A copy of the adapter's tensors of a PEFT model, in the model's own order.

    Parameters
    ----------
    model : peft.PeftModel
    adapter_name : str

    Examples
    --------
    A task vector from two states::

        initial = peft_state(model)
        train(model)
        tau = TaskVector.between(initial, peft_state(model))
    """
    from peft import get_peft_model_state_dict

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
    """
    import torch
    from peft import set_peft_model_state_dict

    Layout.of(peft_state(model, adapter_name)).check(state)
    tensors = {name: torch.as_tensor(tensor) for name, tensor in state.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
