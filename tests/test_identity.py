"""Who a node is, Flower says; what a node says is about itself, and tables are bounded."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import tiny
from flwr.app import ConfigRecord, RecordDict
from local_grid import LocalGrid, node_ids

from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.records import EXCHANGE_KEY
from compeft_fl.mod import CompressionMod
from compeft_fl.server import nodes
from compeft_fl.server.checkpoint import CheckpointFolder
from compeft_fl.strategies import Checkpointing, ComPEFTAverage
from compeft_fl.task_vector import TaskVector

N = 4
LIAR, *OTHERS = node_ids(N)


class Downs:
    """Payload bytes down, by round and node."""

    def __init__(self) -> None:
        self.bytes: dict[tuple[int, int], int] = {}
        self.aside: list[tuple[int, str]] = []

    def on_broadcast(self, server_round, kind, nodes, num_bytes):
        for node in nodes:
            place = server_round, node
            self.bytes[place] = self.bytes.get(place, 0) + num_bytes

    def on_reply(self, server_round, kind, node, num_bytes, metrics, reason):
        if reason is not None:
            self.aside.append((node, reason))


def run(lie=None, rounds=4, nodes=N, **more):
    """A federation in which one node's answers are what ``lie`` makes of the honest ones."""
    seen: dict[int, dict] = {}

    def fault(node, reply):
        if EXCHANGE_KEY in reply.content:
            seen[node] = dict(reply.content[EXCHANGE_KEY])
            if lie is not None and node == LIAR:
                record = ConfigRecord(lie(seen))
                reply.content = RecordDict({**reply.content, EXCHANGE_KEY: record})
        return [reply]

    downs = Downs()
    strategy = ComPEFTAverage(fraction_evaluate=0.0, observer=downs)
    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.2)), nodes, fault=fault)
    result = strategy.start(grid, tiny.arrays(), num_rounds=rounds, timeout=20, **more)
    return strategy, downs, tiny.flat(tiny.state_of(result.arrays))


LIES = {
    "another version": lambda seen: {**seen[LIAR], "version": 99},
    "nothing kept": lambda seen: {**seen[LIAR], "version": -1},
    "another's update": lambda seen: {**seen[LIAR], **_without_resync(seen.get(OTHERS[0], {}))},
    "a new update each time": lambda seen: {**seen[LIAR], "update": secrets.token_bytes(8)},
    "another's name": lambda seen: {**seen[LIAR], "name": f"1-of-{N}"},
}


def _without_resync(answer):
    return {key: value for key, value in answer.items() if key == "update"}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_the_liar_alone(lie):
    _, honest, _ = run()
    strategy, downs, _ = run(LIES[lie])
    for (server_round, node), num_bytes in downs.bytes.items():
        if node != LIAR:
            assert num_bytes == pytest.approx(honest.bytes[server_round, node], abs=40)
    assert {node for node, _ in downs.aside} <= {LIAR}
    assert len(strategy._broadcaster._nodes) <= N


def test_a_node_that_was_forgotten_is_as_new_as_any_other(monkeypatch, tmp_path):
    monkeypatch.setattr(nodes, "MAX_NODES", 2)
    folder = CheckpointFolder(tmp_path)
    strategy, downs, _ = run(checkpointing=Checkpointing(folder))
    assert downs.aside == []
    assert len(strategy._broadcaster._nodes) == 2
    assert len(folder.load().exchange["nodes"]) == 2


def test_a_restored_server_says_that_its_adapter_has_been_driven_away(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path)
    run(checkpointing=Checkpointing(folder))
    assert "has values up to" not in caplog.text
    kept = folder.load()
    kept.arrays = tiny.arrays({k: v + np.float32(1e30) for k, v in tiny.adapter().items()})
    folder.save(kept)
    run(checkpointing=Checkpointing(folder, resume=True))
    assert "the checkpoint's adapter has values up to 1e+30, in 'q.lora_A'" in caplog.text


@pytest.mark.parametrize("codec", ["golomb", "dense"])
def test_a_difference_beyond_float32_makes_a_version_all_the_same(codec):
    """theta - theta_shared can be twice what float32 holds; every node follows all the same."""
    layout = tiny.layout()
    size, most = layout.num_parameters, np.float32(3.4e38)
    rng = np.random.default_rng(0)
    downlink = Downlink(TaskVector(layout, np.zeros(size, np.float32)), codec=codec)
    for _ in range(6):
        target = most * rng.choice([-1, 1], size).astype(np.float32)
        before = downlink.version
        downlink.advance(TaskVector(layout, target))
        assert downlink.version == before + 1
        assert np.isfinite(downlink.shared).all()
        assert downlink.lacking(before).blobs
