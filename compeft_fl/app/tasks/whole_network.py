"""A network that is fine-tuned in itself, without an adapter: all of it, or its biases.

What travels are the tensors that are trained, under their own names; for the whole model also its
buffers, such as BatchNorm's statistics. Tied weights travel once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compeft_fl.errors import ConfigError

__all__ = ["METHODS", "is_whole", "load", "prepare", "save", "state"]

METHODS: Final = ("full", "bitfit")
_MARK: Final = "compeft_method"  # an attribute of the networks that `prepare` has seen
_BIASES: Final = "biases.safetensors"


def prepare(network: nn.Module, method: str) -> nn.Module:
    """Make a base model one that is fine-tuned by ``"full"`` or ``"bitfit"``.

    Raises
    ------
    ConfigError
        A model whose weights are not floats, as a quantised one's, or without biases.
    """
    for name, parameter in network.named_parameters():
        if method == "full" and not parameter.is_floating_point():
            raise ConfigError(f"peft-method full: expected floats to train, found {name} quantised")
        parameter.requires_grad = method == "full" or name.rpartition(".")[2] == "bias"
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"peft-method {method}: the model has nothing of that kind to train")
    setattr(network, _MARK, method)
    return network


def is_whole(network: nn.Module) -> bool:
    """Has `prepare` seen this network?"""
    return hasattr(network, _MARK)


def state(network: nn.Module) -> dict[str, Tensor]:
    """What is trained, where it is."""
    found: dict[str, Tensor] = {n: p for n, p in network.named_parameters() if p.requires_grad}
    if getattr(network, _MARK) == "full":
        kept = network.state_dict()
        found |= {name: buffer for name, buffer in network.named_buffers() if name in kept}
    return found


def load(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set what is trained; names and shapes fit."""
    own = state(network)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def save(network: nn.Module, folder: Path) -> None:
    """Write the whole model as ``save_pretrained`` does, or the biases alone."""
    if getattr(network, _MARK) == "full":
        model: Any = network
        model.save_pretrained(str(folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state(network).items()}
    save_file(tensors, folder / _BIASES)
