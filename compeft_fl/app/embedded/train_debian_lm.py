"""Train ``debian-lm/``, the embedded language model, from nothing: tokenizer first, then weights.

::

    python -m compeft_fl.app.embedded.train_debian_lm --work /tmp/lm --minutes 15  # until done
    python -m compeft_fl.app.embedded.train_debian_lm --work /tmp/lm --finish -o debian-lm

Every call goes on from the newest checkpoint under ``--work``, and stops when its minutes are over;
``--finish`` lets the learning rate fall to nothing over the last fifth of the steps, and writes the
model. One core of an AMD EPYC with bfloat16 sees some 3,000 tokens a second.

The text is what Debian's archive says of its packages (`compeft_fl.app.embedded.debian_archive`),
without the fifth of the sources that is held out. Half of the descriptions are plain, half an
answer to a question in the model's chat format, so that its marks are no strangers to the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compeft_fl.app.embedded import debian_archive
from compeft_fl.app.embedded.debian_archive import Package

__all__ = ["CHAT_TEMPLATE", "documents", "main", "new_model", "new_tokenizer"]

VOCABULARY: Final = 4096
BEGIN, END, PAD, UNKNOWN = "<|begin|>", "<|end|>", "<|pad|>", "<|unknown|>"
ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT: Final = 256  # tokens of a row in training
POSITIONS: Final = 1024  # what the configuration promises; rotary positions go on
ROWS: Final = 16  # a step
STEPS: Final = 1035
WARMUP: Final = 50
FALL: Final = 0.2  # part of all steps over which the learning rate falls
MATRIX_RATE, OTHER_RATE = 0.02, 4e-3  # of Muon, and of AdamW
REPEATS: Final = 2  # how often a paragraph may come: many packages of a source share theirs
SAVE_SECONDS: Final = 120.0
WIDTH, DEPTH, HEADS, INNER = 256, 5, 4, 704


def documents(packages: Iterable[Package], held_out: bool = False) -> Iterator[str]:
    """Yield a text for each package with a description, in the model's own format.

    Parameters
    ----------
    packages : iterable of Package
    held_out : bool
        Whether to take the sources that the model is not trained on instead of the others.
    """
    seen: dict[str, int] = {}
    for package in packages:
        if (package.split == "test") != held_out:
            continue
        kept = []
        for paragraph in package.description.split("\n\n"):
            seen[paragraph] = seen.get(paragraph, 0) + 1
            if seen[paragraph] <= REPEATS:
                kept.append(paragraph)
        body = "\n\n".join(kept)
        if not body and seen.setdefault(package.synopsis, 0):
            continue
        seen[package.synopsis] = 1
        if hashlib.sha256(package.name.encode()).digest()[0] % 2:
            yield f"{BEGIN}{package.name}: {package.synopsis}\n\n{body}{END}"
        else:
            asked = f"<|user|>What is {package.name}?{END}"
            yield f"{BEGIN}{asked}<|assistant|>{package.synopsis}.\n\n{body}{END}"


def new_tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer, learned from texts, as transformers has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END, UNKNOWN, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bare,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(tokenizer: Any, seed: int = 0) -> Any:
    """Return a Llama with fresh weights for a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Training:
    """A model in training, and where it stands; all of it in one file.

    Parameters
    ----------
    work : Path
        Folder of the tokens and of the checkpoint.
    """

    def __init__(self, work: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.work = work
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
        self.tokens = np.load(work / "train.npy")
        self.held_out = np.load(work / "held-out.npy")
        self.model = new_model(self.tokenizer)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        of_matrix = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in of_matrix]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self.file = work / "checkpoint.pt"
        if self.file.exists():
            self._restore(torch.load(self.file, weights_only=True))

    def run(self, until: int, fall: int, minutes: float) -> None:
        """Train to a step, the last `fall` of them at a falling rate, for some minutes at most."""
        started = saved = time.monotonic()
        compiled: Any = torch.compile(self.model)
        while self.step < until and time.monotonic() - started < 60 * minutes:
            began = time.monotonic()
            self._take_step(
                compiled, min(1.0, (self.step + 1) / WARMUP, (until - self.step) / fall)
            )
            self.seconds += time.monotonic() - began
            if self.step % 20 == 0:
                recent = sum(self.losses[-20:]) / 20
                print(f"step {self.step}: loss {recent:.4f}, {self.seconds:.0f} s", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _take_step(self, model: nn.Module, rate: float) -> None:
        for optimizer, full in zip(self.optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        self.model.train()
        loss = self._loss(model, self._rows(self.tokens, self.step))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))
        self.step += 1

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss: Tensor = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten()
        )
        return loss

    def _rows(self, tokens: NDArray[np.uint16], step: int) -> Tensor:
        """Return the rows ``(ROWS, CONTEXT + 1)`` of a step: shuffled passes over the text."""
        count = (len(tokens) - 1) // CONTEXT
        per_pass = count // ROWS
        turn, place = divmod(step, per_pass)
        rng = np.random.default_rng(turn)
        offset = int(rng.integers(CONTEXT)) if turn else 0
        order = rng.permutation(count - 1)[place * ROWS : (place + 1) * ROWS]
        rows = [tokens[offset + i * CONTEXT : offset + (i + 1) * CONTEXT + 1] for i in order]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def score(self) -> float:
        """Return the mean loss a token on the held-out packages, in nats."""
        self.model.eval()
        steps = (len(self.held_out) - 1) // CONTEXT // ROWS
        with torch.inference_mode():
            found = [
                float(self._loss(self.model, self._rows(self.held_out, step)))
                for step in range(min(steps, 40))
            ]
        return sum(found) / len(found)

    def save(self) -> None:
        """Replace the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def export(self, folder: Path, loss: float) -> None:
        """Write the model in bfloat16, its tokenizer, and what came of it."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        _make_portable(folder / "tokenizer_config.json")
        characters = json.loads((self.work / "corpus.json").read_text(encoding="utf-8"))
        facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "tokens": self.step * ROWS * CONTEXT,
            "seconds": round(self.seconds),
            "held_out_loss": round(loss, 4),
            "held_out_perplexity": round(math.exp(loss), 2),
            "held_out_bits_per_byte": round(
                loss / math.log(2) * characters["held_out_tokens"] / characters["held_out_bytes"], 4
            ),
            **characters,
        }
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(facts, indent=2))


def _make_portable(file: Path) -> None:
    """Leave out of a tokenizer's settings what transformers before 5 does not know."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", list(ROLES))
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _prepare(work: Path, apt: list[str]) -> None:
    """Read the archive, learn the tokenizer, and write the tokens."""
    packages = debian_archive.read(apt)
    texts = list(documents(packages))
    np.random.default_rng(0).shuffle(texts)
    held_out = list(documents(packages, held_out=True))
    tokenizer = new_tokenizer(texts)
    counts = {}
    for name, part in (("train", texts), ("held-out", held_out)):
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        flat = np.concatenate([np.asarray(row, np.uint16) for row in ids])
        np.save(work / f"{name}.npy", flat)
        key = name.replace("-", "_")
        counts[f"{key}_packages"] = len(part)
        counts[f"{key}_bytes"] = sum(len(text.encode()) for text in part)
        counts[f"{key}_tokens"] = len(flat)
    (work / "corpus.json").write_text(json.dumps(counts, indent=2), encoding="utf-8")
    print(json.dumps(counts))
    tokenizer.save_pretrained(work / "tokenizer")  # last: what is here is whole


def main(arguments: list[str] | None = None) -> int:
    """Prepare, train for some minutes, or finish; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of tokens and checkpoint")
    parser.add_argument("--minutes", type=float, default=15.0, help="after which a call stops")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of all calls ({STEPS})")
    parser.add_argument("--finish", action="store_true", help="let the rate fall, and write")
    parser.add_argument("-o", "--output", type=Path, help="the folder to write (--finish)")
    debian_archive.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "tokenizer").exists():
        try:
            _prepare(options.work, options.apt)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"apt's lists cannot be read: {error}", file=sys.stderr)
            return 2
    training = Training(options.work)
    fall = int(FALL * options.steps)
    until = options.steps if options.finish else options.steps - fall
    training.run(until, fall if options.finish else 1, options.minutes)
    loss = training.score()
    print(f"step {training.step} of {options.steps}: held-out loss {loss:.4f}")
    if options.finish and training.step == options.steps:
        training.export(options.output, loss)
    return 0


if __name__ == "__main__":
    sys.exit(main())
