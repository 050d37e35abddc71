"""Experts from a store, in a pool: fetched when they are asked for, and again when given up."""

from __future__ import annotations

import threading

import adapter_kinds
import peft
import pytest
import torch
from expert_family import Family, bits, outputs, same

from compeft_fl.adapters import read_update, write_update
from compeft_fl.adapters.base_digest import base_digest, base_digest_under
from compeft_fl.errors import AdapterError, UnknownExpertError
from compeft_fl.experts import serving
from compeft_fl.experts.client import ExpertClient
from compeft_fl.experts.held import Recipe
from compeft_fl.experts.pool import ExpertPool


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("lora"), count=2)


@pytest.fixture
def store(lora, tmp_path):
    with (
        serving.running(tmp_path / "store") as server,
        ExpertClient(server.address, cache=tmp_path / "cache") as client,
    ):
        client.push(lora.folder / "trained-0", "zero", init=lora.start, density=0.2)
        yield client


def test_unknown_names_are_fetched_from_the_store(lora, store):
    client = store
    model, pool = lora.pool(store=client)
    before = bits(model)
    with pool.use("0"):
        expected = outputs(model)
    with pool.use("zero"):
        assert torch.equal(outputs(model), expected)
    assert same(bits(model), before)
    with pytest.raises(UnknownExpertError), pool.use("one"):
        pass
    assert "one" not in pool


def test_a_newer_version_is_fetched_when_asked_for_and_an_older_one_by_its_number(lora, store):
    client = store
    model, pool = lora.pool(store=client)
    with pool.use("1"):
        one = outputs(model)
    with pool.use("zero"):
        zero = outputs(model)
    client.push(lora.folder / "trained-1", "zero", init=lora.start, density=0.2)
    with pool.use("zero"):
        assert torch.equal(outputs(model), zero)
    pool.fetch("zero")
    with pool.use("zero"):
        assert torch.equal(outputs(model), one)
    with pool.use("zero@1"):
        assert torch.equal(outputs(model), zero)
    with pool.use(Recipe.of({"zero@1": 0.5, "zero@2": 0.5}, "task-arithmetic")):
        mixed = outputs(model)
    with pool.use(Recipe.of({"0": 0.5, "1": 0.5}, "task-arithmetic")):
        assert torch.equal(outputs(model), mixed)


def test_the_start_of_an_expert_comes_from_the_store(lora, store):
    client = store
    model = lora.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.requires_grad
    pool = ExpertPool(model, client)
    before = bits(model)
    with pool.use("zero"):
        expected = lora.loaded(lora.restored(0))
        assert torch.equal(outputs(model), outputs(expected))
    assert same(bits(model), before)


def test_what_was_given_up_is_fetched_again_in_the_version_it_had(lora, store):
    client = store
    model, pool = lora.pool(store=client)
    with pool.use("zero"):
        zero = outputs(model)
    client.push(lora.folder / "trained-1", "zero", init=lora.start, density=0.2)
    pool._shelf.find("zero").held = None
    with pool.use("zero"):
        assert torch.equal(outputs(model), zero)


def test_threads_that_want_one_expert_fetch_it_once(lora, store):
    client = store
    _, pool = lora.pool(store=client)
    pulls = []
    pull = client.pull
    client.pull = lambda *arguments: pulls.append(arguments) or pull(*arguments)
    threads = [threading.Thread(target=pool._ready, args=("zero",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([each for each in pulls if each == ("zero",)]) == 1


def test_an_expert_of_another_base_is_an_error_and_of_the_same_elsewhere_is_none(lora, store):
    client = store
    own = base_digest(adapter_kinds.base_model()).hex()
    model, pool = lora.pool(store=client)
    assert base_digest_under(model).hex() == own
    client.push(lora.folder / "trained-0", "other", init=lora.start, base_digest="ab" * 16)
    with pytest.raises(AdapterError, match="expected the model's base, digest"), pool.use("other"):
        pass
    assert "other" not in pool
    stored = read_update(lora.files[0])
    elsewhere = stored.config | {"base_model_name_or_path": "elsewhere"}
    file = lora.folder / "elsewhere.compeft"
    write_update(file, stored.update, elsewhere, stored.start)
    client.push(file, "unsaid")
    with pytest.raises(AdapterError, match="base_model_name_or_path"), pool.use("unsaid"):
        pass
    client.push(file, "said", base_digest=own)
    with pool.use("0"):
        expected = outputs(model)
    with pool.use("said"):
        assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("method", ["LORA", "IA3", "PROMPT_TUNING"])
def test_the_digest_of_the_base_under_an_adapter(method):
    base = adapter_kinds.base_model()
    digest = base_digest(base)
    options = {"modules_to_save": ["lm_head", "embed_tokens"]} if method == "LORA" else {}
    model = peft.get_peft_model(base, adapter_kinds.config(method, **options))
    first = base_digest_under(model)
    assert first == digest
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * ("o_proj" in name and not parameter.requires_grad)
    assert base_digest_under(model) != first
