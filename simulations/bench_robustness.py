"""Accuracy that hostile nodes take, and that bounds and rule keep: ``make bench-robustness``.

The default task of the app (sections of Debian packages by their descriptions), federated over ten
nodes by the parts of the real strategies and client mod, in one process and without Flower. To have
many runs in minutes, the base model's embeddings are made once, and what is trained and sent is a
softmax layer on them. One, two
or three of the ten nodes are hostile; see tests/logistic.py for what they send. Each federation is
run without bounds, with those that are on by default, and with `SignAgreementFilter` as well.
``--out DIR`` writes robustness.csv and robustness.md there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # small matrices gain nothing from more
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logistic  # noqa: E402
from local_grid import identify  # noqa: E402

import compeft_fl as cf  # noqa: E402
from compeft_fl.exchange.downlink import Downlink  # noqa: E402
from compeft_fl.exchange.uplink import ErrorFeedback  # noqa: E402
from compeft_fl.server.bounds import ReplyBounds  # noqa: E402
from compeft_fl.server.intake import Reply  # noqa: E402
from compeft_fl.server.robustness import (  # noqa: E402
    Candidate,
    SignAgreementFilter,
    screened,
)
from compeft_fl.wire.messages import encode  # noqa: E402

ACCUMULATORS = {"average": cf.Average, "ties": lambda: cf.Ties(0.4)}
ONE = tuple((name, 1) for name in logistic.FINITE_ATTACKS)
ATTACKS = {
    "average": (("none", 0), ("absent", 1), *ONE, ("flipped by 4", 2), ("flipped by 4", 3)),
    "ties": (("none", 0), ("flipped", 1), ("a tenth flipped", 1), ("flipped by 4", 2)),
}
MODES = ("no bounds", "default", "with the rule")
NODES = 10


def embeddings() -> tuple[logistic.Rows, logistic.Rows]:
    """Unit embeddings of the app's default data by its default model: training and test rows."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.tasks.data import load
    from compeft_fl.app.tasks.model import embedded_model

    data = load(AppConfig())
    folder = embedded_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def embedded(rows: Any) -> logistic.Rows:
        made = np.empty((len(rows), model.config.hidden_size), np.float32)
        order = sorted(range(len(rows)), key=lambda index: len(rows.texts[index]))
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                chosen = order[start : start + 64]
                batch = tokenizer(
                    [rows.texts[index] for index in chosen], padding=True, truncation=True,
                    max_length=64, return_tensors="pt",
                )  # fmt: skip
                mask = batch["attention_mask"].unsqueeze(2).float()
                mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
                made[chosen] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return made, np.asarray(rows.classes, np.int64)

    return embedded(data.train), embedded(data.test)


def kept(file: Path | None) -> tuple[logistic.Rows, logistic.Rows]:
    """The embeddings, from a file where they have been made before."""
    if file is not None and file.exists():
        with np.load(file) as arrays:
            return (arrays["a"], arrays["b"]), (arrays["c"], arrays["d"])
    train, test = embeddings()
    if file is not None:
        np.savez(file, a=train[0], b=train[1], c=test[0], d=test[1])
    return train, test


def run(
    problem: logistic.Problem, kind: str, attack: str, hostile: int, mode: str, rounds: int
) -> dict[str, float]:
    """One federation: accuracy, and how many replies were set aside."""
    layout = cf.Layout.of(problem.start)
    theta = cf.TaskVector.from_dict(problem.start)
    downlink = Downlink(theta)
    feedback = [ErrorFeedback(0.1) for _ in range(NODES)]
    free = math.inf
    unbounded = ReplyBounds(
        max_weight=free, max_norm=free, max_impact=free, max_largest=free, set_aside=False
    )
    bounds = unbounded if mode == MODES[0] else ReplyBounds()
    rule = SignAgreementFilter() if mode == MODES[2] else None
    change, rng = HOSTILE.get(attack), np.random.default_rng([problem.seed, 1])
    aside = {True: 0, False: 0}  # hostile, honest

    def replies(shared: dict[str, np.ndarray]) -> Iterator[tuple[Reply, Candidate]]:
        for node in range(NODES):
            tau = cf.TaskVector.between(shared, problem.trained(shared, node))
            if not np.isfinite(tau.values).all():
                continue  # an error reply: from such an adapter nothing can be learned
            update: Any = feedback[node].compress(tau)
            weight = float(len(problem.parts[node][1]))
            if change is not None and node >= NODES - hostile:
                update, weight = change(update, rng), getattr(change, "weight", weight)
            metrics = MetricRecord({"num-examples": weight})
            message = Message(RecordDict({"metrics": metrics}), node + 1, "train")
            codec = "golomb" if isinstance(update, cf.TernaryVector) else "dense"
            yield Reply(node, message, 0, node), Candidate(weight, (encode(update, codec),), update)

    for server_round in range(rounds):
        before = [each.residual for each in feedback]
        merged = ACCUMULATORS[kind]()
        found = replies(cf.TaskVector(layout, downlink.shared).to_dict())
        judged = screened(rule, layout, found, lambda *_: None)
        for reply, each in bounds.within(server_round, judged, None):
            if each.reason is None:
                merged.add(each.update, each.weight)
            else:
                aside[reply.node_id >= NODES - hostile] += 1
                feedback[reply.node_id] = ErrorFeedback(0.1, residual=before[reply.node_id])
        if not merged.count:
            continue
        with np.errstate(over="ignore"):
            moved = cf.TaskVector.from_dict(merged.result().apply(theta.to_dict()))
        if np.isfinite(moved.values).all():  # as a server does
            theta = moved
            downlink.advance(theta)
    arrays = {name: Array(value) for name, value in theta.to_dict().items()}
    return {
        "accuracy": problem.accuracy(ArrayRecord(arrays)),
        "hostile_aside": aside[True] / max(1, hostile * rounds),
        "honest_aside": aside[False] / ((NODES - hostile) * rounds),
    }


def absent(update: Any, rng: Any) -> Any:
    """The node takes part, and nothing that it sends counts: the run without it."""
    return cf.TaskVector(update.layout, np.zeros(update.num_parameters, np.float32))


HOSTILE: dict[str, Any] = {
    **logistic.FINITE_ATTACKS,
    "flipped by 4": logistic.flipped,
    "absent": logistic.Hostile(absent, weight=1e-9),
}


def show(rows: list[dict[str, Any]], said: str, out: Path | None) -> None:
    """Print the table; write it where asked."""
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    title = f"compeft-fl {cf.__version__}, {machine}, {datetime.date.today()}"
    heads = ("strategy", "attack", "hostile", *MODES, "hostile out", "honest out")
    table = Table(title=title)
    lines = [
        f"{title}\n",
        said + "\n",
        f"| {' | '.join(heads)} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for head in heads:
        table.add_column(head, justify="left" if head in heads[:2] else "right")
    for row in rows:
        cells = [
            row["strategy"], row["attack"], f"{row['hostile']} of {NODES}",
            *(f"{100 * row[mode]:.1f} %" for mode in MODES),
            f"{100 * row['hostile_aside']:.0f} %" if row["hostile"] else "",
            f"{100 * row['honest_aside']:.1f} %",
        ]  # fmt: skip
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    Console(width=None if sys.stdout.isatty() else 120).print(table, said, sep="\n")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "robustness.md").write_text("\n".join(lines) + "\n")
        with (out / "robustness.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> int:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for robustness.csv and robustness.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rate", type=float, default=16.0, help="the nodes' learning rate")
    parser.add_argument("--embeddings", type=Path, help="a .npz file to keep the embeddings in")
    parser.add_argument("--synthetic", action="store_true", help="random classes, no model")
    options = parser.parse_args()
    identify()
    logging.getLogger("flwr").disabled = True
    logging.getLogger("flwr.compeft_fl").disabled = True
    console = Console(stderr=True)
    data = None if options.synthetic else kept(options.embeddings)

    def problem(seed: int) -> logistic.Problem:
        if data is None:
            return logistic.synthetic(seed)
        return logistic.Problem(*data, NODES, seed, alpha=0.3, rate=options.rate)

    rows = []
    for kind in ACCUMULATORS:
        for attack, hostile in ATTACKS[kind]:
            console.print(f"{kind}, {attack} ...", style="dim")
            found = {
                mode: [
                    run(problem(seed), kind, attack, hostile, mode, options.rounds)
                    for seed in range(options.seeds)
                ]
                for mode in MODES
            }

            def mean(mode: str, key: str, found: Any = found) -> float:
                return statistics.mean(each[key] for each in found[mode])

            rows.append({
                "strategy": kind, "attack": attack, "hostile": hostile,
                **{mode: mean(mode, "accuracy") for mode in MODES},
                "hostile_aside": mean(MODES[1], "hostile_aside"),
                "honest_aside": mean(MODES[1], "honest_aside"),
            })  # fmt: skip
    task = "random classes" if options.synthetic else "debian sections on MiniLM's embeddings"
    said = (
        f"Test accuracy after {options.rounds} rounds, {task}, {NODES} nodes, density 0.1, mean "
        f"of {options.seeds} seeds. Absent: the run without the node. Out: the share of replies "
        "that are set aside by default."
    )
    show(rows, said, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
