"""Experts of one start: their files, the folders that PEFT loads, and what a model answers."""

from __future__ import annotations

import adapter_kinds
import peft
import torch

from compeft_fl.adapters import load_folder, read_update, restore, save_folder, write_update
from compeft_fl.adapters.compression import compress_adapter
from compeft_fl.experts.pool import ExpertPool

IDS = torch.arange(24).view(2, 12)


def outputs(model, **given):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[n].cpu(), other[n].cpu())
        for n in one  # PEFT loads some to a GPU where there is one
    )


def train(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.05 * noise).to(parameter.dtype)


class Family:
    """Experts of one start: their files, and the folders that PEFT loads."""

    def __init__(self, folder, method="LORA", count=2, dtype=None, with_init=True, **options):
        self.folder, self.method, self.dtype = folder, method, dtype
        self.options = options
        model = self.model()
        model.save_pretrained(folder / "start")
        self.start = folder / "start"
        init = load_folder(self.start) if with_init else None
        self.files = []
        for number in range(count):
            model = self.model()
            train(model, number)
            model.save_pretrained(folder / f"trained-{number}")
            adapter = load_folder(folder / f"trained-{number}")
            made = compress_adapter(adapter, init, density=0.2)
            file = folder / f"{number}.compeft"
            write_update(file, made.update, adapter.config, made.start, carried=made.carried)
            self.files.append(file)

    def model(self):
        torch.manual_seed(5)
        model = peft.get_peft_model(
            adapter_kinds.base_model(), adapter_kinds.config(self.method, **self.options)
        )
        return (model if self.dtype is None else model.to(self.dtype)).eval()

    def pool(self, **options):
        model = self.model()
        pool = ExpertPool(model, **options)
        for number, file in enumerate(self.files):
            pool.add(str(number), file)
        return model, pool

    def restored(self, number):
        stored = read_update(self.files[number])
        init = load_folder(self.start) if stored.needs_init else None
        return restore(stored, init)

    def loaded(self, adapter, name="restored"):
        """The model that PEFT loads from a folder."""
        folder = self.folder / name
        save_folder(adapter, folder, force=True)
        base = adapter_kinds.base_model()
        base = base if self.dtype is None else base.to(self.dtype)
        return peft.PeftModel.from_pretrained(base, folder).eval()
