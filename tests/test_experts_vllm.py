"""The resolver for vLLM, but for vLLM itself: with the real engine, `make vllm` tries it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from expert_family import Family, outputs

from compeft_fl.adapters import load_folder
from compeft_fl.errors import CompeftError, ParameterError, UnknownExpertError
from compeft_fl.experts import serving, vllm
from compeft_fl.experts.client import ExpertClient


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("vllm"), count=1)


@pytest.fixture
def resolver(family, tmp_path):
    with (
        serving.running(tmp_path / "store") as server,
        ExpertClient(server.address, cache=tmp_path / "cache") as client,
    ):
        client.push(family.folder / "trained-0", "zero", init=family.start, density=0.2)
        yield vllm.Resolver(vllm.Settings(tmp_path / "folders"), client)


def test_a_name_is_a_folder_that_peft_loads(family, resolver):
    digest, folder = resolver._fetch("zero", "")
    assert folder.name == digest
    expected = outputs(family.loaded(family.restored(0)))
    assert torch.equal(outputs(family.loaded(load_folder(folder), "fetched")), expected)
    again = resolver._fetch(f"zero@{digest[:16]}", "")
    assert again == (digest, folder)
    assert [each.name for each in folder.parent.iterdir()] == [digest]


def test_what_is_not_served(resolver):
    with pytest.raises(UnknownExpertError):
        resolver._fetch("nobody", "")
    with pytest.raises(ParameterError):
        resolver._fetch("../zero", "")
    with pytest.raises(CompeftError, match="expected an expert of base model 'another'"):
        resolver._fetch("zero", "another")


def test_settings(monkeypatch):
    monkeypatch.setenv("COMPEFT_FL_VLLM_REFRESH", "0.5")
    monkeypatch.setenv("COMPEFT_FL_VLLM_BASE", "base")
    found = vllm.Settings.from_environment()
    assert (found.refresh, found.base, found.folders) == (0.5, "base", None)
    for odd in ("soon", "-1", "nan"):
        monkeypatch.setenv("COMPEFT_FL_VLLM_REFRESH", odd)
        with pytest.raises(ParameterError, match="COMPEFT_FL_VLLM_REFRESH"):
            vllm.Settings.from_environment()


def test_it_is_light_and_does_nothing_where_no_store_is_named():
    """vLLM imports it in each of its processes, and its workers trip over llvmlite."""
    code = "import sys, compeft_fl.experts.vllm as v; v.register(); "
    code += "assert not {'numba', 'llvmlite', 'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"HOME": "/tmp"})


def test_the_entry_point_is_this():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    plugins = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    assert plugins == {"compeft-fl": f"{vllm.__name__}:{vllm.register.__name__}"}
