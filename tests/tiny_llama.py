"""A random language model of a few thousand parameters, with a tokenizer of its own."""

from __future__ import annotations

from typing import Any

TEXT = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma "
    "tau upsilon phi chi psi omega. What is it? It is a tool, a library, a game or a font."
)


def make(seed: int = 0) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compeft_fl.app.embedded import train_debian_lm

    tokenizer = train_debian_lm.new_tokenizer([TEXT] * 4)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.5,  # so that choices differ
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer
