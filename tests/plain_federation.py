"""An app without torch for tests of faults: its processes start in a second or two.

It is imported by tests, for an in-process grid, and copied into a folder for Flower to run. What a
node learns in a round is fixed by its partition and the round, so that two runs end with the same
bytes where nothing was lost. FEDERATION_FOLDER holds what tests look at and what holds clients up.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import CheckpointFolder, Checkpointing, ComPEFTAverage, RoundCounts

SIZE = 5000
ROUNDS = 4
PROJECT = """\
[project]
name = "plain-federation"
version = "1.0.0"
description = "An app without torch"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "compeft-fl"
[tool.flwr.app.components]
serverapp = "plain_federation:server_app"
clientapp = "plain_federation:client_app"
"""

server_app = ServerApp()
client_app = ClientApp(mods=[CompressionMod(density=0.1)])


def folder() -> Path:
    return Path(os.environ["FEDERATION_FOLDER"])


def initial() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(SIZE, np.float32))})


class Told(RoundCounts):
    """Writes down what happens, a line of JSON each."""

    def tell(self, **event: object) -> None:
        with (folder() / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def on_broadcast(self, server_round, kind, node_ids, num_bytes) -> None:
        super().on_broadcast(server_round, kind, node_ids, num_bytes)
        self.tell(event="sent", round=server_round, kind=kind, nodes=len(node_ids), size=num_bytes)

    def on_reply(self, server_round, kind, node_id, num_bytes, metrics, reason) -> None:
        super().on_reply(server_round, kind, node_id, num_bytes, metrics, reason)
        partition = None if metrics is None else metrics.get("partition")
        self.tell(event="reply", round=server_round, partition=partition, reason=reason)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    server_round = message.content["config"]["server-round"]
    partition = context.node_config["partition-id"]
    (folder() / f"training-{partition}-{server_round}").write_text(str(os.getpid()))
    while (folder() / f"hold-{partition}-{server_round}").exists():
        time.sleep(0.05)
    weights = message.content["arrays"]["w"].numpy()
    step = np.random.default_rng([partition, server_round]).standard_normal(SIZE)
    arrays = ArrayRecord({"w": Array((weights + step).astype(np.float32))})
    metrics = MetricRecord({"num-examples": 1 + partition, "partition": partition})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Each run goes on from the folder's newest checkpoint, if there is one."""
    observer = Told()
    result = federate(grid, observer, timeout=float(os.environ["FEDERATION_TIMEOUT"]))
    np.save(folder() / "final.npy", result)


def federate(grid: Grid, observer: RoundCounts, timeout: float) -> np.ndarray:
    strategy = ComPEFTAverage(
        fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2, observer=observer
    )
    checkpointing = Checkpointing(CheckpointFolder(folder() / "checkpoints"), resume=True)
    result = strategy.start(
        grid=grid,
        initial_arrays=initial(),
        num_rounds=ROUNDS,
        timeout=timeout,
        checkpointing=checkpointing,
    )
    return result.arrays["w"].numpy()
