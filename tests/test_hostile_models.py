"""Models and adapters of a stranger: no code of theirs runs, and their size is known beforehand."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import data, model
from compeft_fl.errors import CompeftError, ConfigError


@pytest.fixture(scope="module")
def adapter(tiny_config, tmp_path_factory):
    """A folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("stored") / "adapter"
    model.build(tiny_config, data.load(tiny_config)).save(folder)
    return folder


@pytest.fixture
def folder(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder, tiny_model, match, **options):
    with pytest.raises(CompeftError, match=match) as caught:
        model.load_adapter(folder, str(tiny_model), "cpu", **options)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


# --- code that comes with a model ----------------------------------------------------------------


@pytest.fixture
def with_code(tiny_model, tmp_path):
    """The tiny model, and Python code beside it that leaves a mark when it is run."""
    folder = shutil.copytree(tiny_model, tmp_path / "with_code")
    mark = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\n"
        "from transformers import BertConfig, BertModel\n"
        "class Config(BertConfig):\n    model_type = 'strange'\n"
        "class Model(BertModel):\n    config_class = Config\n"
    )
    return folder, mark


def test_code_of_a_model_runs_only_where_a_key_says_so(with_code, tiny_config, monkeypatch):
    folder, mark = with_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    rows = data.load(tiny_config)
    peft = {"target_modules": "query,value"}
    config = dataclasses.replace(tiny_config, model=str(folder), peft=peft)
    assert AppConfig().trust_remote_code is False
    with pytest.raises(ConfigError, match="trust-remote-code=true would run"):
        model.build(config, rows)
    assert not mark.exists()
    monkeypatch.setattr("builtins.input", None)  # nobody is asked
    trusting = dataclasses.replace(config, trust_remote_code=True)
    model.build(trusting, rows)
    assert mark.exists()


def test_weights_that_are_a_pickle_with_code(tiny_model, tiny_config, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Runs()}))
    config = dataclasses.replace(tiny_config, model=str(folder))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        model.build(config, data.load(tiny_config))
    assert not mark.exists()


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"r": 10**6}, {"r": 10**9}, {"rank_pattern": {".*": 10**6}}, {"target_modules": ["dense"]},
     {"modules_to_save": ["pooler"]}, {"r": "8"}, {"r": -1},
     {"peft_type": "VERA", "r": 10**7, "projection_prng_key": 1, "save_projection": False}],
)  # fmt: skip
def test_settings_that_are_not_of_the_stored_tensors_take_no_memory(folder, tiny_model, changes):
    edit(folder, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, tiny_model, "adapter")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_unsaved_projections_count(folder, tiny_model):
    """VeRA's random matrices stand in no folder: of a rank that small tensors can claim."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    rank, tensors = 10**6, {}
    for name, tensor in stored.items():
        if "lora_A" in name:
            tensors[name.replace("lora_A.weight", "vera_lambda_d")] = torch.ones(rank)
        else:
            tensors[name.replace("lora_B.weight", "vera_lambda_b")] = torch.ones(tensor.shape[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    kept = {key: config[key] for key in ("target_modules", "task_type")}
    vera = {"peft_type": "VERA", "r": rank, "projection_prng_key": 0, "save_projection": False}
    (folder / "adapter_config.json").write_text(json.dumps({**vera, **kept}))
    refused(folder, tiny_model, "adapter")


@pytest.mark.parametrize(
    "changes",
    [{"peft_type": "NO_SUCH"}, {"peft_type": "LORA\x1b[2J"}, {"peft_type": None},
     {"task_type": "NO_SUCH"}, {"target_modules": ["nothing"]},
     {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, {"init_lora_weights": "none"}],
)  # fmt: skip
def test_odd_settings_are_one_line(folder, tiny_model, changes):
    edit(folder, **changes)
    with pytest.raises(CompeftError) as caught:
        model.load_adapter(folder, str(tiny_model), "cpu")
    assert str(caught.value).isprintable()


def test_pickled_and_broken_adapters(folder, tiny_model):
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    refused(folder, tiny_model, "not safe to load")
    weights.write_bytes(b"\x00" * 100)
    refused(folder, tiny_model, "expected safetensors")


@pytest.mark.parametrize("content", ["[]", "{}", "9" * 5000, "[" * 100_000, '{"head": 1}'])
def test_heads_that_are_none(folder, tiny_model, content):
    (folder / "head.json").write_text(content)
    refused(folder, tiny_model, "is no adapter folder of this app")


def test_a_head_without_its_tensor(folder, tiny_model):
    (folder / "head.safetensors").write_bytes(b"none")
    refused(folder, tiny_model, "head.safetensors")
