"""What gives more learning for a byte: ``python simulations/bench_levers.py --out DIR [NAME ...]``.

Each lever by itself on a federation that takes half a minute: the app's model and data, six nodes,
all in each round, which make the start from the seed, and the adapter in the last layer alone, so
that what lies below is computed once. ``--whole`` is the app's default federation, five minutes a
run. Tuned on the tasks section and role only. Finished runs lie in DIR/levers and are not run
again; levers.md is written from all that is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import compeft_fl as cf
from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import training
from compeft_fl.app.tasks.base import learning_rate
from compeft_fl.bench import results
from compeft_fl.bench.federation import Federation, Setting
from compeft_fl.codecs.auto import codec_of
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.uplink import ErrorFeedback
from compeft_fl.merging.accumulators import Average
from compeft_fl.reduction.rules import Reduction
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector

STORED = Path(__file__).parent / "results" / "levers.md"
NODES, STEPS, RANK = 6, 20, 8
LAST_LAYER = {"peft-options": '{"layers_to_transform": [5]}'}


@dataclass(frozen=True)
class Lever:
    """One way to run a federation."""

    name: str
    up: str = "factored"
    down: str = "factored"
    density: float | str = 0.05
    down_density: float | str = 0.1
    energy: float = 0.5  # of "auto", up and down
    decay: float = 0.9  # of residuals
    step: float = 1.0  # of the server
    momentum: float = 0.0
    fall: float = 1.0  # what both densities are multiplied by after each round
    rounds: int = 10
    longer: float = 1.0  # local steps, against the others
    cosine: bool = False  # the learning rate falls to a tenth
    per_tensor: bool = False  # top-k of each tensor by itself, with a scale of its own


LEVERS = (
    Lever("dense", "dense", "dense"),
    Lever("dense, cosine", "dense", "dense", cosine=True),
    Lever("ternary 0.1, 0.2 (compeft)", "golomb", "golomb", 0.1, 0.2),
    Lever("ternary 0.05, 0.1", "golomb", "golomb", 0.05, 0.1),
    Lever("ternary 0.1, 0.2, per tensor", "golomb", "golomb", 0.1, 0.2, per_tensor=True),
    Lever("ternary 0.1, 0.2, decay 0.95", "golomb", "golomb", 0.1, 0.2, decay=0.95),
    Lever("factored 0.05, 0.1"),
    Lever("factored 0.05, 0.05", down_density=0.05),
    Lever("factored 0.1, 0.1", density=0.1),
    Lever("factored 0.02, 0.05", density=0.02, down_density=0.05),
    Lever("factored up 0.05, ternary down 0.2", down="golomb", down_density=0.2),
    Lever("factored 0.05, 0.1, decay 1", decay=1.0),
    Lever("factored 0.05, 0.1, decay 0.7", decay=0.7),
    Lever("factored 0.05, 0.1, step 1.5", step=1.5),
    Lever("factored 0.05, 0.1, step 0.7, momentum 0.5", step=0.7, momentum=0.5),
    Lever("factored 0.12, 0.2, falling by 0.85", density=0.12, down_density=0.2, fall=0.85),
    Lever("factored 0.025, 0.05, rising by 1.15", density=0.025, down_density=0.05, fall=1.15),
    Lever("factored 0.1, 0.1, 5 rounds twice as long", density=0.1, rounds=5, longer=2.0),
    Lever("factored 0.07, 0.1, 7 rounds half as long again", density=0.07, rounds=7, longer=1.5),
    Lever("factored 0.1, 0.1, 7 rounds twice as long", density=0.1, rounds=7, longer=2.0),
    Lever("auto, energy 0.5 both ways", density="auto", down_density="auto"),
    Lever("auto, energy 0.7 both ways", density="auto", down_density="auto", energy=0.7),
    Lever("factored 0.05, 0.05, step 1.5", down_density=0.05, step=1.5),
    Lever("factored 0.05, 0.05, decay 1", down_density=0.05, decay=1.0),
    Lever("factored 0.05, 0.05, decay 1, step 1.5", down_density=0.05, decay=1.0, step=1.5),
    Lever("factored 0.05, 0.05, cosine", down_density=0.05, cosine=True),
    Lever("factored 0.05, 0.05, step 1.5, cosine", down_density=0.05, step=1.5, cosine=True),
    Lever(
        "factored 0.06, 0.06, step 1.5, cosine",
        density=0.06,
        down_density=0.06,
        step=1.5,
        cosine=True,
    ),
    Lever(
        "factored 0.08, 0.08, step 1.5, cosine (lean)",
        density=0.08,
        down_density=0.08,
        step=1.5,
        cosine=True,
    ),
    Lever(
        "ternary 0.1, 0.1, step 1.5, cosine", "golomb", "golomb", 0.1, 0.1, step=1.5, cosine=True
    ),
    Lever("ternary 0.1, 0.2, cosine", "golomb", "golomb", 0.1, 0.2, cosine=True),
    Lever(
        "ternary 0.1, 0.2, step 1.5, cosine", "golomb", "golomb", 0.1, 0.2, step=1.5, cosine=True
    ),
    Lever("factored 0.08, 0.08, cosine", density=0.08, down_density=0.08, cosine=True),
    Lever("factored 0.05, 0.05, momentum 0.3", down_density=0.05, momentum=0.3),
    Lever("factored 0.07, 0.05", density=0.07, down_density=0.05),
    Lever("factored 0.04, 0.08", density=0.04, down_density=0.08),
    Lever("factored 0.05 up, ternary down 0.1", down="golomb"),
    Lever("ternary 0.1, 0.1", "golomb", "golomb", 0.1, 0.1),
    Lever("ternary 0.1, 0.1, step 1.5", "golomb", "golomb", 0.1, 0.1, step=1.5),
    Lever(
        "factored 0.08, 0.08, falling by 0.9, step 1.5",
        density=0.08,
        down_density=0.08,
        fall=0.9,
        step=1.5,
    ),
)


class Levered:
    """A federation with a lever; the benchmarks' federation gives model, rows and scores."""

    def __init__(self, lever: Lever, base: Federation, start: TaskVector) -> None:
        self.lever, self.base, self.adapter = lever, base, start
        self.num_nodes = base.num_nodes
        steps = round(lever.longer * base.config.local_steps)
        self.config = replace(base.config, rounds=lever.rounds, local_steps=steps)
        if lever.cosine:
            least = self.config.learning_rate / 10
            self.config = replace(self.config, schedule="cosine", min_learning_rate=least)
        self._feedback: dict[int, ErrorFeedback] = {}
        down = "golomb" if lever.down == "dense" else lever.down
        self._way_down = Downlink(
            start, density=lever.down_density, codec=down, energy=lever.energy
        )
        self._velocity = np.zeros(start.num_parameters)
        self.kept: list[float] = []  # of each update's energy

    def scores(self) -> Iterator[dict[str, Any]]:
        """Each round: accuracy, loss, bits a parameter and node, both ways."""
        lever, layout = self.lever, self.adapter.layout
        shared: Any = self._way_down.shared
        d, down = self.adapter.num_parameters, 0
        accuracy, loss = self.base._scored(shared)
        yield {"accuracy": accuracy, "loss": loss, "bits": 0.0}
        for number in range(1, lever.rounds + 1):
            merged, up = self._round(number, shared)
            self._velocity = lever.momentum * self._velocity + merged
            values: Any = self.adapter.values
            moved = (values + lever.step * self._velocity).astype(np.float32)
            self.adapter = TaskVector(layout, moved)
            accuracy, loss = self.base._scored(moved)
            bits = 8 * (up + down) / (self.num_nodes * d)
            kept = self.kept[-self.num_nodes :]
            row = {"accuracy": accuracy, "loss": loss, "bits": bits}
            yield row | {"kept": float(np.mean(kept)) if kept else None}
            if lever.down == "dense":
                shared, down = moved, 4 * d * self.num_nodes
                continue
            self._way_down.reduction = self._falling(self._way_down.reduction, number)
            before = self._way_down.version
            self._way_down.advance(self.adapter)
            shared = self._way_down.shared
            down = self._way_down.lacking(before).num_bytes * self.num_nodes

    def _falling(self, reduction: Reduction, number: int) -> Reduction:
        if isinstance(self.lever.down_density, str):
            return reduction
        return replace(reduction, density=self.lever.down_density * self.lever.fall ** (number - 1))

    def _round(self, number: int, shared: Any) -> tuple[Any, int]:
        """What the server moves by, and the bytes up."""
        layout = self.adapter.layout
        start = TaskVector(layout, shared).to_dict()
        rate = learning_rate(self.config, number)
        config = replace(self.config, learning_rate=rate, schedule="constant")
        sums, up = Average(layout=layout), 0
        for node, rows in enumerate(self.base._shards):
            self.base._load(start)
            seed = training.round_seed(config, number, node)
            result = training.train(self.base._classifier, rows, config, seed)
            update, size = self._sent(node, TaskVector.between(start, self.base._state()), number)
            sums.add(update, result.num_examples)
            up += size
        merged: Any = sums.result().values
        return merged.astype(np.float64), up

    def _sent(self, node: int, tau: TaskVector, number: int) -> tuple[Any, int]:
        lever = self.lever
        if lever.up == "dense":
            return tau, 4 * tau.num_parameters
        feedback = self._feedback.setdefault(node, ErrorFeedback(decay=lever.decay))
        density = lever.density
        if not isinstance(density, str):
            density *= lever.fall ** (number - 1)
        factored = lever.up == "factored"
        feedback.reduction = Reduction(density, "mean", "best", factored, lever.energy)
        if lever.per_tensor:
            feedback.reduction = _PerTensor(density)
        update = feedback.compress(tau)
        assert feedback.quality is not None
        self.kept.append(1 - feedback.quality.relative_error**2)
        blob = cf.encode(update, codec_of(update, "golomb"), layout_by_id=True)
        return update, len(blob)


@dataclass(frozen=True)
class _PerTensor(Reduction):
    """Top-k of each tensor by itself."""

    def __call__(self, tau: TaskVector, lowest: int = -149) -> TernaryVector:
        """See `Reduction`."""
        assert not isinstance(self.density, str)
        values: Any = tau.values
        found, scales = np.zeros_like(values), []
        for _, where in tau.layout.slices():
            alone = cf.TaskVector.from_dict({"w": values[where]})
            kept = cf.compress(alone, self.density, "mean", "best")
            found[where] = kept.to_task_vector().values
            scales.append(float(kept.scales[0]))
        ternary = TernaryVector.from_task_vector(TaskVector(tau.layout, np.sign(found)))
        return ternary.with_scales(scales)


def run(
    names: list[str], task: str, seed: int, whole: bool, rank: int, device: str, out: Path
) -> None:
    """What is missing of some levers, one after the other over one model."""
    import torch

    torch.set_num_threads(1)
    keys: dict[str, Any] = {"seed": seed, "data": f"debian-{task}", "local-steps": STEPS}
    keys |= {"device": device, "dtype": "float32", "schedule": "constant"}
    keys |= {"peft.r": rank, "peft.lora_alpha": 2 * rank}
    nodes, base, start = 10 if whole else NODES, None, None
    for lever in [lever for lever in LEVERS if lever.name in names]:
        what = ("all layers" if whole else "last layer") + (
            f", rank {rank}" if rank != RANK else ""
        )
        place = what.split()[0] + ("" if rank == RANK else f"-rank-{rank}")
        file = out / "levers" / f"{lever.name.replace(' ', '-')}-{task}-{place}-{seed}.json"
        if file.exists():
            continue
        if base is None or start is None:
            config = AppConfig.from_run_config(keys if whole else {**keys, **LAST_LAYER})
            base = Federation(Setting("levers", "dense", "dense"), config, nodes)
            start = base.adapter
        started, rows = time.process_time(), []
        for row in Levered(lever, base, start).scores():
            rows.append(row)
            print(f"{lever.name}, {task}, {seed}: {row}", flush=True)
        result = {
            "lever": asdict(lever),
            "task": task,
            "seed": seed,
            "adapter": what,
            "rounds": rows,
        }
        result["cpu_seconds"] = round(time.process_time() - started)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


HEADS = [
    "lever (density up, down)", "task", "adapter in", "seeds", "accuracy", "loss", "bits",
    "of dense", "gain, of dense's", "to 95 % of dense's gain", "energy kept",
]  # fmt: skip


def report(out: Path) -> None:
    """Write levers.md; what DIR does not hold stays as the project's own levers.md has it."""
    found = [json.loads(file.read_text()) for file in sorted((out / "levers").glob("*.json"))]
    table = {key: row for row in _stored() if (key := tuple(row[:3]))}
    for name, task, where in {(r["lever"]["name"], r["task"], r["adapter"]) for r in found}:
        here = [r for r in found if (r["task"], r["adapter"]) == (task, where)]
        mine = [r for r in here if r["lever"]["name"] == name]
        dense = {r["seed"]: r for r in here if r["lever"]["name"] == "dense"}
        last = [r["rounds"][-1] for r in mine]
        bits = float(np.mean([_bits(r) for r in mine]))
        kept = [row["kept"] for r in mine for row in r["rounds"] if row.get("kept") is not None]
        table[name, task, where] = [
            name,
            task,
            where,
            str(len(mine)),
            f"{100 * np.mean([row['accuracy'] for row in last]):.1f} %",
            f"{np.mean([row['loss'] for row in last]):.3f}",
            f"{bits:.2f}",
            "1" if name == "dense" else _ratio(mine, dense),
            _gain(mine, dense),
            _to_gain(mine, dense),
            f"{np.mean(kept):.2f}" if kept else "-",
        ]
    order = [lever.name for lever in LEVERS]
    rows = sorted(table.values(), key=lambda row: (row[2], row[1], order.index(row[0])))
    notes = (
        "Bits a parameter and node, all rounds, both directions. Gain: what the loss has fallen by "
        "in the last round, against dense's with the same seed, and by seed. To 95 %: of the most "
        "that dense's loss falls by in any round; the bits until a lever has that, against those "
        "that dense takes for it. One seed does not rank what is near. `(lean)` are the settings "
        "that hold by default, `(compeft)` those of preset=compeft. The date is that of the last "
        "runs: rows may be of earlier ones."
    )
    results.write_markdown(
        out / "levers.md", "python simulations/bench_levers.py", HEADS, rows, notes
    )
    results.show_table("levers", HEADS, rows)


def _stored() -> list[list[str]]:
    """The rows of the project's own levers.md."""
    lines = STORED.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [row for row in rows if row != HEADS]


def _ratio(mine: list[dict[str, Any]], dense: dict[int, Any]) -> str:
    pairs = [(_bits(dense[r["seed"]]), _bits(r)) for r in mine if r["seed"] in dense]
    return f"1/{np.mean([a / b for a, b in pairs]):.1f}" if pairs else "-"


def _bits(result: dict[str, Any]) -> float:
    return float(sum(row["bits"] for row in result["rounds"]))


def _gain(mine: list[dict[str, Any]], dense: dict[int, Any]) -> str:
    """What the loss has fallen by at the end, against dense."""

    def fallen(result: dict[str, Any]) -> float:
        return float(result["rounds"][0]["loss"] - result["rounds"][-1]["loss"])

    parts = [100 * fallen(r) / fallen(dense[r["seed"]]) for r in mine if r["seed"] in dense]
    each = f" ({', '.join(f'{part:.0f}' for part in parts)})" if len(parts) > 1 else ""
    return f"{np.mean(parts):.0f} %{each}" if parts else "-"


def _to_gain(mine: list[dict[str, Any]], dense: dict[int, Any]) -> str:
    """What part of dense's bits to 95 % of its gain in loss these took to get there."""
    ratios = []
    for result in mine:
        whole = dense.get(result["seed"])
        if whole is None:
            return "-"
        losses = [row["loss"] for row in whole["rounds"]]
        goal = losses[0] - 0.95 * (losses[0] - min(losses))
        ours, theirs = _until(result, goal), _until(whole, goal)
        if ours is None or theirs is None:
            return f"not in {len(result['rounds']) - 1} rounds"
        ratios.append(theirs / ours)
    return f"1/{np.mean(ratios):.1f}"


def _until(result: dict[str, Any], goal: float) -> float | None:
    """The bits until the loss is there."""
    total = 0.0
    for row in result["rounds"]:
        total += float(row["bits"])
        if row["loss"] <= goal:
            return total
    return None


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="levers; all where none is given")
    parser.add_argument("--out", type=Path, default=Path("simulations/results"))
    parser.add_argument("--task", default="section", choices=("section", "role"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--whole", action="store_true", help="the app's default federation")
    parser.add_argument("--rank", type=int, default=RANK, help="of LoRA; its alpha is twice that")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    known = {lever.name: lever for lever in LEVERS}
    for name in options.names:
        if name not in known:
            parser.error(f"expected levers among {'; '.join(known)}; found {name}")
    if not options.report:
        names = options.names or list(known)
        whole, rank = options.whole, options.rank
        run(names, options.task, options.seed, whole, rank, options.device, options.out)
    report(options.out)


if __name__ == "__main__":
    main()
