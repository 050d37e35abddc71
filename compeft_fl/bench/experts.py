"""``compeft-fl bench experts``: fetching, swapping, holding and composing compressed experts.

What it writes: experts_links.csv and .md (seconds to a usable model), experts_measured.csv (the
same over real sockets), experts_swaps, experts_memory, experts_store, experts_lorahub, and
experts.png.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench import expert_links, expert_store, expert_swaps, lorahub, results
from compeft_fl.bench.expert_models import DENSITY, SIZES, Bench
from compeft_fl.errors import ParameterError

__all__ = ["PARTS", "run"]

PARTS: Final = ("links", "swaps", "memory", "store", "lorahub")
_QUICK_SIZES: Final = ("0.07M", "40M")
_NOTE: Final = (
    "LoRA in bfloat16; MiniLM's is a real task vector, the others are synthetic, on layouts of "
    f"LLaMA-7B whose base has no weights here. Density {DENSITY}."
)


def run(options: argparse.Namespace) -> int:
    """Measure, show and write all, or the part that ``--only`` names."""
    out: Path = options.out
    parts = (options.only,) if options.only else PARTS
    sizes = _QUICK_SIZES if options.quick else tuple(SIZES)
    command = "compeft-fl bench experts"
    command += (f" --only {options.only}" if options.only else "") + " --quick" * options.quick
    if options.device != "cpu":
        if options.only != "swaps":
            raise ParameterError("expected --only swaps, which alone is measured on other devices")
        _swaps(out, f"{command} --device {options.device}", sizes, options.device)
        return 0
    minutes = "some ten minutes" if options.quick else "about an hour and a half"
    results.say(f"{command}: {minutes} on two cores; results: {out}")
    for part in parts:
        if part == "lorahub":
            _lorahub(out, command, lorahub.QUICK if options.quick else lorahub.FULL)
        elif part == "store":
            store(out, command, *((1_000, 3.0) if options.quick else (10_000, 15.0)))
        else:
            _PARTS[part](out, command, sizes)
    return 0


def _links(out: Path, command: str, sizes: Sequence[str]) -> None:
    computed: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    with results.Progress("links", 2 * len(sizes)) as progress:
        for size in sizes:
            bench = Bench(size)
            progress.step(f"{size} computed", 1)
            computed += expert_links.computed_rows(bench)
            progress.step(f"{size} measured", 1)
            links = (20, 200) if size == "40M" else expert_links.LINKS
            if size != "160M":
                measured += expert_links.measured_rows(bench, links)
    results.write_csv(out / "experts_links.csv", computed)
    results.write_csv(out / "experts_measured.csv", measured)
    heads = ["adapter", "sent as", "bytes", "decode and load s"]
    heads += [f"at {mbps} Mbit/s" for mbps in expert_links.LINKS]
    table = [
        [
            row["size"], row["sent_as"], f"{row['bytes']:,}", f"{row['decode_and_load_s']:.3f}",
            *(
                f"{row[f'at_{mbps}']:.2f} s ({row[f'sooner_{mbps}']:.1f}x)"
                for mbps in expert_links.LINKS
            ),
        ]
        for row in computed
    ]  # fmt: skip
    lines = [
        f"{row['size']}, {row['sent_as']}, at {row['mbit_per_second']} Mbit/s: "
        f"{row['seconds']:.2f} s, {row['bytes_passed']:,} bytes on the wire"
        for row in measured
    ]
    notes = f"{_NOTE} Decoded and loaded: the fastest of three. In parentheses: how many times "
    notes += f"sooner than {expert_links.DENSE}.\n\n"
    notes += "Measured as a whole, over a throttled relay on loopback (ours: the store's service "
    notes += "by gRPC; safetensors: by HTTP):\n\n" + "\n".join(f"- {line}" for line in lines)
    results.write_markdown(out / "experts_links.md", command, heads, table, notes)
    results.show_table("seconds to a usable model", heads, table)
    for line in lines:
        results.say(line)
    plot(out / "experts.png", computed, "40M" if "40M" in sizes else sizes[-1])


def _swaps(out: Path, command: str, sizes: Sequence[str], device: str = "cpu") -> None:
    rows: list[dict[str, Any]] = []
    with results.Progress("swaps", len(sizes)) as progress:
        for size in sizes:
            progress.step(size, 1)
            rows += expert_swaps.swap_rows(Bench(size, device=device))
    name = "experts_swaps" if device == "cpu" else "experts_swaps_cuda"
    results.write_csv(out / f"{name}.csv", rows)
    heads = ["adapter", "way", "median ms", "p99 ms", "fastest ms", "of a copy", "of hotswap"]
    table = [
        [
            row["size"], row["way"], f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}",
            f"{row['fastest_ms']:.2f}", f"{row['of_a_copy']:.2f}x", f"{row['of_hotswap']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    notes = f"{_NOTE} In turns; all from memory: ours compressed, PEFT's dense. The base has no "
    notes += "weights, so the model itself takes no part."
    if device != "cpu":
        import torch

        notes += f" On {torch.cuda.get_device_name(device)}: PEFT's dense tensors are in its memory"
        notes += " where nothing else is said, ours in the CPU's."
    results.write_markdown(out / f"{name}.md", command, heads, table, notes)
    results.show_table("from one expert to another", heads, table)


def _memory(out: Path, command: str, sizes: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = []
    with results.Progress("memory", len(sizes)) as progress:
        for size in sizes:
            progress.step(size, 1)
            rows.append(expert_swaps.memory_row(Bench(size)))
    results.write_csv(out / "experts_memory.csv", rows)
    heads = ["adapter", "parameters", "bytes an expert", "in a GiB", "as masks", "dense bf16", "x"]
    table = [
        [
            row["size"], f"{row['parameters']:,}", f"{row['bytes_each']:,}", f"{row['per_gib']:,}",
            f"{row['per_gib_masks']:,}", f"{row['per_gib_dense']:,}", f"{row['of_dense']:.1f}x",
        ]
        for row in rows
    ]  # fmt: skip
    notes = f"{_NOTE} Bytes by tracemalloc, Python's objects included."
    results.write_markdown(out / "experts_memory.md", command, heads, table, notes)
    results.show_table("experts in a GiB of memory", heads, table)


def store(out: Path, command: str, experts: int, seconds: float, clients: int = 16) -> None:
    """Fill a store, have clients ask it, write and show how soon they were answered."""
    figures = expert_store.measure_store(experts, clients, seconds, results.say)
    results.write_csv(out / "experts_store.csv", [dataclasses.asdict(x) for x in figures.loads])
    heads = ["asked", "clients", "requests", "failed", "a second", "median ms", "p99 ms"]
    table = [
        [
            load.what, str(load.clients), f"{load.requests:,}", str(load.failed),
            f"{load.per_second:,.0f}", f"{1e3 * load.median:.1f}", f"{1e3 * load.p99:.1f}",
        ]
        for load in figures.loads
    ]  # fmt: skip
    each = figures.index_bytes / experts
    notes = (
        f"{figures.experts:,} experts in the shape of the app's own adapter, pushed over gRPC, no "
        f"two alike. The index takes {figures.index_bytes / 1e6:.1f} MB ({each:,.0f} bytes an "
        f"expert), the files {figures.blob_bytes / 1e6:.1f} MB, the server's process "
        f"{figures.memory / 1e6:.0f} MB at the end. Clients are in four processes of the same "
        "machine, each thread with a connection of its own, and ask again at once. A search asks "
        "what nobody has asked before (two words, capitals and small letters as never before; some "
        "180 experts have both), so that the store keeps no answer; search again: one of 56 "
        "questions. A push counts the client's own hashing, not the making of the file; a pull "
        "what is kept of it in a cache that holds next to nothing."
    )
    results.write_markdown(out / "experts_store.md", command, heads, table, notes)
    results.show_table(f"a store of {figures.experts:,} experts", heads, table)


def _lorahub(out: Path, command: str, plan: lorahub.Plan) -> None:
    experts = out / f"lorahub-experts-{plan.variants}-{plan.steps}"
    lorahub.train_experts(experts, plan)
    rows = lorahub.measure(out, experts, plan, list(lorahub.cases(plan)))
    lorahub_table(out, command, plan, rows)


def lorahub_table(
    out: Path, command: str, plan: lorahub.Plan, rows: Sequence[dict[str, Any]]
) -> None:
    """Write and show what composing gave."""
    heads = ["method", "candidates", "evaluations", "dense", "compressed", "within one error"]
    table = [
        [
            row["method"], str(row["candidates"]), str(row["evaluations"]),
            f"{row['dense']:.2f} ± {row['dense_error']:.2f} %",
            f"{row['compressed']:.2f} ± {row['compressed_error']:.2f} %",
            ("yes" if row["within_one_error"] else "no") if row["dense_error"] else "-",
        ]
        for row in lorahub.summary(rows)
    ]  # fmt: skip
    none = [float(row["accuracy"]) for row in rows if row["method"] == "none"]
    notes = (
        f"Accuracy on tasks left out (section, role, interface, lang), mean of "
        f"{lorahub.SEEDS} seeds and its standard error; without any expert "
        f"{sum(none) / max(1, len(none)):.2f} %. MiniLM, LoRA r=8; {plan.variants} experts a task, "
        f"{plan.steps} steps each on a random half of its classes; {plan.shots} examples a class; "
        f"at most {plan.test_rows:,} test rows a task. Compressed: density {lorahub.DENSITY}."
    )
    results.write_markdown(out / "experts_lorahub.md", command, heads, table, notes)
    results.show_table("composing for a task left out", heads, table)


_PARTS: Final[dict[str, Callable[[Path, str, Sequence[str]], None]]] = {
    "links": _links,
    "swaps": _swaps,
    "memory": _memory,
}


def plot(path: Path, rows: Sequence[dict[str, Any]], size: str) -> None:
    """Draw seconds to a usable model against the link, for one size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for row in (row for row in rows if row["size"] == size):
        ours = row["sent_as"].startswith("ours")
        axes.plot(
            expert_links.LINKS, [row[f"at_{mbps}"] for mbps in expert_links.LINKS],
            marker="o", linewidth=2.4 if ours else 1.4,
            label=f"{row['sent_as']}: {row['bytes'] / 1e6:.1f} MB",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel="seconds to a usable model")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.set_xticks(expert_links.LINKS)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"An adapter of {size.rstrip('M')} million parameters: download, decode, load")
    figure.savefig(path, dpi=120)
