"""vLLM answers as experts that only a store of ours has, over its HTTP API: ``make vllm``.

A store and a vLLM server (from build/vllm, in processes of their own) are started on loopback. What
vLLM says is compared, token by token, with what PEFT's model says with the same expert.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compeft_fl.app.tasks.model import embedded_model
from compeft_fl.experts import serving
from compeft_fl.experts.client import ExpertClient

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = [101, 2009, 2003, 1037, 2814, 2005]
TOKENS = 12
START_SECONDS = 1800.0  # on a machine with much other work
REFRESH = 1.0


def make_base(folder: Path) -> None:
    """Save a Llama of random weights, small, with the embedded model's tokenizer."""
    torch.manual_seed(3)
    # Heads of 64: vLLM's attention on CPUs has none of 16.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_expert(base: Path, folder: Path, seed: int, name: str | None = None) -> None:
    """Save a LoRA adapter that changes the base's answers, before and after its training."""
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].base_model_name_or_path = name or str(base)
    model.save_pretrained(folder / "before")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "after")


def expected(base: Path, folder: Path | None) -> list[int]:
    """What PEFT's model says after the prompt, greedily."""
    model: Any = LlamaForCausalLM.from_pretrained(base)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(TOKENS):
            following = model(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens[0, len(PROMPT) :].tolist()


class Server:
    """A vLLM server on loopback, and what it answers."""

    def __init__(self, base: Path, store: str, work: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "compeft-fl",
            "HF_HUB_OFFLINE": "1",
            "COMPEFT_FL_EXPERTS_SERVER": store,
            "COMPEFT_FL_EXPERTS_CACHE": str(work / "cache"),
            "COMPEFT_FL_VLLM_REFRESH": str(REFRESH),
        }
        self.log = work / "vllm.log"
        command = [
            str(ROOT / "build" / "vllm" / "bin" / "python"),
            # What `vllm serve` starts; that command asks for the metadata of a package "vllm".
            "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
            "--host", "127.0.0.1", "--port", str(self.port), "--enable-lora",
            "--max-lora-rank", "8", "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "256", "--max-num-seqs", "4",
        ]  # fmt: skip
        self._file = self.log.open("w")
        self._process = subprocess.Popen(
            command, env=environment, cwd=work, stdout=self._file, stderr=subprocess.STDOUT
        )
        started = time.perf_counter()
        while self.status("/health") != 200:
            if self._process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                sys.stderr.write(self.log.read_text()[-4000:])
                raise SystemExit("vLLM did not start: its log is above")
            time.sleep(0.5)
        self.start_seconds = time.perf_counter() - started

    def status(self, path: str) -> int:
        """The HTTP status of a page; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def ask(self, model: str) -> tuple[int, list[int]]:
        """The HTTP status, and the tokens that a model says after the prompt."""
        body = {
            "model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0,
            "logprobs": 1, "return_tokens_as_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                tokens = json.load(answer)["choices"][0]["logprobs"]["tokens"]
                return 200, [int(token.removeprefix("token_id:")) for token in tokens]
        except urllib.error.HTTPError as error:
            return error.code, []

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.close()


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and how long it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def checks(work: Path) -> Iterator[tuple[str, str, bool]]:
    """Each question, what came of it, and whether that is right."""
    base = work / "base"
    make_base(base)
    for number in (1, 2):
        make_expert(base, work / f"v{number}", number)
    make_expert(base, work / "foreign", 3, name="another/base")
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(serving.running(work / "store", port=0))
        client = stack.enter_context(ExpertClient(running.address, cache=work / "own-cache"))

        def push(name: str, folder: Path) -> Any:
            return client.push(folder / "after", name, init=folder / "before", density=0.2)

        first = push("sections", work / "v1")
        push("foreign", work / "foreign")
        client.pull("sections").save(work / "pulled-1")
        one = expected(base, work / "pulled-1")
        server = stack.enter_context(contextlib.closing(Server(base, running.address, work)))
        yield "vLLM starts", f"{server.start_seconds:.0f} s", True

        status, tokens = server.ask(str(base))
        yield "the base answers", str(status), tokens == expected(base, None)
        (status, tokens), took = seconds(lambda: server.ask("sections"))
        yield (
            "an expert that only the store has: fetched, loaded, answered as PEFT answers",
            f"{status} after {took:.2f} s",
            status == 200 and tokens == one and tokens != expected(base, None),
        )
        (status, tokens), took = seconds(lambda: server.ask("sections"))
        yield "the same again", f"{status} after {took:.2f} s", tokens == one
        status, tokens = server.ask(f"sections@{first.digest[:16]}")
        yield "by its digest", str(status), tokens == one
        for name, why in (
            ("no-such-expert", "an unknown expert"),
            ("../../etc/passwd", "a name that is a path"),
            ("foreign", "an expert of another base model"),
            ("sections@" + "0" * 64, "an unknown digest"),
        ):
            status, _ = server.ask(name)
            yield why, str(status), status == 404
        yield "the server lives", str(server.status("/health")), server.status("/health") == 200

        second = push("sections", work / "v2")
        client.pull("sections").save(work / "pulled-2")
        two = expected(base, work / "pulled-2")
        start = time.perf_counter()
        while (answer := server.ask("sections"))[1] != two and time.perf_counter() - start < 60:
            time.sleep(0.1)
        yield (
            "a new version under the name, after its push",
            f"{answer[0]} after {time.perf_counter() - start:.1f} s",
            answer[1] == two and one != two,
        )
        status, tokens = server.ask(f"sections@{first.digest[:16]}")
        yield "the version before, by its digest", str(status), tokens == one

        running.stop(grace=0.2)
        status, tokens = server.ask("sections")
        yield "the store is gone: what is loaded", str(status), tokens == two
        status, tokens = server.ask(f"sections@{second.digest}")
        yield "the store is gone: what is in the cache, by its digest", str(status), tokens == two
        status, _ = server.ask("never-asked-for")
        yield "the store is gone: an unknown expert", str(status), status == 404
        yield "the server lives", str(server.status("/health")), server.status("/health") == 200


def main() -> int:
    """Run all checks, print them as they come, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "vllm-check")
    parser.add_argument("--out", type=Path, help="write the table into this folder")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    work.mkdir()
    release = subprocess.run(
        [ROOT / "build" / "vllm" / "bin" / "python", "-c",
         "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    rows = []
    for question, answer, right in checks(work):
        print(f"{'ok  ' if right else 'FAIL'} {question}: {answer}", flush=True)
        rows.append(f"| {question} | {answer} | {'yes' if right else 'NO'} |")
    if options.out:
        about = (
            f"Written by `make vllm`: vllm-cpu {release}, {platform.machine()}, "
            f"{datetime.date.today()}. A Llama of random weights, float32; the tokens that vLLM's "
            "`/v1/completions` gives are PEFT's own, greedily, where they are compared.\n"
        )
        table = ["| asked | answered | as it should |", "|---|---|---|", *rows]
        (options.out / "vllm.md").write_text("\n".join([about, *table]) + "\n", encoding="utf-8")
    return 1 if any(row.endswith("| NO |") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
