"""What one hostile node of ten takes from the default federation: ``--out DIR`` writes hostile.md.

The default run of the ready-made app with preset=compeft (ten nodes, ten rounds), in one process:
real clients, messages, mod and strategy. One node, the one with as many rows as the median node,
sends what an attack makes of its honest update, with a weight of 10^12. Each attack is run with the
bounds that are on by default; "honest, no bounds" is the federation without any. One run a seed: a
difference below two points is within what seeds differ by.

    python simulations/bench_hostile.py --out DIR [--seeds 42,43] [--only "flipped;huge"]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # two runs beside each other
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from flwr.app import Context, Error, Message, RecordDict  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from local_grid import LocalGrid, node_ids  # noqa: E402

import compeft_fl as cf  # noqa: E402
from compeft_fl.app import client_app, server_app  # noqa: E402
from compeft_fl.app.config import AppConfig  # noqa: E402
from compeft_fl.compeft import compress  # noqa: E402
from compeft_fl.exchange.records import find_update, update_record  # noqa: E402
from compeft_fl.strategies import ReplyBounds  # noqa: E402
from compeft_fl.task_vector import Layout, TaskVector  # noqa: E402
from compeft_fl.wire.messages import encode, inspect  # noqa: E402

NODES = 10
NO_BOUNDS = dict.fromkeys(("max_weight", "max_norm", "max_impact", "max_largest"), math.inf)


def huge(values: Any) -> Any:
    """Values near float32's largest."""
    return np.sign(values) * np.float32(3.3e38)


def a_tenth(values: Any) -> Any:
    """Honest signs in nine tenths of the entries, tiny; the largest tenth turned around."""
    kept = np.flatnonzero(values)
    turned = kept[np.argsort(-np.abs(values[kept]))[: max(1, kept.size // 10)]]
    sent = values * np.float32(1e-3)
    sent[turned] = -10 * values[turned]
    return sent


ATTACKS: dict[str, Callable[[Any], Any] | None] = {
    "honest, no bounds": None,
    "honest": None,
    "absent": None,
    "huge": huge,
    "flipped": lambda values: -values,
    "flipped, 100 times as long": lambda values: -100 * values,
    "a tenth flipped": a_tenth,
    "nothing, all the weight": lambda values: values * np.float32(1e-20),
}


def run(attack: str, seed: int, device: str) -> dict[str, Any]:
    """One federation; its summary."""
    with tempfile.TemporaryDirectory(prefix="bench-hostile-") as folder:
        os.environ["COMPEFT_FL_STATE_DIR"] = f"{folder}/state"
        config = dataclasses.replace(
            AppConfig(preset="compeft"),
            seed=seed,
            run_dir=f"{folder}/run",
            min_nodes=NODES,
            device=device,
            dtype="float32",
        )
        flat = config.to_run_config()
        layouts: list[Layout] = []
        hostile = node_ids(NODES)[4]

        def fault(node: int, reply: Message) -> list[Message]:
            make = ATTACKS[attack]
            if node != hostile or attack.startswith("honest") or reply.has_error():
                return [reply]
            if attack == "absent":
                return [Message(Error(5, "gone"), reply_to=_answered(reply))]
            found = find_update(reply.content)
            if found is None or make is None:
                return [reply]
            key, blobs = found
            version = inspect(blobs[0]).base_version
            layout = layouts[0]
            update: Any = cf.decode(blobs[0], layout=layout).to_task_vector()
            sent = TaskVector(layout, np.asarray(make(update.values), np.float32))
            blob = (
                encode(sent, "dense", layout_by_id=True, base_version=version)
                if attack == "a tenth flipped"
                else encode(compress(sent, 1.0, "mean"), layout_by_id=True, base_version=version)
            )
            reply.content = RecordDict(
                {**reply.content, key: update_record(blob, layout.num_parameters)}
            )
            for metrics in reply.content.metric_records.values():
                metrics["num-examples"] = 1e12
            return [reply]

        original = server_app.build_strategy

        def build(config: AppConfig, observer: Any) -> Any:
            strategy: Any = original(config, observer)
            if attack == "honest, no bounds":
                strategy.bounds = ReplyBounds(**NO_BOUNDS, set_aside=False)
            start = strategy.start

            def remembering(*args: Any, **kwargs: Any) -> Any:
                arrays = kwargs.get("initial_arrays") or args[1]
                layouts.append(Layout.of({name: each.numpy() for name, each in arrays.items()}))
                return start(*args, **kwargs)

            strategy.start = remembering
            return strategy

        server_app.build_strategy = build
        try:
            grid = LocalGrid(client_app.app, NODES, run_config=flat, fault=fault)
            context = Context(
                run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat
            )
            server_app.app(grid, context)
        finally:
            server_app.build_strategy = original
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text())
        return summary


def _answered(reply: Message) -> Message:
    from local_grid import answered

    return answered(reply)


def main() -> int:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--only", default="", help="attacks, separated by semicolons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    attacks = options.only.split(";") if options.only else list(ATTACKS)
    folder = options.out / "hostile"
    folder.mkdir(exist_ok=True)
    for seed in [] if options.report else map(int, options.seeds.split(",")):
        for attack in attacks:
            file = folder / f"{attack.replace(' ', '-').replace(',', '')}-{seed}.json"
            if file.exists():
                continue
            summary = run(attack, seed, options.device)
            scores = {name: summary[name] for name in ("accuracy", "loss")}
            file.write_text(json.dumps({"attack": attack, "seed": seed, **scores}) + "\n")
            last = summary["accuracy"][-3:]
            print(f"{attack}, seed {seed}: {', '.join(f'{each:.3f}' for each in last)}", flush=True)
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    (options.out / "hostile.md").write_text(page(found))
    return 0


def page(found: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "# One hostile node of ten in the default federation",
        "",
        "`python simulations/bench_hostile.py --out DIR`",
        "",
        "Accuracy after ten rounds, and the mean of rounds 8 to 10: less of one round's luck.",
        "",
        "| the node | seeds | accuracy | loss | rounds 8 to 10 | against absent |",
        "|---|---|---|---|---|---|",
    ]
    absent = {each["seed"]: each for each in found if each["attack"] == "absent"}
    for attack in ATTACKS:
        mine = [each for each in found if each["attack"] == attack]
        if not mine:
            continue
        gaps = [
            _late(each) - _late(absent[each["seed"]]) for each in mine if each["seed"] in absent
        ]
        lines.append(
            f"| {attack} | {', '.join(str(each['seed']) for each in mine)} "
            f"| {100 * _mean(each['accuracy'][-1] for each in mine):.1f} % "
            f"| {_mean(each['loss'][-1] for each in mine):.3f} "
            f"| {100 * _mean(map(_late, mine)):.1f} % "
            f"| {f'{100 * _mean(gaps):+.1f} points' if gaps else '-'} |"
        )
    return "\n".join(lines) + "\n"


def _late(scores: dict[str, Any]) -> float:
    """The mean accuracy of the last three rounds."""
    return _mean(scores["accuracy"][-3:])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    sys.exit(main())
