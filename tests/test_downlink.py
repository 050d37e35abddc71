"""exchange/downlink.py: every node at a version holds the server's theta_shared, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.errors import (
    ChecksumError,
    LayoutMismatchError,
    NonFiniteError,
    ParameterError,
    VersionError,
    WireError,
)
from compeft_fl.exchange.downlink import DIGEST_BYTES, Downlink, Replica, digest_of

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


def test_a_snapshot_is_lossless():
    downlink = Downlink(adapter())
    replica = replica_of(downlink)
    assert (replica.version, replica.layout) == (0, LAYOUT)
    assert np.array_equal(replica.values, adapter().values)
    assert replica.digest == downlink.digest == digest_of(adapter().values)
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
    shipment = downlink.lacking(2)
    assert (shipment.kind, len(shipment.blobs)) == ("deltas", 3)
    shipment = downlink.lacking(0)
    assert late.advance(shipment.blobs, 5).digest == downlink.digest
    for version in (None, -1, 6):  # knows nothing, or what this server never made
        assert downlink.lacking(version).kind == "snapshot"


def test_a_snapshot_is_sent_where_it_is_smaller_and_the_log_stays_short():
    downlink = Downlink(adapter(), density=0.2)
    list(walk(downlink, adapter(), 60))
    snapshot = downlink.snapshot().num_bytes
    assert downlink.lacking(0).kind == "snapshot"
    assert downlink.lacking(59).kind == "deltas"
    oldest = next(v for v in range(61) if downlink.lacking(v).kind == "deltas")
    assert downlink.lacking(oldest).num_bytes < snapshot
    assert sum(len(blob) for blob in downlink.state()["log"].values()) < snapshot


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
    with pytest.raises(VersionError, match="3 deltas from version 0 to 3, found 2"):
        replica.advance(downlink.lacking(1).blobs, 3)
    with pytest.raises(VersionError, match="version 0, found 1"):
        replica.advance(downlink.lacking(1).blobs, 2)


def test_broken_bytes_leave_a_replica_as_it_was():
    downlink = Downlink(adapter(), density=0.05)
    replica = replica_of(downlink)
    list(walk(downlink, adapter(), 2))
    blobs = list(downlink.lacking(0).blobs)
    blobs[1] = blobs[1][:-20] + bytes(20)
    before = replica.values.copy()
    with pytest.raises(ChecksumError):
        replica.advance(blobs, 2)
    assert np.array_equal(replica.values, before)
    assert replica.version == 0
    dense = cf.encode(adapter(), "dense")
    with pytest.raises(WireError, match="dense"):
        replica.advance([dense], 1)
    with pytest.raises(WireError, match="ternary"):
        Replica.from_snapshot([cf.encode(cf.compress(adapter()))])


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
