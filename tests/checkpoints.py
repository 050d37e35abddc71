"""Small checkpoint folders, and what is made of them: for the tests of full fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import compeft_fl as cf
from compeft_fl import full


def write(folder, state, config=None, shards=1):
    """A checkpoint folder as save_pretrained writes it."""
    folder.mkdir(exist_ok=True)
    content = config or {"architectures": ["TinyModel"], "model_type": "tiny"}
    (folder / "config.json").write_text(json.dumps(content))
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    table = {}
    for at in range(shards):
        file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[at::shards]}
        save_file(part, folder / file, {"format": "pt"})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def base_state(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    state = {
        "embed.weight": torch.randn(40, 16, generator=generator),
        "layers.0.weight": torch.randn(300, 16, generator=generator),
        "layers.1.weight": torch.randn(16, 70, generator=generator),
        "norm.weight": torch.ones(16),
    }
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def tuned(state, seed=1, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in state.items()}
    return {n: (t.float() + size * noise[n] ** 3).to(t.dtype) for n, t in state.items()}


def in_memory(base, finetuned, **options):
    """What `compeft_fl.compress` makes of the whole task vector."""
    order = sorted(base)
    tau = cf.TaskVector.between({n: base[n] for n in order}, {n: finetuned[n] for n in order})
    return tau, cf.compress(tau, **options)


def compressed(path, base, finetuned, **options):
    opened = full.open_checkpoint(base), full.open_checkpoint(finetuned)
    return full.compress_checkpoint(*opened, path, **options)


def restored(path, base, folder, **options):
    stored = full.read_checkpoint(path)
    full.restore_checkpoint(stored, full.open_checkpoint(base), folder, **options)
    return tensors(folder)
