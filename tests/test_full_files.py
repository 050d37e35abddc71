"""Files of whole models: commands, what is refused, and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import base_state, compressed, in_memory, restored, tuned, write
from safetensors.numpy import load_file as load_arrays

from compeft_fl import full
from compeft_fl.cli.main import main
from compeft_fl.errors import AdapterError, CompeftError, NonFiniteError, WireError
from compeft_fl.full import folders

# --- commands, and what is refused ------------------------------------------------------------


def test_the_commands_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base", base_state())
    write(tmp_path / "tuned", tuned(base_state()), shards=2)
    assert main(["compress", "base", "tuned", "-o", "x.cpeft", "--density", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "6,576" in out
    assert "TinyModel" in out
    assert main(["inspect", "x.cpeft", "--tensors"]) == 0
    assert "layers.0.weight  300 x 16" in capsys.readouterr().out
    assert main(["decompress", "x.cpeft", "--base", "base", "-o", "again"]) == 0
    assert "4 tensors fine-tuned, TinyModel" in capsys.readouterr().out
    assert main(["decompress", "x.cpeft", "-o", "never"]) == 2
    assert "--base DIR" in capsys.readouterr().err
    assert main(["decompress", "x.cpeft", "--base", "base", "-o", "base", "--force"]) == 2
    assert "expected another folder than the base's" in capsys.readouterr().err
    assert main(["compress", "base", "tuned", "base", "-o", "y"]) == 2
    assert "found 3 folders" in capsys.readouterr().err
    assert main(["similarity", "x.cpeft", "x.cpeft"]) == 2
    assert "adapter" in capsys.readouterr().err
    assert main(["compress", "base", "tuned", "-o", "y", "--codec", "factored"]) == 2
    assert "expected a codec among golomb" in capsys.readouterr().err


def test_another_base_is_refused_and_nothing_is_left(tmp_path):
    write(tmp_path / "base", base_state())
    write(tmp_path / "tuned", tuned(base_state()))
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
    other = base_state()
    other["norm.weight"][3] += 1e-3
    write(tmp_path / "other", other)
    with pytest.raises(AdapterError, match="expected the base blake2b"):
        restored(tmp_path / "x", tmp_path / "other", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    del other["norm.weight"]
    shutil.rmtree(tmp_path / "other")
    write(tmp_path / "other", other)
    with pytest.raises(AdapterError, match=r"'norm\.weight' of shape \(16,\); found none"):
        restored(tmp_path / "x", tmp_path / "other", tmp_path / "again")


def test_folders_that_are_none_are_named(tmp_path):
    for make, text in (
        (lambda f: None, "expected model.safetensors"),
        (lambda f: (f / "pytorch_model.bin").touch(), "not safe to load"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "expected safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "expected an object"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
         "beside it"),
    ):  # fmt: skip
        folder = tmp_path / "f"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        with pytest.raises(AdapterError, match=text):
            full.open_checkpoint(folder)


def test_values_that_are_not_finite_are_named(tmp_path):
    finetuned = tuned(base_state())
    finetuned["layers.1.weight"][0, 0] = float("nan")
    write(tmp_path / "base", base_state())
    write(tmp_path / "tuned", finetuned)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.weight"):
        compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
    big = {name: torch.full_like(t, 65000.0) for name, t in base_state(torch.float16).items()}
    write(tmp_path / "big", big)
    write(tmp_path / "tuned", {name: -tensor for name, tensor in big.items()})
    compressed(tmp_path / "x", tmp_path / "big", tmp_path / "tuned", scale=500.0, density=0.001)
    write(tmp_path / "tuned", {n: t - 100.0 for n, t in big.items()})
    made = tmp_path / "y"
    finetuned = {n: t.clone() for n, t in big.items()}
    finetuned["norm.weight"][0] = -65000.0
    finetuned["norm.weight"][1] = 65504.0
    write(tmp_path / "tuned", finetuned)
    compressed(made, tmp_path / "big", tmp_path / "tuned", density=0.01)
    with pytest.raises(NonFiniteError, match=r"F16 holds in 'norm\.weight'"):
        restored(made, tmp_path / "big", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_damaged_files_end_in_one_error(tmp_path, capsys):
    buffers = {"running_mean": torch.randn(4)}
    write(tmp_path / "base", {**base_state(), "running_mean": torch.zeros(4)})
    write(tmp_path / "tuned", {**tuned(base_state()), **buffers})
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
    blob = (tmp_path / "x").read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(blob), 60):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "y").write_bytes(damaged)
        with pytest.raises(CompeftError):
            restored(tmp_path / "y", tmp_path / "base", tmp_path / "again")
        assert not (tmp_path / "again").exists()
    for length in (0, 7, 20, 100, len(blob) - 1):
        (tmp_path / "y").write_bytes(blob[:length])
        assert main(["inspect", str(tmp_path / "y")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_metadata_that_claim_too_much_are_refused(tmp_path):
    base, finetuned = base_state(), tuned(base_state())
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", finetuned)
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
    stored = full.read_checkpoint(tmp_path / "x")
    good = json.loads(stored.metadata["checkpoint"])
    layout = stored.layout
    for change in (
        {"grown": {"norm.weight": [1]}},
        {"grown": {"embed.weight": [1 << 50, 16]}},
        {"tied": {"a": "no.such"}},
        {"tied": {"norm.weight": "embed.weight"}},
        {"as_base": ["norm.weight"]},
        {"strip": "\x1b[2J"},
        {"config": []},
    ):
        text = json.dumps({**good, **change})
        with (tmp_path / "y").open("wb") as out:
            out.write(full.files.PARTS_MAGIC)
            tau = in_memory(base, finetuned)[1]
            metadata = {"checkpoint": text, "start": stored.start}
            full.files.write_part(out, tau, "golomb", layout, 0, metadata)
        with pytest.raises((WireError, AdapterError)):
            restored(tmp_path / "y", tmp_path / "base", tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_the_header_is_as_safetensors_has_it(tmp_path):
    finetuned = tuned(base_state(torch.float16))
    write(tmp_path / "base", base_state(torch.float16))
    write(tmp_path / "tuned", finetuned)
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned", codec="dense")
    restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    again = load_arrays(tmp_path / "again" / "model.safetensors")
    assert {name: value.dtype for name, value in again.items()} == dict.fromkeys(again, "f2")
    head = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert int.from_bytes(head[:8], "little") % 8 == 0
    assert folders.header([]) == (32).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}'


# --- memory -----------------------------------------------------------------------------------

# VmHWM, and not ru_maxrss: that also counts what the process that started this one had.
_PEAK = """
import pathlib, sys
from compeft_fl.cli.main import main
assert main(sys.argv[1:]) == 0
status = pathlib.Path("/proc/self/status").read_text()
print("peak", status.partition("VmHWM:")[2].split()[0])
"""


def peak_memory(line, folder):
    """The peak memory of a command in a process of its own, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *line.split()],
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    return 1024 * int(done.stdout.rpartition("peak ")[2])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_peak_of_memory_is_within_two_shards(tmp_path):
    shards, rows = 3, 12_000
    shard_bytes = rows * 1024 * 4
    rng = np.random.default_rng(0)
    state = {f"layers.{i}.weight": rng.random((rows, 1024), np.float32) for i in range(shards)}
    write(tmp_path / "base", {n: torch.from_numpy(t) for n, t in state.items()}, shards=shards)
    for tensor in state.values():
        tensor[:, ::7] += 0.01
    write(tmp_path / "tuned", {n: torch.from_numpy(t) for n, t in state.items()}, shards=shards)
    write(tmp_path / "small0", base_state())
    compressed(tmp_path / "s", tmp_path / "small0", write(tmp_path / "small", tuned(base_state())))
    without = peak_memory("merge s s --method ties --base small0 -o merged0", tmp_path)
    for line in (
        "compress base tuned -o l --support best",
        "merge l l --method ties --base base -o merged",
    ):
        taken = peak_memory(line, tmp_path) - without
        assert taken < 2 * shard_bytes, (line, taken / shard_bytes)
