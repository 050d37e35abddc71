"""exchange/downlink.py: every node at a version holds the server's theta_shared, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compeft_fl as cf
from compeft_fl.errors import (
    ChecksumError,
    LayoutMismatchError,
    NonFiniteError,
    ParameterError,
    ResyncError,
    VersionError,
    WireError,
)
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.node_state import NodeState
from compeft_fl.exchange.protocol import UNKNOWN, Offer, follow
from compeft_fl.exchange.replica import DIGEST_BYTES, Replica, Shipment, digest_of

LAYOUT = cf.Layout([cf.TensorSpec("a", (40, 50)), cf.TensorSpec("b", (777,))])


def adapter(seed=0, size=1.0):
    values = np.random.default_rng(seed).standard_normal(LAYOUT.num_parameters) * size
    return cf.TaskVector(LAYOUT, values.astype(np.float32))


def plus(tau, step):
    return cf.TaskVector(LAYOUT, tau.values + step.values)


def walk(downlink, theta, versions, size=0.01):
    """Move theta by random steps, one version each; gives theta after each of them."""
    for i in range(versions):
        theta = plus(theta, adapter(100 + i, size))
        downlink.advance(theta)
        yield theta


def replica_of(downlink):
    return Replica.from_snapshot(downlink.snapshot().blobs)


def test_a_snapshot_is_the_start_on_the_grid():
    downlink = Downlink(adapter())
    replica = replica_of(downlink)
    assert (replica.version, replica.layout) == (0, LAYOUT)
    on_grid = downlink.grid.nearest(adapter().values)
    assert np.array_equal(replica.values, on_grid)
    assert np.abs(on_grid - adapter().values).max() < 1e-6 * np.abs(on_grid).max()
    assert replica.digest == downlink.digest == digest_of(on_grid)
    assert len(downlink.digest) == DIGEST_BYTES == 16


@pytest.mark.parametrize("scale", ["mean", "norm", 2.0])
def test_nodes_that_follow_have_the_same_bits(scale):
    downlink = Downlink(adapter(), density=0.2, scale=scale)
    replica = replica_of(downlink)
    for _ in walk(downlink, adapter(), 12):
        shipment = downlink.lacking(replica.version)
        assert (shipment.kind, len(shipment.blobs)) == ("deltas", 1)
        replica = replica.advance(shipment.blobs, downlink.version)
        assert replica.digest == downlink.digest
        assert replica.values.tobytes() == downlink.shared.tobytes()


def test_what_was_not_sent_comes_later():
    """Error feedback: with theta standing still, theta_shared reaches it."""
    downlink = Downlink(adapter(), density=0.2, scale="mean")
    theta = plus(adapter(), adapter(1))
    before = np.linalg.norm(theta.values - downlink.shared)
    for _ in range(30):
        downlink.advance(theta)
    assert np.linalg.norm(theta.values - downlink.shared) < 0.02 * before


def test_a_node_gets_what_it_lacks_and_no_more():
    downlink = Downlink(adapter(), density=0.05)
    late = replica_of(downlink)
    list(walk(downlink, adapter(), 5))
    assert downlink.lacking(5).kind == "nothing"
    assert downlink.lacking(5).num_bytes == 0
    log = downlink.state()["log"]
    assert downlink.lacking(4) == Shipment("deltas", (log[5],))
    shipment = downlink.lacking(0)
    assert (shipment.kind, len(shipment.blobs)) == ("catchup", 1)
    assert shipment.num_bytes < sum(map(len, log.values()))
    assert late.catch_up(shipment.blobs, 5).digest == downlink.digest
    assert late.advance([log[each] for each in range(1, 6)], 5).digest == downlink.digest
    for version in (None, -1, 6):  # knows nothing, or what this server never made
        assert downlink.lacking(version).kind == "snapshot"


def test_the_log_stays_short_and_the_start_is_never_forgotten():
    downlink = Downlink(adapter(), density=0.2)
    early = replica_of(downlink)
    list(walk(downlink, adapter(), 60))
    snapshot = downlink.snapshot().num_bytes
    log = downlink.state()["log"]
    assert sum(map(len, log.values())) < snapshot
    oldest = min(log) - 1
    assert oldest > 1
    assert downlink.lacking(1).kind == "snapshot"
    for version, kind in ((0, "catchup"), (oldest, "catchup"), (59, "deltas")):
        assert downlink.lacking(version).kind == kind
        assert downlink.lacking(version).num_bytes < snapshot
    assert early.catch_up(downlink.lacking(0).blobs, 60).digest == downlink.digest


def test_nodes_that_make_the_start_are_never_sent_all_of_it():
    """Whoever has missed more than the log holds makes it anew, and gets what came after it."""
    downlink = Downlink(adapter(), density=0.2, seeded=True)
    replicas = []
    for _ in walk(downlink, adapter(), 60):
        shipment = downlink.lacking(downlink.version - 1)
        last = (
            replicas[-1]
            if replicas
            else Replica(LAYOUT, downlink.grid.nearest(adapter().values), 0)
        )
        replicas.append(last.advance(shipment.blobs, downlink.version))
    assert 2 not in downlink.state()["log"]
    shipment = downlink.lacking(1)
    assert shipment is downlink.lacking(0)
    offer = Offer("f", 60, downlink.digest, UNKNOWN)
    found = follow(NodeState(LAYOUT, replicas[0]), offer, shipment, adapter)
    assert (found.version, found.digest) == (60, downlink.digest)
    with pytest.raises(ResyncError, match="version"):  # a node that cannot make it asks anew
        follow(NodeState(LAYOUT, replicas[0]), offer, shipment, None)


def test_many_catch_ups_are_made_in_one_walk_over_the_log(monkeypatch):
    one, two = (Downlink(adapter(), density=0.05) for _ in range(2))
    for downlink in (one, two):
        list(walk(downlink, adapter(), 12))
    wanted = [7, 0, 11, 3, 5, 9]
    alone = {}
    for version in wanted:
        alone[version] = one.lacking(version)
    decoded = []
    monkeypatch.setattr(
        "compeft_fl.exchange.downlink.decode",
        lambda blob, **known: decoded.append(1) or cf.decode(blob, **known),
    )
    two.prepare([*wanted, None, 12])
    assert len(decoded) == 12
    assert {version: two.lacking(version) for version in wanted} == alone
    assert len(decoded) == 12


def test_values_that_outgrow_the_grid_begin_anew():
    downlink = Downlink(adapter(), density=0.2)
    list(walk(downlink, adapter(), 3))
    far = plus(adapter(), adapter(5, 100.0))
    downlink.advance(far)
    assert downlink.version == 4
    np.testing.assert_allclose(downlink.shared, far.values, atol=1e-6 * np.abs(far.values).max())
    assert {downlink.lacking(version).kind for version in (None, 0, 2, 3)} == {"snapshot"}
    replica = replica_of(downlink)
    list(walk(downlink, far, 4, size=1.0))
    assert downlink.lacking(4).kind == "catchup"
    assert replica.catch_up(downlink.lacking(4).blobs, 8).digest == downlink.digest


@pytest.mark.parametrize(("growth", "kind"), [(50, "catchup"), (200, "snapshot")])
def test_a_lora_s_factors_may_grow_before_another_grid_is_laid(growth, kind):
    """Beyond that the version is another start, which every node is sent."""
    names = {"a": adapter().values[:2000].reshape(40, 50), "b": np.zeros((50, 40), "f4")}
    start = cf.TaskVector.from_dict(names)
    downlink = Downlink(start, density=0.1, seeded=True)
    replica = Replica(start.layout, downlink.shared, 0)
    for size in (0.3, 0.6, 1.0):
        grown = start.values + np.float32(size * growth) * np.abs(start.values).max()
        downlink.advance(cf.TaskVector(start.layout, grown.astype("f4")))
    shipment = downlink.lacking(0)
    assert shipment.kind == kind
    if kind == "catchup":
        assert replica.catch_up(shipment.blobs, 3).digest == downlink.digest


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("versions", [0, 1, 6])
def test_a_coarse_start_takes_11_bits_or_fewer_and_7_before_training(versions, fresh):
    other = np.zeros((50, 40), "f4") if fresh else adapter(1, 1e-6).values[:2000].reshape(50, 40)
    names = {"a": adapter().values[:2000].reshape(40, 50), "b": other}
    start = cf.TaskVector.from_dict({**names, "c": np.linspace(-1e-3, 1e-3, 777, dtype="f4")})
    downlink = Downlink(start, density=0.05, coarse_start=True)
    for _, where in start.layout.slices():
        error = np.abs(downlink.shared[where] - start.values[where])
        largest = np.abs(start.values[where]).max()
        assert error.max() <= max(largest / (63 if fresh else 1000), downlink.grid.unit / 2)
    bits = 8 * downlink.snapshot().num_bytes / start.num_parameters
    assert bits < (7 * 2777 / 4777 + 0.3 if fresh else 11)
    theta = start
    for i in range(versions):
        noise = np.random.default_rng(i).normal(size=theta.num_parameters) * 0.01
        theta = cf.TaskVector(theta.layout, (theta.values + noise).astype("f4"))
        downlink.advance(theta)
    shipment = downlink.lacking(None)
    assert shipment.kind == "start"
    replica = Replica.from_start(shipment.blobs, downlink.version)
    assert (replica.version, replica.digest) == (versions, downlink.digest)


def test_what_a_coarse_start_left_out_comes_later():
    downlink = Downlink(adapter(), density=0.2, coarse_start=True)
    before = np.linalg.norm(adapter().values - downlink.shared)
    for _ in range(30):
        downlink.advance(adapter())
    assert np.linalg.norm(adapter().values - downlink.shared) < 0.05 * before


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_the_way_to_a_version_it_is_the_same_to_the_bit(data):
    """Nodes that are seldom asked, lose their state, make the start or cannot; a resumed server."""
    coarse = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    start = cf.TaskVector.from_dict(
        {"a": rng.normal(size=(8, 30)).astype("f4"), "b": np.zeros((30, 4), "f4")}
    )
    density = data.draw(st.sampled_from([0.02, 0.2, 1.0]))
    options = {"density": density, "coarse_start": coarse, "seeded": not coarse}
    downlink = Downlink(start, **options)
    initial = None if coarse else lambda: start
    states, theta = [NodeState() for _ in range(4)], start.values
    for _ in range(data.draw(st.integers(1, 25))):
        size = data.draw(st.sampled_from([1e-5, 0.01, 0.3, 30.0]))
        theta = (theta + rng.normal(size=theta.size) * size).astype("f4")
        downlink.advance(cf.TaskVector(start.layout, theta))
        if data.draw(st.integers(0, 9)) == 0:
            resumed = Downlink(start, **options)
            resumed.restore(downlink.state())
            downlink = resumed
        for i, state in enumerate(states):
            fate = data.draw(st.sampled_from(["absent", "absent", "asked", "lost"]))
            if fate == "absent":
                continue
            if fate == "lost":
                state = NodeState()
            version = state.replica.version if state.replica else (None if coarse else 0)
            offer = Offer("f", downlink.version, downlink.digest, UNKNOWN)
            try:
                replica = follow(state, offer, downlink.lacking(version), initial)
            except ResyncError:  # it was given what builds on a start that is not the last
                replica = follow(state, offer, downlink.snapshot(), initial)
            assert replica.values.tobytes() == downlink.shared.tobytes()
            states[i] = NodeState(start.layout, replica)


def test_nothing_new_makes_no_version():
    downlink = Downlink(adapter())
    downlink.advance(adapter())
    assert downlink.version == 0


def test_a_delta_is_encoded_once():
    downlink = Downlink(adapter())
    list(walk(downlink, adapter(), 1))
    assert downlink.lacking(0).blobs[0] is downlink.lacking(0).blobs[0]
    assert downlink.snapshot() is downlink.snapshot()


@pytest.mark.parametrize("codec", ["dense", "dense-fp16"])
def test_a_dense_downlink_sends_the_whole_adapter(codec):
    downlink = Downlink(adapter(), codec=codec)
    theta = list(walk(downlink, adapter(), 3))[-1]
    shipment = downlink.lacking(2)
    assert shipment.kind == "snapshot"
    replica = Replica.from_snapshot(shipment.blobs)
    assert (replica.version, replica.digest) == (3, downlink.digest)
    np.testing.assert_allclose(replica.values, theta.values, rtol=0 if codec == "dense" else 1e-3)
    assert downlink.lacking(3).kind == "nothing"


def test_deltas_must_fit_the_version():
    downlink = Downlink(adapter(), density=0.05)
    replica = replica_of(downlink)
    list(walk(downlink, adapter(), 3))
    log = downlink.state()["log"]
    with pytest.raises(VersionError, match="3 deltas from version 0 to 3, found 2"):
        replica.advance([log[2], log[3]], 3)
    with pytest.raises(VersionError, match="version 0, found 1"):
        replica.advance([log[2], log[3]], 2)
    with pytest.raises(VersionError, match="version 0, found 1"):
        replica.catch_up(downlink.lacking(1).blobs, 3)


def test_broken_bytes_leave_a_replica_as_it_was():
    downlink = Downlink(adapter(), density=0.05)
    replica = replica_of(downlink)
    list(walk(downlink, adapter(), 2))
    blobs = list(downlink.state()["log"].values())
    blobs[1] = blobs[1][:-20] + bytes(20)
    before = replica.values.copy()
    with pytest.raises(ChecksumError):
        replica.advance(blobs, 2)
    assert np.array_equal(replica.values, before)
    assert replica.version == 0
    dense = cf.encode(adapter(), "dense")
    with pytest.raises(WireError, match="dense"):
        replica.advance([dense], 1)
    ternary = cf.encode(cf.compress(adapter()))
    for read in (
        lambda: Replica.from_snapshot([ternary]),
        lambda: replica.catch_up([ternary], 2),
        lambda: replica.catch_up([dense], 2),
        lambda: Replica.from_start([ternary], 2),
        lambda: Replica.from_start([dense], 2),
    ):
        with pytest.raises(WireError, match="found"):
            read()


def test_state_goes_on_where_it_was():
    one = Downlink(adapter(), density=0.1)
    thetas = list(walk(one, adapter(), 4))
    two = Downlink(adapter(), density=0.1)
    two.restore(one.state())
    assert (two.version, two.digest) == (one.version, one.digest)
    assert two.lacking(2) == one.lacking(2)
    after = plus(thetas[-1], adapter(7, 0.01))
    one.advance(after)
    two.advance(after)
    assert two.digest == one.digest
    with pytest.raises(ParameterError, match="2777 values"):
        two.restore({**one.state(), "shared": np.zeros(3)})


def test_what_the_server_cannot_share():
    downlink = Downlink(adapter())
    nan = adapter()
    nan.values[3] = np.nan
    with pytest.raises(NonFiniteError, match="'a'"):
        downlink.advance(nan)
    with pytest.raises(LayoutMismatchError):
        downlink.advance(cf.TaskVector.from_dict({"w": np.ones(3, "f4")}))
    assert downlink.version == 0
    with pytest.raises(ParameterError, match="density"):
        Downlink(adapter(), density=0)
    with pytest.raises(NonFiniteError):
        Downlink(nan)
