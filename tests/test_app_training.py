from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from compeft_fl.app.tasks import data, model, training
from compeft_fl.errors import ConfigError


@pytest.fixture(scope="module")
def rows(tiny_config) -> data.TextData:
    return data.load(tiny_config)


@pytest.fixture
def classifier(tiny_config, rows) -> model.Classifier:
    return model.build(tiny_config, rows)


def test_training_learns(classifier, rows, tiny_config):
    config = dataclasses.replace(tiny_config, local_steps=60, learning_rate=0.02)
    before = training.evaluate(classifier, rows.test, config)
    frozen = {n: p.clone() for n, p in classifier.named_parameters() if not p.requires_grad}
    first = training.train(classifier, rows.train, config, seed=1)
    after = training.evaluate(classifier, rows.test, config)
    assert after.loss < before.loss - 0.1
    assert after.accuracy > before.accuracy
    assert training.train(classifier, rows.train, config, seed=2).loss < first.loss
    assert all(torch.equal(dict(classifier.named_parameters())[n], p) for n, p in frozen.items())


@pytest.mark.parametrize(
    "changes",
    [{"peft_method": "ia3", "learning_rate": 0.2}, {"head": "linear", "learning_rate": 0.05}],
)
def test_other_methods_and_heads_learn(rows, tiny_config, changes):
    config = dataclasses.replace(tiny_config, local_steps=60, **changes)
    classifier = model.build(config, rows)
    before = training.evaluate(classifier, rows.test, config)
    training.train(classifier, rows.train, config, seed=1)
    assert training.evaluate(classifier, rows.test, config).loss < before.loss - 0.05


def test_minilm_learns(minilm):
    config, rows, classifier = minilm
    start = classifier.adapter_state()
    before = training.evaluate(classifier, rows.train, config)
    training.train(classifier, rows.train, dataclasses.replace(config, local_steps=8), seed=1)
    after = training.evaluate(classifier, rows.train, config)
    classifier.load_adapter_state(start)
    assert after.loss < before.loss


def test_the_same_seed_gives_the_same_training(classifier, rows, tiny_config):
    start = classifier.adapter_state()
    states = []
    for seed in (1, 1, 2):
        classifier.load_adapter_state(start)
        training.train(classifier, rows.train, tiny_config, seed)
        states.append(classifier.adapter_state())
    first, second, third = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_rounds_and_nodes_have_seeds_of_their_own(tiny_config):
    seeds = {training.round_seed(tiny_config, r, node) for r in range(20) for node in range(20)}
    assert len(seeds) == 400
    assert training.round_seed(tiny_config, 1, 2) in seeds


@pytest.mark.parametrize(
    ("changes", "num_rows", "steps"),
    [
        ({"local_steps": 3}, 50, 3),
        ({"local_steps": 30}, 50, 30),  # more than one pass
        ({"local_steps": 0}, 50, 7),
        ({"local_steps": 0, "local_epochs": 2}, 50, 14),
        ({"local_steps": 0}, 5, 1),  # fewer rows than a batch
    ],
)
def test_steps_and_epochs(classifier, rows, tiny_config, changes, num_rows, steps):
    config = dataclasses.replace(tiny_config, **changes)
    result = training.train(classifier, rows.train.take(range(num_rows)), config, seed=0)
    assert (result.steps, result.num_examples) == (steps, num_rows)
    assert result.seconds > 0


def test_a_pass_takes_every_row_once(tiny_config):
    config = dataclasses.replace(tiny_config, local_steps=0, local_epochs=3)
    token_ids = [[0] * (1 + i % 9) for i in range(203)]
    batches = list(training._batches(token_ids, config, np.random.default_rng(0)))
    assert len(batches) == 3 * 26
    for first in range(0, len(batches), 26):
        seen = sorted(row for batch in batches[first : first + 26] for row in batch)
        assert seen == list(range(203))
    assert batches[:26] != batches[26:52]


def test_a_loss_that_runs_away_is_named(classifier, rows, tiny_config):
    config = dataclasses.replace(tiny_config, learning_rate=1e30, local_steps=5)
    with pytest.raises(ConfigError, match=r"the loss became (nan|inf) at step .* learning-rate"):
        training.train(classifier, rows.train, config, seed=0)


def test_the_score_is_what_one_row_at_a_time_gives(classifier, rows, tiny_config):
    found = training.evaluate(classifier, rows.test, tiny_config)
    losses, hits = [], []
    for text, label in zip(rows.test.texts, rows.test.classes, strict=True):
        with torch.inference_mode():
            logits = classifier(classifier.batch(classifier.tokenize([text])))
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
        hits.append(logits.argmax().item() == label)
    assert found.num_examples == len(rows.test)
    assert found.accuracy == pytest.approx(np.mean(hits))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
