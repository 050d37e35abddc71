"""Federated instruction tuning in one process: real apps, strategies and messages; and chat."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import language_models
import pytest
from language_models import save_llama
from test_app_federation import NODES, events, run

from compeft_fl.app import client_app
from compeft_fl.app.tasks import base
from compeft_fl.cli.main import main
from compeft_fl.errors import ConfigError, MissingPackageError, NoUsableReplyError


@pytest.fixture(scope="module")
def finished(instruct_config, tmp_path_factory):
    """A run, and its summary."""
    folder = tmp_path_factory.mktemp("runs") / "instruct"
    return folder, run(dataclasses.replace(instruct_config, local_steps=10), folder)


def test_what_a_run_leaves(finished):
    folder, summary = finished
    assert summary["loss"][2] < summary["loss"][0] - 0.2
    assert [set(scores) for scores in summary["more"]] == [{"perplexity"}] * 3
    dense = [4 * summary["num_parameters"] * NODES] * 2
    assert summary["uplink_dense_bytes"] == summary["downlink_dense_bytes"] == dense
    assert all(0 < sent < dense[0] / 20 for sent in summary["uplink_payload_bytes"])
    assert summary["downlink_payload_bytes"][0] == 0  # every node makes the start by itself
    heads = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert heads[-1] == "perplexity"
    scores = [event for event in events(folder) if event["event"] == "score"]
    assert all(score["perplexity"] > 1 for score in scores)


def test_the_card_tells_of_the_run(finished, instruct_config):
    folder, summary = finished
    card = (folder / "adapter" / "README.md").read_text()
    assert f'base_model: "{instruct_config.model}"' in card
    assert "| task | instruction |" in card
    rows = re.findall(r"^\| (\d) \| .* \|$", card, re.MULTILINE)
    assert rows == ["0", "1", "2"]
    assert f"{summary['loss'][2]:.4g}" in card


def test_nodes_score_on_their_own_rows(instruct_config, tmp_path):
    config = dataclasses.replace(instruct_config, rounds=1, fraction_evaluate=1.0)
    run(config, tmp_path)
    told = [e for e in events(tmp_path) if e["event"] == "reply" and e["kind"] == "evaluate"]
    assert len(told) == NODES
    assert all(0 <= each["accuracy"] <= 1 and each["loss"] > 0 for each in told)


@pytest.mark.parametrize("which", ["classification", "instruction"])
def test_another_base_of_the_same_shapes_is_an_error(
    which, tiny_config, instruct_config, tmp_path, monkeypatch
):
    """A node whose model folder has other weights: its replies are set aside, and it says why."""
    if which == "instruction":
        config, other = instruct_config, save_llama(tmp_path / "other", seed=5)
    else:
        config, other = tiny_config, another_bert(tiny_config.model, tmp_path / "other")
    prepare = client_app._prepare
    monkeypatch.setattr(
        client_app,
        "_prepare",
        lambda config: prepare(dataclasses.replace(config, model=str(other))),
    )
    message = r"model: expected the base model that the server has, digest \w{32}, found another"
    with pytest.raises(NoUsableReplyError, match=message):
        run(dataclasses.replace(config, rounds=1), tmp_path / "run")


def another_bert(model, folder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    made = AutoModel.from_pretrained(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


# --- chat -------------------------------------------------------------------------------------


def test_a_prompt_is_answered(finished, capsys):
    folder, _ = finished
    arguments = ["--prompt", "what does a cow say?", "--max-tokens", "8", "--device", "cpu"]
    assert main(["chat", str(folder), *arguments]) == 0
    told = capsys.readouterr().out
    assert main(["chat", str(folder / "adapter"), *arguments]) == 0
    assert capsys.readouterr().out == told
    assert main(["chat", str(folder), *arguments, "--base"]) == 0
    assert capsys.readouterr().out != told


def test_lines_are_a_conversation(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\none\n"))
    assert main(["chat", str(finished[0]), "--max-tokens", "4", "--device", "cpu"]) == 0
    first, *_ = capsys.readouterr().out.split("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    main(["chat", str(finished[0]), "--max-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith(first)


def test_tokens_come_as_they_are_made_and_terminals_are_safe(finished, instruct_config):
    from compeft_fl.app.chat import Chat, adapter_folder, stored_config

    folder = adapter_folder(finished[0])
    config = stored_config(folder, device="cpu")
    assert (config.model, config.template) == (instruct_config.model, "chat")
    pieces = []
    chat = Chat(folder, config, pieces.append, max_tokens=12)
    answer = chat.ask("more than one dog?")
    assert "".join(pieces) == answer
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "expected an adapter folder, found nothing of that name"),
        (["FOLDER", "--model", "OTHER"], "expected the base model that the adapter was trained on"),
        (["FOLDER", "--prompt", 600 * "x"], "expected fewer than 512 tokens"),
        (["FOLDER", "--max-tokens", "0"], "expected at least 1, found 0"),
        (["CLASSIFIER"], "found one of task=classification, which answers nothing"),
    ],
)
def test_what_cannot_be_asked_is_one_line(finished, capsys, tmp_path, arguments, message):
    folder, _ = finished
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "head.json").write_text("{}")
    other = save_llama(tmp_path / "other", seed=9) if "OTHER" in arguments else ""
    known = {
        "FOLDER": str(folder),
        "OTHER": str(other),
        "CLASSIFIER": str(tmp_path / "classifier"),
    }
    assert main(["chat", *(known.get(word, word) for word in arguments), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_folder_of_pefts_own_is_enough(finished, capsys, tmp_path):
    """Without what this app notes beside it."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((finished[0] / "adapter" / name).read_bytes())
    arguments = ["--prompt", "hi", "--max-tokens", "4", "--device", "cpu"]
    assert main(["chat", str(folder), *arguments]) == 0
    said = capsys.readouterr().out
    main(["chat", str(finished[0]), *arguments])
    assert capsys.readouterr().out == said
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_column": "answer"}, r'no column "answer" for the response'),
        ({"rows": [{"prompt": "a", "response": " "}]}, "expected a response, found none"),
        ({"rows": [{"prompt": 200 * "x", "response": "a"}]}, "leaves no room for its response"),
        ({"template": "chat", "tokenizer": "chat_template"}, "has no chat template"),
        ({"tokenizer": "pad_token eos_token"}, "neither a pad token nor one that ends a text"),
        ({"model": "ENCODER"}, "no causal or sequence-to-sequence language model"),
        ({"model": "minilm"}, "which writes no text"),
        ({"quantization": "4bit"}, "4bit needs bitsandbytes"),
    ],
)
def test_what_does_not_fit_ends_a_run_before_anything_is_sent(
    instruct_config, tiny_model, tmp_path, monkeypatch, change, message
):
    changes = dict(change)
    if rows := changes.pop("rows", None):
        made = [*language_models.pairs(60), *({**row, "source": "plural"} for row in 30 * rows)]
        changes["data"] = str(language_models.write_rows(tmp_path / "rows.jsonl", made))
    if lacking := changes.pop("tokenizer", ""):
        changes["model"] = str(without(lacking.split(), tmp_path / "model"))
    if changes.get("model") == "ENCODER":
        changes["model"] = str(tiny_model)
    if "quantization" in changes:
        monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises((ConfigError, MissingPackageError), match=message) as caught:
        run(dataclasses.replace(instruct_config, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [event["event"] for event in events(tmp_path / "run")] == ["error"]


def without(names, folder):
    """A model whose tokenizer lacks something."""
    save_llama(folder, chat="chat_template" not in names)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({name: each for name, each in told.items() if name not in names}))
    return folder
