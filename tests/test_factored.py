"""Low-rank signs: the search, what is sent of a task vector, the codec, merging, rejections."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
from local_grid import LocalGrid
from low_rank import SHAPES, drawn
from safetensors.numpy import load_file

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.replica import Replica
from compeft_fl.exchange.uplink import ErrorFeedback, within
from compeft_fl.kernels import cpu_factored
from compeft_fl.mod import CompressionMod
from compeft_fl.reduction.factorize import factorize, keep_energy, kept_energy
from compeft_fl.reduction.rules import Reduction
from compeft_fl.strategies import ComPEFTAverage, DownlinkOptions
from compeft_fl.wire import messages

ROOT = Path(__file__).parents[1]
TAUS = {
    path.stem: cf.TaskVector.from_dict(load_file(path))
    for path in sorted((ROOT / "simulations" / "data" / "taus").glob("*.safetensors"))
}


def on_torch(tau):
    """The same task vector as a torch tensor, which takes the way of other devices."""
    import torch

    other = cf.TaskVector(tau.layout, tau.values)
    other.values = torch.from_numpy(tau.values.copy())
    return other


# --- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 64), (8, 384), (16, 1000)])
@pytest.mark.parametrize("largest", [1, 300, 1 << 15, (1 << 24) - 1])
def test_small_matrices_have_the_terms_that_large_ones_would(shape, largest, monkeypatch):
    rng = np.random.default_rng([*shape, largest])
    for share in (1.0, 0.05, 0.0):
        left = rng.integers(-largest, largest, shape, endpoint=True).astype(np.float32)
        left *= rng.random(shape) < share
        found = []
        for small in (left.size, left.size - 1):
            monkeypatch.setattr(cpu_factored, "_SMALL", small)
            found.append(cpu_factored.find_term(left.copy()))
        if found[0] is None:
            assert found[1] is None
            continue
        (factors, exponent, negative, gain), other = found
        np.testing.assert_array_equal(factors, other[0])
        assert factors.dtype == other[0].dtype
        np.testing.assert_array_equal(negative, other[2])
        assert (exponent, gain) == (other[1], other[3])


@pytest.mark.parametrize("name", TAUS)
@pytest.mark.parametrize(("density", "ahead"), [(0.02, 0.16), (0.1, 0.18), (0.3, 0.08)])
def test_more_energy_than_top_k_in_the_same_bytes(name, density, ahead):
    tau = TAUS[name]
    update, ternary = factorize(tau, density), cf.compress(tau, density, "mean")
    assert kept_energy(tau, update) > kept_energy(tau, ternary) + ahead
    size = len(cf.encode(update, "factored", layout_by_id=True))
    assert size < 1.03 * len(cf.encode(ternary, "golomb", layout_by_id=True)) + 30


@pytest.mark.parametrize("name", TAUS)
def test_the_same_energy_as_top_k_in_half_the_bytes(name):
    tau = TAUS[name]
    ternary = cf.compress(tau, 0.1, "mean")
    update = keep_energy(tau, kept_energy(tau, ternary))
    size = len(cf.encode(update, "factored", layout_by_id=True))
    assert size < 0.55 * len(cf.encode(ternary, layout_by_id=True))


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_a_floor_on_the_energy_is_kept(energy):
    for tau in (drawn(), TAUS["section_linear"]):
        update = keep_energy(tau, energy)
        assert energy <= kept_energy(tau, update)
    assert kept_energy(tau, update) < energy + 0.01  # 76,038 parameters: a term is a small step


def test_each_of_the_three_forms_is_taken_where_it_is_the_cheapest():
    rng = np.random.default_rng(0)
    sparse = np.zeros((8, 400), "f4")
    sparse[rng.integers(0, 8, 40), rng.integers(0, 400, 40)] = 1
    update = keep_energy(cf.TaskVector.from_dict({"w": sparse}), 0.9)
    assert isinstance(update, cf.TernaryVector)
    # One step of Adam: every entry is as large as any other, with a sign of its own.
    signs = np.where(rng.random((8, 400)) < 0.5, -1, 1).astype("f4")
    tau = cf.TaskVector.from_dict({"w": signs})
    update = keep_energy(tau, 0.9)
    assert [each.flat for each in update.terms] == [True]
    assert 8 * len(cf.encode(update, "factored", layout_by_id=True)) < 1.2 * 3200
    update = keep_energy(drawn(), 0.6)
    assert not any(each.flat for each in update.terms if each is not None)


def test_tensors_without_a_low_rank_form_are_ternary():
    update = factorize(drawn(), 0.3)
    marked = dict(zip(SHAPES, update.rest.nonzeros_by_tensor().tolist(), strict=True))
    assert marked["bias"] > 0
    assert {name for name, count in marked.items() if count} <= {"bias", "s"}
    only = cf.TaskVector.from_dict({"ia3": drawn().values[:40]})
    assert factorize(only, 0.2).num_terms == 0
    assert kept_energy(only, keep_energy(only, 0.97)) >= 0.97  # beyond what ternary values reach


def test_a_large_full_weight_is_not_searched_for_terms():
    rng = np.random.default_rng(0)
    tau = cf.TaskVector.from_dict({"w": rng.standard_normal((1025, 1024)).astype("f4")})
    assert factorize(tau, 0.1).num_terms == 0
    assert all(each.flat for each in keep_energy(tau, 0.85).terms if each is not None)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1.0, 1e30, 3e38])
def test_values_at_the_ends_of_float32(scale):
    tau = drawn()
    values = (tau.values / np.abs(tau.values).max()).astype("f8") * scale
    tau = cf.TaskVector(tau.layout, values.astype("f4"))
    update = factorize(tau, 0.3)
    assert np.isfinite(update.values).all()
    assert kept_energy(tau, update) > (-1e-6 if scale in (1e-44, 3e38) else 0.6)
    read = cf.decode(cf.encode(update, "factored"))
    assert read.values.tobytes() == update.values.tobytes()


def test_nothing_and_what_is_not_finite():
    zeros = cf.TaskVector.zeros(drawn().layout)
    for update in (factorize(zeros, 0.1), keep_energy(zeros, 0.9)):
        assert not update.to_task_vector().values.any()
    assert cf.decode(cf.encode(factorize(zeros, 0.1), "factored")).num_terms == 0
    bad = drawn()
    bad.values[3] = np.nan
    with pytest.raises(errors.NonFiniteError, match="'a'"):
        factorize(bad, 0.1)
    with pytest.raises(errors.ParameterError, match="parameters"):
        factorize(cf.TaskVector.from_dict({"w": np.zeros(0, "f4")}), 0.1)
    for energy in (0, 1, True, "x", float("nan")):
        with pytest.raises(errors.ParameterError, match="energy"):
            keep_energy(drawn(), energy)
    for density in (0, 2, "most"):
        with pytest.raises(errors.ParameterError, match="density"):
            Reduction(density)


# --- other devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.02, 0.2, 0.6])
def test_torch_writes_and_reads_the_same(density):
    for tau in (drawn(), TAUS["role_linear"]):
        update, other = factorize(tau, density), factorize(on_torch(tau), density)
        blob = cf.encode(update, "factored")
        assert cf.encode(other, "factored") == blob
        read = cf.decode(blob, device="cpu")
        assert read.values.numpy().tobytes() == update.values.tobytes()
        assert other.values.numpy().tobytes() == update.values.tobytes()
        assert cf.encode(read, "factored") == blob
    one, two = keep_energy(tau, 0.8), keep_energy(on_torch(tau), 0.8)
    assert cf.encode(one, "factored") == cf.encode(two, "factored")


@pytest.mark.cuda
@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no CUDA device")
@pytest.mark.parametrize("density", [0.02, 0.2, 0.6])
def test_cuda_writes_and_reads_the_same(density):
    import torch

    for tau in (drawn(), TAUS["role_linear"]):
        blob = cf.encode(factorize(tau, density), "factored")
        there = cf.TaskVector(tau.layout, torch.from_numpy(tau.values).cuda())
        assert cf.encode(factorize(there, density), "factored") == blob
        assert np.array_equal(cf.decode(blob, device="cuda").values.cpu(), cf.decode(blob).values)


# --- both directions --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"factored": True}, {"density": "auto", "energy": 0.7}])
def test_error_feedback_sends_all_in_the_end(options):
    feedback = ErrorFeedback(decay=1.0, **{"density": 0.05, **options})
    tau = drawn()
    sent = np.zeros_like(tau.values)
    zeros = cf.TaskVector.zeros(tau.layout)
    for each in itertools.chain([tau], [zeros] * 15):
        sent += feedback.compress(each).to_task_vector().values
        # in float32, a few roundings of the largest values
        assert np.abs(tau.values - sent - feedback.residual).max() < 1e-7
    assert np.linalg.norm(feedback.residual) < 0.2 * np.linalg.norm(tau.values)
    assert feedback.quality.given >= 0


def test_a_bound_on_the_norm_is_kept():
    update = factorize(drawn(), 0.3)
    norm = float(np.linalg.norm(update.values))
    assert within(update, norm * 1.001) is update
    for share in (0.9, 0.5, 0.3, 1e-3):
        lowered = within(update, share * norm)
        assert share * norm / 2.01 < np.linalg.norm(lowered.values) <= share * norm
        again = cf.decode(cf.encode(lowered, "factored"))
        assert again.values.tobytes() == lowered.values.tobytes()
    assert not within(update, 0.0).values.any()


def test_versions_of_terms_live_on_the_grid():
    rng = np.random.default_rng(0)
    start = drawn(9)
    downlink = Downlink(start, density=0.1, codec="factored")
    nodes = {node: Replica(start.layout, downlink.shared.copy(), 0) for node in range(4)}
    theta = start.values.copy()
    for number in range(12):
        theta = theta + 0.3 * drawn(number).values
        downlink.advance(cf.TaskVector(start.layout, theta))
        node = int(rng.integers(4))
        for each in {node, 0}:  # one each round, others as they are asked
            shipment = downlink.lacking(nodes[each].version)
            replica = nodes[each]
            if shipment.kind == "deltas":
                replica = replica.advance(shipment.blobs, downlink.version)
            elif shipment.kind == "catchup":
                replica = replica.catch_up(shipment.blobs, downlink.version)
            nodes[each] = replica
            assert replica.digest == downlink.digest
    assert {messages.inspect(b, layout=start.layout).codec for b in downlink._log.values()} == {
        "factored"
    }
    joined = Replica(start.layout, downlink.grid.nearest(start.values), 0)
    shipment = downlink.lacking(0)
    joined = getattr(joined, {"deltas": "advance", "catchup": "catch_up"}[shipment.kind])(
        shipment.blobs, downlink.version
    )
    assert joined.digest == downlink.digest


@pytest.mark.parametrize("density", [0.2, "auto"])
def test_a_federation_over_terms_both_ways(density, caplog):
    """Two of four nodes a round: chains, catch-ups and starts, and all nodes follow."""
    grid = LocalGrid(tiny.client_app(CompressionMod(codec="factored", density=density)), 4)
    downlink = DownlinkOptions(codec="factored", density=density)
    strategy = ComPEFTAverage(fraction_train=0.5, fraction_evaluate=0.5, downlink=downlink)
    with caplog.at_level(logging.INFO, logger="flwr"):
        result = strategy.start(grid, tiny.arrays(), num_rounds=6)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("2 replies taken" in line and "aggregate_train" in line for line in lines) == 6
    assert not any("set aside:" in line or "is sent what it lacks" in line for line in lines)
    assert sum("of their energy the updates keep 0." in line for line in lines) == 6
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


def test_auto_density_on_the_way_down():
    start = drawn(9)
    target = cf.TaskVector(start.layout, start.values + drawn(1).values)
    for codec, energy, left in (("golomb", 0.2, 0.36), ("factored", 0.9, 0.04)):
        downlink = Downlink(start, density="auto", codec=codec, energy=energy)
        before = np.linalg.norm(target.values - downlink.shared)
        downlink.advance(target)
        (blob,) = downlink._log.values()
        assert messages.inspect(blob, layout=start.layout).codec == codec
        # the first version keeps more; a step is rounded to a power of two
        assert np.linalg.norm(target.values - downlink.shared) ** 2 < left * before**2
