"""Experts on a GPU, and the torch operations that write them there, on the CPU as well."""

from __future__ import annotations

import functools

import adapter_kinds
import peft
import pytest
import torch
from expert_family import Family, bits, same

from compeft_fl.adapters import live, live_runs
from compeft_fl.errors import NonFiniteError
from compeft_fl.experts.held import Recipe
from compeft_fl.experts.pool import ExpertPool
from compeft_fl.task_vector import Layout, TensorSpec

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def state(model):
    return {n: t.cpu().clone() for n, t in peft.get_peft_model_state_dict(model).items()}


@DTYPES
@pytest.mark.parametrize("with_init", [True, False])
@pytest.mark.parametrize("longest", [1, 700, 1 << 23])
def test_runs_of_any_length_write_the_same_bits(tmp_path, monkeypatch, dtype, with_init, longest):
    family = Family(tmp_path, dtype=dtype, with_init=with_init, count=1)
    model, pool = family.pool()
    with pool.use("0"):
        expected = bits(model)
    shorter = functools.partial(live_runs.write_runs, longest=longest)
    monkeypatch.setattr(live, "write_runs", shorter)
    monkeypatch.setattr(pool._live, "_target", lambda *_: None)
    with pool.use("0"):
        assert same(bits(model), expected)
        # Zeros are those of the compiled path too: 0 and -0 are other bits.
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor.signbit(), expected[name].signbit())


def test_tensors_of_several_kinds_and_one_under_two_names(monkeypatch):
    layout = Layout([TensorSpec(name, (4,)) for name in "abcde"])
    one = torch.zeros(4)
    tensors = [torch.zeros(4), torch.zeros(4, dtype=torch.float64), one, one, torch.zeros(4)]
    assert list(live_runs._runs(tensors, layout, 100)) == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert list(live_runs._runs(tensors, layout, 3)) == [(i, i + 1) for i in range(5)]
    masks = [torch.tensor([0x21, 0x10, 0, 0, 0, 0, 0, 0], dtype=torch.uint8) for _ in range(2)]
    masks[1] = torch.zeros(8, dtype=torch.uint8)
    masks[1][0] = 0x80
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).numpy()
    live_runs.write_runs(tensors, layout, masks, scales, 0.5)
    found = [tensor.tolist() for tensor in tensors]
    assert found[0] == [1.5, 0.5, 0.5, 0.5]
    assert found[1] == [0.5, 2.5, 0.5, -1.5]
    assert found[2] == found[3] == [4.5, 0.5, 0.5, 0.5]
    large = scales.copy()
    large[1] = 1e30
    half = [torch.zeros(4, dtype=torch.float16) for _ in range(5)]
    with pytest.raises(NonFiniteError, match="float16 holds in tensor 'b'"):
        live_runs.write_runs(half, layout, masks, large, 0.5)


@pytest.mark.cuda
@needs_cuda
@DTYPES
@pytest.mark.parametrize("with_init", [True, False])
@pytest.mark.parametrize("form", ["masks", "streams"])
def test_a_gpu_answers_and_goes_back_to_the_bit(tmp_path, dtype, with_init, form):
    family = Family(tmp_path, dtype=dtype, with_init=with_init, count=2)
    model, pool = family.pool()
    recipe = Recipe.of({"0": 1.0, "1": 2.0})
    expected = []
    for expert in ("0", "1", recipe):
        with pool.use(expert):
            expected.append(state(model))
    for name in "01":
        held = pool.held(name)
        assert form == "masks" or held.form == "streams" or held.pack()
    model.to("cuda")
    before = bits(model)
    for expert, there in zip(("0", "1", recipe), expected, strict=True):
        with pool.use(expert):
            assert same(state(model), there)
        assert same(bits(model), before)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.filterwarnings("ignore:inner dimension")  # of bitsandbytes: slower, not other values
@pytest.mark.parametrize("form", ["masks", "streams"])
def test_a_gpu_with_a_base_in_4_bits(tmp_path, form):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    family = Family(tmp_path, with_init=False, count=2)
    adapter_kinds.base_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")

    def loaded():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            ),
            device_map={"": 0},
        )

    model = peft.get_peft_model(loaded(), adapter_kinds.config("LORA")).eval()
    pool = ExpertPool(model, any_base=True)
    for number, file in enumerate(family.files):
        pool.add(str(number), file)
        assert form == "masks" or pool.held(str(number)).pack()
    ids = torch.arange(24, device="cuda").view(2, 12)
    with torch.no_grad():
        home, before = model(input_ids=ids).logits, bits(model)
        for number in (0, 1, 0):
            folder = tmp_path / f"restored-{number}"
            family.loaded(family.restored(number), folder.name)
            expected = peft.PeftModel.from_pretrained(loaded(), folder).eval()
            with pool.use(str(number)):
                assert same(state(model), state(expected))
                answer = model(input_ids=ids).logits
                assert torch.equal(answer, expected(input_ids=ids).logits)
                assert not torch.equal(answer, home)
            assert same(bits(model), before)
        assert torch.equal(model(input_ids=ids).logits, home)
