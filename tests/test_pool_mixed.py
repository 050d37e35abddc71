"""One batch, several experts: each sample is answered as by its own."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from expert_family import IDS, Family, bits, outputs

from compeft_fl.adapters import load_folder, write_update
from compeft_fl.adapters.compression import keep_adapter
from compeft_fl.errors import AdapterError, UnknownExpertError
from compeft_fl.experts.held import Recipe


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("lora"), count=3)


def alone(model, pool, expert):
    if expert is None:
        return outputs(model)
    with pool.use(expert):
        return outputs(model)


def test_each_sample_is_answered_by_its_own_expert(lora, tmp_path):
    model, pool = lora.pool()
    adapter = load_folder(lora.folder / "trained-2")
    whole = keep_adapter(adapter, load_folder(lora.start))
    write_update(tmp_path / "2.compeft", whole.update, adapter.config, whole.start, "dense")
    pool.add("dense", tmp_path / "2.compeft")
    recipe = Recipe.of({"0": 1.0, "1": 0.5})
    before, home = bits(model), outputs(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    ids = torch.cat([IDS, IDS.flip(1), IDS + 3])
    for experts in (
        ["1", "0", None, "1", "dense", recipe],
        [None] * 6,
        ["0", "0", "0", "0", "0", "2"],
    ):
        expected = dict.fromkeys(experts)
        for each in expected:
            with torch.no_grad():
                if each is None:
                    expected[each] = model(input_ids=ids).logits
                else:
                    with pool.use(each):
                        expected[each] = model(input_ids=ids).logits
        with pool.mixed(experts) as (used, names), torch.no_grad():
            assert used is model
            found = model(input_ids=ids, adapter_names=names).logits
        for row, each in enumerate(experts):
            np.testing.assert_allclose(found[row], expected[each][row], atol=1e-5)
        # What was there is there, and answers; the adapters of the batch lie beside it.
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert model.active_adapters == ["default"]
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        assert torch.equal(outputs(model), home)
    assert sorted(model.peft_config) == ["default", *(f"expert-{i}" for i in range(4))]
    assert not torch.equal(alone(model, pool, "0"), home)


def test_a_batch_within_a_use_and_text_that_is_generated(lora):
    model, pool = lora.pool()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = []
    for row, each in enumerate(("0", "1")):
        with pool.use(each):
            expected.append(model.generate(input_ids=IDS[row : row + 1], **options)[0])
    with pool.use("2"):
        inside = outputs(model)
        with pool.mixed(["0", "1"]) as (_, names):
            found = model.generate(input_ids=IDS, adapter_names=names, **options)
        assert torch.equal(outputs(model), inside)
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slot_has_the_data_type_of_the_model_s_own(tmp_path, dtype):
    family = Family(tmp_path, dtype=dtype, count=1)
    model, pool = family.pool()
    with pool.use("0"):
        expected = peft.get_peft_model_state_dict(model)
        expected = {name: tensor.clone() for name, tensor in expected.items()}
    with pool.mixed(["0", None]) as (_, names):
        assert names == ["expert-0", "default"]
        found = peft.get_peft_model_state_dict(model, adapter_name="expert-0")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_cannot_be_mixed(lora, tmp_path):
    model, pool = lora.pool()
    unknown = pytest.raises(UnknownExpertError, match="expected an expert of the pool")
    with unknown, pool.mixed(["0", "nobody"]):
        pass
    assert list(model.peft_config) == ["default"]
    _, pool = Family(tmp_path / "ia3", "IA3", count=1).pool()
    other = pytest.raises(AdapterError, match="expected LoRA, for experts by sample, found IA3")
    with other, pool.mixed(["0"]):
        pass
    _, pool = Family(tmp_path / "dora", count=1, use_dora=True).pool()
    with pytest.raises(AdapterError, match="found LORA with DoRA"), pool.mixed(["0"]):
        pass
