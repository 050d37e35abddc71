"""bench codecs: layouts as PEFT has them, what is measured, and the files that it writes."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.bench import (
    codec_plot,
    codecs,
    cuda,
    flowertune,
    layouts,
    measure,
    results,
    steps,
    table1,
)
from compeft_fl.cli.main import main
from compeft_fl.errors import ParameterError

SMALL = cf.Layout([cf.TensorSpec("a.lora_A", (8, 500)), cf.TensorSpec("a.lora_B", (300, 8))])


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- layouts ------------------------------------------------------------------------------------


def of_peft(name):
    """The layout that PEFT gives the adapter, of a model without weights."""
    import torch
    import transformers as tf
    from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict

    t5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    models = {
        "t5-base-ia3": (tf.T5ForConditionalGeneration, tf.T5Config(**t5), IA3Config()),
        "t5-base-r16": (tf.T5ForConditionalGeneration, tf.T5Config(**t5), LoraConfig(r=16)),
        "mistral-7b-r32": (tf.MistralForCausalLM, tf.MistralConfig(), LoraConfig(r=32)),
        "llama-7b-r64": (
            tf.LlamaForCausalLM,
            tf.LlamaConfig(),
            LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        ),
    }
    kind, config, peft_config = models[name]
    with torch.device("meta"):
        adapted = get_peft_model(kind(config), peft_config)
    return cf.Layout.of(get_peft_model_state_dict(adapted))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", ["t5-base-ia3", "t5-base-r16", "mistral-7b-r32", "llama-7b-r64"])
def test_layouts_are_those_of_peft(name):
    assert layouts.get(name).layout == of_peft(name)


def test_llama_adapters_have_the_papers_sizes():
    """In 16 bits and GB of 2^30 bytes, as its Table 1 prints them."""
    for model, (printed, _) in table1.PAPER.items():
        size = 2 * layouts.get(f"{model}-r64").layout.num_parameters / 2**30
        assert f"{size:.{len(printed) - 2}f}" == printed


def test_unknown_adapters_list_the_known_ones():
    with pytest.raises(ParameterError, match=r"t5-base-ia3, .* found 'gpt'"):
        layouts.get("gpt")


def test_synthetic_vectors_have_the_spreads_that_are_written():
    layout = layouts.get("t5-large-r16").layout
    tau = layouts.synthetic(layout, seed=1)
    along, across, kurtosis = [], [], []
    for tensor, where in layout.slices():
        part = tau.values[where].reshape(tensor.shape).astype(np.float64)
        long = int(np.argmax(tensor.shape))
        for axis, found in ((long, along), (1 - long, across)):
            rms = np.sqrt((part**2).mean(axis=1 - axis))
            found.append(np.log(rms).std())
        rows = np.sqrt((part**2).mean(axis=1, keepdims=True))
        columns = np.sqrt((part**2).mean(axis=0, keepdims=True))
        plain = part / (rows * columns)
        kurtosis.append((plain**4).mean() / (plain**2).mean() ** 2)
    # 16 values of a Laplace distribution estimate a scale to about 27 %.
    assert np.mean(along) == pytest.approx(math.hypot(0.4, 0.27), abs=0.04)
    assert np.mean(across) == pytest.approx(0.1, abs=0.03)
    # 6 where the scales are known; the same estimates leave about 2.7 of a normal distribution's 3.
    assert 3.5 < np.mean(kurtosis) < 6


def test_synthetic_vectors_share_their_structure_and_not_their_values():
    a, b = (layouts.synthetic(SMALL, seed).values for seed in (1, 2))
    assert np.array_equal(a, layouts.synthetic(SMALL, 1).values)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    other = layouts.synthetic(SMALL, 1, structure=5).values
    assert np.array_equal(np.sign(a), np.sign(other))
    assert not np.array_equal(a, other)


def test_real_vectors_are_those_of_the_folder(tmp_path):
    from safetensors.numpy import save_file

    assert layouts.real_vectors(tmp_path) == {}
    save_file({"w": np.arange(3, dtype=np.float32)}, tmp_path / "one.safetensors")
    assert layouts.real_vectors(tmp_path)["one"].values.tolist() == [0, 1, 2]
    assert {"section_proto", "role_linear"} <= set(layouts.real_vectors())


# --- what is measured ---------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_call():
    size = 40_000_000
    _, peak = measure.peak_memory(lambda: np.ones(size, np.uint8).sum())
    _, again = measure.peak_memory(lambda: None)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs")
    assert 0.9 * size < peak < 1.5 * size
    assert again < 0.2 * size


def test_measuring_runs_often_within_its_budget():
    calls = []
    measure.measure(lambda: calls.append(1), budget=10, repeats=3)
    assert len(calls) == 4
    calls.clear()
    measure.measure(lambda: calls.append(1), budget=-1)
    assert len(calls) == 1


@pytest.mark.long
def test_rows_say_what_was_measured():
    rows = codecs.rows_of(layouts.synthetic(SMALL), "small", "synthetic", quick=True)
    by_name = {row["codec"]: row for row in rows}
    golomb = by_name["compeft-golomb@0.05"]
    assert golomb["bits_per_parameter"] == pytest.approx(8 * golomb["bytes"] / 6400, abs=1e-5)
    assert golomb["ratio_fp32"] == pytest.approx(4 * 6400 / golomb["bytes"], abs=1e-3)
    assert golomb["encode_mb_s"] > 0
    assert by_name["fp32"]["relative_error"] == 0
    assert 0 < by_name["fp16"]["relative_error"] < 1e-3
    assert by_name["stc@0.05"]["relative_error"] == golomb["relative_error"]
    assert {"codec", "layout", "density", "num_parameters", "bytes", "bits_per_parameter"} <= set(
        golomb
    )


def test_the_largest_vectors_are_for_fast_codecs():
    def names(size):
        return {codec.family for codec in codecs.codecs_for(size, quick=False)}

    assert names(10**9) == {"compeft-golomb", "compeft-bitmask"}
    assert "nf4" not in names(10**8)
    assert {"fp16", "stc"} <= names(10**8)


def test_the_torch_path_gives_the_same_bytes():
    """On a CUDA device by `bench codecs`; on torch's CPU here, where vectors become NumPy's."""
    rows = cuda.rows_of(layouts.synthetic(SMALL), "cpu")
    assert all(row["identical"] for row in rows)
    assert all(row["encode_gb_s"] >= 0 for row in rows)


@pytest.mark.cuda
def test_the_torch_path_gives_the_same_bytes_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = cuda.rows_of(layouts.synthetic(layouts.get("t5-base-r16").layout), "cuda")
    assert all(row["identical"] for row in rows)


# --- the paper's Table 1, FlowerTune ------------------------------------------------------------


def test_every_size_of_the_papers_table_is_that_of_a_density():
    for model, (_, printed) in table1.PAPER.items():
        d = layouts.get(f"{model}-r64").layout.num_parameters
        fitting = [table1.datasets_of(model, density, d) for density in table1.DENSITIES]
        assert {dataset for each in fitting for dataset in each} == set(table1._DATASETS), model
        assert len(printed) == len(table1._DATASETS)


def test_table1_compares_messages_with_the_entropy(tmp_path):
    rows = table1.rows_of(layouts.synthetic(layouts.get("t5-base-r16").layout), "llama-7b")
    assert [row["density"] for row in rows] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert all(0.9 < row["golomb_of_entropy"] < 1.02 for row in rows)
    assert table1.entropy(0.05) == pytest.approx(0.3364, abs=1e-4)
    table1.write(tmp_path, "test", rows)
    assert len(read(tmp_path / "table1.csv")) == 5
    assert "| llama-7b | 0.05 |" in (tmp_path / "table1.md").read_text()


def test_flowertunes_case_is_41_600_mib():
    d = layouts.get("mistral-7b-r32").layout.num_parameters
    assert 2 * 2 * 200 * 4 * d == 41_600 * 2**20


def test_exchange_counts_the_payloads_of_both_directions():
    traffic = flowertune.exchange(SMALL, nodes=2, rounds=3)
    update = len(cf.encode(cf.compress(layouts.synthetic(SMALL), 0.1), layout_by_id=True))
    delta = len(cf.encode(cf.compress(layouts.synthetic(SMALL), 0.2), layout_by_id=True))
    assert traffic.up == pytest.approx(6 * update, rel=0.1)
    assert traffic.down == pytest.approx(4 * delta, rel=0.1)  # nothing in the first round
    assert traffic.of_rounds(30) == flowertune.Traffic(30, 10 * traffic.up, 29 * traffic.down // 2)


def test_nodes_that_come_back_are_sent_what_they_lack():
    always = flowertune.exchange(SMALL, nodes=2, rounds=12)
    seldom = flowertune.exchange(SMALL, nodes=8, rounds=12)
    assert seldom.up == pytest.approx(always.up, rel=0.05)
    assert 1.2 * always.down < seldom.down < 1.6 * always.down  # and not 4 times


# --- the command --------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_writes_tables_and_a_picture(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(codecs, "_QUICK", ("t5-base-ia3",))
    monkeypatch.setattr(codecs, "HEADLINE", "t5-base-ia3")
    arguments = ["bench", "codecs", "--quick", "--only", "adapters", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = read(tmp_path / "codecs.csv")
    assert {row["kind"] for row in rows} == {"real", "synthetic"}
    assert "compeft-golomb@0.2" in (tmp_path / "codecs.md").read_text()
    assert "t5-base-ia3" in (tmp_path / "codecs_layouts.md").read_text()
    assert (tmp_path / "codecs.png").read_bytes().startswith(b"\x89PNG")
    told = capfd.readouterr()
    assert "2 minutes" in told.err
    assert "codecs: section_proto" in told.err
    assert "compeft-bitmask@0.05" in told.out


def test_absent_vectors_are_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(codecs, "_QUICK", ("t5-base-ia3",))
    monkeypatch.setattr(codecs, "HEADLINE", "t5-base-ia3")
    monkeypatch.setattr(codecs.peers, "names", lambda: ("fp16", "compeft-golomb@0.05"))
    arguments = ["bench", "codecs", "--quick", "--only", "adapters", "--out", str(tmp_path)]
    assert main([*arguments, "--taus", str(tmp_path)]) == 0
    assert "no real task vectors" in capfd.readouterr().err
    assert {row["kind"] for row in read(tmp_path / "codecs.csv")} == {"synthetic"}


def test_flowertune_is_written(tmp_path, monkeypatch, capfd):
    real = layouts.get
    small = layouts.Adapter("mistral-7b-r32", "small", SMALL)
    monkeypatch.setattr(layouts, "get", lambda name: small if "mistral" in name else real(name))
    flowertune.run(tmp_path, "test", quick=True)
    rows = read(tmp_path / "flowertune.csv")
    assert rows[0]["case"] == "dense fp32"
    assert float(rows[0]["ratio_fp32"]) == 1
    assert all(int(row["total_bytes"]) < int(rows[0]["total_bytes"]) for row in rows[1:])
    assert "multiplied" in rows[-1]["measured"]
    monkeypatch.setattr(flowertune, "exchange", None)  # what has been run is not run again
    flowertune.run(tmp_path, "test", quick=True)
    assert read(tmp_path / "flowertune.csv") == rows


def test_a_lower_density_down_sends_less_to_nodes_that_come_back():
    dense, sparse = (flowertune.exchange(SMALL, 8, 12, density) for density in (0.2, 0.05))
    assert sparse.up == pytest.approx(dense.up, rel=0.05)
    assert sparse.down < 0.6 * dense.down


# --- catch-ups ----------------------------------------------------------------------------------


def test_catch_ups_are_set_against_their_entropy(tmp_path):
    taus = [layouts.synthetic(SMALL, seed) for seed in range(3)]
    rows = steps.rows_of("small", taus, 0.1)
    assert [row["missed"] for row in rows] == list(steps.MISSED)
    assert all(0.5 < row["of_entropy"] < 1.3 for row in rows)  # 6,400 parameters learn little
    assert all(row["bits"] == pytest.approx(8 * row["bytes"] / 6400, abs=1e-4) for row in rows)
    assert rows[-1]["bits"] < 0.8 * rows[-1]["chain_bits"]
    assert [row["nonzero"] for row in rows] == sorted(row["nonzero"] for row in rows)
    assert all(row["encode_m_s"] > 0 and row["decode_m_s"] > 0 for row in rows)


def test_the_entropy_is_that_of_each_tensor():
    layout = cf.Layout([cf.TensorSpec("a", (4,)), cf.TensorSpec("b", (4,))])
    vector = cf.TaskVector(layout, np.array([0, 0, 1, 1, 5, 5, 5, 5], np.float32))
    assert steps.entropy_bits(vector) == pytest.approx(0.5)


def test_catch_ups_are_written(tmp_path, monkeypatch, capfd):
    real = layouts.get
    small = layouts.Adapter("t5-base-r16", "small", SMALL)
    monkeypatch.setattr(layouts, "get", lambda name: small if "t5" in name else real(name))
    vectors = {
        "one": cf.TaskVector.from_dict(
            {"x.lora_A": np.ones((4, 40), "f4"), "head": np.ones(3, "f4")}
        )
    }
    steps.run(tmp_path, "test", vectors, quick=True)
    rows = read(tmp_path / "steps.csv")
    assert {row["adapter"] for row in rows} == {"real, MiniLM", "small"}
    assert {row["num_parameters"] for row in rows} == {"160", "6400"}
    assert "| small | 0.05 | all |" in (tmp_path / "steps.md").read_text()


def test_progress_is_lines_where_there_is_no_terminal(capfd):
    with results.Progress("work", 2) as progress:
        progress.step("one", 1)
        progress.step("two", 1)
    assert capfd.readouterr().err == "work: one\nwork: two\n"


def test_labels_do_not_cover_each_other(tmp_path):
    assert codec_plot._meet((0, 0, 2, 2), (1, 1, 3, 3))
    assert not codec_plot._meet((0, 0, 1, 1), (1, 1, 3, 3))
