"""Adapter folders and ``.compeft`` files, with folders that peft itself wrote."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import adapter_folders
import numpy as np
import pytest

from compeft_fl import adapters, compress
from compeft_fl.adapters import files
from compeft_fl.errors import AdapterError, LayoutError, MalformedError, NonFiniteError
from compeft_fl.task_vector import TaskVector

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


def lora(**options):
    return peft.LoraConfig(**{**adapter_folders.LORA, **options})


def ia3():
    names = ["key", "value", "intermediate.dense"]
    return peft.IA3Config(target_modules=names, feedforward_modules=names[2:])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Per kind of adapter: the folder before training and the folder after."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {
        "lora": (lora(), None),
        "bf16": (lora(), torch.bfloat16),
        "fp16": (lora(), torch.float16),
        "ia3": (ia3(), None),
        "dora": (lora(use_dora=True), None),
        "pooler": (lora(modules_to_save=["pooler"]), None),
        "vera": (peft.VeraConfig(r=4, target_modules=["query"]), None),
    }
    return {
        kind: adapter_folders.save_pair(root / kind, config, dtype=dtype)
        for kind, (config, dtype) in kinds.items()
    }


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# --- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [("lora", "f32"), ("bf16", "bf16"), ("fp16", "f16")])
def test_a_folder_is_read_with_names_in_order_and_types(folders, kind, dtype):
    adapter = adapters.load_folder(folders[kind][1])
    expected = tensors(folders[kind][1])
    assert adapter.method == "LORA"
    assert list(adapter.state) == sorted(expected)
    tau, _ = adapters.task_vector(adapter)
    assert {tensor.dtype for tensor in tau.layout.tensors} == {dtype}
    for name, values in tau.to_dict().items():
        assert np.array_equal(values, expected[name].float().numpy())


@pytest.mark.parametrize("kind", ["lora", "bf16", "fp16", "ia3", "pooler"])
def test_a_folder_is_written_as_it_was_read(folders, tmp_path, kind):
    adapters.save_folder(adapters.load_folder(folders[kind][1]), tmp_path / "copy")
    before, after = tensors(folders[kind][1]), tensors(tmp_path / "copy")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    config = "adapter_config.json"
    assert json.loads((tmp_path / "copy" / config).read_text()) == json.loads(
        (folders[kind][1] / config).read_text()
    )
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_scalar_and_a_tensor_without_parameters_keep_their_shapes(tmp_path):
    state = {"x.lora_A": np.float32([3]).reshape(()), "x.lora_B": np.zeros((0, 4), "f4")}
    adapter = adapters.Adapter({"peft_type": "LORA"}, state)
    adapters.save_folder(files.restore(stored(adapter, tmp_path / "update")), tmp_path / "copy")
    found = adapters.load_folder(tmp_path / "copy").state
    assert [(name, tensor.shape) for name, tensor in found.items()] == [
        ("x.lora_A", ()),
        ("x.lora_B", (0, 4)),
    ]
    assert found["x.lora_A"] == 3


def test_a_folder_with_files_is_not_written_to(folders, tmp_path):
    adapter = adapters.load_folder(folders["lora"][1])
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(AdapterError, match="expected an empty folder or none"):
        adapters.save_folder(adapter, tmp_path)
    adapters.save_folder(adapter, tmp_path, force=True)
    assert (tmp_path / "note.txt").read_text() == "mine"
    assert (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(AdapterError, match="found a file"):
        adapters.save_folder(adapter, tmp_path / "note.txt")


def spoil_weights(data):
    def spoil(folder):
        (folder / "adapter_model.safetensors").write_bytes(data)

    return spoil


def spoil_config(data):
    def spoil(folder):
        (folder / "adapter_config.json").write_bytes(data)

    return spoil


def remove(name):
    return lambda folder: (folder / name).unlink()


def only_a_pickle(folder):
    state = tensors(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")


def cut_weights(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def write_tensors(**named):
    def write(folder):
        from safetensors.numpy import save_file

        save_file(named, folder / "adapter_model.safetensors")

    return write


def one_tensor(dtype, size):
    """A safetensors file, by hand: a data type that numpy does not have."""
    head = json.dumps({"x": {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(size)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "expected an adapter folder, found nothing of that name"),
        (remove("adapter_config.json"), "expected adapter_config.json"),
        (remove("adapter_model.safetensors"), "expected adapter_model.safetensors.*found none"),
        (only_a_pickle, "adapter_model.bin, which is not safe to load"),
        (spoil_config(b"{"), "expected JSON"),
        (spoil_config(b"[" * 100_000), "expected JSON"),
        (spoil_config(b"[]"), 'an object with a "peft_type"'),
        (spoil_config(b'{"peft_type": 3}'), 'an object with a "peft_type"'),
        (spoil_config(b"\xff\xfe"), "utf-8"),
        (spoil_weights(b""), "expected safetensors"),
        (spoil_weights(b"\xff" * 64), "expected safetensors"),
        (cut_weights, "expected safetensors"),
        (write_tensors(), "found no parameters"),
        (write_tensors(x=np.zeros((0, 4), "f4")), "found no parameters"),
        (spoil_weights(one_tensor("F8_E4M3", 4)), "integers or Booleans, found F8_E4M3 in tensor"),
        (write_tensors(x=np.zeros(0, "f4"), y=np.ones(4, "f4")), "all values of 'x'.*ZeRO-3"),
        (write_tensors(**{"m.lora_A.weight": np.ones(9, "f4")}), "all values of 'm.lora_A.*FSDP"),
    ],
)
def test_a_broken_folder_is_an_error_that_names_it(folders, tmp_path, spoil, message):
    folder = tmp_path / "broken"
    shutil.copytree(folders["lora"][1], folder)
    spoil(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        adapters.load_folder(folder)
    assert str(folder) in str(caught.value)


def test_a_file_is_no_folder(folders):
    with pytest.raises(AdapterError, match="found a file"):
        adapters.load_folder(folders["lora"][1] / "adapter_config.json")


def test_bfloat16_without_torch_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    adapters.load_folder(folders["lora"][1])
    with pytest.raises(AdapterError, match=r"bfloat16 tensors need torch.*pip install torch"):
        adapters.load_folder(folders["bf16"][1])


# --- the start --------------------------------------------------------------------------------


def test_lora_starts_from_0_and_ia3_from_1(folders):
    adapter = adapters.load_folder(folders["lora"][1])
    tau, start = adapters.task_vector(adapter)
    assert start.tag == "0"
    assert np.array_equal(tau.values, TaskVector.from_dict(adapter.state).values)
    adapter = adapters.load_folder(folders["ia3"][1])
    tau, start = adapters.task_vector(adapter)
    assert start.tag == "1"
    assert np.array_equal(tau.values + 1, TaskVector.from_dict(adapter.state).values)
    untrained, _ = adapters.task_vector(adapters.load_folder(folders["ia3"][0]))
    assert not untrained.values.any()


@pytest.mark.parametrize("kind", ["lora", "bf16", "ia3", "dora", "pooler", "vera"])
def test_a_folder_before_training_is_the_start(folders, kind):
    untrained, trained = (adapters.load_folder(folder) for folder in folders[kind])
    tau, start = adapters.task_vector(trained, untrained)
    assert start.tag.startswith("blake2b:")
    assert np.array_equal(tau.values, TaskVector.between(untrained.state, trained.state).values)
    assert not adapters.task_vector(untrained, untrained)[0].values.any()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pooler", "tensor '.*pooler.*' starts from weights that the folder does not hold"),
        ("dora", "tensor '.*lora_magnitude_vector.*' starts from weights"),
        ("vera", "expected a folder of LORA, .*found VERA"),
    ],
)
def test_tensors_of_the_base_model_need_a_start(folders, kind, message):
    with pytest.raises(AdapterError, match=message) as caught:
        adapters.task_vector(adapters.load_folder(folders[kind][1]))
    assert "--init DIR" in str(caught.value)


def test_a_start_with_other_tensors_is_an_error(folders):
    with pytest.raises(LayoutError, match="expected tensor"):
        adapters.task_vector(*(adapters.load_folder(folders[k][1]) for k in ("lora", "ia3")))


# --- files ------------------------------------------------------------------------------------


def stored(adapter, file, *, init=None, codec="golomb", density=0.2, **options):
    tau, start = adapters.task_vector(adapter, init)
    update = tau if codec.startswith("dense") else compress(tau, density=density)
    size = files.write_update(file, update, adapter.config, start.tag, codec, **options)
    assert size == file.stat().st_size
    return files.read_update(file)


@pytest.mark.parametrize("kind", ["lora", "fp16", "bf16", "ia3"])
def test_a_lossless_file_restores_the_folder(folders, tmp_path, kind):
    adapter = adapters.load_folder(folders[kind][1])
    restored = files.restore(stored(adapter, tmp_path / "update", codec="dense"))
    assert restored.config == adapter.config
    assert list(restored.state) == list(adapter.state)
    for name, tensor in adapter.state.items():
        assert restored.state[name].dtype == tensor.dtype
        if kind == "ia3":  # (x - 1) + 1 is rounded
            assert np.allclose(restored.state[name], tensor, atol=1e-7)
        else:
            assert torch.equal(torch.as_tensor(restored.state[name]), torch.as_tensor(tensor))


@pytest.mark.parametrize("codec", ["golomb", "bitmask"])
@pytest.mark.parametrize("kind", ["lora", "bf16", "ia3", "dora", "pooler", "vera"])
def test_a_restored_folder_is_the_start_plus_the_update(folders, tmp_path, kind, codec):
    untrained, trained = (adapters.load_folder(folder) for folder in folders[kind])
    tau, _ = adapters.task_vector(trained, untrained)
    expected = compress(tau, density=0.2).to_task_vector().apply(untrained.state)
    file = stored(trained, tmp_path / "update", init=untrained, codec=codec)
    restored = files.restore(file, untrained)
    for name, tensor in expected.items():
        assert torch.equal(torch.as_tensor(restored.state[name]), torch.as_tensor(tensor))


@pytest.mark.parametrize("kind", ["lora", "bf16", "ia3", "dora", "pooler", "vera"])
def test_peft_loads_a_restored_folder(folders, tmp_path, kind):
    untrained, trained = (adapters.load_folder(folder) for folder in folders[kind])
    restored = files.restore(stored(trained, tmp_path / "update", init=untrained), untrained)
    adapters.save_folder(restored, tmp_path / "restored")
    by_peft = peft.PeftModel.from_pretrained(adapter_folders.base_model(), tmp_path / "restored")
    by_hand = peft.PeftModel.from_pretrained(adapter_folders.base_model(), folders[kind][1])
    adapters.load_peft_state(by_hand, restored.state)
    found = adapter_folders.outputs(by_peft)
    assert torch.equal(found, adapter_folders.outputs(by_hand))
    assert not torch.equal(found, adapter_folders.outputs(adapter_folders.base_model()))


def test_an_update_in_parts_is_one_file(folders, tmp_path):
    adapter = adapters.load_folder(folders["lora"][1])
    whole = stored(adapter, tmp_path / "whole", codec="dense")
    parts = stored(adapter, tmp_path / "parts", codec="dense", max_body_bytes=1000)
    assert (tmp_path / "parts").read_bytes().startswith(files.PARTS_MAGIC)
    assert not (tmp_path / "whole").read_bytes().startswith(files.PARTS_MAGIC)
    assert np.array_equal(parts.update.values, whole.update.values)
    assert parts.config == whole.config
    data = (tmp_path / "parts").read_bytes()
    for size in (len(data) - 1, len(files.PARTS_MAGIC) + 3):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(MalformedError, match="expected part"):
            files.read_update(tmp_path / "cut")


def test_a_file_that_needs_its_start_says_so(folders, tmp_path):
    untrained, trained = (adapters.load_folder(folder) for folder in folders["lora"])
    file = stored(trained, tmp_path / "update", init=untrained)
    with pytest.raises(AdapterError, match="give it with --init"):
        files.restore(file)
    with pytest.raises(AdapterError, match="expected the start blake2b:"):
        files.restore(file, trained)
    with pytest.raises(AdapterError, match="relative to 0, not to a folder"):
        files.restore(stored(trained, tmp_path / "zero"), untrained)
    with pytest.raises(AdapterError, match="expected the start 7"):
        files.restore(replace(file, start="7"))


def test_a_file_without_a_start_means_the_methods_own(folders, tmp_path):
    adapter = adapters.load_folder(folders["ia3"][1])
    file = stored(adapter, tmp_path / "update")
    silent = files.restore(replace(file, start=""))
    said = files.restore(file)
    for name, tensor in said.state.items():
        assert np.array_equal(silent.state[name], tensor)


def test_an_update_that_is_no_adapters_is_an_error(folders, tmp_path):
    from compeft_fl import encode

    tau, _ = adapters.task_vector(adapters.load_folder(folders["lora"][1]))
    (tmp_path / "bare").write_bytes(encode(tau, "dense"))
    with pytest.raises(AdapterError, match="expected an adapter_config"):
        files.read_update(tmp_path / "bare")
    (tmp_path / "odd").write_bytes(encode(tau, "dense", metadata={"adapter_config": "no"}))
    with pytest.raises(AdapterError, match="expected JSON"):
        files.read_update(tmp_path / "odd")


def test_a_value_beyond_the_tensors_type_is_an_error(folders, tmp_path):
    adapter = adapters.load_folder(folders["fp16"][1])
    file = stored(adapter, tmp_path / "update")
    loud = replace(file, update=file.update.with_scales(1e5))
    with pytest.raises(NonFiniteError, match="float16 holds in tensor"):
        files.restore(loud)


# --- models in memory -------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return peft.get_peft_model(adapter_folders.base_model(), lora())


def test_a_models_state_is_a_copy_and_can_be_put_back(model):
    initial = adapters.peft_state(model)
    adapter_folders.change(model, seed=3)
    tau = TaskVector.between(initial, adapters.peft_state(model))
    assert np.count_nonzero(tau.values) > 0.99 * tau.num_parameters
    finetuned = adapter_folders.outputs(model)
    adapters.load_peft_state(model, initial)
    assert not torch.equal(adapter_folders.outputs(model), finetuned)
    adapters.load_peft_state(model, tau.apply(initial))
    assert torch.allclose(adapter_folders.outputs(model), finetuned, atol=1e-6)


def test_a_models_state_takes_numpy_arrays(model):
    ones = {
        name: np.ones(tuple(tensor.shape), "f4")
        for name, tensor in adapters.peft_state(model).items()
    }
    adapters.load_peft_state(model, ones)
    assert all((tensor == 1).all() for tensor in adapters.peft_state(model).values())


def test_a_state_that_does_not_fit_is_an_error(model):
    state = adapters.peft_state(model)
    name = next(iter(state))
    with pytest.raises(LayoutError, match="expected tensor"):
        adapters.load_peft_state(model, {k: v for k, v in state.items() if k != name})
    with pytest.raises(LayoutError, match="found also 'more'"):
        adapters.load_peft_state(model, {**state, "more": state[name]})
    with pytest.raises(LayoutError, match="expected shape"):
        adapters.load_peft_state(model, {**state, name: state[name][:1]})
