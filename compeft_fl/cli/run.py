"""``compeft-fl run``: reads its arguments here, and imports the rest when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Run a federation in Flower's simulation engine, on this machine.

SCENARIO.toml has the keys of the run under [run], and the size of the simulation under
[simulation]. Without it the defaults hold: 10 nodes fine-tune a small language model on
descriptions of Debian packages.
Results go to a folder of their own under runs/, and runs/latest is the newest.
"""
_EPILOG = """\
examples:
  compeft-fl run
  compeft-fl run rounds=3 num-supernodes=4 strategy=ties
  compeft-fl run simulations/ties.toml seed=43 --out /tmp/results
  compeft-fl run --resume runs/latest
  compeft-fl run --keys
"""


def add_parser(commands: Any) -> None:
    """Add ``run`` to the command line's subparsers."""
    parser = commands.add_parser(
        "run",
        help="run a federation on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments", metavar="SCENARIO.toml | key=value", nargs="*", help="see --keys for the keys"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results (runs)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder"
    )
    parser.add_argument("--keys", action="store_true", help="list all keys, and stop")
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments of ``run`` say and return the exit code.

    0: completed. 1: failed. 2: a key or a value that does not fit. 130 or 143: stopped by Ctrl-C
    or SIGTERM.
    """
    from compeft_fl.runs import display

    if options.keys:
        display.show_keys()
        return 0
    if options.resume is not None:
        return display.resume(options.resume, options.arguments)
    return display.run(options.arguments, options.out)
