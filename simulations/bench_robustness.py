"""Accuracy that hostile nodes take, and that the rule keeps: ``make bench-robustness``.

The default task of the app (sections of Debian packages by their descriptions), federated over ten
nodes by the real strategies and client mod in one process. To have many runs in minutes, the base
model's embeddings are made once, and what is trained and sent is a softmax layer on them. Two or
three of the ten nodes are hostile; see tests/logistic.py for what they send. ``--out DIR`` writes
robustness.csv and robustness.md there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # small matrices gain nothing from more
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logistic  # noqa: E402

import compeft_fl as cf  # noqa: E402
from compeft_fl.server.observer import RoundCounts  # noqa: E402
from compeft_fl.server.robustness import SignAgreementFilter, Similarity  # noqa: E402
from compeft_fl.strategies import ComPEFTAverage, ComPEFTTies  # noqa: E402

KINDS = {"average": ComPEFTAverage, "ties": ComPEFTTies}
ATTACKS = (("none", 0), ("flipped", 2), ("noise", 2), ("huge", 2), ("flipped", 3))
NODES = 10


class Counts(RoundCounts):
    """Counts who is set aside."""

    def __init__(self) -> None:
        super().__init__()
        self.aside: list[int] = []

    def on_similarity(self, server_round: int, similarities: list[Similarity]) -> None:
        """See `SimilarityObserver`."""
        self.aside += [each.node_id for each in similarities if each.reason]


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
    problem: logistic.Problem, kind: str, attack: str, hostile: int, rule: bool, rounds: int
) -> dict[str, float]:
    """One federation: accuracy, and who was set aside how often."""
    counts = Counts()
    strategy = KINDS[kind](
        fraction_evaluate=0.0,
        observer=counts,
        robustness=SignAgreementFilter() if rule else None,
    )
    accuracy = problem.run(strategy, logistic.ATTACKS.get(attack), hostile, rounds)
    last = [node for node in counts.aside if node > 1000 + NODES - hostile]
    return {
        "accuracy": accuracy,
        "hostile_aside": len(last) / max(1, hostile * rounds),
        "honest_aside": (len(counts.aside) - len(last)) / ((NODES - hostile) * rounds),
    }


def show(rows: list[dict[str, Any]], said: str, out: Path | None) -> None:
    """Print the table; write it where asked."""
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    title = f"compeft-fl {cf.__version__}, {machine}, {datetime.date.today()}"
    heads = ("strategy", "attack", "hostile", "plain", "with the rule", "hostile out", "honest out")
    table = Table(title=title)
    lines = [
        f"{title}\n",
        said + "\n",
        f"| {' | '.join(heads)} |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for head in heads:
        table.add_column(head, justify="left" if head in heads[:2] else "right")
    for row in rows:
        cells = [
            row["strategy"], row["attack"], f"{row['hostile']} of {NODES}",
            f"{100 * row['plain']:.1f} %", f"{100 * row['rule']:.1f} %",
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
    logging.getLogger("flwr").disabled = True
    logging.getLogger("flwr.compeft_fl").disabled = True
    console = Console(stderr=True)
    data = None if options.synthetic else kept(options.embeddings)

    def problem(seed: int) -> logistic.Problem:
        if data is None:
            return logistic.synthetic(seed)
        return logistic.Problem(*data, NODES, seed, alpha=0.3, rate=options.rate)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COMPEFT_FL_STATE_DIR"] = folder
        for kind in KINDS:
            for attack, hostile in ATTACKS:
                console.print(f"{kind}, {attack} ...", style="dim")
                found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
                for seed in range(options.seeds):
                    for rule in (False, True):
                        found[rule].append(
                            run(problem(seed), kind, attack, hostile, rule, options.rounds)
                        )

                def mean(rule: bool, key: str, found: Any = found) -> float:
                    return statistics.mean(each[key] for each in found[rule])

                rows.append({
                    "strategy": kind, "attack": attack, "hostile": hostile,
                    "plain": mean(False, "accuracy"), "rule": mean(True, "accuracy"),
                    "hostile_aside": mean(True, "hostile_aside"),
                    "honest_aside": mean(True, "honest_aside"),
                })  # fmt: skip
    task = "random classes" if options.synthetic else "debian sections on MiniLM's embeddings"
    said = (
        f"Test accuracy after {options.rounds} rounds, {task}, {NODES} nodes, density 0.1, mean "
        f"of {options.seeds} seeds. Out: the share of replies that the rule set aside."
    )
    show(rows, said, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
