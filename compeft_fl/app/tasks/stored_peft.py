"""PEFT adapters of a stranger on a model: their size is known before memory is taken for them.

An ``adapter_config.json`` of a few bytes can ask for any rank. The adapter is first built without
memory, on torch's meta device, and compared with the tensors that the folder holds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from compeft_fl.adapters import Adapter
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line, quoted

__all__ = ["load"]

_ALWAYS: Final = 64 << 20  # bytes beside the stored tensors, as VeRA's random projections
_PER_BYTE: Final = 8  # and so many for each byte that is stored


def load(
    base: nn.Module, adapter: Adapter, folder: Path, empty: nn.Module | None = None
) -> nn.Module:
    """Return the PEFT model of an adapter on its base model.

    Parameters
    ----------
    base : nn.Module
    adapter : Adapter
        The folder's content, read without pickles.
    folder : Path
    empty : nn.Module, optional
        The base without values and not quantised, on torch's meta device; default: made of `base`,
        which must not be quantised then.

    Raises
    ------
    ConfigError
        A method that PEFT does not have, settings that it does not take, or tensors other than the
        folder's.
    """
    from peft import PeftModel

    try:
        _check_shapes(_meta(base) if empty is None else empty, adapter, folder)
        model: nn.Module = PeftModel.from_pretrained(
            base, str(folder), config=_config(adapter, folder), use_safetensors=True
        )
        return model
    except ConfigError:
        raise
    except Exception as error:  # whatever a stranger's settings make PEFT and torch raise
        raise ConfigError(
            f"{folder}: the adapter does not fit the model: {type(error).__name__}: "
            f"{one_line(error, 300)}"
        ) from error


def _config(adapter: Adapter, folder: Path) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    if adapter.method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConfigError(f"{folder}: PEFT has no method {quoted(adapter.method)}")
    if adapter.config.get("megatron_config"):
        raise ConfigError(f"{folder}: megatron_config would import a module that the folder names")
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    return config


def _check_shapes(empty: Any, adapter: Adapter, folder: Path) -> None:
    """Build the adapter on a model without values, and compare it with the folder."""
    from peft import get_peft_model, get_peft_model_state_dict

    known = {id(tensor) for tensor in (*empty.parameters(), *empty.buffers())}
    model: Any = get_peft_model(empty, _config(adapter, folder), low_cpu_mem_usage=True)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in adapter.state.items()}
    different = sorted(set(shapes.items()) ^ set(found.items()))
    if different:
        name, shape = different[0]
        where = "the folder" if different[0] in found.items() else "the adapter that it describes"
        raise ConfigError(f"{folder}: tensor {quoted(name)} {shape} is in {where} alone")
    stored = sum(_bytes(tensor) for tensor in expected.values())
    new = (tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in known)
    needed = sum(_bytes(tensor) for tensor in new)
    if needed > _ALWAYS + _PER_BYTE * stored:
        raise ConfigError(
            f"{folder}: expected an adapter of at most {_ALWAYS + _PER_BYTE * stored} bytes for "
            f"{stored} stored ones, found settings that take {needed}"
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _meta(base: nn.Module) -> nn.Module:
    """A copy of a model without its values."""
    memo: dict[int, Any] = {}
    for tensor in (*base.parameters(), *base.buffers()):
        moved = tensor.detach().to("meta")
        memo[id(tensor)] = (
            nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        )
    copied: nn.Module = copy.deepcopy(base, memo)
    return copied
