"""Low-rank signs and density by energy, in figures: ``python simulations/bench_factored.py``.

Energy kept against bits on task vectors of LoRA of ranks 8, 16 and 32 (rank 8: data/taus; the
others are trained here, a minute each on a core of its own), encoding and decoding speeds, versions
on the way down as terms, and the apps after Flower's examples.
Writes factored.md.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import compeft_fl as cf
from compeft_fl.bench import results
from compeft_fl.bench.measure import measure
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.factored import FactoredVector
from compeft_fl.reduction.factorize import factorize, keep_energy, kept_energy

ROOT = Path(__file__).parents[1]
DENSITIES = (0.02, 0.05, 0.1, 0.2)
FLOORS = (0.5, 0.7, 0.9)
COMMAND = "python simulations/bench_factored.py"

Table = tuple[list[str], list[list[str]], str]


# --- energy against bits ------------------------------------------------------------------------


def stored() -> Iterator[tuple[str, cf.TaskVector]]:
    """Real task vectors: name and vector."""
    for file in sorted((ROOT / "simulations" / "data" / "taus").glob("*.safetensors")):
        yield f"rank 8, {file.stem}", cf.TaskVector.from_dict(load_file(file))


def taus() -> Iterator[tuple[str, cf.TaskVector]]:
    """The same, and those that are trained here."""
    yield from stored()
    for rank in (8, 16, 32):
        for rounds, tau in trained(rank):
            yield f"rank {rank}, after {rounds} x 20 steps of Adam", tau


@functools.cache
def trained(rank: int) -> list[tuple[int, cf.TaskVector]]:
    """What a node's first round changes in MiniLM's LoRA, and its first three without others."""
    import torch

    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.tasks import data, model, training

    torch.set_num_threads(1)
    config = AppConfig.from_run_config({"peft.r": rank, "peft.lora_alpha": 2 * rank})
    rows = data.load(config)
    classifier = model.build(config, rows)
    start = {name: t.numpy().copy() for name, t in classifier.adapter_state().items()}
    here = data.node_rows(rows, {"partition-id": 0, "num-partitions": 10}, config)
    found = []
    for number in (1, 2, 3):
        training.train(classifier, here, config, number)
        end = {name: t.numpy().copy() for name, t in classifier.adapter_state().items()}
        if number != 2:
            found.append((number, cf.TaskVector.between(start, end)))
    return found


def bits_of(update: Any) -> float:
    """Bits a parameter of the message, with the layout by its id."""
    codec = "factored" if isinstance(update, FactoredVector) else "golomb"
    size = len(cf.encode(update, codec, layout_by_id=True))
    return 8.0 * size / float(update.num_parameters)


def energy() -> Table:
    """Bits and energy, top-k beside terms, and what a share of energy costs."""
    heads = ["task vector"]
    for density in DENSITIES:
        heads += [f"top-k {density}", "terms"]
    heads += [f"bits for {floor}" for floor in FLOORS]
    rows = []
    for name, tau in taus():
        row = [name]
        for density in DENSITIES:
            for update in (cf.compress(tau, density, "mean"), factorize(tau, density)):
                row.append(f"{kept_energy(tau, update):.2f} ({bits_of(update):.2f})")
        for floor in FLOORS:
            update = keep_energy(tau, floor)
            form = "terms" if isinstance(update, FactoredVector) else "top-k"
            row.append(f"{bits_of(update):.2f} {form}")
        rows.append(row)
    note = (
        "The share of the energy that is kept, and in brackets bits a parameter of the whole "
        "message: top-k of a density with Golomb codes, and low-rank signs in as many bits."
    )
    return heads, rows, note


def speed() -> Table:
    """Seconds for a LoRA of ten million parameters, on one core and more."""
    shapes = [(16, 4096), (4096, 16)] * 80
    layout = cf.Layout(cf.TensorSpec(f"w{i}", shape) for i, shape in enumerate(shapes))
    rng = np.random.default_rng(0)
    values = rng.standard_normal(layout.num_parameters).astype(np.float32)
    tau, rows = cf.TaskVector(layout, values), []
    for density in (0.05, 0.2):
        update, search, _ = measure(functools.partial(factorize, tau, density), 0.0)
        blob, encode, _ = measure(functools.partial(cf.encode, update, "factored"), 0.2)
        decode = measure(functools.partial(_values, blob), 0.2)[1]
        merge = measure(functools.partial(cf.Average(layout=layout).add, update), 0.2)[1]
        million = layout.num_parameters / 1e6
        each = [f"{million / seconds:.1f}" for seconds in (search, encode, decode, merge)]
        rows.append([str(density), str(update.num_terms), f"{bits_of(update):.2f}", *each])
    heads = ["density", "terms", "bits", "search", "encode", "decode", "merge"]
    note = (
        f"{layout.num_parameters:,} parameters, rank 16, random. Millions of parameters a second."
    )
    return heads, rows, note


def _values(blob: bytes) -> Any:
    return cf.decode(blob).to_task_vector().values


# --- the way down -------------------------------------------------------------------------------


def down() -> Table:
    """Versions towards real task vectors: a delta, and what a node lacks after some of them."""
    first = [tau for name, tau in stored() if name.endswith("_proto")]
    heads = ["version as", "delta", "2 missed", "5 missed", "10 missed", "lag at the end"]
    rows = []
    for codec, density in (("golomb", 0.1), ("golomb", 0.2), ("factored", 0.05), ("factored", 0.1)):
        rng = np.random.default_rng(0)
        layout = first[0].layout
        theta = np.zeros(layout.num_parameters, np.float32)
        downlink = Downlink(cf.TaskVector(layout, theta), density=density, codec=codec)
        for number in range(20):
            tau: Any = first[number % 2].values
            noise = 0.3 * tau.std() * rng.standard_normal(tau.size)
            theta = (0.9 * theta + 0.2 * tau + noise).astype(np.float32)
            downlink.advance(cf.TaskVector(layout, theta))
        lag = np.linalg.norm(theta - downlink.shared) / np.linalg.norm(theta)
        sizes = [
            8 * downlink.lacking(downlink.version - missed).num_bytes / layout.num_parameters
            for missed in (1, 2, 5, 10)
        ]
        rows.append([f"{codec} {density}", *(f"{size:.2f}" for size in sizes), f"{lag:.2f}"])
    note = (
        "Bits a parameter. Terms lie on the grid, their steps being powers of two; but their sums "
        "are vectors of many different integers, so that a catch-up costs what the deltas do."
    )
    return heads, rows, note


# --- apps ---------------------------------------------------------------------------------------


def apps() -> Table:
    """Apps after Flower's examples: dense, the defaults, and density "auto" both ways."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from flower_apps import (  # type: ignore[import-not-found]
        advanced_pytorch,
        custom_mods,
        flowertune_llm,
        flowertune_vit,
        quickstart_huggingface,
        quickstart_pytorch,
    )
    from local_grid import LocalGrid  # type: ignore[import-not-found]

    from compeft_fl.mod import CompressionMod
    from compeft_fl.strategies import Compressed, DownlinkOptions

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    before, auto = DownlinkOptions(density=0.2), DownlinkOptions(density="auto")
    ways: list[tuple[str, Callable[[Any], Any], list[dict[str, Any]]]] = [
        ("dense", lambda inner: inner, []),
        ("the defaults", lambda inner: Compressed(inner, downlink=before), [{"density": 0.1}]),
        ("auto both ways", lambda inner: Compressed(inner, downlink=auto), [{"density": "auto"}]),
    ]
    heads = ["app", "nodes a round, rounds"]
    for name, _, _ in ways:
        heads += [name, "of dense"][: 1 if name == "dense" else 2]
    rows = []
    for app in (
        flowertune_vit, quickstart_pytorch, advanced_pytorch, custom_mods, flowertune_llm,
        quickstart_huggingface,
    ):  # fmt: skip
        name = app.__name__.rpartition(".")[2]
        row, dense = [name, "2 of 4, 4" if app is flowertune_vit else "4, 8"], 0
        for _, wrap, mods in ways:
            os.environ["COMPEFT_FL_STATE_DIR"] = tempfile.mkdtemp()
            random.seed(1)
            grid = LocalGrid(app.client_app(*(CompressionMod(**each) for each in mods)), 4)
            strategy = app.strategy()
            if hasattr(strategy, "set_save_path"):
                strategy.set_save_path(Path(tempfile.mkdtemp()))
            scores = app.main(grid, wrap(strategy)).evaluate_metrics_serverapp
            size = grid.bytes_up + grid.bytes_down
            row.append(f"{list(scores.values())[-1]['accuracy']:.3f}")
            row += [f"1/{dense / size:.1f}"] if dense else []
            dense = dense or size
            print(name, row, flush=True)
        rows.append(row)
    logging.disable(logging.NOTSET)
    note = "Accuracy after the last round, and the bytes of arrays in all messages, both ways."
    return heads, rows, note


PARTS: dict[str, tuple[str, Callable[[], Table]]] = {
    "energy": ("Energy and bits", energy),
    "down": ("Versions on the way down", down),
    "speed": ("Speed", speed),
    "apps": ("Apps after Flower's examples", apps),
}


def main() -> None:
    """Run the parts, and write those that have run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "simulations" / "results")
    parser.add_argument("--only", choices=list(PARTS), help="one part, beside those written before")
    options = parser.parse_args()
    file = options.out / "factored.md"
    written = _sections(file)
    for key, (title, make) in PARTS.items():
        if options.only not in (None, key):
            continue
        heads, rows, note = make()
        results.show_table(title, heads, rows)
        lines = [f"## {title}", "", note, "", _line(heads), _line(["---"] * len(heads))]
        written[title] = "\n".join([*lines, *map(_line, rows)])
    text = [f"{results.machine()}: `{COMMAND}`"]
    text += [written[title] for title, _ in PARTS.values() if title in written]
    file.write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _sections(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    parts = file.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part}".rstrip() for part in parts}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
