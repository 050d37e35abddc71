"""Where a run computes, and in which data type."""

from __future__ import annotations

import torch

from compeft_fl.app.config import AppConfig
from compeft_fl.errors import ConfigError

__all__ = ["choose_device", "choose_dtype"]


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA, then MPS, then the CPU.

    Raises
    ------
    ConfigError
        Where the machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f'device: "{name}" is not on this machine: {reason}') from None


def choose_dtype(config: AppConfig) -> torch.dtype:
    """Return the base model's data type: the key's, or by the device."""
    if config.dtype == "auto":
        on_cuda = choose_device(config.device).type == "cuda"
        return torch.bfloat16 if on_cuda else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
