"""Adapter folders that peft itself writes, on a base model small enough to build in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LORA = {"r": 4, "target_modules": ["query", "value"]}


def base_model() -> Any:
    """A two-layer BERT with random weights, the same each time."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config).eval()


def save_pair(
    folder: Path, config: Any, *, base: Any = None, dtype: Any = None, seed: int = 1
) -> tuple[Path, Path]:
    """Save an adapter before and after its parameters were changed; return both folders."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(base_model() if base is None else base, config)
    if dtype is not None:
        model = model.to(dtype)
    untrained, trained = folder / "untrained", folder / "trained"
    model.save_pretrained(untrained)
    change(model, seed)
    model.save_pretrained(trained)
    return untrained, trained


def change(model: Any, seed: int) -> None:
    """Add noise to all that is trained, as training would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.02 * noise).to(parameter.dtype)


def outputs(model: Any) -> Any:
    """What a model makes of one fixed batch."""
    import torch

    with torch.no_grad():
        ids = torch.arange(24).reshape(2, 12) + 1
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
