"""FlowerTune's budget case: what fine-tuning Mistral-7B for 200 rounds sends.

FlowerTune's recipe has 20 nodes, 2 of them in each of 200 rounds, and a LoRA adapter of rank 32 on
query and value: 13,631,488 parameters, 54.5 MB (52.0 MiB) in float32. Dense, both ways:
2 x 2 x 200 x 54.5 MB = 43.6 GB, which is 41,600 MiB: the "41.6 GB" that is often said.

The rounds are run through the project's own exchange: error feedback on each node, one versioned
downlink, averaging; only the training is made up (`compeft_fl.bench.layouts.synthetic`): each
round's is drawn anew, so that nothing of what a node has missed is undone again. A node that comes
back after some rounds is sent the sum of what it lacks, as in a real run. Each case is stored under
OUT/flowertune when it has finished, and not run again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.bench import layouts, results
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.uplink import ErrorFeedback
from compeft_fl.merging.accumulators import Average
from compeft_fl.server.downlink_options import DENSITY, DENSITY_FEW
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.wire.messages import decode, encode

__all__ = ["Traffic", "exchange", "run"]

ROUNDS: Final = 200
NODES, NODES_A_ROUND = 20, 2
BUDGET: Final = 200e9  # FlowerTune's limit on communication
UPLINK: Final = 0.1  # the project's default
_FEW: Final = 20  # enough for nodes that take part in every round: each round costs the same
_QUICK: Final = 6


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of some rounds, summed over nodes."""

    rounds: int
    up: int
    down: int

    def of_rounds(self, rounds: int) -> Traffic:
        """The same a round, over another number of rounds; the first one sends nothing down."""
        up = self.up * rounds / self.rounds
        down = self.down * (rounds - 1) / max(1, self.rounds - 1)
        return Traffic(rounds, round(up), round(down))


def exchange(
    layout: Layout,
    nodes: int,
    rounds: int,
    density: float = DENSITY,
    seed: int = 0,
    step: Any = None,
) -> Traffic:
    """Run rounds of the real exchange with synthetic training, and count the payloads.

    Parameters
    ----------
    layout : Layout
    nodes : int
        How many there are; each round draws `NODES_A_ROUND` of them.
    rounds : int
    density : float
        On the way down.
    seed : int
    step : callable, optional
        Called after each round.
    """
    draw = random.Random(seed)
    adapter = np.zeros(layout.num_parameters, np.float32)
    start = TaskVector(layout, adapter)
    downlink = Downlink(start, density=density, seeded=True)
    versions = dict.fromkeys(range(nodes), 0)  # first contact by seed: nothing is sent
    # Residuals in half precision, so that 20 of them fit: the bytes are what is looked at.
    residuals: dict[int, NDArray[np.float16]] = {}
    scale = np.float32(1 / layouts.MEDIAN_SCALE)
    up = down = 0
    for number in range(rounds):
        average = Average(layout=layout)
        drawn = draw.sample(range(nodes), NODES_A_ROUND)
        downlink.prepare(versions[node] for node in drawn)
        for node in drawn:
            down += downlink.lacking(versions[node]).num_bytes
            versions[node] = downlink.version
            tau = layouts.synthetic(layout, seed=1 + number * nodes + node)
            kept = residuals.get(node)
            left = None if kept is None else kept.astype(np.float32) / scale
            feedback = ErrorFeedback(UPLINK, "mean", left)
            blob = encode(feedback.compress(tau), layout_by_id=True)
            if feedback.residual is not None:
                residuals[node] = (feedback.residual * scale).astype(np.float16)
            up += len(blob)
            average.add(decode(blob, layout=layout))
        adapter = adapter + np.asarray(average.result().values)
        downlink.advance(TaskVector(layout, adapter))
        if step is not None:
            step()
    return Traffic(rounds, up, down)


def run(out: Path, command: str, quick: bool) -> None:
    """Measure, show and write flowertune.csv and flowertune.md."""
    layout = layouts.get("mistral-7b-r32").layout
    few = _QUICK if quick else _FEW
    cases = [(NODES_A_ROUND, few, DENSITY)]
    if not quick:  # what a node lacks depends on how long it was away, so few rounds say little
        cases += [(NODES, ROUNDS, each) for each in (0.05, DENSITY_FEW, 0.1, DENSITY)]
    dense = 4 * layout.num_parameters * NODES_A_ROUND * ROUNDS
    rows = [
        _row("dense fp32", "derived", Traffic(ROUNDS, dense, dense), 2 * dense),
        _row("dense fp16", "derived", Traffic(ROUNDS, dense // 2, dense // 2), 2 * dense),
    ]
    with results.Progress("FlowerTune", sum(rounds for _, rounds, _ in cases)) as progress:
        for nodes, rounds, density in cases:
            of = "the same 2" if nodes == NODES_A_ROUND else f"2 of {nodes}"
            text = f"{of} nodes each round, {density:g} down"
            progress.note(text)
            file = out / "flowertune" / f"{nodes}-{rounds}-{density:g}-{layout.num_parameters}.json"
            traffic = _stored(file)
            if traffic is None:
                advance = partial(progress.advance, 1)
                traffic = exchange(layout, nodes, rounds, density, step=advance)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(asdict(traffic)) + "\n", encoding="utf-8")
            how = "all rounds run" if rounds == ROUNDS else f"{rounds} rounds, multiplied"
            rows.append(_row(f"compeft-fl, {text}", how, traffic.of_rounds(ROUNDS), 2 * dense))
    results.write_csv(out / "flowertune.csv", rows)
    heads = ["what is sent", "measured", "up GB", "down GB", "both GB", "fewer", "of 200 GB"]
    table = [
        [
            row["case"],
            row["measured"],
            *(f"{row[key] / 1e9:.3f}" for key in ("up_bytes", "down_bytes", "total_bytes")),
            f"{row['ratio_fp32']:.1f}x",
            f"{100 * row['of_budget']:.2f} %",
        ]
        for row in rows
    ]
    notes = (
        f"Mistral-7B, LoRA r=32 on q, v: {layout.num_parameters:,} parameters, "
        f"{4 * layout.num_parameters / 1e6:.1f} MB in float32; {NODES_A_ROUND} nodes a round, "
        f"{ROUNDS} rounds, GB of 10^9 bytes. Dense float32 both ways is {2 * dense / 1e9:.1f} GB = "
        f"{2 * dense / 2**20:,.0f} MiB. Payloads through the project's exchange (density "
        f"{UPLINK:g} up with error feedback, Golomb codes; what a node has missed as steps) over "
        "synthetic training; nodes make the start from the seed. Flower adds about 6 kB to a "
        "reply."
    )
    results.write_markdown(out / "flowertune.md", command, heads, table, notes)
    results.show_table("FlowerTune's Mistral-7B, 200 rounds", heads, table)


def _stored(file: Path) -> Traffic | None:
    """A case that has been run before."""
    try:
        return Traffic(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _row(case: str, measured: str, traffic: Traffic, dense: int) -> Mapping[str, Any]:
    total = traffic.up + traffic.down
    return {
        "case": case,
        "measured": measured,
        "rounds": traffic.rounds,
        "up_bytes": traffic.up,
        "down_bytes": traffic.down,
        "total_bytes": total,
        "ratio_fp32": round(dense / total, 2),
        "of_budget": round(total / BUDGET, 5),
    }
