"""Nodes of several ranks in one federation: what each is sent and sends, and how they merge."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from flwr.serverapp.strategy import FedAvg, FedMedian
from local_grid import LocalGrid, node_ids
from test_exchange import flat, resumable

import compeft_fl as cf
from compeft_fl.errors import LayoutError, NoUsableReplyError, ParameterError
from compeft_fl.exchange.cut_shipments import cut_shipment
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.node_state import StateFile
from compeft_fl.exchange.records import find_answer, find_offer, find_update, update_record
from compeft_fl.exchange.replica import Replica, digest_of
from compeft_fl.mod import CompressionMod
from compeft_fl.parts.ranks import Cut
from compeft_fl.strategies import (
    ComPEFTAverage,
    ComPEFTTaskArithmetic,
    ComPEFTTies,
    Compressed,
    DownlinkOptions,
    MixedRanks,
    SignAgreementFilter,
)
from compeft_fl.task_vector import TaskVector
from compeft_fl.wire.messages import inspect

RANKS, NODES = (1, 2, 4), node_ids(3)
WHOLE = tiny.layout()
MIXED = DownlinkOptions(density=0.4)


def mixed_grid(mod=None, ranks=RANKS, **more) -> LocalGrid:
    """A node of each rank, as its node config says."""
    grid = LocalGrid(tiny.client_app(mod or CompressionMod(density=0.3)), len(ranks), **more)
    for context, rank in zip(grid.contexts.values(), ranks, strict=True):
        if rank is not None:
            context.node_config["lora-rank"] = rank
    return grid


def start(strategy, grid, rounds=3, **more):
    more = {"checkpointing": resumable()} | more
    return strategy.start(grid, tiny.arrays(), num_rounds=rounds, timeout=20, **more)


def remembered(federation, name):
    return StateFile(Path(os.environ["COMPEFT_FL_STATE_DIR"]) / federation / name).load()


def downlink_of(strategy) -> Downlink:
    return strategy._broadcaster._downlink


# --- what goes down ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["coarse", "snapshot"])
@pytest.mark.parametrize("codec", ["golomb", "context", "dense-bf16"])
def test_a_part_of_every_shipment_brings_the_part_of_the_adapter(first, codec):
    """From nothing, from the start and from any version; whatever the way, the same bits."""
    rng = np.random.default_rng(1)
    adapter = TaskVector.from_dict({**tiny.adapter(), "q.lora_B": np.zeros((24, 4), "f4")})
    downlink = Downlink(adapter, density=0.2, codec=codec, coarse_start=first == "coarse")
    cut = Cut(WHOLE, 2)
    replicas = {0: Replica(WHOLE, downlink.shared, 0).cut(cut)}
    for version in range(1, 9):
        step = 0.1 * rng.standard_normal(WHOLE.num_parameters)
        adapter = TaskVector(WHOLE, (adapter.values + step).astype(np.float32))
        downlink.advance(adapter)
        expected = digest_of(cut.values(downlink.shared))
        for held in (None, *replicas):
            shipment = cut_shipment(downlink.lacking(held), cut)
            assert shipment.num_bytes < downlink.lacking(held).num_bytes
            if shipment.kind == "start":
                found = Replica.from_start(shipment.blobs, version)
            elif shipment.kind == "snapshot":
                found = Replica.from_snapshot(shipment.blobs)
            elif shipment.kind == "catchup":
                found = replicas[held].catch_up(shipment.blobs, version)
            else:
                found = replicas[held].advance(shipment.blobs, version)
            assert found.layout == cut.layout
            assert found.digest == expected
        replicas[version] = found


@pytest.mark.parametrize("options", [MIXED, DownlinkOptions(codec="dense")])
def test_every_node_has_its_part_bit_for_bit(options):
    seen = []

    def evaluate(server_round, record):
        shared = downlink_of(strategy)
        for index, rank in enumerate(RANKS if server_round else ()):
            state = remembered(strategy._broadcaster.federation, f"{index}-of-3")
            cut = Cut(WHOLE, rank)
            assert state.rank == rank
            assert state.replica.version == shared.version
            assert state.replica.digest == digest_of(cut.values(shared.shared))
            seen.append(rank)

    strategy = ComPEFTAverage(downlink=options, ranks=RANKS)
    result = start(strategy, mixed_grid(), 4, evaluate_fn=evaluate)
    assert len(seen) == 12
    assert [count.replies for count in strategy.observer.train.values()] == [3] * 4
    # A node of which nothing is known says its rank, once.
    assert [count.resyncs for count in strategy.observer.train.values()] == [3, 0, 0, 0]
    assert np.abs(flat(result.arrays) - flat(tiny.arrays())).max() > 0.01


def test_where_nodes_make_the_start_nothing_is_asked_or_sent():
    mod = CompressionMod(density=0.3, initial_adapter=lambda context: tiny.adapter())
    strategy = ComPEFTAverage(downlink=DownlinkOptions(first_contact="seed"), ranks=RANKS)
    start(strategy, mixed_grid(mod), 2)
    assert strategy.observer.train[1].down_bytes == 0
    assert strategy.observer.train[1].resyncs == 0
    assert strategy.observer.train[2].replies == 3


def test_a_late_joiner_that_makes_the_start_gets_its_part_of_what_came_after():
    mod = CompressionMod(density=0.3, initial_adapter=lambda context: tiny.adapter())
    options = DownlinkOptions(first_contact="seed", density=0.3)
    strategy = ComPEFTAverage(downlink=options, ranks=RANKS, fraction_evaluate=0.0)
    grid, offers = mixed_grid(mod), []
    late = grid.contexts.pop(NODES[0])

    def fault(node, reply):
        grid.contexts[late.node_id] = late  # from round 2 on
        return [reply]

    def watch(msg, context, call_next):
        if context.node_id == late.node_id:
            offer, _, shipment = find_offer(msg.content)
            offers.append((offer.rank, shipment.kind))
        return mod(msg, context, call_next)

    grid.fault, grid.apps = fault, dict.fromkeys(NODES, tiny.client_app(watch))
    start(strategy, grid, 3)
    assert offers[:2] == [(0, "nothing"), (1, "deltas")]
    assert [count.replies for count in strategy.observer.train.values()] == [2, 3, 3]


def test_a_restarted_server_whose_nodes_have_new_ids_cuts_what_they_lack():
    checkpointing = resumable()
    first = ComPEFTAverage(ranks=RANKS, downlink=MIXED)
    start(first, mixed_grid(), 2, checkpointing=checkpointing)
    grid = mixed_grid()
    grid.contexts = {node + 100: context for node, context in grid.contexts.items()}
    grid.apps = dict.fromkeys(grid.contexts, tiny.client_app(CompressionMod(density=0.3)))
    for node, context in grid.contexts.items():
        context.node_id = node
    checkpointing.resume = True
    again = ComPEFTAverage(ranks=RANKS, downlink=MIXED)
    start(again, grid, 4, checkpointing=checkpointing)
    assert again.observer.train[3].replies == 3
    assert again.observer.train[4].replies == 3
    assert again.observer.train[4].resyncs == 0


def test_a_node_that_comes_back_with_another_rank_goes_on_with_that():
    strategy, states = ComPEFTAverage(ranks=RANKS, downlink=MIXED), []
    grid = mixed_grid(ranks=(4, 4, 1))
    changed = grid.contexts[NODES[2]]

    def evaluate(server_round, record):
        if server_round == 2:
            changed.node_config["lora-rank"] = 2
        if server_round:
            states.append(remembered(strategy._broadcaster.federation, "2-of-3"))

    start(strategy, grid, 4, evaluate_fn=evaluate)
    assert [state.rank for state in states] == [1, 1, 2, 2]
    assert states[2].replica.layout == Cut(WHOLE, 2).layout
    assert [count.replies for count in strategy.observer.train.values()] == [3] * 4
    assert strategy.observer.train[3].resyncs == 1
    shared = downlink_of(strategy).shared
    assert states[3].replica.digest == digest_of(Cut(WHOLE, 2).values(shared))


# --- what goes up, and how it merges ----------------------------------------------------------


def lossless(rank_of=None) -> CompressionMod:
    return CompressionMod(codec="dense", rank=rank_of)


def trained(ranks=RANKS) -> tuple[np.ndarray, np.ndarray]:
    """The first round's changes, whole, and what each node has; shapes (3, d)."""
    changes, covers = [], []
    for node, rank in zip(NODES, ranks, strict=True):
        cut = Cut(WHOLE, rank)
        state = TaskVector(cut.layout, cut.values(flat(tiny.arrays()))).to_dict()
        step = tiny.step(node, state)
        tau = TaskVector.between(state, {n: v + step[n] for n, v in state.items()})
        changes.append(cut.spread(tau).values)
        covers.append(cut.covered)
    return np.array(changes), np.array(covers)


def moved_in_one_round(strategy, ranks=RANKS, mod=None) -> np.ndarray:
    mod = mod or lossless()
    result = start(strategy, mixed_grid(mod, ranks), 1)
    assert strategy.observer.train[1].replies == len(ranks), strategy.observer.train[1].set_aside
    return flat(result.arrays) - flat(tiny.arrays())


WEIGHTS = np.array([[tiny.num_examples(node)] for node in NODES], float)


def test_an_entry_moves_by_the_mean_over_the_nodes_that_have_it():
    strategy = ComPEFTAverage(ranks=MixedRanks(RANKS, merge="cover", least_cover=0.0))
    changes, covers = trained()
    expected = (WEIGHTS * changes).sum(0) / (WEIGHTS * covers).sum(0)
    np.testing.assert_allclose(moved_in_one_round(strategy), expected, atol=1e-6)


def test_task_arithmetic_sums_as_if_all_had_all():
    strategy = ComPEFTTaskArithmetic(scaling=0.5, ranks=MixedRanks(RANKS, least_cover=0.0))
    changes, covers = trained()
    expected = 0.5 * 3 * changes.sum(0) / covers.sum(0)
    np.testing.assert_allclose(moved_in_one_round(strategy), expected, atol=1e-6)


def test_ties_elects_among_the_nodes_that_have_an_entry():
    from compeft_fl.merging.accumulators import Ties

    strategy = ComPEFTTies(scaling=0.4, ranks=RANKS)
    changes, _ = trained()
    rule = Ties(0.4)
    for change, weight in zip(changes, WEIGHTS[:, 0], strict=True):
        rule.add(TaskVector(WHOLE, change), weight)
    np.testing.assert_allclose(moved_in_one_round(strategy), rule.result().values, atol=1e-6)


@pytest.mark.parametrize("inner", [FedAvg, FedMedian])
def test_flower_s_own_strategies_see_whole_adapters(inner):
    changes, covers = trained()
    mean = (WEIGHTS * changes).sum(0) / (WEIGHTS * covers).sum(0)
    strategy = Compressed(inner(), ranks=MixedRanks(RANKS, least_cover=0.0))
    moved = moved_in_one_round(strategy)
    expected = mean
    if inner is FedMedian:
        expected = np.median(np.where(covers, changes, mean), axis=0)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_products_are_averaged_and_brought_back_to_the_rank():
    strategy = ComPEFTAverage(ranks=MixedRanks(RANKS, least_cover=0.0))
    moved = TaskVector(WHOLE, moved_in_one_round(strategy)).apply(tiny.adapter())
    changes, covers = trained()
    dense = np.zeros((24, 24))
    for change, cover, weight in zip(changes, covers, WEIGHTS[:, 0], strict=True):
        ends = TaskVector(WHOLE, ((flat(tiny.arrays()) + change) * cover).astype("f4")).to_dict()
        dense += weight / WEIGHTS.sum() * ends["q.lora_B"] @ ends["q.lora_A"]
    u, s, v = np.linalg.svd(dense)
    best = (u[:, :4] * s[:4]) @ v[:4]
    assert np.linalg.norm(moved["q.lora_B"] @ moved["q.lora_A"] - best) < 1e-4 * s[0]


def test_updates_name_their_rank_and_the_ledger_has_it():
    blobs, transfers = {}, []

    def fault(node, reply):
        found = find_update(reply.content)
        if found is not None:
            blobs.setdefault(node, found[1][0])
        return [reply]

    strategy = ComPEFTAverage(ranks=RANKS)
    strategy.observer.on_transfer = transfers.append
    strategy._broadcaster.transfers._observer = strategy.observer
    start(strategy, mixed_grid(fault=fault), 2)
    for node, rank in zip(NODES, RANKS, strict=True):
        header = inspect(blobs[node], layout=Cut(WHOLE, rank).layout)
        assert header.metadata == {"rank": str(rank)}
        rows = [each for each in transfers if each.node == node]
        assert {each.rank for each in rows if each.direction == "up"} == {rank}
        size = Cut(WHOLE, rank).layout.num_parameters
        assert {e.parameters for e in rows if e.kind == "train" and e.round == 2} == {size}
        assert all(0 < e.density <= 0.31 for e in rows if e.direction == "up" and e.parameters)


def test_nodes_without_a_rank_have_all_of_it():
    strategy = ComPEFTAverage(ranks=(1, 2))
    start(strategy, mixed_grid(ranks=(1, None, None)), 2)
    assert strategy.observer.train[2].replies == 3
    assert remembered(strategy._broadcaster.federation, "1-of-3").replica.layout == WHOLE


def test_personal_tensors_with_a_rank_are_cut_and_carried_ones_refused():
    strategy = ComPEFTAverage(ranks=RANKS, tensors=(left := {"q.lora_A": "left"}))
    arrays = start(strategy, mixed_grid(), 3).arrays
    assert strategy.observer.train[3].replies == 3, strategy.observer.train[3].set_aside
    np.testing.assert_array_equal(tiny.state_of(arrays)["q.lora_A"], tiny.adapter()["q.lora_A"])
    product = MixedRanks(RANKS, merge="product")  # "auto" does without
    with pytest.raises(LayoutError, match="none to multiply"):
        start(ComPEFTAverage(ranks=product, tensors=left), grid := mixed_grid(), 1)
    assert grid.sent == []  # no node trains a round for nothing
    with pytest.raises(LayoutError, match="to be trained or left"):
        start(ComPEFTAverage(ranks=RANKS, tensors={"q.lora_A": "carried"}), mixed_grid(), 1)


# --- what is refused, and what a hostile node can do -------------------------------------------


def refused(fault=None, ranks=RANKS, said="", **options) -> str:
    strategy = ComPEFTAverage(ranks=options.pop("taken", RANKS), **options)
    start(strategy, mixed_grid(ranks=ranks, fault=fault), 2)
    reasons = [reason for _, reason in strategy.observer.train[2].set_aside]
    assert len(reasons) == 1
    assert said in reasons[0], reasons
    assert strategy.observer.train[2].replies == 2
    return reasons[0]


@pytest.mark.parametrize("rank", [3, 16, 65536])
def test_a_rank_that_is_not_taken_is_named(rank):
    refused(ranks=(1, 4, rank), said=f"expected a rank among 1, 2, 4, found a node of rank {rank}")


def test_a_server_for_whole_adapters_says_so():
    strategy = ComPEFTAverage()
    with pytest.raises(NoUsableReplyError, match="its strategy's `ranks` says which are taken"):
        start(strategy, mixed_grid(), 1)
    reasons = dict(strategy.observer.train[1].set_aside)
    assert "takes nodes of rank 1, found one" in reasons[NODES[0]]


def altered(node, change):
    """A fault: one node's Update, re-encoded by ``change(update, version)`` -> bytes."""

    def fault(which, reply):
        found = find_update(reply.content)
        if which == node and found is not None:
            header = inspect(found[1][0])
            reply.content[found[0]] = update_record(change(header.base_version), 1)
        return [reply]

    return fault


@pytest.mark.parametrize(
    ("layout", "metadata", "said"),
    [
        (Cut(WHOLE, 2).layout, {"rank": "3"}, "expected a rank among 1, 2, 4"),
        (Cut(WHOLE, 2).layout, {"rank": "1" * 99}, "expected a rank in the update's metadata"),
        (Cut(WHOLE, 2).layout, {"rank": "-2"}, "expected a rank in the update's metadata"),
        (WHOLE, {"rank": "4"}, "found one of rank 4"),  # it states 2
        (WHOLE, {}, "found one of rank all"),
        (Cut(WHOLE, 1).layout, {"rank": "2"}, "expected layout"),
        (WHOLE, {"rank": "2"}, "expected layout"),
    ],
)
def test_updates_that_are_not_of_the_rank_that_their_node_states_are_named(layout, metadata, said):
    update = cf.compress(TaskVector(layout, np.ones(layout.num_parameters, "f4")), 0.5, "mean")

    def change(version):
        return cf.encode(update, layout_by_id=True, base_version=version, metadata=metadata)

    refused(altered(NODES[1], change), said=said)


def test_an_answer_with_a_broken_rank_is_named():
    def fault(node, reply):
        record = reply.content.config_records.get("compeft_fl.exchange")
        if node == NODES[0] and record is not None and find_answer(reply.content).update:
            record["rank"] = -7
        return [reply]

    refused(fault, said="expected a rank in 1 .. 65536")


def test_what_does_not_go_together_is_refused_before_the_first_round():
    with pytest.raises(ParameterError, match="expected ranks merged by cover"):
        ComPEFTTies(ranks=MixedRanks(RANKS, merge="product"))
    with pytest.raises(ParameterError, match="ranks merged by cover"):
        Compressed(FedAvg(), ranks=MixedRanks(RANKS, merge="product"))
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

    private = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 0.5, num_sampled_clients=3)
    with pytest.raises(ParameterError, match="no wrapper for differential privacy"):
        Compressed(private, ranks=RANKS)
    with pytest.raises(ParameterError, match="expected ranks of at most 4"):
        start(ComPEFTAverage(ranks=(2, 8)), mixed_grid(), 1)
    for ranks in ((), "248", (0,), [True], range(1, 99), 4):
        with pytest.raises(ParameterError):
            MixedRanks(ranks)
    with pytest.raises(ParameterError, match="least_cover"):
        MixedRanks(RANKS, least_cover=2.0)
    with pytest.raises(ParameterError, match="merge among auto, cover, product"):
        MixedRanks(RANKS, merge="svd")
    with pytest.raises(ParameterError, match="expected a rank"):
        CompressionMod(rank=0)


def test_honest_nodes_of_high_rank_are_not_bounded_among_many_of_low_rank():
    class Watch:
        bounded = None

    strategy = ComPEFTAverage(ranks=RANKS, downlink=MIXED)
    ranks = (1, 1, 1, 1, 1, 1, 1, 4)
    start(strategy, mixed_grid(ranks=ranks), 3)
    for count in strategy.observer.train.values():
        assert not any("norm" in how for how in count.bounded.values()), count.bounded
        assert not count.set_aside


def opposing(sign_of, nodes):
    """A client whose training goes one way with all others, or the other way."""

    def train(state, context):
        sign = -20.0 if context.node_id in nodes else 1.0
        rng = np.random.default_rng(5)
        return {
            n: (v + sign * (0.1 + 0.01 * rng.standard_normal(v.shape))).astype("f4")
            for n, v in state.items()
        }

    return tiny.client_app(CompressionMod(density=1.0, support="fixed"), train=train)


@pytest.mark.parametrize("robustness", [None, SignAgreementFilter()])
def test_one_hostile_node_of_any_rank_is_set_aside(robustness):
    ranks = (1, 2, 4, 4, 2, 1)
    for bad in (0, 1, 2):
        strategy = ComPEFTAverage(ranks=RANKS, robustness=robustness, downlink=MIXED)
        grid = mixed_grid(ranks=ranks)
        hostile = list(grid.contexts)[bad]
        grid.apps = dict.fromkeys(grid.contexts, opposing(1, {hostile}))
        start(strategy, grid, 2)
        for count in strategy.observer.train.values():
            assert [node for node, _ in count.set_aside] == [hostile]


def test_a_single_node_of_the_highest_rank_does_not_move_its_entries_all_the_way():
    strategy = ComPEFTAverage(ranks=MixedRanks(RANKS, merge="cover", least_cover=0.5))
    ranks = (1, 1, 4)
    moved = moved_in_one_round(strategy, ranks)
    changes, covers = trained(ranks)
    alone = covers[2] & ~covers[0]
    share = WEIGHTS[2, 0] / WEIGHTS.sum()  # 0.5: 30 of 60 examples
    np.testing.assert_allclose(moved[alone], changes[2][alone] * share / max(share, 0.5), atol=1e-6)
