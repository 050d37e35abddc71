"""What compression costs a language model: ``--out DIR`` writes instruct.md.

simulations/instruct.toml by the app's own client and server, in one process: real messages, mod and
strategy. A variant is the scenario with other settings; `dense` is Flower's FedAvg over dense
links with the same training. Settings are chosen by the validation rows; test rows are reported.
A run is stored in DIR as NAME-SEED.json, and not run again.

    python simulations/bench_instruct.py --out DIR [--only dense,scenario] [--seeds 42,43]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # two runs beside each other
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from flwr.app import Context, RecordDict  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from local_grid import LocalGrid  # noqa: E402

from compeft_fl.app import client_app, server_app, tasks  # noqa: E402
from compeft_fl.app.config import AppConfig  # noqa: E402
from compeft_fl.app.tasks import conversations, fine_tuning, language_model  # noqa: E402
from compeft_fl.app.tasks.base import round_seed  # noqa: E402
from compeft_fl.app.tasks.conversations import Conversations  # noqa: E402
from compeft_fl.app.tasks.formatting import Formatter  # noqa: E402
from compeft_fl.bench import results  # noqa: E402
from compeft_fl.reduction.rules import Reduction, quality_of  # noqa: E402
from compeft_fl.task_vector import TaskVector  # noqa: E402

NODES, MOST_TOKENS, AT_A_TIME = 6, 40, 50

# What all variants but the scenario itself begin from.
COMMON: dict[str, Any] = {
    "rounds": 16,
    "local-steps": 10,
    "learning-rate": 0.003,
    "schedule": "cosine",
    "min-learning-rate": 0.0003,
    "density": 0.1,
    "codec": "golomb",
    "residual-decay": 0.5,
    "downlink-density": 0.3,
}
DENSE = {"strategy": "fedavg", "downlink": "dense"}
LOW_RANK = {"codec": "factored", "downlink-codec": "factored"}
AUTO = {**LOW_RANK, "density": "auto", "downlink-density": "auto"}
EIGHT = {"rounds": 8, "local-steps": 20}
DEFAULTS = {"residual-decay": 0.9, "downlink-density": 0.0}

VARIANTS: dict[str, dict[str, Any] | None] = {
    "scenario": None,  # as the file has it
    "dense": DENSE,
    "dense-8-rounds": {**DENSE, **EIGHT},
    "dense-constant": {**DENSE, "schedule": "constant"},
    "dense-eight-constant": {**DENSE, **EIGHT, "schedule": "constant"},
    "dense-lr-0.002": {**DENSE, "learning-rate": 0.002},
    "dense-lr-0.005": {**DENSE, "learning-rate": 0.005},
    "ternary": {},
    "defaults": DEFAULTS,
    "defaults-constant": {**DEFAULTS, "schedule": "constant"},
    "defaults-no-feedback": {**DEFAULTS, "error-feedback": False},
    "defaults-norm": {**DEFAULTS, "scale": "norm", "downlink-scale": "norm"},
    "only-up": {"downlink": "dense"},
    "only-down": {"codec": "dense"},
    "decay-0": {"error-feedback": False},
    "decay-0.3": {"residual-decay": 0.3},
    "decay-0.7": {"residual-decay": 0.7},
    "up-0.05": {"density": 0.05},
    "up-0.2": {"density": 0.2},
    "down-0.2": {"downlink-density": 0.2},
    "down-0.25": {"downlink-density": 0.25},
    "down-0.5": {"downlink-density": 0.5},
    "lr-0.002": {"learning-rate": 0.002},
    "lr-0.005": {"learning-rate": 0.005},
    "step-0.7": {"server-learning-rate": 0.7},
    "step-1.3": {"server-learning-rate": 1.3},
    "eight-rounds": EIGHT,
    "32-rounds": {"rounds": 32, "local-steps": 5},
    "factored": {**LOW_RANK, "downlink-density": 0.1},
    "factored-0.1-0.2": {**LOW_RANK, "downlink-density": 0.2},
    "factored-0.05-0.1": {**LOW_RANK, "density": 0.05, "downlink-density": 0.1},
    "factored-decay-0.7": {**LOW_RANK, "downlink-density": 0.1, "residual-decay": 0.7},
    "factored-decay-0.9": {**LOW_RANK, "downlink-density": 0.1, "residual-decay": 0.9},
    "factored-0.14": {**LOW_RANK, "density": 0.14, "downlink-density": 0.1},
    "factored-0.14-decay-0.9": {
        **LOW_RANK,
        "density": 0.14,
        "downlink-density": 0.1,
        "residual-decay": 0.9,
    },
    "factored-up": {"codec": "factored"},
    "factored-up-down-0.25": {"codec": "factored", "downlink-density": 0.25},
    "auto-0.5": {**AUTO, "energy": 0.5, "downlink-energy": 0.5},
    "auto-0.6": {**AUTO, "energy": 0.6, "downlink-energy": 0.6},
    "auto-0.7": {**AUTO, "energy": 0.7, "downlink-energy": 0.7},
    "auto-decay-0.9": {**AUTO, "residual-decay": 0.9},
    "factored-constant": {**LOW_RANK, "downlink-density": 0.1, "schedule": "constant"},
    "factored-eight-rounds": {**LOW_RANK, **EIGHT, "downlink-density": 0.1},
    "factored-eight-0.9": {
        **LOW_RANK,
        **EIGHT,
        "downlink-density": 0.1,
        "residual-decay": 0.9,
    },
    "factored-eight-constant": {
        **LOW_RANK,
        **EIGHT,
        "downlink-density": 0.1,
        "schedule": "constant",
    },
    "auto-0.7-eight": {**AUTO, **EIGHT, "energy": 0.7, "downlink-energy": 0.7},
    "b-only": {"trainable": "B"},
}
BY_KIND = ("scenario", "dense", "ternary", "factored")  # whose answers are shown by kind
FORMS = {
    "ternary, density 0.1": Reduction(0.1),
    "ternary, density 0.3": Reduction(0.3),
    "low-rank signs in the bytes of 0.1": Reduction(0.1, factored=True),
    "low-rank signs in the bytes of 0.14": Reduction(0.14, factored=True),
}
QUICK = {"rounds": 2, "local-steps": 2, "limit-rows": 120, "limit-test-rows": 20}


def configured(variant: str, seed: int, device: str, quick: bool) -> AppConfig:
    """The keys of a run; float32 on every device, as on the scenario's own."""
    told = tomllib.loads((ROOT / "simulations" / "instruct.toml").read_text())["run"]
    keys = {f"peft.{name}": value for name, value in told.pop("peft").items()} | told
    changes = VARIANTS[variant]
    keys |= {} if changes is None else {**COMMON, **changes}
    keys |= QUICK if quick else {}
    keys |= {"seed": seed, "device": device, "dtype": "float32", "min-nodes": NODES}
    return AppConfig.from_run_config(keys)


def run(config: AppConfig) -> dict[str, Any]:
    """One federation: its summary, and how its adapter answers."""
    started, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="bench-instruct-") as folder:
        os.environ["COMPEFT_FL_STATE_DIR"] = f"{folder}/state"
        flat = {**config.to_run_config(), "run-dir": f"{folder}/run"}
        grid = LocalGrid(client_app.app, NODES, run_config=flat)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
        server_app.app(grid, context)
        seconds = [time.perf_counter() - started, time.process_time() - used]
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text())
        model = language_model.with_adapter(config, Path(folder, "run", "adapter"))
    ways = ("uplink_payload_bytes", "uplink_dense_bytes")
    ways += tuple(way.replace("up", "down") for way in ways)
    return {
        "config": summary["config"],
        "accuracy": summary["accuracy"],
        "loss": summary["loss"],
        **{way: sum(summary[way]) for way in ways},
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
        **answers(model, config),
    }


def base(config: AppConfig) -> dict[str, Any]:
    """How the base model answers."""
    return answers(language_model.load_base(config), config)


def answers(model: language_model.LanguageModel, config: AppConfig) -> dict[str, Any]:
    """By kind: accuracy and loss by token of validation and test rows, and written answers."""
    model.network.eval()
    data = conversations.load(config)
    formatter = Formatter(model.tokenizer, config)
    found: dict[str, Any] = {}
    for split, rows in (("validation", data.validation), ("test", data.test)):
        for kind, part in by_kind(rows):
            score = fine_tuning.evaluate(model, formatter.encode(part.rows), config)
            figures = {"accuracy": score.accuracy, "loss": score.loss, "rows": len(part)}
            found.setdefault(split, {})[kind] = figures
    for kind, part in by_kind(data.test)[1:]:
        said = written(model, [formatter.prompt(row) for row in part.rows])
        right = [row.response.strip() for row in part.rows]
        pairs = list(zip(right, said, strict=True))
        found["test"][kind] |= {
            "exact": sum(one == other for one, other in pairs) / len(pairs),
            "rouge_l": sum(rouge_l(one, other) for one, other in pairs) / len(pairs),
        }
    return found


def kept(config: AppConfig) -> dict[str, list[float]]:
    """The part of the energy that is sent of a node's first updates, trained alone."""
    task = tasks.prepare(config)
    rows = task.node_rows({"partition-id": 0, "num-partitions": NODES})
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(1, 6):
        before = task.adapter_state()
        task.train(rows, number, round_seed(config, number, 0))
        tau = TaskVector.between(before, task.adapter_state())
        for name, form in FORMS.items():
            found[name].append(1 - quality_of(tau, form(tau)).relative_error ** 2)
    return found


OTHERS: dict[str, Callable[[AppConfig], dict[str, Any]]] = {"base": base, "kept": kept}


def by_kind(rows: Conversations) -> list[tuple[str, Conversations]]:
    """All rows, and those of each kind."""
    kinds = sorted(set(rows.groups))
    parts = [[i for i, kind in enumerate(rows.groups) if kind == each] for each in kinds]
    return [("all", rows), *((kind, rows.take(p)) for kind, p in zip(kinds, parts, strict=True))]


@torch.inference_mode()
def written(model: language_model.LanguageModel, prompts: Sequence[list[int]]) -> Iterator[str]:
    """The most likely answer to each prompt, up to its line's end."""
    pad = model.tokenizer.pad_token_id
    for start in range(0, len(prompts), AT_A_TIME):
        batch = prompts[start : start + AT_A_TIME]
        length = max(map(len, batch))
        ids = torch.tensor([[pad] * (length - len(each)) + each for each in batch])
        mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in batch])
        out = model.network.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )
        for row in out[:, length:]:
            text: str = model.tokenizer.decode(row, skip_special_tokens=True)
            yield text.strip().split("\n")[0].strip()


def rouge_l(expected: str, found: str) -> float:
    """F of the longest common subsequence of words, as rouge_score has it without stems."""
    one, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (expected, found))
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for i, each in enumerate(other, 1):
            best = before + 1 if word == each else max(lengths[i], lengths[i - 1])
            before, lengths[i] = lengths[i], best
    return 2 * lengths[-1] / (len(one) + len(other)) if one and other else 0.0


def main() -> int:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--only", default="base,kept,dense,scenario", help="variants, by comma")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that it runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    names = options.only.split(",")
    for name in names:
        if name not in (*OTHERS, *VARIANTS):
            parser.error(f"expected variants of {', '.join((*OTHERS, *VARIANTS))}, found {name}")
    for seed in map(int, options.seeds.split(",")):
        for name in names:
            file = options.out / (f"{name}.json" if name in OTHERS else f"{name}-{seed}.json")
            if file.exists():
                continue
            variant = "scenario" if name in OTHERS else name
            found = OTHERS.get(name, run)(configured(variant, seed, options.device, options.quick))
            put(file, json.dumps(found, indent=1) + "\n")
            print(f"{name}, seed {seed}: done", flush=True)
    put(options.out / "instruct.md", page(options.out))
    return 0


def put(file: Path, text: str) -> None:
    """Write a file that runs beside this one may read."""
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)


def page(folder: Path) -> str:
    """The tables as Markdown."""
    runs = [
        (name, int(file.stem.removeprefix(f"{name}-")), json.loads(file.read_text()))
        for name in VARIANTS
        for file in sorted(folder.glob(f"{name}-[0-9]*.json"))
        if re.fullmatch(rf"{re.escape(name)}-\d+", file.stem) and file.stem not in VARIANTS
    ]
    start = folder / "base.json"
    known = json.loads(start.read_text()) if start.exists() else None
    lines = [
        "# A language model tuned by six nodes: compressed against dense",
        "",
        f"`python simulations/bench_instruct.py --out DIR`: {results.machine()}",
        "",
        f"All but the scenario itself have {told(COMMON)}; and what the second column says.",
        "Accuracy and loss are over the tokens of responses: of 498 rows to choose settings by",
        "(validation), and of the 200 that a run scores (test). Bytes are parts of dense ones.",
        "",
        "| variant | settings | seed | on | validation: accuracy | loss | test: accuracy | loss "
        "| up | down | both |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    if known:
        lines.append(f"| base model | | | | {scores(known)} | | | |")
    for name, seed, found in runs:
        up, down = (
            (found[f"{way}_payload_bytes"], found[f"{way}_dense_bytes"])
            for way in ("uplink", "downlink")
        )
        changes = VARIANTS[name]
        settings = "simulations/instruct.toml" if changes is None else told(changes)
        both = (up[0] + down[0], up[1] + down[1])
        parts = [f"1/{dense / sent:.1f}" for sent, dense in (up, down, both)]
        lines.append(
            f"| {name} | {settings} | {seed} | {found['config']['device']} | {scores(found)} "
            f"| {' | '.join(parts)} |"
        )
    lines += over_seeds(runs)
    share = folder / "kept.json"
    if share.exists():
        lines += [
            "",
            "## What is sent of one node's updates, trained alone: part of the energy",
            "",
        ]
        lines += ["| sent as | rounds 1 to 5 |", "|---|---|"]
        for name, parts in json.loads(share.read_text()).items():
            lines.append(f"| {name} | {', '.join(f'{100 * part:.0f} %' for part in parts)} |")
    lines += ["", "## Answers to the test rows, by kind", ""]
    lines += [
        "| variant | seed | kind | accuracy | loss | answers that are exact | ROUGE-L |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [each for each in runs if each[0] in BY_KIND]
    for name, seed, found in ([("base model", "", known)] if known else []) + shown:
        for kind, figures in found["test"].items():
            if kind != "all":
                lines.append(
                    f"| {name} | {seed} | {kind} | {100 * figures['accuracy']:.1f} % "
                    f"| {figures['loss']:.3f} | {100 * figures['exact']:.1f} % "
                    f"| {figures['rouge_l']:.3f} |"
                )
    lines += ["", "## Loss of the test rows by round", ""]
    lines += ["| variant | seed | loss |", "|---|---|---|"]
    for name, seed, found in runs:
        losses = ", ".join(f"{loss:.2f}" for loss in found["loss"])
        lines.append(f"| {name} | {seed} | {losses} |")
    return "\n".join(lines) + "\n"


def over_seeds(runs: Sequence[tuple[str, int, dict[str, Any]]]) -> Iterator[str]:
    """Means of what has several seeds, and the difference to dense links with the same ones."""
    of = {(name, seed): found for name, seed, found in runs}
    yield from ("", "## Over seeds", "")
    yield "| variant | seeds | validation | test | loss | against dense: validation | test | loss |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(name for name, *_ in runs):
        seeds = [seed for each, seed in of if each == name and ("dense", seed) in of]
        if len(seeds) < 2:
            continue
        cells: list[str] = []
        against: list[str] = []
        for split, key, unit in (
            ("validation", "accuracy", " %"), ("test", "accuracy", " %"), ("test", "loss", ""),
        ):  # fmt: skip
            scale, digits = (100, 1) if unit else (1, 3)
            mine, dense = (
                [scale * of[each, seed][split]["all"][key] for seed in seeds]
                for each in (name, "dense")
            )
            mean, spread = statistics.mean(mine), statistics.stdev(mine)
            cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}{unit}")
            differences = [a - b for a, b in zip(mine, dense, strict=True)]
            each = ", ".join(f"{difference:+.{digits}f}" for difference in differences)
            against.append(f"{statistics.mean(differences):+.{digits}f} ({each})")
        yield f"| {name} | {len(seeds)} | {' | '.join(cells)} | {' | '.join(against)} |"


def told(settings: dict[str, Any]) -> str:
    """Settings as they are typed."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def scores(found: dict[str, Any]) -> str:
    """Cells of validation and test."""
    return " | ".join(
        f"{100 * found[split]['all']['accuracy']:.1f} % | {found[split]['all']['loss']:.3f}"
        for split in ("validation", "test")
    )


if __name__ == "__main__":
    sys.exit(main())
