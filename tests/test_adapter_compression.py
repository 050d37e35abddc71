"""Adapters to files and back: what is carried, what is lost and said, and the memory it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import adapter_kinds
import numpy as np
import pytest
import test_adapter_merge

from compeft_fl import adapters
from compeft_fl.adapters import files
from compeft_fl.adapters.compression import compress_adapter
from compeft_fl.cli.main import main
from compeft_fl.errors import AdapterError, MalformedError

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = [  # PEFT's, of its methods
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

save, tensors, change = (getattr(test_adapter_merge, n) for n in ("save", "tensors", "change"))
place, run = test_adapter_merge.place, test_adapter_merge.run


# --- what is lost without a start -------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("LORA", {}),
        ("ADALORA", {}),
        ("LOHA", {}),
        ("LOKR", {}),
        ("LOKR", {"r": 2, "decompose_both": True}),
    ],
)
def test_what_factors_lose_without_a_start_is_said_as_it_is(place, capsys, method, options):
    save("a", adapter_kinds.config(method, **options))
    for density in ("0.05", "0.4"):
        assert main(["compress", "a", "-o", "a.compeft", "--density", density]) == 0
        error = capsys.readouterr().err
        assert main(["decompress", "a.compeft", "-o", "restored", "--force"]) == 0
        cosine = float(torch.cosine_similarity(change("a"), change("restored"), dim=0))
        if cosine < 0.895:
            assert float(re.search(r"after, is (-?\d\.\d\d), ", error)[1]) == pytest.approx(
                cosine, abs=0.006
            )
            assert "--init DIR" in error
        assert files.read_update("a.compeft").effect_cosine == pytest.approx(cosine, abs=1e-4)
    assert cosine > 0.2


def test_each_factor_keeps_its_part(place):
    save("a", adapter_kinds.config("LOHA"))
    update = compress_adapter(adapters.load_folder("a"), density=0.05).update
    kept, size = {}, {}
    counts = update.nonzeros_by_tensor()
    for tensor, count in zip(update.layout.tensors, counts, strict=True):
        part = tensor.name.rpartition(".")[2]
        kept[part] = kept.get(part, 0) + int(count)
        size[part] = size.get(part, 0) + tensor.size
    assert len(kept) == 4
    assert {part: int(0.05 * of) for part, of in size.items()} == kept
    signs = update.with_scales(1.0).to_task_vector().values
    values = adapters.task_vector(adapters.load_folder("a"))[0].values
    assert np.array_equal(signs[signs != 0], np.sign(values[signs != 0]))


def test_pieces_of_a_file_are_the_whole_read_at_once(place, monkeypatch):
    from compeft_fl.adapters import compression, weights

    save("a", adapter_kinds.config("LORA"))
    both = [adapters.load_folder(name) for name in ("a", "a0")]
    for init in (None, both[1]):
        expected = compress_adapter(both[0], init, density=0.3)
        monkeypatch.setattr(weights, "PIECE", 37)
        monkeypatch.setattr(compression, "_PIECE", 40)
        lazy = None if init is None else adapters.open_folder("a0")
        found = compress_adapter(adapters.open_folder("a"), lazy, density=0.3)
        monkeypatch.undo()
        monkeypatch.chdir(place)
        assert np.array_equal(found.update.positive, expected.update.positive)
        assert np.array_equal(found.update.negative, expected.update.negative)
        assert np.array_equal(found.update.scales, expected.update.scales)
        assert (found.start, found.quality) == (expected.start, expected.quality)


# --- what is carried --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("SHIRA", {}),
        ("FROD", {}),
        ("SUPERTUNING", {}),
        ("VBLORA", {"save_only_topk_weights": True}),
        ("UNILORA", {"save_indices": True}),
    ],
)
def test_indices_are_carried_exactly(place, run, method, options):
    save("a", adapter_kinds.config(method, **options))
    out = run("compress a -o a.compeft --init a0")
    run("decompress a.compeft -o restored --init a0")
    assert run("inspect a.compeft") == out
    expected, found = tensors("a"), tensors("restored")
    carried = [name for name, tensor in expected.items() if not tensor.is_floating_point()]
    assert carried
    assert set(carried) <= set(files.read_update("a.compeft").carried)
    assert found.keys() == expected.keys()
    for name in files.read_update("a.compeft").carried:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])
    peft.PeftModel.from_pretrained(adapter_kinds.base_model(), "restored")


def test_values_whose_places_have_changed_are_carried_too(place, run):
    options = {"save_only_topk_weights": True}
    model = save("a", adapter_kinds.config("VBLORA", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logits" in name:
                parameter.neg_()  # the largest are the smallest: other indices
    model.save_pretrained("a")
    run("compress a -o a.compeft --init a0")
    run("decompress a.compeft -o restored --init a0")
    expected, found = tensors("a"), tensors("restored")
    weights = [name for name in expected if "topk" in name]
    assert weights
    assert all(torch.equal(found[name], expected[name]) for name in weights)
    line = "merge a.compeft b.compeft --method average -o m --init a0"
    save("b", adapter_kinds.config("VBLORA", **options), seed=2)
    run("compress b -o b.compeft --init a0")
    assert "for other places" in run(line, 2) or "layouts" in run(line, 2)


def folder(name, state, config=None):
    """An adapter folder of any tensors."""
    from pathlib import Path

    from safetensors.torch import save_file

    Path(name).mkdir()
    save_file(state, f"{name}/adapter_model.safetensors", {"format": "pt"})
    Path(name, "adapter_config.json").write_text(json.dumps(config or {"peft_type": "LORA"}))


def state_with_statistics(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.lora_A.weight": torch.randn(4, 8, generator=generator),
        "m.lora_B.weight": torch.randn(8, 4, generator=generator),
        "bn.running_var": torch.rand(8, generator=generator) + 1,
        "bn.num_batches_tracked": torch.tensor(steps),
        "wide": torch.randn(3, dtype=torch.float64, generator=generator),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(2, generator=generator).to(torch.bfloat16),
    }


def test_statistics_counters_and_float64_are_carried_and_averaged(place, run):
    folder("start", state_with_statistics(0, 0))
    states = [state_with_statistics(seed, steps) for seed, steps in ((1, 10), (2, 20))]
    for name, state in zip("ab", states, strict=True):
        folder(name, state)
        run(f"compress {name} -o {name}.compeft --init start")
        run(f"decompress {name}.compeft -o {name}-restored --init start")
        found = tensors(f"{name}-restored")
        assert {key: tensor.dtype for key, tensor in found.items()} == {
            key: tensor.dtype for key, tensor in state.items()
        }
        for key in ("bn.running_var", "bn.num_batches_tracked", "wide", "mask"):
            assert torch.equal(found[key], state[key])
    run("merge a.compeft b.compeft --method task-arithmetic --weights=3,-1 -o m --init start")
    merged = tensors("m")
    for key in ("bn.running_var", "wide"):
        assert torch.allclose(merged[key], 0.75 * states[0][key] + 0.25 * states[1][key])
    assert int(merged["bn.num_batches_tracked"]) == 12
    assert torch.equal(merged["mask"], states[0]["mask"])


def test_masks_that_differ_are_refused_by_name(place, run):
    states = [state_with_statistics(1, 10) for _ in range(2)]
    states[1]["mask"] = torch.tensor([True, True, True])
    for name, state in zip("ab", states, strict=True):
        folder(name, state)
        run(f"compress {name} -o {name}.compeft --init {name}")
    assert "differ in 'mask'" in run("merge a.compeft b.compeft --method ties -o m --init a", 2)
    assert "differ in 'mask'" in run("similarity a.compeft b.compeft", 2)
    # and a start with other indices, where no value stands beside them
    folder("c", {"x.lora_A.weight": torch.ones(2, 2), "list.i": torch.arange(3)})
    folder("c0", {"x.lora_A.weight": torch.zeros(2, 2), "list.i": torch.arange(3) + 1})
    assert "'list.i'" in run("compress c -o c.compeft --init c0", 2)


def test_an_adapter_of_integers_alone_is_refused(place, run):
    folder("a", {"x": torch.arange(3)})
    assert "expected floats of 16 or 32 bits" in run("compress a -o a.compeft --init a", 2)


def test_damaged_carried_tensors_are_an_error(place, run):
    folder("a", state_with_statistics(1, 10))
    run("compress a -o a.compeft --init a")
    data = (place / "a.compeft").read_bytes()
    assert data.startswith(files.CARRIED_MAGIC)
    length = int.from_bytes(data[8:16], "little")
    for damaged, message in (
        (data[: 16 + length - 1], "expected carried tensors of"),
        (data[:12], "expected carried tensors of"),
        (data[:40] + b"?" + data[41:], "digest"),
        (data[16 + length :], "digest .*, found none"),
    ):
        (place / "damaged").write_bytes(damaged)
        with pytest.raises(MalformedError, match=message) as caught:
            files.read_update("damaged")
        assert "expected" in str(caught.value)
        run("inspect damaged", 2)
        run("decompress damaged -o never --init a", 2)
    assert not (place / "never").exists()


# --- AdaLoRA after pruning --------------------------------------------------------------------


def test_adalora_is_compressed_after_pruning(place, run):
    schedule = {"tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
    config = adapter_kinds.config("ADALORA", **schedule)
    model = peft.get_peft_model(adapter_kinds.base_model(), config)
    model.save_pretrained("a0")
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    ids = torch.arange(24).reshape(2, 12) + 5
    for step in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained("a")
    assert any(tensors("a")[n].shape != tensor.shape for n, tensor in tensors("a0").items())
    run("compress a -o dense.compeft --codec dense --init a0")
    run("decompress dense.compeft -o restored --init a0")
    for name, tensor in tensors("a").items():
        assert torch.allclose(tensors("restored")[name], tensor, atol=1e-6)
    run("compress a -o sparse.compeft --density 0.3 --init a0")
    run("decompress sparse.compeft -o sparse --init a0")
    assert torch.cosine_similarity(change("sparse"), change("a"), dim=0) > 0.2
    written = json.loads((place / "a" / "adapter_config.json").read_text())
    written["rank_pattern"] = {key: [True] for key in written["rank_pattern"]}
    (place / "a" / "adapter_config.json").write_text(json.dumps(written))
    assert "rank" in run("compress a -o x --init a0", 2)


def test_an_unknown_start_is_named(place, run):
    save("a", adapter_kinds.config("VERA"))
    with pytest.raises(AdapterError, match="found VERA"):
        compress_adapter(adapters.load_folder("a"))


# --- memory -----------------------------------------------------------------------------------

# VmHWM, and not ru_maxrss: that also counts what the process that started this one had.
_PEAKS = """
import pathlib, sys
from compeft_fl.cli.main import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0
    status = pathlib.Path("/proc/self/status").read_text()
    print("peak", status.partition("VmHWM:")[2].split()[0])
"""


def peaks(*lines):
    """The peak memory of a process after each of its commands, in bytes."""
    command = [sys.executable, "-c", _PEAKS, *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [1024 * int(found) for found in re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)]


def large_lora(name, rank, width, layers, seed):
    from pathlib import Path

    from safetensors.numpy import save_file

    Path(name).mkdir()
    rng = np.random.default_rng(seed)
    state = {}
    for layer in range(layers):
        module = f"base_model.model.layers.{layer}.q_proj"
        state[f"{module}.lora_A.weight"] = rng.standard_normal((rank, width), np.float32)
        state[f"{module}.lora_B.weight"] = rng.standard_normal((width, rank), np.float32)
    save_file(state, f"{name}/adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8}
    Path(name, "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.size for tensor in state.values())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("layers", [1, 16])
def test_compress_takes_at_most_6_bytes_a_parameter(place, layers):
    sizes = [
        (large_lora(f"{name}0", rank, width, layers, 1), large_lora(name, rank, width, layers, 2))[
            0
        ]
        for name, rank, width in (("small", 2, 2048), ("large", 128, 65536 // layers))
    ]
    for options in ("", "--init {}0", "--codec dense"):
        small, large = peaks(  # the small one loads what any size takes
            *(
                f"compress {name} -o {name}.compeft {options.format(name)}"
                for name in ("small", "large")
            )
        )
        taken = (large - small) / (sizes[1] - sizes[0])
        assert taken <= 6, options
