"""Experts in memory: what the model answers with, and that it is put back bit for bit."""

from __future__ import annotations

import threading

import adapter_kinds
import numpy as np
import peft
import pytest
import torch
from expert_family import IDS, Family, bits, outputs, same, train

from compeft_fl.adapters import (
    Adapter,
    load_folder,
    read_update,
    restore,
    write_update,
)
from compeft_fl.adapters.compression import keep_adapter
from compeft_fl.adapters.merge import AdapterMerge
from compeft_fl.compeft import compress
from compeft_fl.errors import (
    AdapterError,
    LayoutError,
    NonFiniteError,
    ParameterError,
    UnknownExpertError,
)
from compeft_fl.experts.held import Recipe
from compeft_fl.experts.pool import ExpertPool


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("lora"), count=4)


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """LoRA without a start: the task vector is the factors, each with a scale of its own."""
    return Family(tmp_path_factory.mktemp("factors"), with_init=False, count=3)


def test_the_model_answers_as_what_peft_loads_and_then_as_before(lora):
    model, pool = lora.pool()
    before, home = bits(model), outputs(model)
    for number in (0, 1, 0):
        with pool.use(str(number)) as used:
            assert used is model
            expected = lora.loaded(lora.restored(number))
            assert torch.equal(outputs(model), outputs(expected))
            assert not torch.equal(outputs(model), home)
        assert same(bits(model), before)
        assert pool.active is None


MADE = ("P_TUNING", "CPT")  # PEFT's state of them is made of what is trained
BUILT = {*adapter_kinds.OPTIONS, "LORA", "LOHA", "LOKR"} & set(adapter_kinds.methods())
KINDS = sorted(BUILT - set(MADE))
GIVEN = {"MULTITASK_PROMPT_TUNING": {"task_ids": torch.ones(len(IDS), dtype=torch.long)}}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about compilers and the like
@pytest.mark.parametrize("method", KINDS)
def test_every_method_with_weights_of_its_own(method, tmp_path):
    family = Family(tmp_path, method, count=1)
    model, pool = family.pool()
    before = bits(model)
    expected = family.loaded(family.restored(0))
    with pool.use("0"):
        assert same(peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(expected))
        if method != "SHADOW":  # whose layers do not run in a Llama
            given = GIVEN.get(method, {})
            assert torch.equal(outputs(model, **given), outputs(expected, **given))
    assert same(bits(model), before)


@pytest.mark.parametrize("method", MADE)
def test_prompts_that_are_made_of_others_are_refused(method):
    model = peft.get_peft_model(adapter_kinds.base_model(), adapter_kinds.config(method))
    with pytest.raises(AdapterError, match="expected a state that is trained"):
        ExpertPool(model)


@pytest.mark.parametrize("with_init", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_16_bits(tmp_path, dtype, with_init):
    family = Family(tmp_path, dtype=dtype, with_init=with_init, count=1)
    model, pool = family.pool()
    before = bits(model)
    expected = family.loaded(family.restored(0)).to(dtype)
    with pool.use("0"):
        assert same(peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(expected))
    assert same(bits(model), before)


def test_factors_without_a_start(factors):
    model, pool = factors.pool()
    for number in range(2):
        with pool.use(str(number)):
            assert torch.equal(outputs(model), outputs(factors.loaded(factors.restored(number))))


@pytest.mark.parametrize("form", ["streams", "masks"])
def test_streams_masks_and_the_torch_path_write_the_same(lora, form, monkeypatch):
    model, pool = lora.pool()
    held = pool._held("0")
    assert held.form == "masks"
    if form == "streams":
        assert held.pack()
        assert held.form == "streams"
    with pool.use("0"):
        fast = bits(model)
    monkeypatch.setattr(pool._live, "_target", lambda *_: None)
    with pool.use("0"):
        assert same(bits(model), fast)


def test_a_dense_expert_and_one_of_all_tensors_alike(lora, tmp_path):
    adapter = load_folder(lora.folder / "trained-0")
    made = keep_adapter(adapter, load_folder(lora.start))
    file = tmp_path / "dense.compeft"
    write_update(file, made.update, adapter.config, made.start, "dense")
    model, pool = lora.pool()
    pool.add("dense", file)
    assert pool.forms()["dense"] == "dense"
    with pool.use("dense"):
        assert torch.equal(
            outputs(model),
            outputs(lora.loaded(restore(read_update(file), load_folder(lora.start)))),
        )


def test_use_inside_use_and_after_an_error(lora):
    model, pool = lora.pool()
    before = bits(model)
    with pool.use("0"):
        outer = bits(model)
        with pool.use("1"):
            assert not same(bits(model), outer)
            assert pool.active == "1"
        assert same(bits(model), outer)
        with pytest.raises(KeyError), pool.use("2"):
            raise KeyError
        assert same(bits(model), outer)
    assert same(bits(model), before)
    pool.swap("1")
    assert pool.active == "1"
    with pool.use("0"):
        assert same(bits(model), outer)
    assert pool.active == "1"
    pool.swap(None)
    assert same(bits(model), before)


def test_threads_never_see_a_mixture(lora):
    model, pool = lora.pool(memory="60 kB")
    expected = {}
    for name in "0123":
        with pool.use(name):
            expected[name] = outputs(model)
    wrong = []

    def ask(seed):
        rng = np.random.default_rng(seed)
        for name in rng.choice(list("0123"), 12):
            with pool.use(str(name)):
                if not torch.equal(outputs(model), expected[str(name)]):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["lora", "factors"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("average", {}),
        ("task-arithmetic", {"scaling": 0.4}),
        ("ties", {"scaling": 0.7}),
        ("ties", {"tie": "majority"}),
    ],
)
@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 0.5, -1)])
def test_a_merged_member_is_what_merge_makes(which, method, settings, weights, request):
    family = request.getfixturevalue(which)
    merge = AdapterMerge(method, **settings)
    for file, weight in zip(family.files, weights, strict=False):
        merge.add(read_update(file), weight)
    stored = merge.result()
    init = load_folder(family.start) if stored.needs_init else None
    expected = family.loaded(restore(stored, init))
    model, pool = family.pool()
    before = bits(model)
    recipe = pool.merge(
        "merged", {str(i): weight for i, weight in enumerate(weights)}, method, **settings
    )
    assert pool.forms()["merged"] == "merged"
    with pool.use("merged"):
        assert torch.equal(outputs(model), outputs(expected))
    with pool.use(recipe):
        assert torch.equal(outputs(model), outputs(expected))
    assert same(bits(model), before)
    exported = pool.export("merged")
    assert np.array_equal(exported.update.values, stored.update.values)
    assert torch.equal(
        outputs(family.loaded(pool.adapter("merged"), "exported")), outputs(expected)
    )


def test_lorahub_weighs_the_factors_themselves(lora):
    model, pool = lora.pool()
    weights = {"0": 0.5, "1": -1.25, "2": 0.0}
    state = {}
    for number, weight in zip(range(3), weights.values(), strict=True):
        for name, tensor in lora.restored(number).state.items():
            state[name] = state.get(name, 0) + np.float32(weight) * tensor
    recipe = Recipe.of(weights, "lorahub")
    with pool.use(recipe):
        live = peft.get_peft_model_state_dict(model)
        for name, tensor in state.items():
            np.testing.assert_allclose(live[name].numpy(), tensor, atol=1e-6)
        inside = outputs(model)
    adapter = pool.adapter(recipe)
    np.testing.assert_allclose(
        outputs(lora.loaded(adapter, "lorahub")).numpy(), inside.numpy(), atol=1e-5
    )
    with pool.use(Recipe.of({"0": 0.0, "1": 0.0}, "lorahub")):
        assert all(not t.any() for t in peft.get_peft_model_state_dict(model).values())


def test_merging_what_does_not_go_together(lora, tmp_path):
    model, pool = lora.pool()
    whole = keep_adapter(load_folder(lora.folder / "trained-0"))
    config = load_folder(lora.start).config
    write_update(tmp_path / "whole.compeft", whole.update, config, whole.start, "dense")
    pool.add("whole", tmp_path / "whole.compeft")
    before = bits(model)
    with (
        pytest.raises(AdapterError, match="members of one start"),
        pool.use(Recipe.of({"0": 1, "whole": 1})),
    ):
        pass
    assert same(bits(model), before)
    with pytest.raises(AdapterError, match="different starts"):
        pool.merge("mixed", {"0": 1, "whole": 1})
    pool.merge("sum", {"0": 1, "1": 1}, "task-arithmetic")
    with pytest.raises(ParameterError, match="not merged"):
        pool.merge("again", {"sum": 1, "1": 1})
    with pytest.raises(ParameterError, match="expected a method among"):
        pool.merge("odd", {"0": 1}, "mean")
    with pytest.raises(ParameterError, match="expected members"):
        pool.merge("none", {})
    with pytest.raises(ParameterError, match="finite weight"):
        pool.merge("nan", {"0": float("nan")})
    with pytest.raises(ParameterError, match="expected a tie"):
        pool.merge("tie", {"0": 1}, "average", tie="zero")
    with pytest.raises(ParameterError, match="no scaling"):
        pool.merge("scaled", {"0": 1}, "average", scaling=2)
    assert "odd" not in pool


# --- memory ---------------------------------------------------------------------------------------


def test_what_is_used_least_is_packed_then_given_up_then_read_again(lora):
    model, pool = lora.pool()
    sizes = {name: pool._held(name).nbytes for name in "0123"}
    with pool.use("0"):
        expected = outputs(model)
    assert set(pool.forms().values()) == {"masks"}
    packed = {}
    for name in "0123":
        held = pool._held(name)
        held.pack()
        packed[name] = held.nbytes
        assert held.nbytes < sizes[name]

    model, pool = lora.pool(memory=sum(packed.values()) + 10)
    assert set(pool.forms().values()) == {"streams"}
    assert pool.nbytes <= pool.memory
    model, pool = lora.pool(memory=2 * max(packed.values()) + 10)
    forms = pool.forms()
    assert [forms[name] for name in "0123"] == ["", "", "streams", "streams"]
    with pool.use("0"):  # read again from its file
        assert torch.equal(outputs(model), expected)
    forms = pool.forms()
    assert forms["0"]
    assert not forms["2"]
    assert pool.nbytes <= pool.memory


def test_what_is_nowhere_else_is_never_given_up(lora):
    _, pool = lora.pool(memory="20 kB")
    stored = read_update(lora.files[0])
    room = pool.memory // pool._held("3").nbytes
    for number in range(room):
        pool.add(f"kept-{number}", stored)
    with pytest.raises(ParameterError, match="expected room"):
        pool.add("one-more", stored)
    kept = [name for name in pool.names() if name.startswith("kept")]
    assert len(kept) > 1
    assert all(pool.forms()[name] for name in kept)


def test_a_name_is_replaced_and_removed(lora):
    model, pool = lora.pool()
    with pool.use("1"):
        expected = outputs(model)
    size, count = pool.nbytes, len(pool)
    pool.add("0", lora.files[1])
    assert (pool.nbytes, len(pool)) == (size, count)
    with pool.use("0"):
        assert torch.equal(outputs(model), expected)
    pool.remove("0")
    assert "0" not in pool
    with pytest.raises(UnknownExpertError, match="expected an expert of the pool"), pool.use("0"):
        pass


# --- what does not fit ----------------------------------------------------------------------------


def test_experts_of_other_bases_settings_and_starts(lora, tmp_path):
    other = Family(tmp_path / "rank", r=4, count=1)
    _, pool = lora.pool()
    with pytest.raises(AdapterError, match="differ in"):
        pool.add("rank", other.files[0])
    stored = read_update(lora.files[0])
    elsewhere = stored.config | {"base_model_name_or_path": "elsewhere"}
    write_update(tmp_path / "base.compeft", stored.update, elsewhere, stored.start)
    with pytest.raises(AdapterError, match="base_model_name_or_path"):
        pool.add("base", tmp_path / "base.compeft")
    ExpertPool(lora.model(), any_base=True).add("base", tmp_path / "base.compeft")
    model = lora.model()
    train(model, 99)
    with pytest.raises(AdapterError, match="the adapter before training"):
        ExpertPool(model).add("0", lora.files[0])
    pool = ExpertPool(model, init=lora.start)
    before = bits(model)
    pool.add("0", lora.files[0])
    with pool.use("0"):
        assert torch.equal(outputs(model), outputs(lora.loaded(lora.restored(0))))
    assert same(bits(model), before)
    with pytest.raises(AdapterError, match="expected a PEFT model"):
        ExpertPool(adapter_kinds.base_model())


def test_other_tensors(lora):
    _, pool = lora.pool()
    stored = read_update(lora.files[0])
    layout = type(stored.update.layout)(stored.update.layout.tensors[:-1])
    from compeft_fl.task_vector import TaskVector

    tau = TaskVector(layout, np.ones(layout.num_parameters, np.float32))
    odd = type(stored)(compress(tau), stored.config, stored.start, "golomb", 0, 0)
    with pytest.raises(LayoutError, match="expected the model's tensor"):
        pool.add("odd", odd)


def test_values_that_16_bits_do_not_hold(tmp_path):
    family = Family(tmp_path, dtype=torch.float16, with_init=False, count=1)
    model, pool = family.pool()
    before = bits(model)
    stored = read_update(family.files[0])
    large = stored.update.with_scales(1e6)
    pool.add("large", type(stored)(large, stored.config, stored.start, "golomb", 0, 0))
    with pytest.raises(NonFiniteError, match="float16"), pool.use("large"):
        pass
    assert same(bits(model), before)


def test_an_adapter_that_is_merged_into_the_base(lora):
    model, pool = lora.pool()
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into"), pool.use("0"):
        pass
    model.unmerge_adapter()
    with pool.use("0"):
        pass


def test_a_model_that_is_moved_after_the_pool_was_made(lora):
    model, pool = lora.pool()
    with pool.use("0"):
        expected = {n: t.double() for n, t in peft.get_peft_model_state_dict(model).items()}
    model.to(torch.float64)  # other tensors under the same parameters
    with pool.use("0"):
        found = peft.get_peft_model_state_dict(model)
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same(lora):
    model, pool = lora.pool()
    with pool.use("0"):
        expected = {n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()}
    model.to("cuda")
    before = bits(model)
    with pool.use("0"):
        found = peft.get_peft_model_state_dict(model)
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in found)
    assert same(bits(model), before)


def test_an_adapter_is_what_a_folder_holds(lora):
    _, pool = lora.pool()
    adapter = pool.adapter("0")
    expected = lora.restored(0)
    assert isinstance(adapter, Adapter)
    assert adapter.state.keys() == expected.state.keys()
    assert all(np.array_equal(adapter.state[n], expected.state[n]) for n in adapter.state)
