"""Instruction tuning: what is learned, how, and what comes back."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from heap import put_aside_as_before
from language_models import pairs, save_llama, write_rows

from compeft_fl.adapters.base_digest import noted_base
from compeft_fl.app import tasks
from compeft_fl.app.chat import stored_config
from compeft_fl.app.tasks import base, fine_tuning, language_model
from compeft_fl.app.tasks.base import learning_rate
from compeft_fl.app.tasks.instruction import InstructionTuning
from compeft_fl.errors import AdapterError, ConfigError, MissingPackageError

NODE = {"partition-id": 0, "num-partitions": 3}


@pytest.fixture(scope="module")
def task(instruct_config) -> InstructionTuning:
    """A task whose adapter tests may change: they begin from `start`."""
    return tasks.prepare(instruct_config)


@pytest.fixture
def start(task):
    state = task.adapter_state()
    yield state
    task.load_adapter_state(state)


def built(config, **changes) -> InstructionTuning:
    return tasks.prepare(dataclasses.replace(config, **changes))


def difference(one, other) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_training_learns_and_the_score_says_so(task, start, instruct_config):
    config = dataclasses.replace(instruct_config, local_steps=40, learning_rate=0.02)
    rows = task.formatter.encode(task.data.train.rows)
    before = task.evaluate(task.test_rows)
    assert before.more["perplexity"] == pytest.approx(math.exp(before.loss))
    found = fine_tuning.train(task.model, rows, config, 0.02, seed=1)
    after = task.evaluate(task.test_rows)
    assert (found.steps, found.num_examples) == (40, len(rows))
    assert after.loss < before.loss - 0.3  # of a random model, whose embeddings stay
    assert after.accuracy > before.accuracy + 0.1


def test_training_looks_for_garbage_among_its_own_things_alone(monkeypatch):
    monkeypatch.setattr(fine_tuning, "_seen", {"aside": False})
    with put_aside_as_before():
        gc.unfreeze()
        with fine_tuning._no_garbage():
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0
        gc.freeze()
        with fine_tuning._no_garbage():
            pass
        assert fine_tuning._seen["aside"]
        assert gc.get_freeze_count() > 10_000  # who has put things aside keeps them there


def test_the_score_is_that_of_each_row_by_itself(task):
    found = task.evaluate(task.test_rows)
    sums, hits, count = 0.0, 0, 0
    task.model.network.eval()
    for row in task.test_rows:
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        with torch.inference_mode():
            logits = task.model.network(input_ids=ids).logits[0]
        for place in np.flatnonzero(row.labels != -100):
            chances = logits[place - 1].log_softmax(0)
            sums -= float(chances[row.labels[place]])
            hits += int(chances.argmax() == row.labels[place])
            count += 1
    assert found.loss == pytest.approx(sums / count, rel=1e-4)
    assert found.accuracy == hits / count
    assert found.num_examples == len(task.test_rows)


def test_the_seed_gives_start_and_training(task, start, instruct_config):
    assert difference(built(instruct_config).adapter_state(), start) == 0
    assert difference(built(instruct_config, seed=43).adapter_state(), start) > 0
    rows, states = task.node_rows(NODE), []
    for seed in (1, 1, 2):
        task.load_adapter_state(start)
        task.train(rows, 1, seed)
        states.append(task.adapter_state())
    assert difference(states[0], states[1]) == 0
    assert difference(states[0], states[2]) > 0


def test_accumulation_and_checkpointing_change_memory_alone(task, start, instruct_config):
    rows, states = task.node_rows(NODE), []
    for changes in ({}, {"accumulation": 4}, {"checkpointing": True}):
        task.load_adapter_state(start)
        config = dataclasses.replace(instruct_config, **changes)
        fine_tuning.train(task.model, rows, config, 0.01, seed=1)
        states.append(task.adapter_state())
    assert difference(states[0], start) > 1e-3
    assert difference(states[0], states[1]) < 1e-4
    assert difference(states[0], states[2]) < 1e-4


def test_the_learning_rate_goes_down_by_round(instruct_config):
    config = dataclasses.replace(
        instruct_config, schedule="cosine", rounds=200, learning_rate=5e-5, min_learning_rate=1e-6
    )
    rates = [learning_rate(config, each) for each in range(1, 201)]
    # FlowerTune's cosine_annealing(current_round, total_round, lrate_max, lrate_min)
    theirs = [1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * n / 200)) for n in range(1, 201)]
    assert rates == pytest.approx(theirs)
    assert rates[-1] == 1e-6
    assert learning_rate(instruct_config, 7) == instruct_config.learning_rate


def test_the_rate_of_a_round_is_trained_with(task, start, instruct_config, monkeypatch):
    config = dataclasses.replace(instruct_config, schedule="cosine", rounds=4)
    monkeypatch.setattr(task, "config", config)
    moved = []
    for server_round in (1, 3):
        task.load_adapter_state(start)
        task.train(task.node_rows(NODE), server_round, 1)
        moved.append(difference(task.adapter_state(), start))
    assert moved[1] < moved[0]


def test_rows_are_tokenised_once(task):
    assert task.node_rows(NODE) is task.node_rows(dict(NODE))
    assert task.test_rows is task.test_rows
    nodes = [task.node_rows({**NODE, "partition-id": i}) for i in range(3)]
    assert sum(map(len, nodes)) == len(task.data.train)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_to_sequence_model_learns(instruct_config, tiny_t5, dtype):
    of_t5 = {"model": str(tiny_t5), "peft": {"target_modules": "q,v"}}
    task = built(instruct_config, dtype=dtype, local_steps=40, learning_rate=0.05, **of_t5)
    before = task.evaluate(task.test_rows)
    assert task.model.seq2seq
    task.train(task.formatter.encode(task.data.train.rows), 1, 1)
    assert task.evaluate(task.test_rows).loss < before.loss - 0.3
    frozen = {p.dtype for p in task.model.network.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    assert all(value.dtype == np.float32 for value in task.adapter_state().values())


METHODS = {
    "lora": {"peft": {"r": 4}},
    "adalora": {"peft_options": '{"total_step": 10, "init_r": 4, "tinit": 1, "tfinal": 1}'},
    "ia3": {},
    "loha": {"peft": {"r": 2}, "peft_options": '{"target_modules": ["q_proj", "v_proj"]}'},
    "lokr": {"peft": {"r": 2}, "peft_options": '{"target_modules": ["q_proj", "v_proj"]}'},
    "vera": {"peft": {"r": 4}, "peft_options": '{"target_modules": ["q_proj", "o_proj"]}'},
    "oft": {"peft": {"r": 0}, "peft_options": '{"oft_block_size": 8}'},
    "ln_tuning": {"peft_options": '{"target_modules": ["norm"]}'},
    "prompt_tuning": {"peft_options": '{"num_virtual_tokens": 4}'},
    "prefix_tuning": {"peft_options": '{"num_virtual_tokens": 4}'},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_with_weights_of_their_own(instruct_config, method):
    changes = {"peft": {}, "peft_options": "", **METHODS[method]}
    task = built(instruct_config, peft_method=method, learning_rate=0.05, **changes)
    state = task.adapter_state()
    before = task.evaluate(task.test_rows)
    task.train(task.node_rows(NODE), 1, 1)
    trained, after = task.adapter_state(), task.evaluate(task.test_rows)
    assert difference(trained, state) > 0
    assert after.loss != before.loss
    task.load_adapter_state(state)
    assert task.evaluate(task.test_rows).loss == pytest.approx(before.loss, rel=1e-6)
    task.load_adapter_state(trained)
    assert task.evaluate(task.test_rows).loss == pytest.approx(after.loss, rel=1e-6)


def test_a_loss_that_runs_away_is_named(task, start, instruct_config):
    with pytest.raises(ConfigError, match=r"the loss became (nan|inf) .* lower learning-rate"):
        fine_tuning.train(task.model, task.node_rows(NODE), instruct_config, 1e30, seed=1)


# --- 4 and 8 bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_is_trained_on(instruct_config, quantization):
    pytest.importorskip("bitsandbytes")
    whole = built(instruct_config, dtype="bfloat16")
    task = built(instruct_config, dtype="bfloat16", quantization=quantization)
    kinds = {type(p).__name__ for p in task.model.network.parameters()}
    assert {"4bit": "Params4bit", "8bit": "Int8Params"}[quantization] in kinds
    assert difference(task.adapter_state(), whole.adapter_state()) == 0  # first contact is free
    assert task.base_digest != whole.base_digest
    before, exact = task.evaluate(task.test_rows), whole.evaluate(whole.test_rows)
    assert before.loss == pytest.approx(exact.loss, rel=0.05)  # what the bits cost
    rows = task.formatter.encode(task.data.train.rows)
    config = dataclasses.replace(instruct_config, local_steps=20)
    losses = [fine_tuning.train(each.model, rows, config, 0.02, 1).loss for each in (task, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    after = task.evaluate(task.test_rows)
    assert after.loss < before.loss - 0.2
    assert after.loss == pytest.approx(whole.evaluate(whole.test_rows).loss, rel=0.05)


def test_scoring_in_4_bits_leaves_gradients_as_they_are(instruct_config):
    """bitsandbytes packs weights anew when they are first used, and then has no gradients."""
    pytest.importorskip("bitsandbytes")
    states = []
    for scored in (False, True):
        task = built(instruct_config, quantization="4bit")
        if scored:
            task.evaluate(task.test_rows)
        task.train(task.node_rows(NODE), 1, 1)
        states.append(task.adapter_state())
    assert difference(*states) == 0


def test_4_bits_without_bitsandbytes_say_what_to_install(instruct_config, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"4bit needs bitsandbytes.*pip install"):
        built(instruct_config, quantization="4bit")


def test_classification_has_no_4_bits(tiny_config):
    with pytest.raises(ConfigError, match=r"quantization: task=classification has none"):
        built(tiny_config, quantization="4bit")


# --- models that do not fit -------------------------------------------------------------------


def test_an_encoder_is_no_language_model(instruct_config, tiny_model):
    with pytest.raises(ConfigError, match=r"no causal or sequence-to-sequence .* \(bert\)"):
        built(instruct_config, model=str(tiny_model))


def test_a_tokenizer_without_pad_and_end_is_named(instruct_config, tiny_llama, tmp_path):
    folder = save_llama(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    for name in ("pad_token", "eos_token"):
        told.pop(name)
    file.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"neither a pad token nor one that ends a text"):
        built(instruct_config, model=str(folder))


def test_a_pad_token_is_not_needed(instruct_config, tmp_path):
    folder = save_llama(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    told.pop("pad_token")
    file.write_text(json.dumps(told))
    task = built(instruct_config, model=str(folder))
    with_one = built(instruct_config)
    assert task.model.tokenizer.pad_token == "<eos>"
    assert task.evaluate(task.test_rows).loss == pytest.approx(
        with_one.evaluate(with_one.test_rows).loss, rel=1e-5
    )


# --- folders ----------------------------------------------------------------------------------


class Record:
    """What a card tells of a run."""

    scenario, nodes, num_parameters, rounds = "mine", 3, 7, ()
    config = MappingProxyType({"task": "instruction", "seed": 1})


def test_a_folder_gives_the_same_model(task, start, instruct_config, tmp_path):
    task.train(task.node_rows(NODE), 1, 1)
    task.save(tmp_path / "adapter", Record())
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "chat_template.jinja",
        "task.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (
        instruct_config.model,
        "CAUSAL_LM",
    )
    assert noted_base(tmp_path / "adapter") == (task.base_digest, "")
    loaded = language_model.with_adapter(instruct_config, tmp_path / "adapter")
    found = fine_tuning.evaluate(loaded, task.test_rows, instruct_config)
    assert found.loss == pytest.approx(task.evaluate(task.test_rows).loss, rel=1e-6)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_folder_of_a_quantised_base_gives_the_same_model(instruct_config, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    task = built(instruct_config, quantization=quantization)
    task.train(task.node_rows(NODE), 1, 1)
    task.save(tmp_path / "adapter", Record())
    assert noted_base(tmp_path / "adapter") == (task.base_digest, quantization)
    config = stored_config(tmp_path / "adapter", device="cpu")
    assert config.quantization == quantization
    loaded = language_model.with_adapter(config, tmp_path / "adapter")
    found = fine_tuning.evaluate(loaded, task.test_rows, instruct_config)
    assert found.loss == pytest.approx(task.evaluate(task.test_rows).loss, rel=1e-4)
    whole = dataclasses.replace(config, quantization="none")
    with pytest.raises(AdapterError, match=rf"digest \w+ in {quantization}, found another"):
        language_model.with_adapter(whole, tmp_path / "adapter")


def test_the_embedded_encoder_writes_no_text(instruct_config):
    with pytest.raises(ConfigError, match=r"minilm is an encoder.*debian-lm \(embedded\)"):
        built(instruct_config, model="minilm")


def test_a_folder_of_another_base_is_refused(task, instruct_config, tmp_path):
    task.save(tmp_path / "adapter", Record())
    other = save_llama(tmp_path / "model", seed=1)
    config = dataclasses.replace(instruct_config, model=str(other))
    with pytest.raises(AdapterError, match=r"expected the base model .* found another, digest"):
        language_model.with_adapter(config, tmp_path / "adapter")


def test_rows_that_do_not_fit_end_the_run_before_training(instruct_config, tmp_path):
    rows = pairs(60)
    rows[41]["prompt"] = "x" * 200
    data = write_rows(tmp_path / "rows.jsonl", rows)
    task = built(instruct_config, data=str(data))
    with pytest.raises(ConfigError, match=r"row 42 of train: the prompt has 2\d\d tokens.*raise"):
        task.check()
    dropped = built(instruct_config, data=str(data), long_prompts="drop")
    dropped.check()
