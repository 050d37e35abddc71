"""Why TIES is behind averaging in rounds, and what mends it: ``python simulations/bench_ties.py``.

Ten nodes, ten rounds, a tenth of the parameters up, error feedback; what goes down is exact, so
that only the rule differs. The adapter is a LoRA on top of MiniLM's embedding, a run takes seconds
(``--layer``: in the last layer, half a minute). Rows are split evenly, or by Dirichlet 0.3 as in
the default federation. Finished runs lie in OUT/ties and are not run again; ties.md is written
from what is there.

    python simulations/bench_ties.py --out DIR [--seeds 42,43,44] [--only "average;TIES, 0.4"]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import training
from compeft_fl.bench import results
from compeft_fl.bench.federation import Federation, Setting
from compeft_fl.exchange.uplink import RESIDUAL_DECAY, ErrorFeedback
from compeft_fl.task_vector import TaskVector

NODES, ON_TOP = 10, 8
SPLITS = {"even": {"partition": "iid"}, "uneven": {"partition": "dirichlet", "alpha": 0.3}}


@dataclass(frozen=True)
class Rule:
    """A way to merge a round's updates.

    Attributes
    ----------
    elected : {"", "mass", "weight", "nodes"}
        Who decides a parameter's sign: nobody; the weighted sum of values, as TIES; the nodes'
        rows; the nodes, one vote each.
    over : {"all", "agreeing"}
        Whose weight the sum is divided by: all nodes', as in averaging, or that of those who sent
        the elected sign, as in TIES.
    scaling : float
        lambda.
    density : float
        Up; 1: dense.
    decay : float
        Of residuals; 0: no error feedback.
    give_back : bool
        What was outvoted returns to its node's residual (which no node can know in the real
        exchange: an upper bound on what that would help).
    """

    elected: str = ""
    over: str = "all"
    scaling: float = 1.0
    density: float = 0.1
    decay: float = RESIDUAL_DECAY
    give_back: bool = False


TIES = Rule("mass", "agreeing", 0.4)
RULES = {
    "average": Rule(),
    "TIES, 0.2": Rule("mass", "agreeing", 0.2),
    "TIES, 0.4": TIES,
    "TIES, 0.7": Rule("mass", "agreeing", 0.7),
    "TIES, 1": Rule("mass", "agreeing", 1.0),
    "TIES, 0.2, majority by rows": Rule("weight", "agreeing", 0.2),
    "TIES, 0.2, one vote a node": Rule("nodes", "agreeing", 0.2),
    "TIES, 0.2, outvoted values given back": Rule("mass", "agreeing", 0.2, give_back=True),
    "TIES, 0.2, no error feedback": Rule("mass", "agreeing", 0.2, decay=0.0),
    "average, no error feedback": Rule(decay=0.0),
    "signs elected, over all nodes": Rule("mass"),
    "no election, over those who sent, 0.2": Rule("", "agreeing", 0.2),
    "average, dense": Rule(density=1.0),
    "TIES, 0.4, dense": Rule("mass", "agreeing", 0.4, density=1.0),
    "signs elected, over all nodes, dense": Rule("mass", density=1.0),
}


def merge(rule: Rule, values: Any, weights: Any) -> tuple[Any, Any]:
    """The merged vector, and which entries counted, of values of shape (nodes, parameters)."""
    weighted = weights[:, None] * values
    if not rule.elected:
        counted = values != 0
    else:
        votes = {
            "mass": weighted,
            "weight": weights[:, None] * np.sign(values),
            "nodes": np.sign(values),
        }[rule.elected]
        counted = (np.sign(values) == np.sign(votes.sum(0))) & (values != 0)
    total = np.where(counted, weighted, 0.0).sum(0)
    by = weights.sum() if rule.over == "all" else (weights[:, None] * counted).sum(0)
    return rule.scaling * total / np.where(by == 0, 1.0, by), counted


def run(rule: Rule, base: Federation, start: TaskVector) -> list[dict[str, Any]]:
    """Each round: accuracy, loss, and how the merged step is made up."""
    feedback = [
        ErrorFeedback(min(rule.density, 0.999), "mean", support="best", decay=rule.decay)
        for _ in range(NODES)
    ]
    now: Any = start.values.astype(np.float64)
    rows = []
    for number in range(1, base.config.rounds + 1):
        begin = TaskVector(start.layout, now.astype(np.float32)).to_dict()
        sent, weights = [], []
        for node, shard in enumerate(base._shards):
            base._load(begin)
            seed = training.round_seed(base.config, number, node)
            result = training.train(base._classifier, shard, base.config, seed)
            tau = TaskVector.between(begin, base._state())
            update = tau if rule.density == 1 else feedback[node].compress(tau)
            sent.append(np.asarray(update.to_task_vector().values, np.float64))
            weights.append(float(result.num_examples))
        values = np.stack(sent)
        step, counted = merge(rule, values, np.array(weights))
        if rule.give_back:
            for each, lost in zip(feedback, np.where(counted, 0.0, values), strict=True):
                each.residual = each.residual + lost.astype(np.float32)
        now = now + step
        accuracy, loss = base._scored(now.astype(np.float32))
        senders, mass = (values != 0).sum(0), float(np.abs(values).sum())
        rows.append(
            {
                "accuracy": accuracy,
                "loss": loss,
                "senders": float(senders[senders > 0].mean()),
                "alone": float((step[senders == 1] ** 2).sum() / (step**2).sum()),
                "outvoted": float(np.abs(values[~counted]).sum()) / mass,
                "length": float(np.linalg.norm(step)),
            }
        )
    return rows


def measure(names: list[str], seeds: list[int], layer: bool, out: Path) -> None:
    """What is missing, one after the other over one model."""
    import torch

    torch.set_num_threads(1)
    where = "layer" if layer else "top"
    for split, keys in SPLITS.items():
        for seed in seeds:
            base = None
            for name in names:
                slug = name.replace(" ", "-").replace(",", "")
                file = out / "ties" / f"{where}-{split}-{slug}-{seed}.json"
                if file.exists():
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                if base is None:
                    base = _federation(keys, seed, layer, out)
                    start = base.adapter
                began = time.process_time()
                rows = run(RULES[name], base, start)
                told = {"rule": name, "split": split, "seed": seed, "adapter": where}
                told |= {"cpu_seconds": round(time.process_time() - began), "rounds": rows}
                file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                print(f"{where}, {split}, {seed}, {name}: {rows[-1]}", flush=True)


def _federation(keys: dict[str, Any], seed: int, layer: bool, out: Path) -> Federation:
    more: dict[str, Any] = {"peft-options": '{"layers_to_transform": [5]}'} if layer else {}
    config = AppConfig.from_run_config({"seed": seed, "device": "cpu", **keys, **more})
    setting = Setting("ties", "dense", "dense", on_top=0 if layer else ON_TOP)
    return Federation(setting, config, NODES, out / "ties" / "embeddings.npz")


def report(out: Path) -> None:
    """Write ties.md."""
    found = [json.loads(file.read_text()) for file in sorted((out / "ties").glob("*.json"))]
    heads = ["rule", "adapter", "seeds", "even: accuracy", "loss", "uneven: accuracy", "loss"]
    heads += ["senders a parameter", "of the step: sent by one node", "outvoted"]
    table = []
    for where in ("top", "layer"):
        for name in RULES:
            mine = [r for r in found if (r["rule"], r["adapter"]) == (name, where)]
            uneven = [r for r in mine if r["split"] == "uneven"]
            if not uneven:
                continue
            cells = [name, where, str(len(uneven))]
            for split in SPLITS:
                last = [r["rounds"][-1] for r in mine if r["split"] == split]
                cells += [_cell([100 * row["accuracy"] for row in last], 1)] if last else ["-"]
                cells += [_cell([row["loss"] for row in last], 3)] if last else ["-"]
            for key, form in (("senders", ".1f"), ("alone", ".0%"), ("outvoted", ".0%")):
                told = [row[key] for r in uneven for row in r["rounds"]]
                cells.append(format(statistics.fmean(told), form))
            table.append(cells)
    notes = (
        "Test rows after ten rounds, in percent, and the loss; ± is the seeds' standard deviation. "
        "The last columns are means over the rounds of uneven splits: how many nodes sent a "
        "parameter that any sent, what part of the step's squared length lies where one node alone "
        "sent, and what part of all magnitudes was outvoted. Adapter: on top of the embedding, or "
        "in the last layer."
    )
    seeds = ",".join(map(str, sorted({each["seed"] for each in found})))
    command = f"python simulations/bench_ties.py --seeds {seeds}"
    results.write_markdown(out / "ties.md", command, heads, table, notes)
    results.show_table("ties", heads, table)


def _cell(values: list[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("simulations/results"))
    parser.add_argument("--seeds", default="42,43,44", help="numbers, by comma")
    parser.add_argument("--only", help="rules, by semicolon")
    parser.add_argument("--layer", action="store_true", help="LoRA in the last layer")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(";")] if options.only else list(RULES)
    if unknown := [name for name in names if name not in RULES]:
        parser.error(f"expected rules among {'; '.join(RULES)}; found {unknown[0]!r}")
    if not options.report:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        measure(names, seeds, options.layer, options.out)
    report(options.out)


if __name__ == "__main__":
    main()
