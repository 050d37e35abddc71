"""Full fine-tuning: whole checkpoint folders to files and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import base_state, compressed, in_memory, restored, tensors, tuned, write

import compeft_fl as cf
from compeft_fl import full
from compeft_fl.cli.main import main
from compeft_fl.errors import AdapterError
from compeft_fl.full import compression, matching
from compeft_fl.kernels import cpu_pieces
from compeft_fl.reduction.quality import Quality

# --- the same as in memory --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {"density": 0.05},
    {"density": 0.2, "scale": "mean", "support": "best"},
    {"density": 1.0, "scale": 2.0},
])  # fmt: skip
def test_what_is_kept_is_that_of_the_whole_task_vector(tmp_path, monkeypatch, dtype, options):
    monkeypatch.setattr(compression, "PART_PARAMETERS", 999)  # many parts, none at a border
    base, finetuned = base_state(dtype), tuned(base_state(dtype))
    write(tmp_path / "base", base, shards=2)
    write(tmp_path / "tuned", finetuned, shards=3)
    made = compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned", **options)
    tau, expected = in_memory(base, finetuned, **options)
    stored = full.read_checkpoint(tmp_path / "x")
    found = np.concatenate([p.values for p in stored.pieces(1 << 20)])
    np.testing.assert_array_equal(found, expected.to_task_vector().values)
    assert [part.num_parameters for *_, part in stored.parts()] == [
        640, 999, 999, 999, 999, 804, 999, 121 + 16,
    ]  # fmt: skip
    quality = Quality.of(tau, expected)
    assert made.quality.cosine == pytest.approx(quality.cosine, abs=1e-6)
    assert made.quality.relative_error == pytest.approx(quality.relative_error, abs=1e-5)
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    wanted = expected.to_task_vector().apply({name: base[name] for name in sorted(base)})
    assert set(again) == set(base)
    for name, tensor in wanted.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor), name


def test_ties_between_equal_magnitudes_go_to_the_lower_index():
    rng = np.random.default_rng(3)
    values = rng.choice(np.array([0, 1, 1, -1, 2, -2, 1.5], "f4"), 5000)
    tau = cf.TaskVector.from_dict({"w": values})
    for density in (0.01, 0.3, 0.6, 1.0):
        for support in ("fixed", "best"):
            seen = cpu_pieces.Choosing()
            pieces = np.split(values, [7, 1000, 1001, 4096])
            assert all(seen.add(piece) for piece in pieces)
            choice = cpu_pieces.choose(
                seen, lambda: iter(pieces), max(1, int(density * 5000)), support == "best"  # noqa: B023
            )  # fmt: skip
            left, signs = choice.ties, []
            for piece in pieces:
                positive, negative, left = cpu_pieces.masks(piece, choice, left)
                bits = [
                    np.unpackbits(m.view("u1"), bitorder="little") for m in (positive, negative)
                ]
                signs.append((bits[0].astype(int) - bits[1])[: piece.size])
            expected = cf.compress(tau, density, "mean", support)
            found = np.concatenate(signs)
            np.testing.assert_array_equal(found, np.sign(expected.to_task_vector().values))
            assert choice.count == expected.num_nonzeros
            assert choice.sum_magnitudes == pytest.approx(np.abs(values[found != 0]).sum())


@pytest.mark.parametrize("codec", compression.CODECS)
def test_every_codec_writes_a_checkpoint(tmp_path, codec):
    base, finetuned = base_state(), tuned(base_state())
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", finetuned)
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned", codec=codec)
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    if codec.startswith("dense"):
        for name, tensor in finetuned.items():
            torch.testing.assert_close(again[name], tensor, atol=2e-2, rtol=0)


def test_the_folder_of_a_large_file_has_shards_and_an_index(tmp_path):
    base, finetuned = base_state(), tuned(base_state())
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", finetuned)
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned", codec="dense")
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "a", max_shard_bytes=6000)
    files = sorted(file.name for file in (tmp_path / "a").glob("*.safetensors"))
    assert files[0] == "model-00001-of-00003.safetensors"
    assert len(files) == 3
    reopened = full.open_checkpoint(tmp_path / "a")
    assert list(reopened.state) == sorted(base)
    for name in base:
        torch.testing.assert_close(again[name], finetuned[name], rtol=0, atol=1e-6)
    stored = full.read_checkpoint(tmp_path / "x")
    full.restore_checkpoint(stored, full.open_checkpoint(tmp_path / "base"), tmp_path / "a")
    left = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert left == ["config.json", "model.safetensors"]  # nothing of the shards


# --- tensors of all kinds ---------------------------------------------------------------------


def test_a_vocabulary_that_has_grown_keeps_its_new_rows(tmp_path, capsys):
    base = base_state(torch.bfloat16)
    finetuned = tuned(base)
    finetuned["embed.weight"] = torch.cat([finetuned["embed.weight"], torch.full((3, 16), 7.0)])
    finetuned["embed.weight"] = finetuned["embed.weight"].to(torch.bfloat16)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", finetuned)
    assert main(["compress", str(tmp_path / "base"), str(tmp_path / "tuned"), "-o",
                 str(tmp_path / "x")]) == 0  # fmt: skip
    assert "3 new rows of embed.weight, 43 x 16" in capsys.readouterr().out
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    assert torch.equal(again["embed.weight"][40:], finetuned["embed.weight"][40:])
    assert again["embed.weight"].shape == (43, 16)
    _, expected = in_memory(
        base, {n: t[:40] if n == "embed.weight" else t for n, t in finetuned.items()}
    )
    wanted = expected.to_task_vector().apply({name: base[name] for name in sorted(base)})
    assert torch.equal(again["embed.weight"][:40], wanted["embed.weight"])


def test_a_new_head_and_another_shape_are_kept_as_they_are(tmp_path, capsys):
    base = {f"bert.{name}": tensor for name, tensor in base_state().items()}
    base |= {"cls.weight": torch.ones(9, 9), "score.weight": torch.ones(3, 16)}
    finetuned = {f"bert.{name}": tensor for name, tensor in tuned(base_state()).items()}
    finetuned |= {"score.weight": torch.randn(2, 16), "new.bias": torch.randn(5)}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", finetuned)
    assert main(["compress", str(tmp_path / "base"), str(tmp_path / "tuned"), "-o",
                 str(tmp_path / "x")]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "kept as it is: score.weight, 2 x 16, which is 3 x 16 in the base" in said
    assert f"left out, because {tmp_path / 'tuned'} has none of that name: 'cls.weight'\n" in said
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    assert set(again) == set(finetuned)
    for name in ("score.weight", "new.bias"):
        assert torch.equal(again[name], finetuned[name])


@pytest.mark.parametrize(("ours", "theirs"), [("bert.", ""), ("", "bert."), ("bert.", "roberta.")])
def test_names_are_compared_without_the_models_prefix(tmp_path, ours, theirs):
    base = {theirs + name: tensor for name, tensor in base_state().items()}
    finetuned = {ours + name: tensor for name, tensor in tuned(base_state()).items()}
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", finetuned)
    if theirs == "roberta.":
        with pytest.raises(AdapterError, match=r"no fine-tuning of .*'bert\.embed\.weight'"):
            compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
        return
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned", codec="dense")
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    assert set(again) == set(finetuned)
    assert full.read_checkpoint(tmp_path / "x").carried == {}
    for name, tensor in finetuned.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


def test_tied_weights_are_in_the_file_once(tmp_path):
    base, finetuned = base_state(), tuned(base_state())
    write(tmp_path / "base", base)
    write(tmp_path / "once", finetuned)
    write(tmp_path / "twice", {**finetuned, "lm_head.weight": finetuned["embed.weight"].clone()})
    sizes = [
        compressed(tmp_path / name, tmp_path / "base", tmp_path / source, codec="dense").num_bytes
        for name, source in (("a", "once"), ("b", "twice"))
    ]
    assert sizes[1] - sizes[0] < 100
    again = restored(tmp_path / "b", tmp_path / "base", tmp_path / "again")
    assert torch.equal(again["lm_head.weight"], again["embed.weight"])
    zeros = write(tmp_path / "zeros", {"a.w": torch.zeros(4, 4), "b.w": torch.zeros(4, 4)})
    assert matching._tied(full.open_checkpoint(zeros).state) == {}


def test_buffers_are_kept_bit_for_bit_and_only_where_they_differ(tmp_path):
    buffers = {
        "position_ids": torch.arange(512)[None],
        "mask": torch.tensor([True, False]),
        "running_mean": torch.randn(4),
        "wide": torch.tensor([np.pi, -1e300], dtype=torch.float64),
    }
    changed = {**buffers, "running_mean": torch.randn(4), "wide": buffers["wide"] / 3}
    write(tmp_path / "base", {**base_state(), **buffers})
    write(tmp_path / "tuned", {**tuned(base_state()), **changed})
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
    stored = full.read_checkpoint(tmp_path / "x")
    assert sorted(stored.carried) == ["running_mean", "wide"]
    assert sorted(stored.as_base) == ["mask", "position_ids"]
    again = restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    for name, tensor in changed.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def test_small_files_travel_where_they_differ(tmp_path):
    write(tmp_path / "base", base_state(), {"vocab": 1})
    write(tmp_path / "tuned", tuned(base_state()), {"vocab": 2})
    for folder, words in (("base", "a b"), ("tuned", "a b c")):
        (tmp_path / folder / "vocab.txt").write_text(words)
        (tmp_path / folder / "special_tokens_map.json").write_text('{"a": 1, "b": 2}')
    (tmp_path / "tuned" / "special_tokens_map.json").write_text('{"b": 2,  "a": 1}')
    (tmp_path / "tuned" / "modeling.py").write_text("raise SystemExit")
    compressed(tmp_path / "x", tmp_path / "base", tmp_path / "tuned")
    assert sorted(full.read_checkpoint(tmp_path / "x").carried) == ["file:vocab.txt"]
    restored(tmp_path / "x", tmp_path / "base", tmp_path / "again")
    again = {file.name: file for file in (tmp_path / "again").iterdir()}
    assert sorted(again) == [
        "config.json", "model.safetensors", "special_tokens_map.json", "vocab.txt",
    ]  # fmt: skip
    assert again["vocab.txt"].read_text() == "a b c"
    assert json.loads(again["config.json"].read_text()) == {"vocab": 2}


def test_a_model_of_transformers_comes_back(tmp_path, tiny_model):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    compressed(tmp_path / "x", tiny_model, tmp_path / "tuned", codec="dense")
    assert sorted(full.read_checkpoint(tmp_path / "x").carried) == [
        "classifier.bias", "classifier.weight",
    ]  # fmt: skip
    restored(tmp_path / "x", tiny_model, tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    ids = torch.arange(12).reshape(2, 6)
    expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    AutoTokenizer.from_pretrained(tmp_path / "again")
    AutoModel.from_pretrained(tmp_path / "again")


# --- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties"])
def test_merges_are_those_of_the_whole_task_vectors(tmp_path, method, monkeypatch):
    monkeypatch.setattr(compression, "PART_PARAMETERS", 777)
    base = base_state()
    write(tmp_path / "base", base)
    files, blobs = [], []
    for seed in (1, 2, 3):
        finetuned = tuned(base, seed)
        write(tmp_path / f"t{seed}", finetuned)
        files.append(str(tmp_path / f"{seed}.compeft"))
        assert main(["compress", str(tmp_path / "base"), str(tmp_path / f"t{seed}"), "-o",
                     files[-1], "--density", "0.3"]) == 0  # fmt: skip
        blobs.append(cf.encode(in_memory(base, finetuned, density=0.3)[1]))
    extra = [] if method == "average" else ["--scaling", "0.5"]
    command = ["merge", *files, "--method", method, *extra, "--weights", "1,2,3"]
    assert main([*command, "--base", str(tmp_path / "base"), "-o", str(tmp_path / "m")]) == 0
    rules = {
        "average": cf.Average(),
        "task-arithmetic": cf.TaskArithmetic(0.5),
        "ties": cf.Ties(0.5),
    }
    merged = cf.merge(blobs, rules[method], weights=[1, 2, 3])
    wanted = merged.apply({name: base[name] for name in sorted(base)})
    for name, tensor in tensors(tmp_path / "m").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_only_files_over_one_base_are_merged(tmp_path, capsys):
    write(tmp_path / "base", base_state())
    write(tmp_path / "other", tuned(base_state(), 9))
    write(tmp_path / "tuned", tuned(base_state()))
    for base in ("base", "other"):
        compressed(tmp_path / f"over-{base}", tmp_path / base, tmp_path / "tuned")
    files = [str(tmp_path / f"over-{base}") for base in ("base", "other")]
    command = ["merge", *files, "--method", "average", "--base", str(tmp_path / "base")]
    assert main([*command, "-o", str(tmp_path / "m")]) == 2
    assert "are over different bases" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
