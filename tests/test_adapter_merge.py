"""Adapters of all of PEFT's methods through the commands: merged and compared, or refused."""

from __future__ import annotations

import json

import adapter_folders
import adapter_kinds
import pytest

from compeft_fl.cli.main import main

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of its methods

METHODS = sorted(set(adapter_kinds.methods()) - set(adapter_kinds.NOT_BUILT))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line; return what it wrote to stdout, or to stderr where it must fail."""

    def run(line, expected=0):
        code = main(line.split())
        out, err = capsys.readouterr()
        assert code == expected, err
        return out if expected == 0 else err

    return run


def save(name, config, *, seed=1):
    """Save an adapter before training, as NAME0, and after, as NAME; all have one start."""
    torch.manual_seed(11)
    model = peft.get_peft_model(adapter_kinds.base_model(), config)
    model.save_pretrained(f"{name}0")
    train(model, seed)
    model.save_pretrained(name)
    return model


def train(model, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(f"{folder}/adapter_model.safetensors")


def change(folder):
    """What an adapter does to the base's weights, by PEFT itself, as one vector."""
    before = adapter_kinds.base_model()
    model = peft.PeftModel.from_pretrained(adapter_kinds.base_model(), folder)
    after = dict(model.merge_and_unload().named_parameters())
    pairs = [(after[name], weight) for name, weight in before.named_parameters()]
    return torch.cat([(one - other).detach().double().flatten() for one, other in pairs])


# --- what means the same ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_each_method_are_merged_as_peft_holds_them(place, run, method):
    for seed in (1, 2):
        save(f"a{seed}", adapter_kinds.config(method), seed=seed)
        run(f"compress a{seed} -o a{seed}.dense --codec dense --init a{seed}0")
        run(f"compress a{seed} -o a{seed}.sparse --init a{seed}0")
    run("decompress a1.dense -o restored --init a10")
    run("merge a1.dense a2.dense --method average -o merged --init a10")
    run("similarity a1.sparse a2.sparse")
    run("merge a1.sparse a2.sparse --method ties -o sparse --init a10")
    ours, theirs = tensors("a1"), tensors("a2")
    restored, merged = tensors("restored"), tensors("merged")
    assert restored.keys() == merged.keys() == ours.keys()
    for name, tensor in ours.items():
        assert restored[name].dtype == merged[name].dtype == tensor.dtype
        assert torch.allclose(restored[name].double(), tensor.double(), atol=1e-6)
        mean = (tensor.double() + theirs[name].double()) / 2
        assert torch.allclose(merged[name].double(), mean, atol=1e-6)
    for folder in ("merged", "sparse"):
        peft.PeftModel.from_pretrained(adapter_kinds.base_model(), folder)


def test_an_adapter_of_an_older_peft_is_merged(place, run):
    for name, seed in (("new", 1), ("old", 2)):
        save(name, adapter_kinds.config("LORA"), seed=seed)
    file = place / "old" / "adapter_config.json"
    written = json.loads(file.read_text())
    kept = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules")
    file.write_text(json.dumps({key: written[key] for key in (*kept, "init_lora_weights")}))
    for name in ("new", "old"):
        run(f"compress {name} -o {name}.compeft --init new0")
    run("merge new.compeft old.compeft --method average -o merged --init new0")
    run("similarity new.compeft old.compeft")


@pytest.mark.parametrize(
    ("method", "key", "values"),
    [
        ("LOHA", "alpha", (8, 128)),
        ("LOKR", "alpha", (8, 128)),
        ("FOURIERFT", "random_loc_seed", (1, 2)),
        ("FOURIERFT", "scaling", (50.0, 400.0)),
        ("WAVEFT", "random_loc_seed", (1, 2)),
        ("LORA", "use_rslora", (False, True)),
        ("LORA", "alpha_pattern", ({}, {"q_proj": 32})),
        ("LORA", "trainable_token_indices", ([1, 2], [1, 3])),
    ],
)
def test_adapters_that_mean_different_things_are_refused(place, run, method, key, values):
    drawn = {"init_weights": True} if method == "FOURIERFT" else {}
    for index, value in enumerate(values):
        save(f"a{index}", adapter_kinds.config(method, **drawn, **{key: value}))
        run(f"compress a{index} -o a{index}.compeft --codec dense --init a{index}0")
    message = f"a0.compeft and a1.compeft differ in {key}: "
    assert message in run("merge a0.compeft a1.compeft --method ties -o merged --init a00", 2)
    assert message in run("similarity a0.compeft a1.compeft", 2)
    assert not (place / "merged").exists()


def test_vera_of_another_key_without_its_projections_is_refused(place, run):
    for key in (1, 2):
        options = {"save_projection": False, "projection_prng_key": key}
        save(f"a{key}", adapter_kinds.config("VERA", **options))
        run(f"compress a{key} -o a{key}.compeft --codec dense --init a{key}0")
    line = "merge a1.compeft a2.compeft --method average -o merged --init a10"
    assert "differ in projection_prng_key: 1 and 2" in run(line, 2)


def test_pissa_and_plain_lora_are_refused_and_two_pissas_need_their_start(place, run):
    save("plain", adapter_kinds.config("LORA"))
    for seed in (1, 2):
        save(f"pissa{seed}", adapter_kinds.config("LORA", init_lora_weights="pissa"), seed=seed)
    for name in ("plain", "pissa1", "pissa2"):
        run(f"compress {name} -o {name}.compeft --codec dense")
    line = "merge {}.compeft {}.compeft --method {} -o merged --force"
    message = "differ in init_lora_weights: True and pissa"
    assert message in run(line.format("plain", "pissa1", "average"), 2)
    assert "--init DIR" in run(line.format("pissa1", "pissa2", "task-arithmetic"), 2)
    assert "--init DIR" in run("compress pissa1 -o sparse", 2)
    run(line.format("pissa1", "pissa2", "average"))
    for name, tensor in tensors("merged").items():
        mean = (tensors("pissa1")[name] + tensors("pissa2")[name]) / 2
        assert torch.allclose(tensor, mean, atol=1e-6)


def test_another_base_model_is_refused_unless_it_is_the_same(place, run):
    save("a", adapter_kinds.config("LORA"))
    file = place / "a" / "adapter_config.json"
    for name in ("org/one", "org/two"):
        written = json.loads(file.read_text()) | {"base_model_name_or_path": name}
        file.write_text(json.dumps(written))
        run(f"compress a -o {name[4:]}.compeft --init a0")
    for line in (
        "merge one.compeft two.compeft --method ties -o m --init a0",
        "similarity one.compeft two.compeft",
    ):
        error = run(line, 2)
        assert "differ in base_model_name_or_path: org/one and org/two" in error
        run(f"{line} --any-base")


def test_a_method_or_a_setting_of_a_later_peft_is_compressed_and_not_merged(place, run):
    save("a", adapter_kinds.config("LORA"))
    file = place / "a" / "adapter_config.json"
    known = json.loads(file.read_text())
    for added in ({"peft_type": "NEXT"}, {"next_scaling": 2}):
        file.write_text(json.dumps(known | added))
        run("compress a -o a.compeft --init a0")
        run("decompress a.compeft -o restored --init a0 --force")
        for line in (
            "merge a.compeft a.compeft --method ties -o m --init a0",
            "similarity a.compeft a.compeft",
        ):
            assert str(next(iter(added.values() if "peft_type" in added else added))) in run(
                line, 2
            )


# --- a number and a sign, once ----------------------------------------------------------------


@pytest.mark.parametrize("codec", ["dense", "bitmask"])
@pytest.mark.parametrize("method", ["LORA", "ADALORA", "LOHA", "LOKR"])
def test_a_number_scales_the_change_once_without_a_start(place, run, method, codec):
    save("a", adapter_kinds.config(method))
    run(f"compress a -o a.compeft --codec {codec}")
    run("decompress a.compeft -o whole")
    whole = change("whole")
    assert whole.norm() > 0
    for options, factor in (
        ("a.compeft --scaling 0.5", 0.5),
        ("a.compeft --scaling=-1", -1),
        ("a.compeft --weights=-1", -1),
        ("a.compeft a.compeft a.compeft", 3),
        ("a.compeft a.compeft a.compeft --weights 1,2,-1 --scaling 2", 4),
    ):
        run(f"merge {options} --method task-arithmetic -o merged --force")
        assert torch.allclose(change("merged"), factor * whole, rtol=1e-4, atol=1e-7), options
    for options, factor in (("a.compeft --scaling 2", 2), ("a.compeft --weights=-3", -1)):
        run(f"merge {options} --method ties -o merged --force")
        assert torch.allclose(change("merged"), factor * whole, rtol=1e-4, atol=1e-7)
    run("merge a.compeft a.compeft --weights=3,-1 --method average -o merged --force")
    assert torch.allclose(change("merged"), whole / 2, rtol=1e-4, atol=1e-7)


def test_one_adapter_minus_another(place, run):
    torch.manual_seed(11)
    model = peft.get_peft_model(adapter_kinds.base_model(), adapter_kinds.config("LORA"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # so that A is theirs both, and the rank is kept
    for seed, name in enumerate("ab"):
        train(model, seed)
        model.save_pretrained(name)
        run(f"compress {name} -o {name}.compeft --codec dense")
    run("merge a.compeft b.compeft --method task-arithmetic --weights=1,-1 -o minus")
    assert torch.allclose(change("minus"), change("a") - change("b"), atol=1e-6)
    run("merge a.compeft a.compeft --method task-arithmetic --weights=1,-1 -o nothing")
    assert change("nothing").abs().max() == 0


def test_with_a_start_a_number_is_the_task_vectors(place, run):
    save("a", adapter_kinds.config("LORA"))
    run("compress a -o a.compeft --codec dense --init a0")
    run("merge a.compeft --method task-arithmetic --scaling=-0.5 -o merged --init a0")
    before, after, merged = tensors("a0"), tensors("a"), tensors("merged")
    for name, tensor in merged.items():
        expected = before[name] - 0.5 * (after[name] - before[name])
        assert torch.allclose(tensor, expected, atol=1e-6)


def test_ia3_is_scaled_around_1(place, run):
    save("a", adapter_kinds.config("IA3"))
    run("compress a -o a.compeft --codec dense")
    run("merge a.compeft --method task-arithmetic --scaling=-2 -o merged")
    for name, tensor in tensors("merged").items():
        assert torch.allclose(tensor, 1 - 2 * (tensors("a")[name] - 1), atol=1e-5)


def test_a_weight_of_0_is_refused(place, run):
    save("a", adapter_kinds.config("LORA"))
    run("compress a -o a.compeft --init a0")
    line = "merge a.compeft --method task-arithmetic --weights 0 -o m --init a0"
    assert "weight" in run(line, 2)


# --- models in memory -------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted({*METHODS} - {"P_TUNING", "CPT"}))
def test_a_models_state_can_be_put_back(method):
    from compeft_fl import adapters

    model = peft.get_peft_model(adapter_kinds.base_model(), adapter_kinds.config(method))
    before = adapters.peft_state(model)
    adapter_folders.change(model, seed=3)
    adapters.load_peft_state(model, before)
    after = adapters.peft_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("P_TUNING", {}),
        ("CPT", {}),
        ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16}),
    ],
)
def test_a_prompt_that_is_made_of_what_is_trained_is_refused(method, options):
    from compeft_fl import adapters
    from compeft_fl.errors import AdapterError

    config = adapter_kinds.config(method, **options)
    model = peft.get_peft_model(adapter_kinds.base_model(), config)
    for call in (adapters.peft_state, lambda model: adapters.load_peft_state(model, {})):
        with pytest.raises(AdapterError, match=f"found {method}, .* cannot be put back"):
            call(model)
