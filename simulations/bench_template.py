"""What FlowerTune's template gains in ten rounds: ``python simulations/bench_template.py``.

The template on a model that takes seconds (tests/flower_apps/flowertune_template.py), as it is and
with two lines changed, for several draws of its nodes: 2 of 20 in a round. Ten rounds at its
learning rate swing, so that one draw says little. Writes template.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from compeft_fl.bench import results
from compeft_fl.mod import CompressionMod
from compeft_fl.server.downlink_options import DownlinkOptions
from compeft_fl.strategies import ComPEFTAverage

ROOT = Path(__file__).parents[1]
# Each lever: options of the way down, and the server's step; the first is the default.
LEVERS = {
    "default": ({}, 1.0),
    "the server's own": ({"result": "server"}, 1.0),
    "step 1.5": ({}, 1.5),
    "step 1.5, the server's own": ({"result": "server"}, 1.5),
    "0.1 down": ({"density": 0.1}, 1.0),
    "0.05 down": ({"density": 0.05}, 1.0),
}


def main() -> None:
    """Run the draws, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "simulations" / "results")
    parser.add_argument("--draws", type=int, default=10, help="of the nodes that train")
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))
    from flower_apps import flowertune_template as template
    from flwr.serverapp.strategy import FedAvg
    from local_grid import LocalGrid

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def loss(draw: int, lever: str = "", *mods: CompressionMod) -> float:
        """The test loss after the last round."""
        random.seed(draw)
        grid = LocalGrid(template.client_app(*mods), template.NODES)
        keys = template.options()
        if mods:
            down, step = LEVERS[lever]
            strategy = template.flowertune(ComPEFTAverage)(
                **keys, downlink=DownlinkOptions(**down), server_learning_rate=step
            )
        else:
            strategy = template.flowertune(FedAvg)(**keys)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["COMPEFT_FL_STATE_DIR"] = str(Path(folder, "state"))
            with contextlib.redirect_stdout(io.StringIO()):
                found = template.main(grid, strategy, Path(folder))
        return float(template.loss_of(found.arrays))

    start = template.get_peft_model_state_dict(template.get_model())
    before = float(template.loss_of(template.ArrayRecord(start)))
    rows, gains = [], []
    for draw in range(1, options.draws + 1):
        dense = loss(draw)
        ours = [loss(draw, lever, CompressionMod()) for lever in LEVERS]
        gains.append([100 * (before - each) / (before - dense) for each in ours])
        rows.append([str(draw), f"{dense:.2f}", *(f"{gain:.0f} %" for gain in gains[-1])])
        print(*rows[-1], flush=True)
    rows.append(["mean", "", *(f"{gain:.0f} %" for gain in np.mean(gains, axis=0))])
    heads = ["draw of nodes", "dense: loss", *LEVERS]
    note = (
        f"Loss at the start: {before:.2f}. The others: their part of what dense links gain, by "
        "what nodes have of the adapter, but where it says the server's own."
    )
    results.write_markdown(
        options.out / "template.md", "python simulations/bench_template.py", heads, rows, note
    )


if __name__ == "__main__":
    main()
