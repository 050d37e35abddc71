"""The bytes on the sockets of a deployment, told apart by round, node and direction.

The relay says when how many bytes passed; the ledger says when each round began and ended, from the
first message down to the last reply read. ``sockets.csv`` in the run's folder has the sums: round,
node (Flower's id, or the partition where there is none), direction, socket_bytes. Round 0 is all
that passed outside of rounds: connecting, polling while the server is at work, taking leave.

Within a round the count has all that its messages take and the nodes' polling for more meanwhile,
which can't be told apart under TLS.
"""

from __future__ import annotations

import bisect
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from compeft_fl.deploy.relay import DOWN, UP, Relay
from compeft_fl.results import overhead
from compeft_fl.results.report import SUMMARY_FILE

__all__ = ["SOCKETS_FILE", "by_round", "write"]

SOCKETS_FILE: Final = "sockets.csv"


def by_round(
    passed: Sequence[tuple[float, int]], rounds: Sequence[tuple[float, float]]
) -> list[int]:
    """Sum bytes by round.

    Parameters
    ----------
    passed : sequence of (seconds, bytes)
    rounds : sequence of (seconds, seconds)
        Begin and end of each, in order.

    Returns
    -------
    list of int
        What passed outside of rounds, then of each.

    Examples
    --------
    >>> by_round([(1.0, 5), (2.5, 7), (3.0, 1), (9.0, 2)], [(2.0, 3.0), (4.0, 5.0)])
    [7, 8, 0]
    """
    found = [0] * (len(rounds) + 1)
    begins = [begin for begin, _ in rounds]
    for when, size in passed:
        number = bisect.bisect_right(begins, when)
        within = number and when <= rounds[number - 1][1]
        found[number if within else 0] += size
    return found


def write(folder: Path, relay: Relay, node_ids: Mapping[int, int]) -> None:
    """Write ``sockets.csv``, add the sums to ``summary.json``, and draw ``bytes.png`` anew.

    Parameters
    ----------
    folder : Path
        The run's, with its summary; without one nothing is known of rounds, and all is round 0.
    relay : Relay
    node_ids : mapping of int to int
        Flower's id of the node at each of the relay's ports.
    """
    summary_file = folder / SUMMARY_FILE
    summary: dict[str, Any] = {}
    if summary_file.exists():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    ledger = summary.get("ledger", {})
    rounds = list(zip(ledger.get("started", []), ledger.get("ended", []), strict=True))
    sums: dict[str, list[int]] = {}
    with (folder / SOCKETS_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "node", "direction", "socket_bytes"])
        for way in (UP, DOWN):
            counts = [by_round(relay.passed(node, way), rounds) for node in range(len(relay.ports))]
            sums[way] = [sum(column) for column in zip(*counts, strict=True)]
            for number in range(len(rounds) + 1):
                for node, count in enumerate(counts):
                    writer.writerow([number, node_ids.get(node, node), way, count[number]])
    if not ledger:
        return
    for way, name in ((UP, "uplink"), (DOWN, "downlink")):
        ledger[f"{name}_socket_bytes"] = sums[way][1:]
        ledger[f"{name}_socket_bytes_outside"] = sums[way][0]
    summary_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    overhead.plot(folder / overhead.BYTES_PLOT_FILE, summary)
