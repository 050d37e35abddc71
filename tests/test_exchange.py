"""Both directions compressed, over an in-process grid: versions, resync, partial participation."""

from __future__ import annotations

import os
import random
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import tiny
from flwr.app import ConfigRecord, RecordDict
from local_grid import LocalGrid, node_ids

from compeft_fl.client.node_memory import NodeMemory
from compeft_fl.compeft import compress
from compeft_fl.exchange.grid import Grid
from compeft_fl.exchange.records import EXCHANGE_KEY, find_answer, find_offer
from compeft_fl.exchange.replica import digest_of
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import (
    CheckpointFolder,
    Checkpointing,
    ComPEFTAverage,
    ComPEFTTies,
    DownlinkOptions,
)
from compeft_fl.task_vector import TaskVector

N = 4
START, DENSE = 200, 800  # bytes of the start's 200 parameters, coarse and in float32
NODES = node_ids(N)


def grid_of(mod=None, nodes=N, **more) -> LocalGrid:
    return LocalGrid(tiny.client_app(mod or CompressionMod(density=0.2)), nodes, **more)


def start(strategy, grid, rounds=3, **more):
    more = {"checkpointing": resumable()} | more
    return strategy.start(grid, tiny.arrays(), num_rounds=rounds, timeout=20, **more)


def resumable() -> Checkpointing:
    """Of a federation that can go on after its end: its nodes keep what they know."""
    folder = Path(os.environ["COMPEFT_FL_STATE_DIR"]) / f"server-{uuid.uuid4().hex}"
    return Checkpointing(CheckpointFolder(folder))


def flat(record) -> np.ndarray:
    return tiny.flat(tiny.state_of(record)).astype(np.float32)


def remembered(strategy, node=0):
    """What a node has on disk."""
    folder = Path(os.environ["COMPEFT_FL_STATE_DIR"]) / strategy._broadcaster.federation
    from compeft_fl.exchange.node_state import StateFile

    return StateFile(folder / f"{node}-of-{N}").load()


def test_every_node_has_the_server_s_bits_after_every_round():
    seen = []

    def evaluate(server_round, record):
        shared = strategy._broadcaster._downlink
        if server_round:
            for node in range(N):
                replica = remembered(strategy, node).replica
                assert replica.version == shared.version == server_round
                assert replica.digest == shared.digest
            seen.append(np.linalg.norm(flat(record) - shared.shared))

    strategy = ComPEFTAverage(downlink=DownlinkOptions(density=0.3))
    result = start(strategy, grid_of(), 6, evaluate_fn=evaluate)
    assert len(seen) == 6
    assert min(seen) > 0  # the server holds more than it has sent
    assert np.abs(flat(result.arrays) - flat(tiny.arrays())).max() > 0.01


def test_the_start_goes_down_once_and_then_deltas():
    strategy = ComPEFTTies()
    grid = grid_of()
    start(strategy, grid, 4)
    train, evaluate = strategy.observer.train, strategy.observer.evaluate
    assert N * START < train[1].down_bytes < N * DENSE / 1.5  # at first contact
    for server_round in (2, 3, 4):
        assert train[server_round].down_bytes == 0  # evaluation has brought it
        assert 0 < evaluate[server_round].down_bytes < N * 120
    assert all(count.resyncs == 0 for count in train.values())


def test_without_evaluation_training_brings_the_deltas():
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(), 3)
    sizes = [strategy.observer.train[r].down_bytes for r in (1, 2, 3)]
    assert N * START < sizes[0] < N * DENSE / 1.5
    assert all(0 < size < N * 120 for size in sizes[1:])


def test_first_contact_by_seed_sends_nothing():
    mod = CompressionMod(initial_adapter=lambda context: tiny.adapter())
    strategy = ComPEFTAverage(downlink=DownlinkOptions(first_contact="seed"))
    result = start(strategy, grid_of(mod), 2)
    assert strategy.observer.train[1].down_bytes == 0
    assert strategy.observer.train[1].replies == N
    sent = ComPEFTAverage(downlink=DownlinkOptions(first_contact="snapshot"))
    with_snapshot = start(sent, grid_of(CompressionMod()), 2)
    assert sent.observer.train[1].down_bytes > N * DENSE
    np.testing.assert_array_equal(flat(result.arrays), flat(with_snapshot.arrays))


@pytest.mark.parametrize("other", ["another seed", "another layout", "none"])
def test_a_start_that_differs_is_sent_the_snapshot_in_the_same_round(other):
    starts = {
        "another seed": lambda context: tiny.adapter(seed=9),
        "another layout": lambda context: {"w": np.zeros(3, np.float32)},
        "none": None,
    }
    mod = CompressionMod(initial_adapter=starts[other])
    strategy = ComPEFTAverage(downlink=DownlinkOptions(first_contact="seed"))
    start(strategy, grid_of(mod), 2)
    first = strategy.observer.train[1]
    assert (first.replies, first.resyncs, first.set_aside) == (N, N, [])
    assert first.down_bytes > N * DENSE
    assert strategy.observer.train[2].resyncs == 0


def test_a_node_that_lost_its_state_is_resynchronised_in_the_same_round(caplog):
    def evaluate(server_round, record):
        if server_round == 2:
            folder = Path(os.environ["COMPEFT_FL_STATE_DIR"]) / strategy._broadcaster.federation
            shutil.rmtree(folder / f"0-of-{N}")

    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(), 4, evaluate_fn=evaluate)
    third = strategy.observer.train[3]
    assert (third.replies, third.resyncs, third.set_aside) == (N, 1, [])
    assert third.down_bytes > START
    assert "is sent what it lacks" in caplog.text
    assert strategy.observer.train[4].resyncs == 0
    assert remembered(strategy).replica.version == 3


def test_a_node_whose_copy_drifted_is_noticed_by_the_digest():
    def evaluate(server_round, record):
        if server_round == 1:
            context = grid.contexts[NODES[1]]
            with NodeMemory.of(context, strategy._broadcaster.federation) as memory:
                state = memory.state
                values = state.replica.values.copy()
                values[7] += np.float32(0.25)
                replica = type(state.replica)(state.layout, values, state.replica.version)
                assert memory.save(state.following(replica))

    strategy, grid = ComPEFTAverage(fraction_evaluate=0.0), grid_of()
    start(strategy, grid, 2, evaluate_fn=evaluate)
    second = strategy.observer.train[2]
    assert (second.replies, second.resyncs) == (N, 1)
    shared = strategy._broadcaster._downlink
    assert remembered(strategy, 1).replica.version == 1
    assert shared.version == 2  # the checkpoint has made one of what was merged last


def test_a_node_that_can_never_follow_is_set_aside(caplog):
    """It asks and asks; the round goes on with the others."""

    def fault(node, reply):
        if node == NODES[0]:
            record = ConfigRecord({"version": -1, "resync": "again"})
            reply.content = RecordDict({EXCHANGE_KEY: record})
        return [reply]

    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(fault=fault), 1)
    count = strategy.observer.train[1]
    assert (count.replies, count.resyncs, len(count.set_aside)) == (N - 1, 2, 1)
    assert "cannot follow: again" in caplog.text


@pytest.mark.parametrize(
    "record",
    [
        {"version": 0, "update": 3},
        {"version": "0"},
        {"version": 0, "update": b"x" * 9},
        {"version": 0, "taken": b"x" * 9},
        {"update": b"x"},
        {"version": 0, "more": 1},
    ],
)
def test_an_answer_that_is_none_is_set_aside(record, caplog):
    def fault(node, reply):
        if node == NODES[0]:
            reply.content = RecordDict({**reply.content, EXCHANGE_KEY: ConfigRecord(record)})
        return [reply]

    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(fault=fault), 2)
    assert [count.replies for count in strategy.observer.train.values()] == [N - 1] * 2
    assert "MalformedError" in caplog.text


def test_a_lost_reply_is_undone_exactly():
    """What a node sent and the server never took goes back into what it has left to send."""
    lost = {2}

    def fault(node, reply):
        if node == NODES[0]:
            sent.append((node, find_answer(reply.content).update))
        dropped = node == NODES[0] and server_round[0] in lost
        return [] if dropped else [reply]

    server_round = [0]

    class Counting(ComPEFTAverage):
        def configure_train(self, round_, *args):
            server_round[0] = round_
            return super().configure_train(round_, *args)

    sums, sent = {}, []

    def train(state, context):
        return tiny.train_step(state, context)

    strategy = Counting(fraction_evaluate=0.0)
    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.2), train=train), N, fault=fault)
    strategy.start(
        grid, tiny.arrays(), num_rounds=2, timeout=0.5, checkpointing=resumable()
    )  # fmt: skip
    state = remembered(strategy)
    assert sent == [(NODES[0], state.taken), (NODES[0], state.trained)]
    sums["before"], sums["after"] = state.residual, state.next_residual
    settled = state.settled(state.taken)
    np.testing.assert_array_equal(settled.residual, sums["before"])
    assert not np.array_equal(sums["before"], sums["after"])


def test_an_update_that_was_set_aside_is_sent_again_later():
    """With one node whose first reply is set aside, nothing that it trained is lost."""

    def fault(node, reply):
        if not flags:
            flags.append(1)
            reply.content["metrics"]["num-examples"] = -1
        return [reply]

    flags: list[int] = []
    taus, sent = [], []

    def train(state, context):
        new = tiny.train_step(state, context)
        taus.append(TaskVector.between(state, new).values)
        return new

    app = tiny.client_app(CompressionMod(density=0.2, residual_decay=1.0), train=train)
    strategy = ComPEFTAverage(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    grid = LocalGrid(app, 1, fault=fault)
    result = start(strategy, grid, 3)
    assert [count.replies for count in strategy.observer.train.values()] == [0, 1, 1]
    moved = flat(result.arrays) - flat(tiny.arrays())
    folder = Path(os.environ["COMPEFT_FL_STATE_DIR"]) / strategy._broadcaster.federation
    from compeft_fl.exchange.node_state import StateFile

    left = StateFile(folder / "0-of-1").load().next_residual
    # The first round's training is not merged, and not lost from the residual's point of view:
    # the update was never taken, so it is as if that round had not been.
    np.testing.assert_allclose(moved + left, taus[1] + taus[2], atol=1e-5)
    assert sent == []


def test_nodes_that_come_and_go():
    """Partial participation: each round another half of the nodes, and one that joins late."""
    strategy = ComPEFTAverage(
        fraction_train=0.5, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2
    )
    grid = grid_of(nodes=N)
    random.seed(3)
    result = start(strategy, grid, 8)
    assert all(count.replies == 2 for count in strategy.observer.train.values())
    assert all(count.resyncs == 0 for count in strategy.observer.train.values())
    assert np.isfinite(flat(result.arrays)).all()
    versions = [remembered(strategy, node).replica.version for node in range(N)]
    assert len(set(versions)) > 1


def test_a_late_joiner_gets_the_start_and_what_came_after_it_and_goes_on_with_deltas():
    strategy, grid = ComPEFTAverage(fraction_evaluate=0.0), grid_of()
    late = grid.contexts.pop(NODES[3])

    def evaluate(server_round, record):
        if server_round == 3:
            grid.contexts[NODES[3]] = late

    start(strategy, grid, 5, evaluate_fn=evaluate)
    train = strategy.observer.train
    assert [count.nodes for count in train.values()] == [3, 3, 3, 4, 4]
    assert START < train[4].down_bytes < DENSE + 3 * 120
    assert train[5].down_bytes < N * 120
    assert train[5].replies == 4


def test_a_reply_relative_to_another_version_is_set_aside_and_counted(caplog):
    kept = []

    def fault(node, reply):
        if node == NODES[2]:
            kept.append(reply.content["arrays"])
            reply.content = RecordDict({**reply.content, "arrays": kept[0]})
        return [reply]

    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(fault=fault), 2)
    assert [c.replies for c in strategy.observer.train.values()] == [N, N - 1]
    assert "VersionError: expected an update to version 1, found 0" in caplog.text


def test_a_message_delivered_twice_gets_the_same_answer_twice():
    strategy, grid = ComPEFTAverage(fraction_evaluate=0.0), grid_of(nodes=1)
    strategy.min_train_nodes = strategy.min_available_nodes = 1
    result = start(strategy, grid, 1)
    (message,) = strategy.configure_train(2, result.arrays, ConfigRecord(), grid)
    content = message.content
    answers = []
    for _ in range(2):
        message.content = content
        reply = grid.apps[NODES[0]](message, grid.contexts[NODES[0]])
        assert find_answer(reply.content).resync == ""
        (array,) = reply.content["arrays"].values()
        answers.append(array.data)
    assert answers[0] == answers[1]


def test_the_offer_costs_16_bytes_of_digest_and_a_few_more():
    strategy = ComPEFTAverage()
    (message, *_) = strategy.configure_train(1, tiny.arrays(), ConfigRecord(), grid_of())
    offer, key, shipment = find_offer(message.content)
    assert (key, shipment.kind, len(offer.digest)) == ("arrays", "start", 16)
    start = flat(tiny.arrays())
    assert offer.digest == digest_of(Grid.of(start).coarse(start, tiny.layout())[0])
    record = message.content[EXCHANGE_KEY]
    assert record.count_bytes() < 160


def test_a_node_without_a_place_for_its_state_takes_part(tmp_path, monkeypatch, caplog):
    """A state folder that cannot be made: the node is sent a snapshot each round, and says why."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path / "file"))
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(), 2)
    assert [count.replies for count in strategy.observer.train.values()] == [N, N]
    assert strategy.observer.train[2].down_bytes > N * START
    assert "remembers nothing" in caplog.text


def test_one_node_without_error_feedback_is_followed(tmp_path):
    mod = CompressionMod(density=0.3, error_feedback=False)
    strategy = ComPEFTAverage(fraction_evaluate=0.0, downlink=DownlinkOptions(codec="dense"))
    result = start(strategy, grid_of(mod), 1)
    state = tiny.adapter()
    rows = []
    for node in NODES:
        context = type("Node", (), {"node_id": node})
        tau = TaskVector.between(state, tiny.train_step(state, context))
        rows.append(compress(tau, 0.3, "mean").to_task_vector().values)
    wanted = np.average(rows, axis=0, weights=[tiny.num_examples(node) for node in NODES])
    np.testing.assert_allclose(flat(result.arrays) - flat(tiny.arrays()), wanted, atol=1e-6)


def test_after_evaluation_a_node_keeps_one_residual(tmp_path):
    """Whether its update was taken is known then: two adapters on disk in place of three."""
    strategy = ComPEFTAverage()
    start(strategy, grid_of(), 2)
    state = remembered(strategy)
    assert state.residual is not None
    assert state.next_residual is None
    file = Path(os.environ["COMPEFT_FL_STATE_DIR"]) / strategy._broadcaster.federation
    size = (file / f"0-of-{N}" / "state.safetensors").stat().st_size
    assert size < 2 * 4 * state.layout.num_parameters + 1000
