"""Density by bandwidth: what is asked of each node by what is known of its link, and what comes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import tiny
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid, node_ids
from test_exchange import flat, resumable

import compeft_fl as cf
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import find_answer, find_offer
from compeft_fl.exchange.uplink import ErrorFeedback
from compeft_fl.mod import CompressionMod
from compeft_fl.reduction.rates import Rate, rounded_to
from compeft_fl.server.upload_budget import TIERS, LinkTimes, UploadBudget
from compeft_fl.strategies import ComPEFTAverage, Compressed
from compeft_fl.task_vector import TaskVector

NODES = node_ids(3)
LINKS = (1.0, 10.0, 100.0)
D = 1_000_000


def start(strategy, grid, rounds=3, **more):
    more = {"checkpointing": resumable()} | more
    return strategy.start(grid, tiny.arrays(), num_rounds=rounds, timeout=20, **more)


def linked_grid(mod=None, links=LINKS, **more) -> LocalGrid:
    grid = LocalGrid(tiny.client_app(mod or CompressionMod()), len(links), **more)
    for context, mbps in zip(grid.contexts.values(), links, strict=True):
        if mbps is not None:
            context.node_config["link-mbps"] = mbps
    return grid


# --- rates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_updates_in_bits_take_them_and_their_error_falls(bits):
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    tau = TaskVector.from_dict({"w": values.reshape(100, 200)})
    sent = rounded_to(tau, bits)
    found = 8 * len(cf.encode(sent, "steps", layout_by_id=True)) / values.size
    assert bits - 1.1 < found <= bits + 0.1  # a step is a power of two
    error = np.linalg.norm(tau.values - sent.values) / np.linalg.norm(tau.values)
    assert error < 2.0 ** (1.2 - bits) * 2
    np.testing.assert_array_equal(cf.decode(cf.encode(sent, "steps")).values, sent.values)


def test_values_that_are_far_apart_or_few_or_nothing():
    for values in ([1e-30, 1e30, 0], [0, 0, 0], [1e-45, 0, 0], [3.4e38, -3.4e38, 1]):
        tau = TaskVector.from_dict({"w": np.array(values, "f4")})
        sent = rounded_to(tau, 4)
        np.testing.assert_array_equal(cf.decode(cf.encode(sent, "steps")).values, sent.values)
        assert np.abs(sent.values - tau.values).max() <= np.abs(tau.values).max()


def test_what_is_rounded_off_stays_in_the_residual():
    rng = np.random.default_rng(0)
    total, sent = np.zeros(500), np.zeros(500)
    feedback = ErrorFeedback(decay=1.0)
    for number, rate in enumerate([Rate(0.05), Rate(bits=3), Rate(0.3), Rate(bits=8)]):
        tau = TaskVector.from_dict({"w": rng.standard_normal(500).astype("f4")})
        feedback.reduction = feedback.reduction.at(rate)
        update = feedback.compress(tau)
        total += tau.values
        sent += update.to_task_vector().values
        np.testing.assert_allclose(total - sent, feedback.residual, atol=1e-5)
        feedback.reduction = feedback.reduction.at(Rate(), ternary=True)
        assert feedback.quality.cosine > (0.2, 0.9, 0.7, 0.99)[number]


def test_each_tier_takes_less_than_twice_the_one_before():
    sizes = [Rate.of_tier(tier).bits_a_parameter for tier in TIERS]
    assert sizes == sorted(sizes)
    assert all(b < 2 * a for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("size", [200_000, 1_000_000, 40_000_000])
@pytest.mark.parametrize("seconds", [0.04, 0.3, 4.0])
def test_uploads_end_in_time_where_the_least_tier_does(size, seconds):
    budget = UploadBudget(seconds)
    for mbps in (0.1, 1, 3, 10, 30, 100, 1000):
        rate = budget.rate(size, mbps)
        took = budget.seconds_of(rate, size, mbps)
        bounds = [budget.seconds_of(Rate.of_tier(tier), size, mbps) for tier in TIERS]
        assert took <= seconds or took == bounds[0]
        # None takes less than half of the time, but where it sends all that it may.
        assert took > seconds / 2 or took == bounds[-1]


def test_what_is_no_setting_is_refused():
    for seconds in (0, -1, float("inf"), float("nan"), "1", True):
        with pytest.raises(ParameterError):
            UploadBudget(seconds)
    for tiers in ((), (0,), (1.5,), (17,), (2.5,), "0.1", (True,), 3):
        with pytest.raises(ParameterError):
            UploadBudget(1.0, tiers)
    for start_tier in (0, 1.5, "x"):
        with pytest.raises(ParameterError):
            UploadBudget(1.0, start=start_tier)


# --- what is known of a link -------------------------------------------------------------------


def test_a_link_is_seen_apart_from_its_latency():
    link = LinkTimes()
    assert link.mbps is None
    for size in (10_000, 10_100, 200_000, 50_000):  # 4 Mbit/s, half a second away
        link.add(size, 0.5 + 8e-6 * size / 4)
    assert link.mbps == pytest.approx(4, rel=0.01)
    link.stated = 25.0  # what the node's config says is before
    assert link.mbps == 25.0


def test_where_all_exchanges_are_alike_all_of_the_time_is_the_link_s():
    link = LinkTimes()
    for _ in range(20):
        link.add(1_000_000 - 3200, 2.0)
    assert link.mbps == pytest.approx(4.0)
    assert len(link.samples) == 8
    for seconds in (-5.0, 0.0):  # a node that says it worked longer than it took
        link.add(100, seconds)
    assert link.mbps > 0
    assert np.isfinite(link.mbps)


# --- federations -------------------------------------------------------------------------------


def offers_of(mod, seen):
    def watch(msg, context, call_next):
        offer = find_offer(msg.content)[0]
        if msg.metadata.message_type == "train":
            seen.setdefault(context.node_id, []).append(Rate(offer.density, offer.bits))
        return mod(msg, context, call_next)

    return watch


@pytest.mark.parametrize("inner", [None, FedAvg])
def test_each_node_is_asked_what_its_link_carries(inner):
    seconds = UploadBudget(1.0).seconds_of(Rate(0.08), 200, 1.0)  # of the slowest
    budget = UploadBudget(seconds, start=0.2)
    seen, transfers = {}, []
    strategy = (
        ComPEFTAverage(upload=budget) if inner is None else Compressed(inner(), upload=budget)
    )
    strategy.observer.on_transfer = transfers.append
    strategy._broadcaster.transfers._observer = strategy.observer
    grid = linked_grid(offers_of(CompressionMod(), seen))
    start(strategy, grid)
    for node, mbps in zip(NODES, LINKS, strict=True):
        assert seen[node][0] == Rate(0.2)  # nothing is known yet
        assert seen[node][1] == seen[node][2] == budget.rate(200, mbps)
        rows = [t for t in transfers if t.node == node and t.direction == "up" and t.round == 3]
        row = next(t for t in rows if t.kind == "train")
        assert row.link_mbps == mbps
        assert row.transfer_seconds is not None
        assert row.density == pytest.approx(0.08, abs=0.01) if mbps == 1 else row.density > 0.3
    assert strategy.observer.train[3].replies == 3


def test_a_link_that_nobody_states_is_measured():
    """Half a second between request and reply, of which the node works three tenths."""

    def slow(state, context):
        time.sleep(0.3)
        return tiny.train_step(state, context)

    grid = LocalGrid(tiny.client_app(CompressionMod(), train=slow), 1, delays={NODES[0]: 0.2})
    strategy = ComPEFTAverage(upload=UploadBudget(1.0), min_train_nodes=1, min_available_nodes=1)
    strategy.fraction_evaluate = 0.0
    start(strategy, grid, 2)
    link = strategy._broadcaster.node(NODES[0]).link
    assert link.stated == 0
    assert 0.15 < link.seconds < 1.0  # not the half second that it took, and no less than its way
    expected = 8e-6 * link.samples[-1][0] / link.seconds
    assert link.mbps == pytest.approx(expected, rel=0.9)


def test_what_a_node_says_of_its_link_is_about_itself():
    """Absurd claims change the liar's own density, are refused by name, and stop nobody."""
    seen = {}

    def fault(node, reply):
        record = reply.content.config_records["compeft_fl.exchange"]
        if node == NODES[0] and "w" in record:
            record["w"] = np.array(lies.pop(0), "<f4").tobytes()
        return [reply]

    lies = [(0.0, 1e30), (0.0, float("nan")), (-1.0, 5.0), (1e30, 0.0)]
    strategy = ComPEFTAverage(upload=UploadBudget(0.01))
    start(strategy, linked_grid(offers_of(CompressionMod(), seen), fault=fault), 5)
    assert seen[NODES[0]][1] == Rate.of_tier(TIERS[-1])
    aside = [[node for node, _ in strategy.observer.train[r].set_aside] for r in range(1, 5)]
    assert aside == [[], [NODES[0]], [NODES[0]], []]
    assert "expected an answer" in strategy.observer.train[2].set_aside[0][1]
    assert seen[NODES[1]][2] == seen[NODES[1]][4] == UploadBudget(0.01).rate(200, 10)


def test_the_mod_states_the_link_that_it_was_given_and_the_node_config_is_before_it():
    answers = {}

    def fault(node, reply):
        found = find_answer(reply.content)
        if found.update:
            answers[node] = found
        return [reply]

    mod = CompressionMod(link_mbps=7.0)
    start(ComPEFTAverage(upload=1.0), linked_grid(mod, (3.0, None, None), fault=fault), 1)
    assert [answers[node].link for node in NODES] == [3.0, 7.0, 7.0]
    assert all(answer.work is not None for answer in answers.values())


@pytest.mark.parametrize("link", [0, -1, "fast", float("nan"), True])
def test_a_link_that_is_none_is_named(link):
    strategy = ComPEFTAverage(upload=1.0)
    start(strategy, linked_grid(links=(link, 10.0, 10.0)), 1)
    ((node, reason),) = strategy.observer.train[1].set_aside
    assert node == NODES[0]
    assert "expected link-mbps over 0 in the node config" in reason


def test_a_node_s_own_dense_codec_stays_and_privacy_takes_no_finer_updates(caplog):
    start(ComPEFTAverage(upload=1.0), linked_grid(CompressionMod(codec="dense")), 1)
    assert "the server's density does not hold" in caplog.text
    seen = []

    def fault(node, reply):
        from compeft_fl.exchange.records import find_update
        from compeft_fl.wire.messages import inspect

        found = find_update(reply.content)
        if found:
            seen.append(inspect(found[1][0]).codec)
        return [reply]

    budget = UploadBudget(3600.0, start=8)
    mod = CompressionMod(error_feedback=False)
    start(ComPEFTAverage(upload=budget), linked_grid(mod, fault=fault), 2)
    assert "steps" not in seen
    seen.clear()
    start(ComPEFTAverage(upload=budget), linked_grid(fault=fault), 2)
    assert set(seen) == {"steps"}


def test_without_a_budget_nothing_is_asked_or_said():
    answers = []

    def fault(node, reply):
        answers.append(find_answer(reply.content))
        return [reply]

    start(ComPEFTAverage(), linked_grid(fault=fault), 2)
    assert all(answer.work is None and answer.link == 0 for answer in answers)


def test_what_is_known_of_links_outlives_the_server():
    checkpointing, seen = resumable(), {}
    budget = UploadBudget(UploadBudget(1.0).seconds_of(Rate(0.08), 200, 1.0))
    start(ComPEFTAverage(upload=budget), linked_grid(), 1, checkpointing=checkpointing)
    checkpointing.resume = True
    grid = linked_grid(offers_of(CompressionMod(), seen))
    result = start(ComPEFTAverage(upload=budget), grid, 2, checkpointing=checkpointing)
    assert [seen[node][0] for node in NODES] == [budget.rate(200, mbps) for mbps in LINKS]
    assert np.isfinite(flat(result.arrays)).all()
