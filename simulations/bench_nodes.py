"""What nodes that differ cost: ranks by tier, B alone, densities by link. ``--out DIR``.

The ready-made app (MiniLM on the section task, ten nodes, ten rounds) in one process: real clients,
messages, mod and strategy; only the links are numbers. So that a run takes a minute of a core, LoRA
is in the last layer alone, nodes make ten steps a round, and what the frozen layers below give for
a text is computed once, without dropout. Each federation's summary is stored in DIR/nodes, and not
run again. Writes nodes.md of what is there.

    python simulations/bench_nodes.py --out DIR [--seeds 42,43,44] [--only "all at 8;2, 4, 8"]
    python simulations/bench_nodes.py --out DIR --links     upload times through the throttled relay
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # runs beside each other
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from flwr.app import Context, RecordDict  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from local_grid import LocalGrid  # noqa: E402

from compeft_fl.app import client_app, server_app  # noqa: E402
from compeft_fl.app.config import AppConfig  # noqa: E402
from compeft_fl.app.tasks import model, training  # noqa: E402
from compeft_fl.deploy.relay import UP, Link, Relay  # noqa: E402
from compeft_fl.exchange.ledger import read_ledger  # noqa: E402

NODES = 10
ROUNDS = 10
SCORED = 3  # of the rounds, the last ones
LAYER = 5  # the one that has LoRA
COMMON = {
    "peft_options": json.dumps({"layers_to_transform": [LAYER]}),
    "rounds": ROUNDS,
    "local_steps": 10,
}
LINKS = (1.0, 10.0, 100.0)  # Mbit/s, by tier
BUDGET = 0.05  # seconds of an upload
# An adapter of 221,184 parameters, so that it is not Flower's own bytes that take the time.
LARGER = {"peft": {"r": 32, "lora_alpha": 64, "target_modules": "query,key,value,dense"}}

# What differs from the default run with preset=compeft.
RUNS: dict[str, dict[str, Any]] = {
    "all at 8": {},
    "2, 4, 8": {"ranks": "2,4,8"},
    "2, 4, 8 by cover": {"ranks": "2,4,8", "rank_merge": "cover"},
    "all at 8 by products": {"ranks": "8", "rank_merge": "product"},
    "all at 2": {"peft": {"r": 2, "lora_alpha": 4}},
    "B alone": {"trainable": "B"},
    "2, 4, 8, B alone": {"ranks": "2,4,8", "trainable": "B"},
    "links, density by link": {**LARGER, "links": "1,10,100", "upload_seconds": BUDGET},
    "links, 6 bits for all": {**LARGER, "upload_seconds": 3600.0, "upload_tiers": "6"},
    "links, density 0.1 for all": LARGER,
}


def run(name: str, seed: int) -> dict[str, Any]:
    """One federation: its summary, and for each node its rank, bytes and densities."""
    with tempfile.TemporaryDirectory(prefix="bench-nodes-") as folder:
        os.environ["COMPEFT_FL_STATE_DIR"] = f"{folder}/state"
        config = dataclasses.replace(
            AppConfig(preset="compeft"), seed=seed, run_dir=f"{folder}/run", min_nodes=NODES,
            **{**COMMON, **RUNS[name]},
        )  # fmt: skip
        flat = config.to_run_config()
        grid = LocalGrid(client_app.app, NODES, run_config=flat)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
        with last_scores_only(), frozen_layers_once():
            server_app.app(grid, context)
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text())
        uploads = [
            [each.node, each.round, each.message_bytes, each.density]
            for _, each in read_ledger(Path(folder, "run", "ledger.csv"))
            if each.direction == "up" and each.kind == "train" and each.parameters
        ]
        loads = {path.name: _loads(path) for path in sorted(Path(folder, "run").glob("adapters/*"))}
        return {
            "accuracy": summary["accuracy"],
            "loss": summary["loss"],
            "up": sum(summary["uplink_payload_bytes"]),
            "down": sum(summary["downlink_payload_bytes"]),
            "set_aside": sum(summary["set_aside"]),
            "by_node": summary["ledger"]["by_node"],
            "uploads": uploads,
            "loads": loads,
        }


@contextlib.contextmanager
def last_scores_only() -> Iterator[None]:
    """Score the start, and the last rounds: scoring the others takes a fifth of a run."""
    scored, known, calls = training.evaluate, [], itertools.count()

    def evaluate(*args: Any) -> Any:
        number = next(calls)
        if not known or number > ROUNDS - SCORED:
            known[:] = [scored(*args)]
        return known[0]

    training.evaluate = evaluate
    try:
        yield
    finally:
        training.evaluate = scored


_frozen: dict[tuple[int, ...], Any] = {}  # token ids to what the layers below give for them
_prototypes: list[Any] = []  # of the base model, which is one for all runs


@contextlib.contextmanager
def frozen_layers_once() -> Iterator[None]:
    """Compute what lies below the layer that is trained once for each text."""
    import torch

    build, measure = model.build, model._prototypes

    def measured(*args: Any) -> Any:
        if not _prototypes:
            _prototypes.append(measure(*args))
        return _prototypes[0].clone()

    def built(*args: Any) -> Any:
        classifier = build(*args)
        bert = classifier.network.base_model.model
        embed, below = bert.embeddings.forward, [bert.encoder.layer[i] for i in range(LAYER)]

        def compute(ids: tuple[int, ...]) -> Any:
            modes = [each.training for each in (bert.embeddings, *below)]
            with torch.no_grad():
                for each in (bert.embeddings, *below):
                    each.eval()
                hidden = embed(input_ids=torch.tensor([ids]))
                for forward in forwards:
                    found = forward(hidden, None)
                    hidden = found[0] if isinstance(found, tuple) else found
            for each, mode in zip((bert.embeddings, *below), modes, strict=True):
                each.train(mode)
            return hidden[0].clone()

        def cached(input_ids: Any = None, **_: Any) -> Any:
            rows = []
            for row in input_ids.tolist():
                ids = tuple(each for each in row if each)  # 0 pads
                if ids not in _frozen:
                    _frozen[ids] = compute(ids)
                rows.append(_frozen[ids])
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        forwards = [each.forward for each in below]
        bert.embeddings.forward = cached
        for each in below:
            as_tuple = isinstance(each.forward(torch.zeros(1, 1, 384), None), tuple)
            each.forward = _as_it_is(as_tuple)
        return classifier

    model.build, model._prototypes = built, measured
    try:
        yield
    finally:
        model.build, model._prototypes = build, measure


def _as_it_is(as_tuple: bool) -> Any:
    return lambda hidden, *_, **__: (hidden,) if as_tuple else hidden


def _loads(folder: Path) -> int:
    """Load a folder as PEFT does, over a fresh base model; its rank."""
    from peft import PeftModel
    from transformers import AutoModel

    from compeft_fl.app.tasks.model import embedded_model

    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(embedded_model()), str(folder))
    rank: int = loaded.peft_config["default"].r
    return rank


def upload_seconds(num_bytes: int, mbps: float) -> float:
    """What an upload takes through the throttled relay, from its first byte to its last."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                left = num_bytes
                while left and (data := connection.recv(1 << 16)):
                    left -= len(data)
            done.set()

        threading.Thread(target=receive, daemon=True).start()
        with (
            Relay(server.getsockname()[1], link=Link(mbps)) as relay,
            socket.create_connection(("127.0.0.1", relay.ports[0])) as sender,
        ):
            began = time.perf_counter()
            sender.sendall(bytes(num_bytes))
            if not done.wait(600):
                raise TimeoutError(f"{num_bytes} bytes did not arrive")
            seconds = time.perf_counter() - began
        if relay.total(UP) != num_bytes:
            raise RuntimeError(f"expected {num_bytes} bytes, the relay counted {relay.total(UP)}")
    return seconds


def measure_links(out: Path, seed: int) -> list[dict[str, float]]:
    """The uploads of the last round of a run, each over its node's link."""
    found = json.loads((out / f"links, density by link.{seed}.json").read_text())
    nodes = sorted({node for node, *_ in found["uploads"]})
    last = max(each[1] for each in found["uploads"])
    rows = []
    for node, server_round, size, density in found["uploads"]:
        if server_round == last:
            mbps = LINKS[nodes.index(node) % len(LINKS)]
            seconds = statistics.median(upload_seconds(size, mbps) for _ in range(5))
            rows.append({"mbps": mbps, "bytes": size, "density": density, "seconds": seconds})
            print(f"{mbps:g} Mbit/s: {size} bytes in {seconds:.4f} s", flush=True)
    return sorted(rows, key=lambda row: row["mbps"])


def page(out: Path) -> str:
    """What is there, as Markdown."""
    lines = [
        "# Nodes that differ",
        "",
        "`python simulations/bench_nodes.py --out DIR`: the ready-made app, ten nodes, ten rounds,",
        "MiniLM on the section task, ten steps a node and round, LoRA in the last layer alone; for",
        "links of rank 32 in all its linear maps, 221,184 parameters. Below that layer there is no",
        f"dropout. {platform.machine()}, two cores with other work, {datetime.date.today()}.",
        "",
        "| nodes | seeds | accuracy, round 10 | rounds 8 to 10 | loss | up, kB | down, kB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        found = [json.loads(file.read_text()) for file in sorted(out.glob(f"{name}.[0-9]*.json"))]
        if not found:
            continue
        accuracy = [100 * each["accuracy"][-1] for each in found]
        last = [100 * one for each in found for one in each["accuracy"][-SCORED:]]
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(found) > 1 else ""
        lines.append(
            f"| {name} | {len(found)} | {statistics.mean(accuracy):.1f}{spread} % "
            f"| {statistics.mean(last):.1f} % "
            f"| {statistics.mean(each['loss'][-1] for each in found):.3f} "
            f"| {statistics.mean(each['up'] for each in found) / 1e3:.0f} "
            f"| {statistics.mean(each['down'] for each in found) / 1e3:.0f} |"
        )
    links = out / "links.json"
    if links.exists():
        rows = json.loads(links.read_text())
        lines += [
            "",
            f"Uploads of round 10, each through the throttled relay; {BUDGET:g} s are asked for.",
            "",
            "| link, Mbit/s | bytes | entries that are not 0 | seconds |",
            "|---|---|---|---|",
            *(
                f"| {row['mbps']:g} | {row['bytes']} | {row['density']:.3f} "
                f"| {row['seconds']:.4f} |"
                for row in rows
            ),
        ]
        seconds = [row["seconds"] for row in rows]
        lines += ["", f"The slowest takes {max(seconds) / min(seconds):.2f} times the fastest."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for and not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--only", default="", help="runs, separated by semicolons")
    parser.add_argument("--links", action="store_true", help="measure uploads through the relay")
    options = parser.parse_args()
    stored = options.out / "nodes"
    stored.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    names = options.only.split(";") if options.only else list(RUNS)
    for seed in map(int, options.seeds.split(",")):
        if options.links:
            rows = measure_links(stored, seed)
            (stored / "links.json").write_text(json.dumps(rows, indent=1) + "\n")
            break
        for name in names:
            file = stored / f"{name}.{seed}.json"
            if not file.exists():
                began = time.perf_counter()
                found = run(name, seed)
                file.write_text(json.dumps(found) + "\n")
                last = ", ".join(f"{each:.3f}" for each in found["accuracy"][-3:])
                took = time.perf_counter() - began
                print(f"{name}, seed {seed}: {last} ({took:.0f} s) {found['loads']}", flush=True)
    (options.out / "nodes.md").write_text(page(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())
