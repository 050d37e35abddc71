from __future__ import annotations

import pytest
import torch

from compeft_fl.adapters.base_digest import BASE_DIGEST_BYTES, base_digest
from compeft_fl.errors import ParameterError


@pytest.fixture(scope="module")
def base():
    def make(seed=0, dtype=torch.float32):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=96)
        return LlamaForCausalLM(config).to(dtype)

    return make


def test_the_same_weights_have_one_digest(base):
    digest = base_digest(base())
    assert len(digest) == BASE_DIGEST_BYTES
    assert base_digest(base()) == digest
    assert base_digest(base(dtype=torch.bfloat16)) == digest  # as another device loads it
    assert base_digest(base().model) == digest  # without its head


def test_other_weights_of_the_same_shapes_have_another(base):
    assert base_digest(base(seed=1)) != base_digest(base())


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_fine_tuning_of_one_tensor_is_seen(base, name):
    model = base()
    digest = base_digest(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)
    assert base_digest(model) != digest


def test_a_quantised_model_is_another_base(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    digests = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        base(seed, torch.bfloat16).save_pretrained(folder)
        for bits in (4, 8, 4, 8):
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
                ),
                device_map={"": "cpu"},
            )
            digest = base_digest(loaded)
            assert digests.setdefault((seed, bits), digest) == digest
        digests[seed, 16] = base_digest(base(seed, torch.bfloat16))
    assert len(set(digests.values())) == 6


def test_what_has_no_digest_is_named(base):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ParameterError, match="without an adapter, found a PEFT model"):
        base_digest(get_peft_model(base(), LoraConfig(r=2)))
    with pytest.raises(ParameterError, match=r"found none in embed_tokens\.weight"):
        base_digest(base().to("meta"))
