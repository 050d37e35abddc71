"""``compeft-fl report``: reads its arguments here, and imports the rest when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compeft_fl.cli.tables import say

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Write one HTML file that shows runs side by side: accuracy by bytes and by round, bytes by layer and
by node, the settings that differ. It opens without a server and without a network; tables sort, and
plots tell their values under the pointer. Every run writes its own, report.html, into its folder.
"""
_EPILOG = """\
examples:
  compeft-fl report runs/latest
  compeft-fl report runs/* -o all.html
"""


def add_parser(commands: Any) -> None:
    """Add ``report`` to the command line's subparsers."""
    parser = commands.add_parser(
        "report",
        help="show runs side by side, in one HTML file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("report.html"),
        help="the file to write (report.html)",
    )  # fmt: skip
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    """Write the report that the parsed arguments ask for, and return the exit code."""
    from compeft_fl.results import html_report

    runs = [html_report.read_run(folder) for folder in options.runs]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    html_report.write(options.output, runs)
    say(f"{options.output}: {len(runs)} runs")
    return 0
