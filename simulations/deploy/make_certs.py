#!/usr/bin/env python
"""Make the keys and certificates of a federation, once: one folder for each machine.

    python simulations/deploy/make_certs.py credentials --server fl.example.org --nodes 3

What goes where is in simulations/deploy/README.md. An existing folder is never written to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compeft_fl.deploy.credentials import write_credentials
from compeft_fl.errors import CompeftError

# How the SuperLink is reached on its own machine, by an ssh tunnel, and in compose.server.yaml.
_CLOSE_BY = ("localhost", "127.0.0.1", "superlink")


def main() -> int:
    """Read the arguments, write the folder, and say what goes where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--server",
        action="append",
        required=True,
        metavar="NAME",
        help="host name or IP address under which nodes reach the server; may be given again",
    )
    parser.add_argument(
        "--nodes", type=int, default=0, metavar="N", help="key pairs to make (0: nodes make theirs)"
    )
    parser.add_argument(
        "--days", type=int, default=365, help="how long the server's certificate holds (365)"
    )
    options = parser.parse_args()
    names = list(dict.fromkeys([*options.server, *_CLOSE_BY]))
    try:
        write_credentials(options.folder, names, options.nodes, options.days)
    except CompeftError as error:
        print(f"make_certs: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}/server   to the server's machine")
    for index in range(options.nodes):
        print(f"{options.folder}/node-{index}   to node {index}'s machine")
    print(f"{options.folder}/admin    to whoever registers nodes and starts runs")
    print(f"{options.folder}/ca       nowhere: keep it offline, it can make other servers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
