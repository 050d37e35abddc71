"""A PEFT model's adapter: its tensors out and in, and its folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compeft_fl.app.tasks import whole_network
from compeft_fl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# PEFT imports it where it is there, and it says then that it lacks a package of kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["adapter_state", "load_adapter_state", "quiet", "save_network", "tensors_of"]


def adapter_state(network: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Return the adapter's tensors on the CPU, under PEFT's names, in alphabetical order.

    ``copy=False``: those that are there already are the network's own memory.
    """
    state = _own(network)
    found = {name: state[name].detach().cpu() for name in sorted(state)}
    return {name: tensor.clone() for name, tensor in found.items()} if copy else found


def tensors_of(state: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Return arrays as tensors of the same memory, to be read only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(value) for name, value in state.items()}


def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the adapter's tensors.

    Raises
    ------
    ConfigError
        Where names or shapes are not this adapter's: another model or method elsewhere.
    """
    own = {name: tuple(tensor.shape) for name, tensor in _own(network).items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != given:
        different = sorted(set(own.items()) ^ set(given.items()))
        raise ConfigError(
            f"these are not the tensors of this adapter ({len(own)} tensors here, {len(given)} "
            f"given): {different[0][0]} {different[0][1]} is on one side only; "
            "model, head and peft keys must be the same everywhere"
        )
    if whole_network.is_whole(network):
        whole_network.load(network, state)
    else:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(network, dict(state))


def save_network(network: nn.Module, folder: Path) -> None:
    """Write a PEFT adapter folder; of a network without an adapter, what was trained."""
    model: Any = network
    if whole_network.is_whole(network):
        with quiet():
            whole_network.save(network, folder)
        return
    with quiet():
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _own(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors where they are, or what is trained where there is no adapter."""
    if whole_network.is_whole(network):
        return whole_network.state(network)
    from peft import PeftModel, get_peft_model_state_dict

    assert isinstance(network, PeftModel)
    state: dict[str, Tensor] = get_peft_model_state_dict(network, save_embedding_layers=False)
    return state


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and peft's progress bars and advice out of the log."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers)(\..*)?")
            yield
    finally:
        transformers_logging.set_verbosity(level)
