"""``compeft-fl bench``: reads its arguments here, and imports a benchmark when it is called."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any, Final

__all__ = ["BENCHES", "add_parser", "run"]

BENCHES: Final = {
    "codecs": "bytes, speed and memory of every codec, over real and synthetic adapters",
    "bandwidth": "seconds a round against the speed of the link",
    "learning": "accuracy against bytes, every codec and strategy on one federation",
    "few": "accuracy against bytes where few of many nodes take part in a round",
    "paper": "ComPEFT's tables and figures, on the embedded tasks or on your model and data",
    "merge": "merging against PEFT and mergekit: time, memory, equality",
    "experts": "compressed experts: fetched, swapped, held in memory, composed",
}

_DESCRIPTION = """\
Measure what updates cost. Each benchmark writes BENCH.csv, BENCH.md and its plots to --out, says
what time it will take, and shows progress.
"""
_EPILOG = """\
examples:
  compeft-fl bench codecs --quick
  compeft-fl bench learning --out results
"""


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the command line's subparsers."""
    parser = commands.add_parser(
        "bench",
        help="measure bytes, seconds and accuracy",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCH", required=True)
    for name, text in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        bench.add_argument(
            "--out", type=Path, metavar="DIR", default=Path("runs") / "bench",
            help="folder for results (runs/bench)",
        )  # fmt: skip
        bench.add_argument("--quick", action="store_true", help="a small set, in minutes")
        if name == "codecs":
            bench.add_argument(
                "--taus", type=_folder, metavar="DIR",
                help="real task vectors, safetensors (the clone's simulations/data/taus)",
            )  # fmt: skip
            bench.add_argument(
                "--only", choices=("adapters", "steps", "flowertune"), help="one part of it"
            )  # fmt: skip
        if name == "experts":
            bench.add_argument(
                "--only", choices=("links", "swaps", "memory", "store", "lorahub"),
                help="one part of it",
            )  # fmt: skip
            bench.add_argument(
                "--device", type=_device, default="cpu", help="cuda: --only swaps, on a GPU"
            )
        bench.set_defaults(handler=run, bench=name)
        if name in ("learning", "few"):
            _add_sweep(bench)
        if name == "learning":
            _add_keys(bench, "device=cuda dtype=float32")
        if name == "paper":
            _add_paper(bench)


def _add_sweep(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--settings", metavar="NAME,...", help="only these settings")
    bench.add_argument("--seeds", metavar="N,...", help="other seeds, the same for all settings")
    bench.add_argument("--workers", type=_count, metavar="N", help="runs at a time (cores)")
    bench.add_argument("--report", action="store_true", help="run nothing, report what there is")


def _add_paper(bench: argparse.ArgumentParser) -> None:
    _add_keys(bench, "model=ORG/NAME data=FILE,FILE")
    bench.add_argument(
        "--only", metavar="PART,...", help="experts, ablations, merged, pareto, full, language"
    )
    bench.add_argument(
        "--pieces", metavar="PATTERN,...", help="only these pieces, as 'merged-*' or '*-lora-0'"
    )
    bench.add_argument("--seeds", type=_count, metavar="N", help="how many seeds (3)")
    bench.add_argument("--workers", type=_count, metavar="N", help="pieces at a time (1)")
    bench.add_argument(
        "--report", action="store_true", help="measure nothing, report what there is"
    )


def _add_keys(bench: argparse.ArgumentParser, example: str) -> None:
    bench.add_argument(
        "keys", metavar="key=value", nargs="*", help=f"keys of the app for all of it: {example}"
    )


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, found {text!r}")
    return Path(text)


def _device(text: str) -> str:
    if text != "cpu":
        import torch

        if not text.startswith("cuda") or not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"expected cpu, or cuda where it is, found {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 4 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number over 0, found {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark that the parsed arguments name, and return the exit code.

    Each is a module of this package with a function ``run(options)``.
    """
    module = importlib.import_module(f"compeft_fl.bench.{options.bench}")
    options.out.mkdir(parents=True, exist_ok=True)
    code: int = module.run(options)
    return code
