"""What only a GPU can show: the torch path on CUDA, and clients with a base in bf16 or 4 bits.

    python simulations/bench_gpu.py --out DIR [--quick]

Three parts, each a table:

1. The same bytes: task vectors of many sizes and kinds, compressed and encoded on the device and on
   the CPU, and decoded on both.
2. Throughput at 40 and 160 million parameters, against a copy within the device's memory.
3. A federation in one process, Flower's real messages between real strategies and clients: a Llama
   of 1.1 billion parameters with random weights, LoRA of rank 16 on all linear layers, the base in
   bf16 and in 4 bits (bitsandbytes' NF4), on sequences whose next token is a function of the two
   before. Loss, bytes against dense float32, and the device's memory.

Without a CUDA device it says so and exits with 3; ``--quick`` runs parts 1 and 3 small, on the CPU
too, so that the script itself can be tried anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import compeft_fl as cf  # noqa: E402
from compeft_fl.exchange.downlink import Downlink  # noqa: E402
from compeft_fl.reduction.rules import Reduction  # noqa: E402
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec  # noqa: E402

KINDS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "normal": lambda rng, d: rng.standard_normal(d),
    "ties": lambda rng, d: rng.integers(-3, 4, d),
    "heavy tails": lambda rng, d: rng.standard_cauchy(d),
    "rare": lambda rng, d: np.where(rng.random(d) < 0.003, rng.standard_normal(d), 0),
    "tiny": lambda rng, d: rng.standard_normal(d) * 1e-30,
}
SIZES = (1, 63, 65, 1000, 70_001, (1 << 20) + 7)
CODECS = ("golomb", "bitmask", "context", "dense", "dense-fp16", "dense-bf16")


def main() -> int:
    """Run all parts; 0 where all bytes are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where bench_gpu.json and .md go")
    parser.add_argument("--quick", action="store_true", help="small, and on the CPU if need be")
    parser.add_argument("--only", default="", help="parts: identity,throughput,clients")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.quick):
        print("bench_gpu: no CUDA device here", file=sys.stderr)
        return 3
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "bench_gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found["torch"] = torch.__version__
    for part, run in PARTS.items():
        if options.only and part not in options.only.split(","):
            continue
        started = time.perf_counter()
        found[part] = run(device, options.quick)
        found[f"{part}_seconds"] = round(time.perf_counter() - started, 1)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(part, json.dumps(found[part]), flush=True)
    if all(part in found for part in PARTS):
        (options.out / "bench_gpu.md").write_text(page(found), encoding="utf-8")
    return 0 if not found.get("identity", {}).get("different") else 1


# --- the same bytes ---------------------------------------------------------------------------


def identity(device: torch.device, quick: bool) -> dict[str, Any]:
    """Every kind, size, density, support and codec, there and on the CPU."""
    count, different = 0, []
    for kind, draw in KINDS.items():
        for d in SIZES[:-1] if quick else SIZES:
            values = draw(np.random.default_rng(d), d).astype(np.float32)
            layout = Layout([TensorSpec("a", (d // 2,)), TensorSpec("b", (d - d // 2,))])
            here = TaskVector(layout, values)
            there = TaskVector(layout, torch.from_numpy(values).to(device))
            for density in (0.01, 0.2, 1.0):
                for support in ("best", "fixed"):
                    one = cf.compress(here, density, "mean", support)
                    other = cf.compress(there, density, "mean", support)
                    for codec in CODECS[:3]:
                        count += 1
                        blob, far = cf.encode(one, codec), cf.encode(other, codec)
                        back = cf.decode(blob, device=device).to_task_vector().values
                        same = np.array_equal(
                            torch.as_tensor(back).cpu().numpy(), one.to_task_vector().values
                        )
                        if blob != far or not same:
                            different.append(f"{kind}, {d}, {density}, {support}, {codec}")
            if kind in ("normal", "ties"):
                for codec in CODECS[3:]:
                    count += 1
                    if cf.encode(here, codec) != cf.encode(there, codec):
                        different.append(f"{kind}, {d}, {codec}")
            for made, what in ((low_rank(kind, values, device), "factored"),
                               (catch_up(values, device), "steps")):  # fmt: skip
                count += len(made)
                different += [
                    f"{kind}, {d}, {what}, {at}" for at, same in enumerate(made) if not same
                ]
    return {"compared": count, "different": different}


def low_rank(kind: str, values: Any, device: torch.device) -> list[bool]:
    """Low-rank signs of a LoRA's two factors: the same bytes, and the same values read back."""
    if values.size < 1000:
        return []
    width = values.size // 16
    layout = Layout(
        [TensorSpec("lora_A.weight", (8, width)), TensorSpec("lora_B.weight", (width, 8))]
    )
    tau = TaskVector(layout, values[: 16 * width])
    there = TaskVector(layout, torch.from_numpy(tau.values).to(device))
    found = []
    for density in (0.02, 0.2):
        reduction = Reduction(density, "mean", "best", factored=True, low_rank=True)
        one, other = (cf.encode(reduction(each), "factored") for each in (tau, there))
        here: Any = cf.decode(one).to_task_vector().values
        back = torch.as_tensor(cf.decode(one, device=device).to_task_vector().values)
        found.append(one == other and np.array_equal(back.cpu().numpy(), here))
    return found


def catch_up(values: Any, device: torch.device) -> list[bool]:
    """Versions of the way down from a server whose adapter is on the device, and what a node that
    missed some is sent, read on the device: the same as all on the CPU.
    """
    layout = Layout([TensorSpec("w", (values.size,))])
    one, other = (Downlink(TaskVector.zeros(layout), density=0.1) for _ in range(2))
    for factor in (0.25, 0.5, 1.0):
        adapter = (np.clip(values, -8, 8) * np.float32(factor)).astype(np.float32)
        one.advance(TaskVector(layout, adapter))
        other.advance(TaskVector(layout, torch.from_numpy(adapter).to(device)))
    blob = cf.encode(TaskVector(layout, one.shared), "steps")
    back = torch.as_tensor(cf.decode(blob, device=device).to_task_vector().values)
    there = TaskVector(layout, torch.from_numpy(one.shared).to(device))
    return [
        one.digest == other.digest,
        one.lacking(0).blobs == other.lacking(0).blobs,
        np.array_equal(back.cpu().numpy(), one.shared),
        cf.encode(there, "steps") == blob,
    ]


# --- throughput -------------------------------------------------------------------------------


def throughput(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Seconds of compressing, encoding and decoding on the device, against a copy of the vector."""
    rows = []
    for d in (1 << 20,) if quick else (40_000_000, 160_000_000):
        # Rank 16 over layers of 4096: as many as fit.
        pairs = max(1, d // (2 * 16 * 4096))
        shapes = [s for i in range(pairs) for s in ((f"{i}.A", (16, 4096)), (f"{i}.B", (4096, 16)))]
        layout = Layout([TensorSpec(*shape) for shape in shapes])
        generator = torch.Generator(device).manual_seed(0)
        values = torch.randn(layout.num_parameters, generator=generator, device=device)
        values *= torch.rand(layout.num_parameters, generator=generator, device=device) ** 2
        for density, support in ((0.05, "fixed"), (0.05, "best"), (0.2, "best")):
            rows.append(measured(TaskVector(layout, values), density, support, device))
    return rows


def measured(tau: TaskVector, density: float, support: str, device: torch.device) -> dict[str, Any]:
    """One row: seconds on the device and on the CPU, and whether the bytes are the same."""
    values = torch.as_tensor(tau.values)
    layout = tau.layout
    copy = seconds(values.clone, device)
    update = cf.compress(tau, density, "mean", support)
    blob = cf.encode(update, layout_by_id=True)

    def back() -> Any:
        return cf.decode(blob, layout=layout, device=device).to_task_vector().values

    timed = {
        "compress": seconds(lambda: cf.compress(tau, density, "mean", support), device),
        "encode": seconds(lambda: cf.encode(update, layout_by_id=True), device),
        "decode": seconds(back, device),
    }
    on_cpu = TaskVector(layout, values.cpu().numpy())
    cf.encode(cf.compress(on_cpu, density, "mean", support), layout_by_id=True)
    started = time.perf_counter()
    other = cf.encode(cf.compress(on_cpu, density, "mean", support), layout_by_id=True)
    cpu_seconds = time.perf_counter() - started
    here: Any = cf.decode(other, layout=layout).to_task_vector().values
    same = np.array_equal(torch.as_tensor(back()).cpu().numpy(), here)
    return {
        "parameters": layout.num_parameters,
        "density": density,
        "support": support,
        "kept": update.num_nonzeros / layout.num_parameters,
        "bytes": len(blob),
        "identical": blob == other and same,
        "copy_seconds": copy,
        "copy_gb_s": 8 * layout.num_parameters / copy / 1e9,
        **{f"{what}_seconds": value for what, value in timed.items()},
        "cpu_compress_encode_seconds": cpu_seconds,
        "over_copies": (timed["compress"] + timed["encode"]) / copy,
    }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The fastest of five runs after one to warm up."""
    best = float("inf")
    for turn in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            best = min(best, time.perf_counter() - started)
    return best


# --- clients ----------------------------------------------------------------------------------

NODES, ROUNDS, STEPS, BATCH, LENGTH = 3, 4, 12, 8, 128
WAYS = {"dense": (1.0, 1.0), "compressed": (0.1, 0.2), "auto": ("auto", "auto")}  # up, down


def clients(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Federations over one base model, in bf16 and in 4 bits, dense and compressed."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        write_base(Path(folder) / "base", quick)
        for precision in ("bf16", "4bit"):
            for way in WAYS:
                rows.append(federate(Path(folder), precision, way, device, quick))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def write_base(folder: Path, quick: bool) -> None:
    """A Llama with random weights, as files: 4 bits are made as a model is loaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    if quick:
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = 4 if quick else 32
    config = LlamaConfig(
        vocab_size=1024, num_attention_heads=heads, num_key_value_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=False, **size,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def build(folder: Path, precision: str, device: torch.device) -> Any:
    """The base with LoRA of rank 16 on all linear layers; the same start in each call."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    more: dict[str, Any] = {}
    if precision == "4bit":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.bfloat16, device_map={"": device}, **more
    )
    if precision == "4bit":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def batch(seed: int, device: torch.device) -> torch.Tensor:
    """Sequences whose next token is the sum of the two before, modulo 17: (BATCH, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 17, (BATCH, LENGTH), generator=generator)
    for at in range(2, LENGTH):
        tokens[:, at] = (tokens[:, at - 1] + tokens[:, at - 2]) % 17
    return tokens.to(device)


def federate(
    folder: Path, precision: str, way: str, device: torch.device, quick: bool
) -> dict[str, Any]:
    """Some rounds of Flower's messages between a strategy and the clients."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg
    from local_grid import LocalGrid
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from compeft_fl.mod import CompressionMod
    from compeft_fl.strategies import ComPEFTAverage, DownlinkOptions

    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(folder, precision, device)
    rounds, steps = (2, 2) if quick else (ROUNDS, STEPS)
    spent = {"mod": 0.0, "train": 0.0, "messages": 0}

    def arrays() -> ArrayRecord:
        state = get_peft_model_state_dict(model)
        return ArrayRecord({n: Array(v.float().cpu().numpy()) for n, v in state.items()})

    def load(record: ArrayRecord) -> None:
        state = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
        set_peft_model_state_dict(model, state)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            result: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return result

    up, down = WAYS[way]
    mod = CompressionMod(density=up, state_dir=folder / f"state-{precision}-{way}")

    def timed(message: Any, context: Any, call_next: Any) -> Any:
        started, before = time.perf_counter(), spent["train"]
        reply = mod(message, context, call_next)
        spent["mod"] += time.perf_counter() - started - (spent["train"] - before)
        spent["messages"] += 1
        return reply

    app = ClientApp(mods=[] if way == "dense" else [timed])

    @app.train()
    def train(message: Any, context: Any) -> Any:
        started = time.perf_counter()
        load(message.content["arrays"])
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        model.train()
        total = 0.0
        for step in range(steps):
            seed = 1000 * context.node_id + 100 * message.content["config"]["server-round"] + step
            loss = loss_of(batch(seed, device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss)
        metrics = MetricRecord({"num-examples": steps * BATCH, "loss": total / steps})
        content = {"arrays": arrays(), "metrics": metrics}
        spent["train"] += time.perf_counter() - started
        return Message(RecordDict(content), reply_to=message)

    losses: list[float] = []

    def evaluate(server_round: int, record: ArrayRecord) -> MetricRecord:
        load(record)
        model.eval()
        with torch.no_grad():
            losses.append(sum(float(loss_of(batch(-1 - i, device))) for i in range(4)) / 4)
        return MetricRecord({"loss": losses[-1]})

    options = {"fraction_evaluate": 0.0, "min_train_nodes": NODES, "min_available_nodes": NODES}
    strategy: Any = FedAvg(**options)
    if way != "dense":
        strategy = ComPEFTAverage(downlink=DownlinkOptions(density=down), **options)
    start = arrays()
    count = sum(int(np.prod(array.shape)) for array in start.values())
    grid = LocalGrid(app, NODES)
    strategy.start(grid, start, num_rounds=rounds, timeout=600, evaluate_fn=evaluate)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    dense = 4 * count * NODES * rounds
    return {
        "precision": precision,
        "way": way,
        "adapter": count,
        "loss": [round(value, 4) for value in losses],
        "up_bytes": grid.bytes_up,
        "down_bytes": grid.bytes_down,
        "up_fewer": round(dense / grid.bytes_up, 1),
        "down_fewer": round(dense / grid.bytes_down, 1),
        "device_gib": round(peak / 2**30, 2),
        "train_seconds": round(spent["train"] / (NODES * rounds), 3),
        "mod_seconds": round(spent["mod"] / max(1, spent["messages"]), 3),
    }


# --- the page ---------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        f"# What a GPU shows: {found['device']}, torch {found['torch']}",
        "",
        "`python simulations/bench_gpu.py --out DIR`",
        "",
        f"Bytes on the device and on the CPU: {found['identity']['compared']:,} comparisons, "
        f"{len(found['identity']['different'])} different.",
        "",
        "| parameters | density, support | kept | bytes | as on the CPU | compress | encode "
        "| decode | a copy | compress + encode, in copies | the CPU's compress + encode |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["throughput"]:
        parts = ("compress", "encode", "decode")
        times = (f"{1e3 * row[f'{part}_seconds']:.2f} ms" for part in parts)
        lines.append(
            f"| {row['parameters']:,} | {row['density']:g}, {row['support']} | {row['kept']:.4f} "
            f"| {row['bytes']:,} | {'identical' if row['identical'] else 'DIFFERENT'} "
            f"| {' | '.join(times)} | {1e3 * row['copy_seconds']:.2f} ms "
            f"({row['copy_gb_s']:,.0f} GB/s) | {row['over_copies']:.0f} "
            f"| {1e3 * row['cpu_compress_encode_seconds']:.0f} ms |"
        )
    lines += [
        "",
        f"{NODES} nodes, {ROUNDS} rounds of {STEPS} steps, messages of Flower counted whole. "
        'Compressed: density 0.1 up, 0.2 down; auto: density="auto" both ways.',
        "",
        "| base | way | adapter | held-out loss by round | up, fewer bytes | down, fewer bytes "
        "| device memory | training a message | the mod a message |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['precision']} | {row['way']} | {row['adapter']:,} "
        f"| {', '.join(f'{value:.3f}' for value in row['loss'])} | {row['up_fewer']:g}x "
        f"| {row['down_fewer']:g}x | {row['device_gib']:.2f} GiB | {row['train_seconds']:.2f} s "
        f"| {row['mod_seconds']:.2f} s |"
        for row in found["clients"]
    ]
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[torch.device, bool], Any]]
PARTS = {"identity": identity, "throughput": throughput, "clients": clients}

if __name__ == "__main__":
    sys.exit(main())
