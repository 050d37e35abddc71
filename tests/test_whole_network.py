"""Full fine-tuning in the ready-made app."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compeft_fl import full
from compeft_fl.app.tasks import data, model, training, whole_network
from compeft_fl.errors import ConfigError


def built(config, method):
    config = dataclasses.replace(config, peft_method=method, learning_rate=1e-3)
    rows = data.load(config)
    return config, rows, model.build(config, rows)


def test_the_whole_model_travels_and_comes_back(tiny_config, tiny_model, tmp_path):
    config, rows, classifier = built(tiny_config, "full")
    start = classifier.adapter_state()
    parameters = sum(p.numel() for p in classifier.network.parameters())
    assert sum(tensor.numel() for tensor in start.values()) == parameters
    training.train(classifier, rows.train, config, seed=0)
    after = classifier.adapter_state()
    assert any(not torch.equal(after[name], start[name]) for name in start)
    score = training.evaluate(classifier, rows.test, config)
    classifier.load_adapter_state(start)
    assert all(torch.equal(t, start[n]) for n, t in classifier.adapter_state().items())
    classifier.load_adapter_state(after)
    classifier.save(tmp_path / "tuned")
    again = model.load_adapter(tmp_path / "tuned", device="cpu")
    assert training.evaluate(again, rows.test, config).accuracy == score.accuracy
    base, tuned = full.open_checkpoint(tiny_model), full.open_checkpoint(tmp_path / "tuned")
    made = full.compress_checkpoint(base, tuned, tmp_path / "x", density=0.2, support="best")
    assert made.num_bytes < 4 * parameters / 15
    assert made.quality.cosine > 0.5


def test_bitfit_trains_biases_alone(tiny_config, tmp_path):
    config, rows, classifier = built(tiny_config, "bitfit")
    assert all(name.endswith("bias") for name in classifier.adapter_state())
    before = classifier.network.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    training.train(classifier, rows.train, config, seed=0)
    moved = {n for n, t in classifier.network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert all(name.endswith("bias") for name in moved)
    classifier.save(tmp_path)
    assert (tmp_path / "biases.safetensors").is_file()


def test_a_state_of_other_tensors_is_refused(tiny_config):
    _, _, classifier = built(tiny_config, "full")
    state = classifier.adapter_state()
    name = next(iter(state))
    with pytest.raises(ConfigError, match="these are not the tensors"):
        classifier.load_adapter_state({**state, name: torch.zeros(2)})


def test_what_cannot_be_trained_is_named():
    network = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ConfigError, match="nothing of that kind"):
        whole_network.prepare(network, "bitfit")
    network.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        whole_network.prepare(network, "full")
