"""``compeft-fl state``: reads its arguments here, and imports the rest when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from compeft_fl.errors import StateError

__all__ = ["add_parser", "run"]

_DAY_SECONDS: Final = 24 * 3600
_DESCRIPTION: Final = """\
List what nodes of this machine remember of federations, or clear it.

A node keeps its copy of the global adapter and what it has left to send. What a run leaves that
nobody can go on with goes at its end; the rest goes when it was not heard of for 30 days, or when
there is too much of it. A node whose state was cleared is sent the adapter; what it had left to
send is lost.

Nothing is removed that was not made here, and nothing that a process works in.
"""
_EPILOG: Final = """\
examples:
  compeft-fl state
  compeft-fl state clear
  compeft-fl state clear 0123456789abcdef
  compeft-fl state clear --older 7 --dir /srv/state
"""


def add_parser(commands: Any) -> None:
    """Add ``state`` to the command line's subparsers."""
    parser = commands.add_parser(
        "state",
        help="list or clear what nodes of this machine remember",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action", choices=("list", "clear"), nargs="?", default="list", help="default list"
    )
    parser.add_argument(
        "federations", metavar="FEDERATION", nargs="*", help="those of this name alone"
    )
    parser.add_argument(
        "--older", metavar="DAYS", type=float, default=0.0,
        help="those that were not heard of for so many days alone",
    )  # fmt: skip
    parser.add_argument(
        "--dir", type=Path, metavar="DIR",
        help="the state folder (COMPEFT_FL_STATE_DIR, or ~/.local/state/compeft_fl)",
    )  # fmt: skip
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments of ``state`` say and return the exit code.

    Raises
    ------
    StateError
        No such federation, or one that is left where it is.
    """
    import time

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from compeft_fl.client.node_memory import default_root
    from compeft_fl.client.state_store import inventory, remove
    from compeft_fl.printable import printable
    from compeft_fl.results.units import size

    root = default_root() if options.dir is None else options.dir
    found, now = inventory(root), time.time()
    missing = set(options.federations) - {state.federation for state in found}
    if missing:
        raise StateError(f"expected a federation in {root}, found no {', '.join(sorted(missing))}")
    chosen = [
        state
        for state in found
        if (not options.federations or state.federation in options.federations)
        and now - state.heard >= options.older * _DAY_SECONDS
    ]
    console = Console()
    if options.action == "clear":
        left = []
        for state in chosen:
            if why := remove(state):
                left.append(f"{state.folder} ({why})")
            else:
                what = f"removed {state.folder}: {state.nodes} nodes, {size(state.num_bytes)}"
                console.print(escape(printable(what)), highlight=False, soft_wrap=True)
        if left:
            raise StateError(f"left as it is: {', '.join(left)}")
        return 0
    if not chosen:
        console.print(f"nothing in {escape(printable(root))}", highlight=False, soft_wrap=True)
        return 0
    total = sum(state.num_bytes for state in chosen)
    table = Table(
        title=f"state in {escape(printable(root))}", title_justify="left", show_footer=True
    )
    for header, footer, justify in (
        ("federation", "all", "left"),
        ("nodes", str(sum(state.nodes for state in chosen)), "right"),
        ("on disk", size(total), "right"),
        ("heard of", "", "left"),
        ("", "", "left"),
    ):
        table.add_column(header, footer, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for state in chosen:
        note = f"{state.foreign[0]} was not made here: it stays" if state.foreign else ""
        table.add_row(
            escape(printable(state.federation)),
            str(state.nodes),
            size(state.num_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(state.heard)),
            escape(printable(note)),
        )
    console.print(table)
    return 0
