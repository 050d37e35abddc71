"""kernels/: torch operations and the CPU's loops give the same bytes; threads change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import compeft_fl as cf
from compeft_fl.kernels import cpu, cpu_golomb, cpu_select, torch_ops
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES = [1, 5, 63, 64, 257, 5000, 70_001, (1 << 18) + 3]
KINDS = {
    "normal": lambda rng, d: rng.standard_normal(d),
    "ties": lambda rng, d: rng.integers(-3, 4, d),
    "zeros": lambda rng, d: np.zeros(d),
    "rare": lambda rng, d: np.where(rng.random(d) < 0.003, rng.standard_normal(d), 0),
    "uneven": lambda rng, d: rng.standard_normal(d) * np.exp(3 * np.sin(np.arange(d) / 700)),
}


def both(device, kind, d, density):
    """One update made by the CPU's kernels, and one made by torch on a device."""
    values = KINDS[kind](np.random.default_rng(d), d).astype(np.float32)
    k = max(1, int(density * d))
    on_cpu = cpu_select.select_top_k(values, k)
    on_device = torch_ops.select_top_k(torch.from_numpy(values).to(device), k)
    return values, on_cpu, on_device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", SIZES)
def test_torch_gives_the_cpu_s_bytes(device, kind, d):
    for density in (0.001, 0.05, 0.5, 1.0):
        values, masks, tensors = both(device, kind, d, density)
        for mask, tensor in zip(masks, tensors, strict=True):
            assert mask.tobytes() == tensor.cpu().numpy().tobytes()
        there = torch.from_numpy(values).to(device)
        assert cpu.sum_values(values) == torch_ops.sum_values(there)
        assert cpu.sum_squares(values) == torch_ops.sum_squares(there)
        assert cpu.sum_kept(values, *masks) == torch_ops.sum_kept(there, *tensors)
        plan = cpu_golomb.plan_blocks(*masks, d)
        streams = cpu_golomb.write_streams(*masks, plan)
        others = torch_ops.write_streams(*tensors, d)
        assert streams[1:] == others[1:]
        assert plan.level == others.plan.level
        assert plan.total_bytes == others.plan.total_bytes
        assert np.array_equal(plan.rice, others.plan.rice)
        assert np.array_equal(plan.nonzeros, others.plan.nonzeros)
        tables = (d, plan.level, plan.nonzeros.astype(np.int64), plan.rice)
        back = cpu_golomb.read_streams(*tables, *streams[1:])
        back_there = torch_ops.read_streams(*tables, *streams[1:], device=device)
        assert back[2] == back_there[2] == -1
        for mask, here, tensor in zip(masks, back, back_there[:2], strict=False):
            assert mask.tobytes() == here.tobytes() == tensor.cpu().numpy().tobytes()


def torch_update(update, device="cpu"):
    """The same update with its masks as torch tensors."""
    masks = torch_ops.upload(update.positive, update.negative, device)
    return TernaryVector(update.layout, *masks, update.scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_updates_on_a_device_encode_and_decode_alike(device, per_tensor):
    rng = np.random.default_rng(0)
    tau = TaskVector.from_dict({n: rng.standard_normal(999).astype("f4") for n in "ab"})
    update = cf.compress(tau, 0.1)
    if per_tensor:
        update = update.with_scales([0.5, 2.0])
    there = torch_update(update, device)
    assert there.num_nonzeros == update.num_nonzeros
    dense = there.to_task_vector().values
    dense = dense if isinstance(dense, np.ndarray) else dense.cpu().numpy()
    assert np.array_equal(dense, update.to_task_vector().values)
    for codec in cf.codecs.names():
        blob = cf.encode(update, codec)
        assert cf.encode(there, codec) == blob
        back = cf.decode(blob, device=device).to_task_vector().values
        back = back if isinstance(back, np.ndarray) else back.cpu().numpy()
        assert np.array_equal(back, cf.decode(blob).to_task_vector().values)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    d = 5_000_011  # of a changing density: blocks are small, and parts begin inside words
    values = KINDS["uneven"](np.random.default_rng(0), d).astype(np.float32)
    results = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(cpu, "num_cores", lambda cores=cores: cores)
        masks = cpu_select.select_top_k(values, d // 20)
        plan = cpu_golomb.plan_blocks(*masks, d)
        assert plan.nonzeros.size > 1000
        streams = cpu_golomb.write_streams(*masks, plan)
        tables = (d, plan.level, plan.nonzeros.astype(np.int64), plan.rice)
        back = cpu_golomb.read_streams(*tables, *streams[1:])
        assert np.array_equal(back[0], masks[0])
        assert np.array_equal(back[1], masks[1])
        sums = cpu.sum_values(values), cpu.sum_squares(values), cpu.sum_kept(values, *masks)
        results.append((streams[1:], sums))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("device", DEVICES)
def test_an_overrun_names_its_block(device):
    """Two blocks of 256; the second holds a gap of 300."""
    counts, rice = np.array([1, 1], np.int64), np.array([0, 0], np.uint8)
    bits = np.zeros(1 + 301, np.uint8)
    bits[[0, 301]] = 1
    quotients = np.packbits(bits, bitorder="little").tobytes()
    arguments = (512, 8, counts, rice, quotients, b"", b"\0")
    assert cpu_golomb.read_streams(*arguments)[2] == 1
    assert torch_ops.read_streams(*arguments, device=device)[2] == 1


def test_memory_of_compress_and_encode():
    """Peak beyond the vector itself: at most 1.5 times its bytes (masks and streams)."""
    import tracemalloc

    values = np.random.default_rng(0).standard_normal(8_000_000, dtype=np.float32)
    tau = TaskVector(cf.Layout([cf.TensorSpec("w", values.shape)]), values)
    for density in (0.05, 0.5):
        cf.encode(cf.compress(tau, density))  # compiles
        tracemalloc.start()
        cf.encode(cf.compress(tau, density))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 1.5 * values.nbytes
