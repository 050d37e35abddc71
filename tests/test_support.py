"""kernels/support.py: the best support against its definition, and alike on all devices."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import compeft_fl as cf
from compeft_fl.compeft import keep_top_k
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.kernels import cpu, cpu_select, torch_ops

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
VECTORS = {
    "normal": lambda rng, d: rng.standard_normal(d),
    "heavy-tailed": lambda rng, d: rng.standard_cauchy(d),
    "products": lambda rng, d: rng.standard_normal(d) * rng.exponential(1, d),
    "many ties": lambda rng, d: rng.integers(-9, 9, d),
    "one large": lambda rng, d: np.r_[100.0, np.ones(d - 1)],
    "rounding noise": lambda rng, d: np.r_[
        np.ones(d // 20), 3e-8 * rng.standard_normal(d - d // 20)
    ],
    "one bucket": lambda rng, d: 1 + 1e-3 * rng.random(d),
    "log-normal": lambda rng, d: np.exp(3 * rng.standard_normal(d)),
    "subnormal": lambda rng, d: rng.standard_normal(d) * 1e-41,
    "huge": lambda rng, d: rng.standard_cauchy(d).clip(-1000, 1000) * 1e35,
    "zeros": lambda rng, d: np.zeros(d),
}


def best_by_definition(values, k):
    """The k' <= k that maximises (sum of the k' largest)^2 / k', in exact arithmetic."""
    magnitudes = sorted((Fraction(float(abs(v))) for v in values if v), reverse=True)[:k]
    total, best, best_k = Fraction(0), Fraction(0), 0
    for number, magnitude in enumerate(magnitudes, 1):
        total += magnitude
        if total * total / number > best:
            best, best_k = total * total / number, number
    return best_k


def number_kept(masks):
    return int(np.bitwise_count(masks[0] | masks[1]).sum())


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("d", [1, 2, 63, 65, 1000])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("few", [cpu_select._FEW, 0], ids=["sorted", "counted"])
def test_the_support_that_keeps_most_energy(kind, d, density, few, monkeypatch):
    monkeypatch.setattr(cpu_select, "_FEW", few)
    values = VECTORS[kind](np.random.default_rng(d), d).astype(np.float32)
    k = max(1, int(density * d))
    masks = cpu_select.select_best(values, k)
    best_k = best_by_definition(values, k)
    assert number_kept(masks) == best_k
    if best_k:  # and they are the largest
        for mask, other in zip(masks, cpu_select.select_top_k(values, best_k), strict=True):
            assert np.array_equal(mask, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("d", [5, 1000, 150_001])
def test_every_device_chooses_the_same_bits(device, kind, d):
    values = VECTORS[kind](np.random.default_rng(d), d).astype(np.float32)
    for k in (1, d // 10 or 1, d):
        masks = cpu_select.select_best(values, k)
        tensors = torch_ops.select_best(torch.from_numpy(values).to(device), k)
        for mask, tensor in zip(masks, tensors, strict=True):
            assert mask.tobytes() == tensor.cpu().numpy().tobytes()


def test_the_number_of_threads_changes_nothing(monkeypatch):
    values = np.random.default_rng(0).standard_cauchy(5_000_011).astype(np.float32)
    found = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(cpu, "num_cores", lambda cores=cores: cores)
        found.append([mask.tobytes() for mask in cpu_select.select_best(values, values.size // 5)])
    assert found[0] == found[1] == found[2]


def test_a_sample_that_misleads_is_noticed():
    """Every sampled entry is 0: what the first pass has counted must not count."""
    d = 1 << 20
    values = np.zeros(d, np.float32)
    step = d // max(1 << 16, d >> 9)
    others = np.flatnonzero(np.arange(d) % step != step // 2)[:3000]
    values[others] = np.random.default_rng(0).standard_cauchy(others.size)
    best_k = best_by_definition(values[others], others.size)
    assert number_kept(cpu_select.select_best(values, d // 20)) == best_k < others.size


def test_the_cosine_is_the_greatest_of_all_supports():
    values = np.random.default_rng(0).standard_cauchy(2000).astype(np.float32)
    tau = cf.TaskVector(cf.Layout([cf.TensorSpec("w", values.shape)]), values)

    def cosine(update):
        dense = update.to_task_vector().values.astype(np.float64)
        return dense @ values / np.linalg.norm(dense) / np.linalg.norm(values.astype(np.float64))

    best = cosine(cf.compress(tau, 0.2, "mean", "best"))
    every = [cosine(cf.compress(tau, k / 2000, "mean")) for k in range(1, 401)]
    assert best == pytest.approx(max(every), rel=1e-6)
    assert best > 1.5 * every[-1]


def test_the_bound_stays_active_on_normal_values():
    """Of normal values more than half keep most energy: nothing is lost below that."""
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    tau = cf.TaskVector(cf.Layout([cf.TensorSpec("w", values.shape)]), values)
    for density in (0.05, 0.2, 0.5):
        fixed, best = cf.compress(tau, density), cf.compress(tau, density, support="best")
        assert cf.encode(fixed) == cf.encode(best)
    assert keep_top_k(tau, 1.0, "best").density == pytest.approx(0.54, abs=0.02)


def test_not_finite_and_unknown_names():
    tau = cf.TaskVector.from_dict({"w": np.array([1, np.inf], "f4")})
    with pytest.raises(cf.errors.NonFiniteError):
        cf.compress(tau, 0.5, support="best")
    with pytest.raises(ParameterError, match='"fixed" or "best"'):
        cf.compress(tau, 0.5, support="some")
    with pytest.raises(ParameterError, match='"fixed" or "best"'):
        Downlink(cf.TaskVector.from_dict({"w": np.ones(2, "f4")}), support="some")


def test_rounding_noise_does_not_go_down():
    """A way down whose density is wider than what has changed leaves the rest where it was."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(2000).astype(np.float32)
    layout = cf.Layout([cf.TensorSpec("w", values.shape)])
    downlink = Downlink(cf.TaskVector(layout, values), density=0.2)
    moved = np.where(np.arange(2000) < 100, rng.standard_normal(2000), 0)
    noise = 3e-8 * rng.standard_normal(2000)
    theta = (values.astype(np.float64) + moved + noise).astype(np.float32)
    start = downlink.shared
    downlink.advance(cf.TaskVector(layout, theta))
    assert np.array_equal(downlink.shared[100:], start[100:])
    change, sent = theta - start, downlink.shared - start
    assert change @ sent > 0.85 * np.linalg.norm(change) * np.linalg.norm(sent)
