"""LoRA of a lower rank as a part of another: its settings, its tensors, and its folder.

The part's change of a weight is scaled as the whole's is, so that it is the whole's leading
summands: alpha goes down with the rank (with its square root under rsLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compeft_fl.adapters.folders import Adapter, load_folder, save_folder
from compeft_fl.errors import AdapterError
from compeft_fl.parts.ranks import check_rank, leading, rank_axis
from compeft_fl.task_vector import is_torch

__all__ = ["cut_folder", "lora_settings"]


def lora_settings(settings: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """LoRA's settings at a lower rank: ``r`` and ``lora_alpha``, and their patterns by module.

    Parameters
    ----------
    settings : mapping
        Of a LoraConfig, as keywords or as ``adapter_config.json`` has them.
    rank : int
        Modules of a lower rank keep theirs.

    Returns
    -------
    dict
        All settings, those of rank and scaling changed.

    Raises
    ------
    AdapterError
        No ``r``; patterns of other modules for ranks and for alphas, or another method's.
    ParameterError
        No rank.

    Examples
    --------
    >>> lora_settings({"r": 8, "lora_alpha": 16}, 2)
    {'r': 2, 'lora_alpha': 4}
    >>> lora_settings({"r": 8, "lora_alpha": 16, "use_rslora": True}, 2)["lora_alpha"]
    8
    """
    check_rank(rank)
    whole = settings.get("r")
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
        raise AdapterError(f"expected LoRA's rank under 'r', found {whole!r}")
    method = str(settings.get("peft_type", "LORA"))
    if method.rpartition(".")[2] != "LORA":
        raise AdapterError(f"expected LoRA, whose ranks are in order, found {method}")
    alpha = float(settings.get("lora_alpha", 8))  # PEFT's default
    ranks = dict(settings.get("rank_pattern") or {})
    alphas = dict(settings.get("alpha_pattern") or {})
    if ranks and alphas and set(ranks) != set(alphas):
        raise AdapterError("expected rank_pattern and alpha_pattern of the same modules")
    is_root = bool(settings.get("use_rslora"))
    found = {**settings, "r": min(rank, whole)}
    found["lora_alpha"] = _alpha(alpha, whole, rank, is_root)
    if ranks or alphas:
        modules = [*ranks] or [*alphas]
        its = {name: (ranks.get(name, whole), alphas.get(name, alpha)) for name in modules}
        found["rank_pattern"] = {name: min(rank, r) for name, (r, _) in its.items()}
        found["alpha_pattern"] = {n: _alpha(a, r, rank, is_root) for n, (r, a) in its.items()}
    return found


def _alpha(alpha: float, whole: int, rank: int, is_root: bool) -> int | float:
    """The alpha with which the scaling stays what it is."""
    share = min(rank, whole) / whole
    found = float(alpha) * (math.sqrt(share) if is_root else share)
    return round(found) if math.isclose(found, round(found)) else found


def cut_folder(folder: Path, rank: int, out: Path, *, force: bool = False) -> None:
    """Write the part of a LoRA folder that a node of a lower rank has, as a folder of its own.

    Parameters
    ----------
    folder, out : Path
    rank : int
    force : bool
        Also over a folder that is there.

    Raises
    ------
    AdapterError
        No LoRA folder, or ``out`` cannot be written.
    """
    adapter = load_folder(folder)
    cut = {}
    for name, tensor in adapter.state.items():
        axis = rank_axis(name, tuple(tensor.shape))
        part = tensor if axis is None else leading(tensor, axis, rank)
        cut[name] = part.contiguous() if is_torch(part) else np.ascontiguousarray(part)
    save_folder(Adapter(lora_settings(adapter.config, rank), cut), out, force=force)
