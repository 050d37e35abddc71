"""PEFT models for bench experts: real adapters' tensors on base models without memory.

A base of 7 billion parameters does not fit a small machine, and no weight of it is needed: it is
built on torch's meta device, and the adapter's tensors are the only ones that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.adapters import StoredUpdate, write_update
from compeft_fl.bench import layouts
from compeft_fl.compeft import compress
from compeft_fl.errors import ParameterError
from compeft_fl.task_vector import Layout, TaskVector

__all__ = ["DENSITY", "SIZES", "Bench"]

DENSITY: Final = 0.05
_DTYPES: Final = {"float32": "f32", "bfloat16": "bf16"}
_ALL: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _minilm() -> Any:
    from transformers import BertConfig, BertModel

    sizes: Any = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    return BertModel(BertConfig(num_attention_heads=12, **sizes))


def _llama_7b() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers = layouts.LLAMA["llama-7b"]
    sizes: Any = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=32, **sizes))


@dataclass(frozen=True)
class _Size:
    text: str
    base: Callable[[], Any]
    rank: int
    modules: list[str]


SIZES: Final = {
    "0.07M": _Size("MiniLM, LoRA r=8 on query and value", _minilm, 8, ["query", "value"]),
    "4M": _Size("LLaMA-7B, LoRA r=8 on q and v", _llama_7b, 8, ["q_proj", "v_proj"]),
    "40M": _Size("LLaMA-7B, LoRA r=16 on all linear layers", _llama_7b, 16, _ALL),
    "160M": _Size("LLaMA-7B, LoRA r=64 on all linear layers", _llama_7b, 64, _ALL),
}


class Bench:
    """A model of one size, and task vectors for it.

    Parameters
    ----------
    size : str
        A key of `SIZES`.
    dtype : {"bfloat16", "float32"}
        Of the adapter's tensors in the model.
    device : str
        Where they lie.

    Attributes
    ----------
    model : peft.PeftModel
    layout : Layout
        Of the adapter, in the data type of the model.
    """

    def __init__(self, size: str, dtype: str = "bfloat16", device: str = "cpu") -> None:
        import torch
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        if size not in SIZES:
            raise ParameterError(f"expected a size among {', '.join(SIZES)}; found {size!r}")
        self.size, self.dtype, self.device, known = size, dtype, device, SIZES[size]
        with torch.device("meta"):
            config = LoraConfig(r=known.rank, target_modules=known.modules)
            self.model: Any = get_peft_model(known.base(), config)
        materialise(self.model, getattr(torch, dtype), device)
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self.layout = Layout.of({name: state[name] for name in sorted(state)})

    @property
    def num_parameters(self) -> int:
        """d, of the adapter."""
        return self.layout.num_parameters

    def task_vector(self, seed: int = 0) -> TaskVector:
        """A real one for MiniLM, where this runs from a clone; a synthetic one else."""
        real = layouts.real_vectors()
        if self.size == "0.07M" and "section_proto" in real:
            tau = real["section_proto" if seed % 2 == 0 else "lang_proto"]
            by_name = {name.replace(".default", ""): x for name, x in tau.to_dict().items()}
            ordered = [np.ravel(by_name[tensor.name]) for tensor in self.layout.tensors]
            return TaskVector(self.layout, np.concatenate(ordered))
        return layouts.synthetic(self.layout, seed)

    def expert(self, seed: int = 0) -> StoredUpdate:
        """An expert of this model at density 0.05, relative to a start of 0."""
        from compeft_fl.adapters.live import model_config

        update = compress(self.task_vector(seed), DENSITY)
        return StoredUpdate(update, model_config(self.model), "0", "golomb", 0, 0)

    def file(self, path: Path, expert: StoredUpdate, codec: str = "golomb") -> int:
        """Write an expert as a ``.compeft`` file; its size in bytes."""
        return write_update(path, expert.update, expert.config, expert.start, codec)

    def dense_state(self, seed: int = 0) -> dict[str, Any]:
        """What an expert was compressed from: tensors of the model's data type, by PEFT's names."""
        import torch

        values = self.task_vector(seed).to_dict()
        dtype = getattr(torch, self.dtype)
        return {name: torch.as_tensor(value).to(dtype) for name, value in values.items()}


def materialise(model: Any, dtype: Any, device: str = "cpu") -> None:
    """Give the adapters' tensors memory; the base stays without."""
    import torch

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if ".lora_" in name and weight is not None and weight.is_meta:
            empty = torch.zeros(weight.shape, dtype=dtype, device=device)
            module.weight = torch.nn.Parameter(empty, requires_grad=False)
