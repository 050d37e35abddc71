"""Layouts of real adapters, and synthetic task vectors over them.

The names and shapes are those that PEFT gives the adapters of these models; no weights are needed.
The values are made up. What makes a sparse vector cheap or dear to encode is how unevenly the large
values lie, so three scales multiply, each log-normal:

- of a tensor, with a standard deviation of 0.3 in the logarithm (layers and projections differ);
- of a row or column along the model's own dimension, 0.4;
- along the rank, 0.1.

In the task vectors of simulations/data/taus the last two are 0.37 .. 0.46 and 0.07 .. 0.10, with
what eight values leave to chance; their tensors differ by 0.04 .. 0.19, but over six layers of one
small model. The values themselves are Laplace's. So the tails are heavier than those vectors'
(a tensor's kurtosis is about 12 here and 2.8 .. 3.3 there, after some steps of Adam), and the large
values lie less evenly: the benchmarks report both kinds, and apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from compeft_fl.bench.packages import checkout
from compeft_fl.errors import ParameterError
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec

__all__ = ["LLAMA", "Adapter", "get", "names", "real_vectors", "synthetic"]

TENSOR_SPREAD: Final = 0.3
MODEL_SPREAD: Final = 0.4
RANK_SPREAD: Final = 0.1
MEDIAN_SCALE: Final = 1e-3


@dataclass(frozen=True)
class Adapter:
    """An adapter's layout, and what it is the adapter of."""

    name: str
    text: str
    layout: Layout


# Hidden and intermediate sizes and layers of LLaMA (https://arxiv.org/abs/2302.13971, table 2).
LLAMA: Final = {
    "llama-7b": (4096, 11008, 32),
    "llama-13b": (5120, 13824, 40),
    "llama-33b": (6656, 17920, 60),
    "llama-65b": (8192, 22016, 80),
}
_T5: Final = {"t5-base": (768, 3072, 12), "t5-large": (1024, 4096, 24)}


def names() -> tuple[str, ...]:
    """The adapters, from small to large."""
    return tuple(_BUILDERS)


def get(name: str) -> Adapter:
    """The adapter of that name.

    Raises
    ------
    ParameterError
        No such adapter.

    Examples
    --------
    >>> get("mistral-7b-r32").layout.num_parameters
    13631488
    """
    if name not in _BUILDERS:
        raise ParameterError(f"expected an adapter among {', '.join(names())}; found {name!r}")
    text, tensors = _BUILDERS[name]
    return Adapter(name, text, Layout(tensors()))


def synthetic(layout: Layout, seed: int = 0, structure: int = 0) -> TaskVector:
    """A made-up task vector over a layout; see the module.

    Parameters
    ----------
    layout : Layout
    seed, structure : int
        Of the values, and of the scales of tensors, rows and columns: a node's updates of several
        rounds share their structure.
    """
    rng, scales = np.random.default_rng(seed), np.random.default_rng([structure, 1])
    values = np.empty(layout.num_parameters, np.float32)
    for tensor, where in layout.slices():
        part = values[where].reshape(tensor.shape)
        rng.standard_exponential(dtype=np.float32, out=part)
        signs = np.unpackbits(np.frombuffer(rng.bytes((part.size + 7) >> 3), np.uint8))
        part *= 1 - 2 * signs[: part.size].reshape(part.shape).astype(np.float32)
        part *= np.float32(MEDIAN_SCALE * np.exp(scales.normal(0, TENSOR_SPREAD)))
        for axis, length in enumerate(tensor.shape):
            # Of a LoRA matrix the shorter side is the rank; IA3's vectors have a side of 1.
            spread = MODEL_SPREAD if length == max(tensor.shape) else RANK_SPREAD
            along = [1] * len(tensor.shape)
            along[axis] = length
            part *= np.exp(scales.normal(0, spread, length)).astype(np.float32).reshape(along)
    return TaskVector(layout, values)


def real_vectors(folder: Path | None = None) -> dict[str, TaskVector]:
    """The task vectors of simulations/data/taus, by name: empty where there is no such folder.

    Parameters
    ----------
    folder : Path, optional
        Another folder of safetensors files; default: that of the clone that this package runs from.
    """
    from safetensors.numpy import load_file

    if folder is None:
        root = checkout()
        if root is None:
            return {}
        folder = root / "simulations" / "data" / "taus"
    files = sorted(folder.glob("*.safetensors"))
    return {file.stem: TaskVector.from_dict(load_file(file)) for file in files}


# --- the tensors of each ------------------------------------------------------------------------


def _lora(module: str, rank: int, columns: int, rows: int) -> Iterator[TensorSpec]:
    """The two matrices that PEFT adds to a linear layer from ``columns`` to ``rows``."""
    yield TensorSpec(f"base_model.model.{module}.lora_A.weight", (rank, columns))
    yield TensorSpec(f"base_model.model.{module}.lora_B.weight", (rows, rank))


def _llama(name: str) -> Iterator[TensorSpec]:
    """QLoRA's adapters: rank 64 on every linear layer (https://arxiv.org/abs/2305.14314)."""
    hidden, inner, layers = LLAMA[name]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for projection in "qkvo":
            yield from _lora(f"{block}.self_attn.{projection}_proj", 64, hidden, hidden)
        for projection in ("gate", "up"):
            yield from _lora(f"{block}.mlp.{projection}_proj", 64, hidden, inner)
        yield from _lora(f"{block}.mlp.down_proj", 64, inner, hidden)


def _mistral() -> Iterator[TensorSpec]:
    """Rank 32 on query and value, PEFT's default, of Mistral-7B: 8 of 32 heads have keys."""
    for layer in range(32):
        block = f"model.layers.{layer}.self_attn"
        yield from _lora(f"{block}.q_proj", 32, 4096, 4096)
        yield from _lora(f"{block}.v_proj", 32, 4096, 1024)


def _t5_blocks(layers: int) -> Iterator[tuple[list[str], str]]:
    """Of each block of T5, encoder first: its attention modules, and its feed-forward's output."""
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        yield [f"{block}.0.SelfAttention"], f"{block}.1.DenseReluDense.wo"
    for layer in range(layers):
        block = f"decoder.block.{layer}.layer"
        attention = [f"{block}.0.SelfAttention", f"{block}.1.EncDecAttention"]
        yield attention, f"{block}.2.DenseReluDense.wo"


def _t5_lora(name: str) -> Iterator[TensorSpec]:
    """Rank 16 on query and value, PEFT's default modules."""
    hidden, _, layers = _T5[name]
    for attention, _ in _t5_blocks(layers):
        for module in attention:
            for projection in "qv":
                yield from _lora(f"{module}.{projection}", 16, hidden, hidden)


def _t5_ia3(name: str) -> Iterator[TensorSpec]:
    """IA3 on key, value and the feed-forward's output, PEFT's default modules."""
    hidden, inner, layers = _T5[name]
    for attention, output in _t5_blocks(layers):
        for module in attention:
            for projection in "kv":
                yield TensorSpec(f"base_model.model.{module}.{projection}.ia3_l", (hidden, 1))
        yield TensorSpec(f"base_model.model.{output}.ia3_l", (1, inner))


_BUILDERS: Final[dict[str, tuple[str, Callable[[], Iterator[TensorSpec]]]]] = {
    "t5-base-ia3": ("T5-base, IA3", lambda: _t5_ia3("t5-base")),
    "t5-large-ia3": ("T5-large, IA3", lambda: _t5_ia3("t5-large")),
    "t5-base-r16": ("T5-base, LoRA r=16 on q, v", lambda: _t5_lora("t5-base")),
    "t5-large-r16": ("T5-large, LoRA r=16 on q, v", lambda: _t5_lora("t5-large")),
    "mistral-7b-r32": ("Mistral-7B, LoRA r=32 on q, v (FlowerTune)", _mistral),
    "llama-7b-r64": ("LLaMA-7B, QLoRA r=64 on all linear layers", lambda: _llama("llama-7b")),
    "llama-13b-r64": ("LLaMA-13B, QLoRA r=64 on all linear layers", lambda: _llama("llama-13b")),
    "llama-33b-r64": ("LLaMA-33B, QLoRA r=64 on all linear layers", lambda: _llama("llama-33b")),
    "llama-65b-r64": ("LLaMA-65B, QLoRA r=64 on all linear layers", lambda: _llama("llama-65b")),
}
