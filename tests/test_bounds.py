"""bounds.py: what a single reply can do, by default, whatever finite values and weights it has."""

from __future__ import annotations

import functools
import math
import random

import logistic
import numpy as np
import pytest
import tiny
from bad_replies import blob_of, with_records
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid, identify, node_ids

from compeft_fl.compeft import compress
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import update_record
from compeft_fl.mod import CompressionMod
from compeft_fl.results.journal import Journal
from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.checkpoint import CheckpointFolder
from compeft_fl.server.intake import Reply
from compeft_fl.server.robustness import Candidate
from compeft_fl.strategies import (
    Checkpointing,
    ComPEFTAverage,
    ComPEFTTaskArithmetic,
    ComPEFTTies,
    Compressed,
)
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.wire.messages import encode, inspect

N = 10
NODES = node_ids(N)
BAD = NODES[4]
LAYOUT = tiny.layout()
D = LAYOUT.num_parameters
MOST = np.float32(3.4e38)
KINDS = {
    "average": lambda: ComPEFTAverage(fraction_evaluate=0.0),
    "task arithmetic": lambda: ComPEFTTaskArithmetic(fraction_evaluate=0.0),
    "ties": lambda: ComPEFTTies(fraction_evaluate=0.0),
    "compressed": lambda: Compressed(FedAvg(fraction_evaluate=0.0)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def forged(reply, values, weight=1e12):
    version = inspect(blob_of(reply)).base_version
    tau = TaskVector(LAYOUT, np.asarray(values, np.float32))
    blob = encode(tau, "dense", base_version=version, layout_by_id=True)
    metrics = MetricRecord({"num-examples": weight, "loss": 0.1})
    return with_records(reply, arrays=update_record(blob, 1), metrics=metrics)


def federate(strategy, attack=None, rounds=4, **more):
    """A tiny federation; ``attack`` gives the values that a node sends in its n-th reply."""
    sent = []

    def fault(node, reply):
        if attack is None or node != BAD or reply.has_error():
            return [reply]
        sent.append(node)
        return [forged(reply, attack(len(sent)))]

    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.1)), N, fault=fault)
    result = strategy.start(grid, tiny.arrays(), num_rounds=rounds, timeout=20, **more)
    return tiny.flat(tiny.state_of(result.arrays))


def overflowing(count):
    """Three replies that drove theta - theta_shared beyond float32."""
    values = np.zeros(D, np.float32)
    some, others = slice(0, D // 5 - 2), slice(D // 5 - 2, D)
    values[some] = 0.9 * MOST if count == 1 else -0.9 * MOST
    if count == 2:
        values[others] = 0.99 * MOST
    return values


ATTACKS = {
    "overflowing": overflowing,
    "huge": lambda count: np.full(D, MOST),
    "alternating": lambda count: np.full(D, MOST if count % 2 else -MOST),
    "large": lambda count: np.full(D, 1e30),
    "one entry": lambda count: np.eye(1, D, 3)[0] * 1e6,
    "growing": lambda count: np.full(D, 10.0**count),
}


@functools.cache
def honest_federation(kind):
    return federate(KINDS[kind]())


@every_kind
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_single_reply_moves_the_adapter_out_of_proportion(kind, attack, caplog):
    start, honest = tiny.flat(tiny.adapter()), honest_federation(kind)
    strategy = KINDS[kind]()
    moved = federate(strategy, ATTACKS[attack])
    assert np.linalg.norm(moved - start) < 5 * np.linalg.norm(honest - start)
    said = f"node {BAD}"
    assert any("within bounds" in each and said in each for each in caplog.messages) or any(
        "oppose" in each and said in each for each in caplog.messages
    )
    train = strategy.observer.train.values()
    assert {node for count in train for node in count.bounded} >= {BAD} or any(
        node == BAD for count in train for node, _ in count.set_aside
    )
    assert all(count.replies >= N - 1 for count in train)


def test_a_hostile_node_does_not_stop_the_server_and_not_its_resume(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for rounds in (4, 8):
        moved = federate(
            KINDS["average"](), overflowing, rounds,
            checkpointing=Checkpointing(folder, resume=True),
        )  # fmt: skip
        assert np.abs(moved).max() < 10


@every_kind
def test_what_is_undisturbed_is_as_without_bounds(kind, monkeypatch, caplog):
    """Weights from 10 to 100: no bound is reached, and not a bit differs."""
    random.seed(0)  # Flower asks the nodes in a random order, in which float sums are made
    bounded = federate(KINDS[kind]())
    random.seed(0)
    monkeypatch.setattr(ReplyBounds, "within", lambda self, _round, each, *_, **__: each)
    np.testing.assert_array_equal(bounded, federate(KINDS[kind]()))
    assert "within bounds" not in caplog.text


# --- the numbers -------------------------------------------------------------------------------


def replies_of(*sizes, layout=None):
    """Candidates of (weight, norm) each, along directions of their own."""
    identify()
    layout = layout or Layout([TensorSpec("w", (64,))])
    rng = np.random.default_rng(0)
    for key, (weight, norm) in enumerate(sizes):
        values = rng.standard_normal(layout.num_parameters)
        length = np.linalg.norm(values)
        tau = TaskVector(layout, (values * (norm / length)).astype(np.float32))
        content = RecordDict({"metrics": MetricRecord({"num-examples": weight})})
        message = Message(content, 1, "train")
        yield Reply(key, message, 0, key), Candidate(weight, (), tau)


def within(bounds, *sizes):
    """The (weight, norm) of what comes out."""
    pairs = bounds.within(1, replies_of(*sizes), None)
    return [
        (found.weight, float(np.linalg.norm(found.update.values.astype(np.float64))))
        for _, found in pairs
    ]


def test_weight_norm_and_both_together():
    bounds = ReplyBounds(max_weight=3, max_norm=4, max_impact=6)
    honest = [(10.0, 1.0)] * 4
    found = within(bounds, *honest, (1e12, 1.0), (10.0, 1e30), (1e12, 1e30))
    assert found[:4] == [pytest.approx(each) for each in honest]
    assert found[4] == pytest.approx((30.0, 1.0))
    assert found[5] == pytest.approx((10.0, 4.0), rel=1e-5)
    assert found[6] == pytest.approx((15.0, 4.0), rel=1e-5)  # 6 times 10


def test_one_large_entry_is_bounded_by_the_others_largest():
    layout = Layout([TensorSpec("w", (10_000,))])
    pairs = list(replies_of(*[(1.0, 1.0)] * 5, layout=layout))
    spike = np.zeros(10_000, np.float32)
    spike[7] = 1.0
    pairs.append((pairs[0][0], Candidate(1.0, (), TaskVector(layout, spike))))
    *_, (_, found) = ReplyBounds(max_largest=10).within(1, iter(pairs), None)
    median = np.median([np.abs(each.update.values).max() for _, each in pairs])
    assert np.abs(found.update.values).max() == pytest.approx(10 * median, rel=0.1)


def test_rounds_of_few_are_measured_against_those_before():
    bounds = ReplyBounds()
    for _ in range(4):
        assert within(bounds, (10.0, 1.0), (12.0, 1.1)) == [
            pytest.approx((10.0, 1.0)), pytest.approx((12.0, 1.1)),
        ]  # fmt: skip
    (weight, norm), _ = within(bounds, (1e12, 1e38), (10.0, 1.0))
    assert weight * norm < 40
    again = ReplyBounds()
    again.restore(bounds.state())
    assert within(again, (1e12, 1e38)) == [
        pytest.approx(each) for each in within(bounds, (1e12, 1e38))
    ]


def test_updates_of_nothing_bound_nobody():
    found = within(ReplyBounds(), *[(10.0, 0.0)] * 7, (10.0, 1.0))
    assert found[7] == pytest.approx((10.0, 1.0))


def test_where_the_others_have_come_to_rest_what_they_did_before_is_the_measure():
    """However long that is ago: the few that still move are no measure of themselves."""
    bounds = ReplyBounds()
    within(bounds, *[(10.0, 1.0)] * 10)
    again = ReplyBounds()
    for _ in range(10):
        found = within(bounds, *[(10.0, 0.0)] * 9, (10.0, 1e38))
        assert found[9][0] * found[9][1] < 40
        again.restore(bounds.state())
        bounds, again = again, bounds


def test_what_is_kept_does_not_grow_with_nodes_or_rounds():
    bounds = ReplyBounds()
    for _ in range(3):
        within(bounds, *[(10.0, 1.0)] * 500)
    state = bounds.state()
    assert len(state["sizes"]) == 64
    assert len(state["past"]) <= 256


def test_few_replies_of_a_round_wait():
    """At most 16 bit masks, or 4 dense updates, whatever the number of replies."""
    for density, most in ((None, 4), (0.1, 16)):
        pulled, waiting = [0], []

        def counted(density=density, pulled=pulled):
            for reply, found in replies_of(*[(10.0, 1.0)] * 50):
                pulled[0] += 1
                update = found.update if density is None else compress(found.update, density)
                yield reply, found._replace(update=update)

        for handed, _ in enumerate(ReplyBounds().within(1, counted(), None)):
            waiting.append(pulled[0] - handed)
        assert max(waiting) == most


@pytest.mark.parametrize(
    "setting", [{"max_weight": 0.5}, {"max_norm": math.nan}, {"max_impact": 0}, {"max_largest": -1}]
)
def test_a_factor_below_one_is_an_error(setting):
    with pytest.raises(ParameterError, match="of 1 or more"):
        ReplyBounds(**setting)


# --- the direction -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    return logistic.synthetic()


@pytest.fixture(scope="module")
def undisturbed(problem, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path_factory.mktemp("nodes")))
        return problem.run(ComPEFTAverage(fraction_evaluate=0.0), rounds=12)


@pytest.mark.parametrize("attack", logistic.FINITE_ATTACKS)
def test_one_of_ten_costs_little(problem, undisturbed, attack):
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    found = problem.run(strategy, logistic.FINITE_ATTACKS[attack], hostile=1, rounds=12)
    assert undisturbed > 0.85
    assert found > undisturbed - 0.03  # of one seed
    honest = [
        node for count in strategy.observer.train.values() for node, _ in count.set_aside
        if node != NODES[-1]
    ]  # fmt: skip
    assert len(honest) <= 2  # of 108


def test_two_camps_of_like_size_are_no_outliers():
    """Half of the nodes learn one thing, half of them the opposite: nobody is set aside."""
    target = np.random.default_rng(0).choice([-1.0, 1.0], D)

    def train(state, context):
        sign = 1 if context.node_id % 2 else -1
        flat, at = {}, 0
        for name, value in state.items():
            part = target[at : at + value.size].reshape(value.shape)
            flat[name], at = np.asarray(value + 0.01 * sign * part, np.float32), at + value.size
        return flat

    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.5), train=train), N)
    strategy.start(grid, tiny.arrays(), num_rounds=3, timeout=20)
    assert [count.replies for count in strategy.observer.train.values()] == [N] * 3


# --- beside the Update -------------------------------------------------------------------------


@every_kind
def test_far_more_than_was_asked_for_is_set_aside(kind, caplog):
    def fault(node, reply):
        if node == BAD:
            reply.content["mine"] = ConfigRecord({"x": bytes(2 << 20)})
        return [reply]

    strategy = KINDS[kind]()
    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.1)), N, fault=fault)
    strategy.start(grid, tiny.arrays(), num_rounds=1, timeout=20)
    assert strategy.observer.train[1].replies == N - 1
    assert "at most 1048576 bytes of records beside the Update" in caplog.text


@every_kind
@pytest.mark.parametrize("loss", [math.nan, 1.7e308])
def test_a_metric_that_spoils_the_mean_costs_that_metric(kind, loss):
    def fault(node, reply):
        if node == BAD:
            reply.content["metrics"]["loss"] = loss
        return [reply]

    strategy = KINDS[kind]()
    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.1)), N, fault=fault)
    result = strategy.start(grid, tiny.arrays(), num_rounds=1, timeout=20)
    assert strategy.observer.train[1].replies == N
    others = [tiny.num_examples(node) for node in NODES if node != BAD]
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(len(others) / sum(others))


def test_the_metrics_weigh_what_the_update_weighs():
    def fault(node, reply):
        if node == BAD:
            reply.content["metrics"]["num-examples"] = 1e12
            reply.content["metrics"]["loss"] = 9.0
        return [reply]

    grid = LocalGrid(tiny.client_app(CompressionMod(density=0.1)), N, fault=fault)
    result = KINDS["average"]().start(grid, tiny.arrays(), num_rounds=1, timeout=20)
    assert result.train_metrics_clientapp[1]["loss"] < 3


def test_the_journal_has_who_was_bounded_and_no_nan(tmp_path):
    journal = Journal(tmp_path, "default", 1, {})
    journal.begin(D)
    journal.on_bounds(1, {BAD: "weight 1e+12 as 30"})
    for loss in (1.0, math.nan, 1.7e308, 3.0):
        journal.on_reply(1, "train", BAD, 10, MetricRecord({"loss": loss}), None)
    assert math.isfinite(journal.record().rounds[1].train_loss)
    said = (tmp_path / "progress.jsonl").read_text()
    assert '"how": "weight 1e+12 as 30"' in said
    assert "NaN" not in said
