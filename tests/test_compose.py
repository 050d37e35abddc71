"""Composing experts for a few examples: LoraHub's search, and the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from expert_family import train

from compeft_fl.adapters import StoredUpdate, load_folder
from compeft_fl.adapters.compression import compress_adapter
from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import data, few_shot, model
from compeft_fl.cli.main import main
from compeft_fl.errors import ConfigError, MissingPackageError, ParameterError
from compeft_fl.experts import composition, serving
from compeft_fl.experts.client import ExpertClient
from compeft_fl.experts.composition import compose
from compeft_fl.experts.held import Recipe
from compeft_fl.experts.pool import ExpertPool


@pytest.fixture(scope="module")
def experts(tiny_model, tiny_data, tmp_path_factory):
    """Four adapters of one start on the tiny model, saved as a run saves them."""
    folder = tmp_path_factory.mktemp("experts")
    config = AppConfig(model=str(tiny_model), data=str(tiny_data), device="cpu")
    rows = data.load(config)
    for number in range(4):
        classifier = model.build(config, rows)
        if number == 0:
            classifier.save(folder / "start")
        train(classifier.network, number)
        classifier.save(folder / f"expert-{number}")
    return folder


@pytest.fixture
def examples(tiny_rows, tmp_path):
    file = tmp_path / "few-shot.jsonl"
    rows = [{"text": row["text"], "label": row["label"]} for row in tiny_rows[:24]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def pool(experts, tiny_model, examples):
    config = AppConfig(model=str(tiny_model), device="cpu")
    rows = few_shot.examples(examples)
    classifier = model.build(config, rows, experts / "start").eval()
    pool = ExpertPool(classifier.network)
    for number in range(4):
        adapter, init = (load_folder(experts / name) for name in (f"expert-{number}", "start"))
        made = compress_adapter(adapter, init, density=0.2)
        pool.add(
            f"expert-{number}", StoredUpdate(made.update, adapter.config, made.start, "", 0, 0)
        )
    return pool, few_shot.loss_on(classifier, rows.train)


@pytest.mark.parametrize("rule", ["factors", "changes"])
def test_it_finds_weights_with_which_the_loss_is_smaller(pool, rule):
    pool, _ = pool
    names = pool.names()
    method = composition.RULES[rule]
    wanted = {"expert-0": 0.9, "expert-1": -0.6, "expert-2": 0.3, "expert-3": 0.0}
    target = pool.adapter(Recipe.of(wanted, method)).state
    live = dict(pool._live._model.named_parameters())
    parts = [(live[name.replace(".weight", ".default.weight")], target[name]) for name in target]

    def loss():
        """How far the model's adapter is from the one that those weights make."""
        with torch.no_grad():
            return float(sum(((tensor - torch.as_tensor(t)) ** 2).sum() for tensor, t in parts))

    before = loss()
    heard = []
    found = compose(pool, names, loss, rule=rule, evaluations=60, seed=3, progress=heard.append)
    assert loss() == before  # the model is as it was
    assert list(found.trials) == heard
    assert len(heard) == 60
    first = heard[0]
    assert first.weights == (0.0,) * 4
    assert found.best.loss < 0.1 * first.loss
    assert found.best.objective == min(trial.objective for trial in heard)
    assert found.best.objective == pytest.approx(
        found.best.loss + 0.05 * np.mean(np.abs(found.best.weights))
    )
    assert all(abs(weight) <= 1.5 for trial in heard for weight in trial.weights)
    assert found.best.weights[0] > 0.5
    assert found.best.weights[1] < -0.2
    with pool.use(found.recipe):
        assert loss() == pytest.approx(found.best.loss)
    told = found.to_json()
    assert [member["expert"] for member in told["members"]] == names
    assert told["search"]["evaluations"] == 60
    again = compose(pool, names, loss, rule=rule, evaluations=60, seed=3)
    assert again.recipe == found.recipe


def test_what_cannot_be_composed(pool, monkeypatch):
    pool, loss = pool
    with pytest.raises(ParameterError, match="expected a rule"):
        compose(pool, ["expert-0"], loss, rule="sum")
    with pytest.raises(ParameterError, match="each once"):
        compose(pool, ["expert-0", "expert-0"], loss)
    with pytest.raises(ParameterError, match="each once"):
        compose(pool, [], loss)
    with pytest.raises(ParameterError, match="evaluations"):
        compose(pool, ["expert-0"], loss, evaluations=1)
    with pytest.raises(ParameterError, match="expected a loss that is a number"):
        compose(pool, ["expert-0"], lambda: float("nan"), evaluations=3)
    monkeypatch.setitem(__import__("sys").modules, "nevergrad", None)
    with pytest.raises(MissingPackageError, match=r"compeft-fl\[compose\]"):
        composition.check_budget(40)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "two classes"),
        ('{"text": "a", "label": "b"}\n' * 3, "two classes"),
        ('{"text": "a"}\n', "expected lines of"),
        ('{"text": 1, "label": "b"}\n', "expected lines of"),
        ("[" * 100_000, "expected lines of"),
        ("no json\n", "expected lines of"),
        ('{"text": "a", "label": "b"}\n{"text": "a", "label": "\\u001b"}\n', "labels that print"),
    ],
)
def test_files_that_are_no_examples(tmp_path, text, match):
    file = tmp_path / "odd.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=match):
        few_shot.examples(file)
    with pytest.raises(ConfigError, match="expected lines of"):
        few_shot.examples(tmp_path / "none.jsonl")


def test_the_command(experts, examples, tiny_model, tmp_path, capsys):
    cache = tmp_path / "cache"
    with (
        serving.running(tmp_path / "store") as server,
        ExpertClient(server.address, cache=cache) as client,
    ):
        for number in range(3):
            client.push(
                experts / f"expert-{number}", f"expert-{number}", init=experts / "start",
                density=0.2, tags={"kind": "tiny"},
            )  # fmt: skip
        client.push(experts / "expert-3", "whole")  # relative to 0: another start, left out or not
        command = ["experts", "compose", str(examples), "--model", str(tiny_model)]
        command += ["--server", server.address, "--cache", str(cache), "--evaluations", "12"]
        output = tmp_path / "composed"
        assert main([*command, "--search", "tiny", "-o", str(output), "--push", "mine"]) == 0
        said = capsys.readouterr().out
        assert "loss on 24 examples" in said
        assert "pushed mine@1" in said
        recipe = json.loads((output / "recipe.json").read_text())
        assert recipe["method"] == "lorahub"
        assert set(recipe["versions"].values()) == {f"expert-{n}@1" for n in range(3)}
        classifier = model.load_adapter(output, str(tiny_model), "cpu")
        rows = few_shot.examples(examples).train
        assert few_shot.loss_on(classifier, rows)() == pytest.approx(
            recipe["search"]["loss"], abs=1e-5
        )
        pulled = client.pull("mine")
        assert pulled.expert.tags["composed"] == "lorahub-factors"
        assert pulled.expert.tags["expert.00"].startswith("expert-")
        for name, tensor in load_folder(output).state.items():
            np.testing.assert_allclose(pulled.adapter().state[name], tensor, atol=2e-3)

        assert main([*command, "--json", "--candidates", "2", "--rule", "changes"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert len(told["members"]) <= 2
        assert told["search"]["rule"] == "changes"

        assert main([*command, "--experts", "nobody"]) == 2
        assert main([*command, "--search", "nothing-of-it"]) == 2
        assert "expected experts of" in capsys.readouterr().err
        assert main([*command, "-o", str(output)]) == 2
        assert "expected an empty folder" in capsys.readouterr().err


def test_settings_of_an_expert_decide_and_not_the_apps_defaults(experts, examples, tiny_model):
    config = AppConfig(model=str(tiny_model), device="cpu")
    config = dataclasses.replace(config, peft={**config.peft, "r": 2})
    classifier = model.build(config, few_shot.examples(examples), experts / "start")
    state = classifier.adapter_state()
    start = load_folder(experts / "start").state
    assert all(torch.equal(state[name], torch.as_tensor(start[name])) for name in start)
