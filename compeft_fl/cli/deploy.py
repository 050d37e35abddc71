"""``compeft-fl deploy`` and ``warm``: read arguments here, and import the rest when called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

__all__ = ["add_parsers"]

_DEFAULTS: Final = ("num-supernodes=3", "rounds=3")

_DEPLOY: Final = """\
Run a federation between real processes on this machine: a SuperLink and SuperNodes on loopback,
over gRPC with TLS and SuperNode authentication. Everything is ended afterwards.

SCENARIO.toml and the keys are those of `compeft-fl run`; num-supernodes is the number of
SuperNodes (default 3, and 3 rounds, where no file is given). For several machines see
simulations/deploy/README.md.

With --count, --mbit or --latency a relay stands between the nodes and the SuperLink. It counts what
passes on each node's socket: sockets.csv, and sums in summary.json.
"""
_DEPLOY_EXAMPLES: Final = """\
examples:
  compeft-fl deploy
  compeft-fl deploy simulations/deploy/loopback.toml rounds=5 --out /tmp/results
  compeft-fl deploy --count
  compeft-fl deploy --mbit 10 --latency 50
"""
_WARM: Final = """\
Run a flower-supernode (or flower-superexec) whose client processes are forked from one that has
torch, transformers, peft and the run's model in memory, in place of a cold start for every message.
"""
_WARM_EXAMPLES: Final = """\
example:
  compeft-fl warm flower-supernode --superlink fl.example.org:9092 \\
    --root-certificates ca.crt --auth-supernode-private-key node.key \\
    --node-config "partition-id=0 num-partitions=3"
"""


def add_parsers(commands: Any) -> None:
    """Add ``deploy`` and ``warm`` to the command line's subparsers."""
    parser = commands.add_parser(
        "deploy",
        help="run a federation between real processes on this machine, over gRPC with TLS",
        description=_DEPLOY,
        epilog=_DEPLOY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        metavar="SCENARIO.toml | key=value",
        nargs="*",
        help="see `compeft-fl run --keys` for the keys",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results (runs)")
    parser.add_argument(
        "--count", action="store_true", help="count the bytes on each node's socket"
    )
    parser.add_argument(
        "--mbit", type=float, metavar="N", help="each node's link has N Mbit/s each way"
    )
    parser.add_argument(
        "--latency", type=float, metavar="MS", default=0.0,
        help="each node's link takes MS milliseconds one way",
    )  # fmt: skip
    parser.set_defaults(handler=_deploy)
    parser = commands.add_parser(
        "warm",
        help="run a SuperNode whose clients start at once",
        description=_WARM,
        epilog=_WARM_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", metavar="COMMAND", help="such as flower-supernode")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(handler=_warm)


def _deploy(options: argparse.Namespace) -> int:
    """Run and return the exit code, see `compeft_fl.cli.run.run`."""
    from functools import partial

    from compeft_fl.deploy.deployment import deploy
    from compeft_fl.deploy.relay import Link
    from compeft_fl.runs import display

    has_file = any("=" not in argument for argument in options.arguments)
    arguments = [*(() if has_file else _DEFAULTS), *options.arguments]
    link = None
    if options.count or options.mbit is not None or options.latency:
        link = Link(options.mbit, options.latency / 1000)
    launcher = partial(deploy, link=link)
    return display.run(arguments, options.out, launcher=launcher, command="deploy")


def _warm(options: argparse.Namespace) -> int:
    """Run the command to its end and return its exit code."""
    from compeft_fl.deploy.warm import run

    return run([options.program, *options.rest])
