"""What a Trainer costs a node: transformers' Trainer, TRL's SFTTrainer, and a plain loop.

Each is a process of its own. It imports the trainer, and then, as a node does round after round,
builds one around the same model and takes a few steps on the same rows, whose labels are there: a
Llama with random weights of 0.2 million parameters with LoRA, so that steps cost next to nothing.
Seconds are of a core (CPU time), so that what else the machine does counts little. ``--out DIR``
writes trainers.md there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAINERS = ("plain loop", "Trainer", "SFTTrainer")
ROUNDS, STEPS, ROWS, BATCH = 4, 5, 64, 4


def model_and_rows() -> tuple[Any, list[dict[str, list[int]]]]:
    """A small Llama with LoRA, and rows of 48 tokens of which 16 are learned."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, task_type="CAUSAL_LM"))
    ids = torch.randint(1, 512, (ROWS, 48)).tolist()
    rows = [
        {"input_ids": row, "attention_mask": [1] * 48, "labels": [-100] * 32 + row[32:]}
        for row in ids
    ]
    return model, rows


def tokenizer() -> Any:
    """SFTTrainer and the collator want one; it has nothing to do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(512)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2")


def one(kind: str) -> dict[str, float]:
    """Import and rounds of a trainer, in CPU seconds."""
    model, rows = model_and_rows()
    tokens = tokenizer()
    began = time.process_time()
    if kind == "SFTTrainer":
        import trl  # noqa: F401
        from trl import SFTConfig, SFTTrainer
    elif kind == "Trainer":
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    imported = time.process_time() - began
    rounds = []
    for seed in range(ROUNDS):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            settings: dict[str, Any] = {
                "output_dir": folder, "per_device_train_batch_size": BATCH, "max_steps": STEPS,
                "use_cpu": True, "report_to": "none", "save_strategy": "no",
                "logging_strategy": "no", "disable_tqdm": True, "seed": seed,
                "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
            }  # fmt: skip
            if kind == "Trainer":
                arguments = TrainingArguments(remove_unused_columns=False, **settings)
                collate = DataCollatorForSeq2Seq(tokens)
                Trainer(
                    model=model, args=arguments, train_dataset=rows, data_collator=collate
                ).train()
            elif kind == "SFTTrainer":
                from datasets import Dataset

                arguments = SFTConfig(max_length=64, bf16=False, **settings)
                data = Dataset.from_list(rows)
                SFTTrainer(
                    model=model, args=arguments, train_dataset=data, processing_class=tokens
                ).train()
            else:
                plain_loop(model, rows, seed)
        rounds.append(time.process_time() - began)
    return {"import": imported, "first": rounds[0], "later": sum(rounds[1:]) / (ROUNDS - 1)}


def plain_loop(model: Any, rows: list[dict[str, list[int]]], seed: int) -> None:
    """The same steps by hand."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(STEPS):
        chosen = [rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        batch = {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def main() -> int:
    """Measure each in a process of its own, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return 0
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("transformers", "trl"))
    about = (
        "`python simulations/bench_trainers.py --out simulations/results` "
        f"({platform.machine()}, {os.cpu_count()} cores, {versions}, {datetime.date.today()}): CPU "
        f"seconds of a node that trains {STEPS} steps of {BATCH} rows a round; transformers and "
        "PEFT are imported already.\n"
    )
    lines = ["| | import | first round | a later round |", "|---|---|---|---|"]
    for kind in TRAINERS:
        command = [sys.executable, __file__, "--one", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        lines.append(
            f"| {kind} | {found['import']:.2f} | {found['first']:.2f} | {found['later']:.2f} |"
        )
    text = "\n".join([about, *lines]) + "\n"
    print(text)
    if options.out:
        (options.out / "trainers.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
