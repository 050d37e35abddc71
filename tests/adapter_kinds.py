"""One adapter of each of PEFT's methods, on a Llama small enough to build in a test."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

QV = ["q_proj", "v_proj"]
SQUARE = ["q_proj", "o_proj"]  # for methods that share matrices between modules of one shape

# What a method needs beside the modules that it is for.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 2, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 40},
    "FROD": {"progressbar": False},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HIRA": {"r": 4},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {"r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "PVERA": {"r": 4, "target_modules": SQUARE},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4, "target_modules": SQUARE},
    "ROAD": {"group_size": 16},
    "SHADOW": {"r": 4},
    "SHIRA": {"r": 4, "random_seed": 1},
    "TINYLORA": {"r": 2, "u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5, 7]},
    "UNILORA": {"r": 4, "theta_d_length": 16},
    "VBLORA": {"num_vectors": 16, "vector_length": 8, "target_modules": SQUARE},
    "VERA": {"r": 4, "target_modules": SQUARE},
    "WAVEFT": {"n_frequency": 40},
}
# They need a package, or adapters, that a test does not have.
NOT_BUILT = ("ADAMSS", "XLORA")


def methods() -> dict[str, Any]:
    """PEFT's configuration classes, by the names of their methods."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def config(method: str, **options: Any) -> Any:
    """A small configuration of a method."""
    kind = methods()[method]
    given = {"task_type": "CAUSAL_LM", **OPTIONS.get(method, {})}
    names = {field.name for field in dataclasses.fields(kind)}
    if "target_modules" in names and method not in ("ADAPTION_PROMPT", "TRAINABLE_TOKENS"):
        given.setdefault("target_modules", QV)
    return kind(**{**given, **options})


def base_model() -> Any:
    """A two-layer Llama with random weights, the same each time, as is what is drawn after it."""
    import torch

    model, drawn = _built()
    torch.set_rng_state(drawn)
    return copy.deepcopy(model)


@functools.cache
def _built() -> tuple[Any, Any]:
    """The model, and the state of torch's generator behind it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval(), torch.get_rng_state()
