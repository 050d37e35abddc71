"""compeft_fl/server/robustness.py: what it sets aside and keeps, and what learning makes of it."""

from __future__ import annotations

import json
import logging
import math

import logistic
import numpy as np
import pytest
import tiny
from local_grid import LocalGrid, node_ids

import compeft_fl as cf
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import LOGGER
from compeft_fl.mod import CompressionMod
from compeft_fl.server import sign_agreement
from compeft_fl.server.observer import RoundCounts
from compeft_fl.server.robustness import SignAgreementFilter
from compeft_fl.strategies import ComPEFTAverage, ComPEFTTaskArithmetic, ComPEFTTies, ReplyBounds

KINDS = [ComPEFTAverage, ComPEFTTies]
NODES = node_ids(10)
HOSTILE = set(NODES[-2:])
LAYOUT = tiny.layout()
ROUNDS = 10


class Watching(RoundCounts):
    """An observer that is also told of the similarities."""

    def __init__(self):
        super().__init__()
        self.similarities = {}

    def on_similarity(self, server_round, similarities):
        self.similarities[server_round] = list(similarities)


# --- learning ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    return logistic.synthetic()


@pytest.fixture(scope="module")
def undisturbed(problem, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path_factory.mktemp("nodes")))
        return {kind: problem.run(kind(fraction_evaluate=0.0), rounds=ROUNDS) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ["flipped", "noise", "huge"])
def test_the_rule_keeps_the_accuracy_that_hostile_nodes_would_take(
    problem, undisturbed, kind, attack
):
    """2 of 10 are hostile."""
    observer = Watching()
    rule = SignAgreementFilter()
    kept = problem.run(
        kind(fraction_evaluate=0.0, robustness=rule, observer=observer),
        logistic.ATTACKS[attack],
        rounds=ROUNDS,
    )
    plain = problem.run(kind(fraction_evaluate=0.0), logistic.ATTACKS[attack], rounds=ROUNDS)
    assert undisturbed[kind] > 0.85
    assert kept > undisturbed[kind] - 0.05
    if attack == "huge":  # bounded in any case
        assert plain > undisturbed[kind] - 0.05
    elif (kind, attack) != (ComPEFTAverage, "noise"):  # an average of ten suffers little from it
        assert plain < kept - 0.05
    first = observer.similarities[1]
    assert {each.node_id for each in first if each.reason} == HOSTILE
    counts = observer.train[1]
    assert counts.replies == 8
    assert {node for node, _ in counts.set_aside} == HOSTILE
    assert honest_aside(observer) <= ROUNDS // 2


def honest_aside(observer, hostile=HOSTILE):
    """How many replies of honest nodes were set aside, of ten times as many as rounds."""
    found = (each for sims in observer.similarities.values() for each in sims)
    return sum(each.reason is not None and each.node_id not in hostile for each in found)


def test_three_of_ten_that_oppose_take_little(problem, undisturbed):
    """Their votes decide many parameters, so honest nodes seem to differ until they have none."""
    hostile = set(NODES[-3:])
    observer = Watching()
    rule = SignAgreementFilter()
    strategy = ComPEFTAverage(fraction_evaluate=0.0, robustness=rule, observer=observer)
    kept = problem.run(strategy, logistic.ATTACKS["flipped"], 3, rounds=ROUNDS)
    assert kept > undisturbed[ComPEFTAverage] - 0.05
    last = {each.node_id for each in observer.similarities[ROUNDS] if each.reason}
    assert last == hostile
    assert honest_aside(observer, hostile) <= ROUNDS // 2


@pytest.mark.parametrize("kind", KINDS)
def test_without_hostile_nodes_the_rule_changes_little(problem, undisturbed, kind):
    observer = Watching()
    strategy = kind(fraction_evaluate=0.0, robustness=SignAgreementFilter(), observer=observer)
    assert problem.run(strategy, rounds=ROUNDS) > undisturbed[kind] - 0.02
    aside = [each for each in observer.similarities.values() for each in each if each.reason]
    assert len(aside) <= ROUNDS // 2  # of ten times as many replies as rounds


# --- the rule, reply by reply ------------------------------------------------------------------


def common_step(state, context):
    """Training that takes all nodes in much the same direction."""
    shared, own = np.random.default_rng(5), np.random.default_rng(context.node_id)
    return {
        name: np.asarray(
            value + 0.1 * shared.standard_normal(value.shape)
            + 0.03 * own.standard_normal(value.shape),
            value.dtype,
        )
        for name, value in state.items()
    }  # fmt: skip


def one_round(kind, rule, forge=None, nodes=10, codec="golomb", rounds=1, **options):
    """Rounds of which the last two nodes' Updates are what ``forge`` makes of them."""
    observer = Watching()

    def fault(node, reply):
        if forge is None or node not in node_ids(nodes)[-2:]:
            return [reply]
        return [logistic.forged(reply, LAYOUT, forge)]

    app = tiny.client_app(CompressionMod(density=0.3, codec=codec), train=common_step)
    strategy = kind(fraction_evaluate=0.0, robustness=rule, observer=observer, **options)
    grid = LocalGrid(app, nodes, fault=fault)
    result = strategy.start(grid, tiny.arrays(), num_rounds=rounds)
    return tiny.flat(tiny.state_of(result.arrays)), observer, result


def flip(update):
    return cf.TernaryVector(update.layout, update.negative, update.positive, update.scales)


def aside(observer, server_round=1):
    return {each.node_id for each in observer.similarities[server_round] if each.reason}


@pytest.mark.parametrize("kind", [*KINDS, ComPEFTTaskArithmetic])
def test_what_is_set_aside_is_as_if_it_had_not_come(kind):
    merged, observer, _ = one_round(kind, SignAgreementFilter(), flip)
    assert aside(observer) == HOSTILE
    honest, _, _ = one_round(kind, None, nodes=8)
    np.testing.assert_allclose(merged, honest, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [*KINDS, ComPEFTTaskArithmetic])
def test_with_nothing_to_set_aside_the_merge_is_the_same(kind):
    plain, _, before = one_round(kind, None)
    for rule in (SignAgreementFilter(), SignAgreementFilter(dry_run=True)):
        merged, observer, after = one_round(kind, rule)
        assert not aside(observer)
        np.testing.assert_array_equal(merged, plain)
        assert dict(after.train_metrics_clientapp[1]) == dict(before.train_metrics_clientapp[1])
        assert observer.train[1].replies == 10


def test_a_dry_run_says_and_merges():
    plain, _, _ = one_round(ComPEFTTies, None, flip)
    merged, observer, _ = one_round(ComPEFTTies, SignAgreementFilter(dry_run=True), flip)
    np.testing.assert_array_equal(merged, plain)
    assert aside(observer) == HOSTILE
    assert observer.train[1].replies == 10


def test_the_log_has_one_line_a_round(caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER.name):
        one_round(ComPEFTTies, SignAgreementFilter(), flip, rounds=2)
    lines = [r.getMessage() for r in caplog.records if "cosine of signs to" in r.getMessage()]
    assert len(lines) == 2
    assert "min -0." in lines[0]
    assert "median 0." in lines[0]
    assert "of 10; outliers: nodes 10" in lines[0]
    said = [r.getMessage() for r in caplog.records if "is set aside: its signs" in r.getMessage()]
    assert len(said) == 4


def test_metrics_of_those_set_aside_are_left_out():
    _, _, result = one_round(ComPEFTAverage, SignAgreementFilter(), flip)
    _, _, eight = one_round(ComPEFTAverage, None, nodes=8)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(
        eight.train_metrics_clientapp[1]["loss"]
    )


def loud(update):
    return update.with_scales(update.scales * np.float32(6))


def narrow_and_loud(update):
    """The norm of the others, in one parameter."""
    values = np.zeros(update.num_parameters, np.float32)
    values[7] = np.sqrt(update.dot(update))
    return cf.TernaryVector.from_task_vector(cf.TaskVector(update.layout, values))


def loud_and_dense(update):
    values = update.to_task_vector().values * 6
    return cf.TaskVector(update.layout, values)


@pytest.mark.parametrize("forge", [loud, narrow_and_loud, loud_and_dense])
def test_sizes_far_over_the_median_are_set_aside(forge):
    _, observer, _ = one_round(ComPEFTAverage, SignAgreementFilter(), forge)
    assert aside(observer) == HOSTILE
    reasons = [each.reason for each in observer.similarities[1] if each.reason]
    assert all("times the median" in reason for reason in reasons)
    _, observer, _ = one_round(ComPEFTAverage, SignAgreementFilter(max_size=1e6), forge)
    if forge is not narrow_and_loud:  # which then differs in its direction
        assert not aside(observer)


def test_updates_that_move_every_parameter_do_not_outvote_the_others():
    """Two that agree on everything, of the usual norm, against eight that move a tenth."""

    def everywhere(update):
        size = np.float32(np.sqrt(update.dot(update) / update.num_parameters))
        signs = np.random.default_rng(1).choice([-size, size], update.num_parameters)
        return cf.TernaryVector.from_task_vector(cf.TaskVector(update.layout, signs))

    observer = Watching()
    app = tiny.client_app(CompressionMod(density=0.1), train=common_step)

    def fault(node, reply):
        return [logistic.forged(reply, LAYOUT, everywhere) if node in HOSTILE else reply]

    strategy = ComPEFTTies(
        fraction_evaluate=0.0, robustness=SignAgreementFilter(), observer=observer
    )
    strategy.start(LocalGrid(app, 10, fault=fault), tiny.arrays(), num_rounds=1)
    assert aside(observer) == HOSTILE


def test_a_huge_number_of_examples_counts_as_a_large_one():
    def merged(claim, rule):
        app = tiny.client_app(CompressionMod(codec="dense"), train=common_step)

        def fault(node, reply):
            if node == NODES[0]:
                reply.content["metrics"]["num-examples"] = claim
            else:
                reply.content["metrics"]["num-examples"] = 10
            return [reply]

        free = ReplyBounds(max_weight=math.inf, max_impact=math.inf)
        strategy = ComPEFTAverage(
            fraction_evaluate=0.0, robustness=rule, bounds=free if rule else None
        )
        result = strategy.start(LocalGrid(app, 10, fault=fault), tiny.arrays(), num_rounds=1)
        return tiny.flat(tiny.state_of(result.arrays))

    np.testing.assert_array_equal(
        merged(10**12, SignAgreementFilter(max_weight=10)),
        merged(100, SignAgreementFilter(max_weight=10)),
    )
    apart = np.abs(merged(10**12, None) - merged(100, None)).max()
    assert apart < 1e-3  # without the rule too


def test_with_too_few_replies_nothing_is_set_aside():
    _, observer, _ = one_round(ComPEFTTies, SignAgreementFilter(), flip, nodes=3)
    assert not aside(observer)
    _, observer, _ = one_round(ComPEFTTies, SignAgreementFilter(min_replies=3), loud, nodes=5)
    assert aside(observer) == set(node_ids(5)[-2:])


def test_updates_with_nothing_in_common_are_kept():
    observer = Watching()
    app = tiny.client_app(CompressionMod(density=0.3))  # every node its own random step
    strategy = ComPEFTTies(
        fraction_evaluate=0.0, robustness=SignAgreementFilter(), observer=observer
    )
    strategy.start(LocalGrid(app, 10), tiny.arrays(), num_rounds=1)
    assert not aside(observer)
    assert observer.train[1].replies == 10


def test_a_round_without_direction_remembers_who_was_set_aside():
    rule = SignAgreementFilter()
    one_round(ComPEFTAverage, rule, flip)
    assert rule.state()["suspects"] == sorted(HOSTILE)
    again = SignAgreementFilter()
    again.restore(json.loads(json.dumps(rule.state())))
    assert again.state() == rule.state()

    def second(rule, scale):
        observer = Watching()
        app = tiny.client_app(CompressionMod(density=0.3, error_feedback=False))

        def fault(node, reply):
            loud = logistic.forged(
                reply, LAYOUT, lambda update: update.with_scales(update.scales * np.float32(scale))
            )
            return [loud if node == NODES[0] else reply]

        strategy = ComPEFTAverage(fraction_evaluate=0.0, robustness=rule, observer=observer)
        result = strategy.start(LocalGrid(app, 10, fault=fault), tiny.arrays(), num_rounds=1)
        return tiny.flat(tiny.state_of(result.arrays)), observer

    louder, observer = second(again, 4.5)
    assert aside(observer) == HOSTILE
    assert all("no direction" in each.reason for each in observer.similarities[1] if each.reason)
    loud, _ = second(again, 3.0)
    np.testing.assert_allclose(louder, loud, rtol=1e-6)  # neither counts as more than the median
    _, observer = second(SignAgreementFilter(), 3.0)
    assert not aside(observer)


def test_what_is_remembered_has_a_bound(monkeypatch):
    monkeypatch.setattr(sign_agreement, "_REMEMBERED", 4)
    rule = SignAgreementFilter()
    one_round(ComPEFTAverage, rule, flip)
    state = rule.state()
    assert len(state["past"]) == 4
    assert {str(node) for node in state["suspects"]} <= set(state["past"])


def test_what_stays_counts_as_twice_the_median_norm_at_most():
    def forged(scale):
        return one_round(
            ComPEFTAverage,
            SignAgreementFilter(),
            lambda update: update.with_scales(update.scales * np.float32(scale)),
        )

    louder, observer, _ = forged(4.0)
    assert not aside(observer)
    np.testing.assert_allclose(louder, forged(3.0)[0], rtol=1e-5)
    assert np.abs(louder - forged(1.0)[0]).max() > 1e-3


def test_a_suspect_that_agrees_again_is_taken_again():
    rule = SignAgreementFilter()
    one_round(ComPEFTAverage, rule, flip)
    _, observer, _ = one_round(ComPEFTAverage, rule)
    assert not aside(observer)
    assert rule.state()["suspects"] == []


def test_dense_replies_are_judged_too():
    _, observer, _ = one_round(
        ComPEFTTies,
        SignAgreementFilter(),
        lambda update: cf.TaskVector(update.layout, -update.values),
        codec="dense",
    )
    assert aside(observer) == HOSTILE


def test_replies_that_wait_in_a_file_are_the_same():
    plain, _, _ = one_round(ComPEFTTies, SignAgreementFilter(), flip)
    spooled, observer, _ = one_round(ComPEFTTies, SignAgreementFilter(memory_bytes=1), flip)
    np.testing.assert_array_equal(plain, spooled)
    assert aside(observer) == HOSTILE


def test_an_ordinary_observer_will_do():
    app = tiny.client_app(CompressionMod(density=0.3), train=common_step)
    counts = RoundCounts()
    strategy = ComPEFTTies(fraction_evaluate=0.0, robustness=SignAgreementFilter(), observer=counts)
    strategy.start(LocalGrid(app, 4), tiny.arrays(), num_rounds=1)
    assert counts.train[1].replies == 4


@pytest.mark.parametrize(
    "setting",
    [
        {"min_cosine": -0.1},
        {"min_cosine": 1.1},
        {"min_cosine": float("nan")},
        {"max_size": 1.0},
        {"max_size": float("nan")},
        {"max_norm": 0.9},
        {"max_norm": float("nan")},
        {"max_weight": 0.5},
        {"min_replies": 2},
        {"memory_bytes": 0},
    ],
    ids=str,
)
def test_settings_out_of_range(setting):
    with pytest.raises(ParameterError, match=next(iter(setting))):
        SignAgreementFilter(**setting)
