"""The learning benchmark's table says what its runs say."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.bench import learning, learning_report
from compeft_fl.bench.federation import Setting
from compeft_fl.bench.sweep import Job, _packed
from compeft_fl.cli.main import main

LAYOUT = cf.Layout([cf.TensorSpec("a", (32, 16)), cf.TensorSpec("b", (16, 32))])


def stored(folder, setting, seed, accuracy, up, down, updates=()) -> dict:
    """A run's files, as a sweep leaves them."""
    job = Job(setting, seed, 2)
    rounds = [
        {"accuracy": value, "loss": 1 - value, "up": up if i else 0, "down": down if i else 0}
        for i, value in enumerate(accuracy)
    ]
    layout = [[t.name, list(t.shape)] for t in LAYOUT.tensors]
    result = {
        "job": job.plain(), "num_parameters": 1024, "layout": layout, "cpu_seconds": 60.0,
        "rounds": rounds,
    }  # fmt: skip
    job.file(folder).write_text(json.dumps(result), encoding="utf-8")
    (folder / f"{job.key}.updates").write_bytes(b"".join(updates))
    found = job.finished(folder)
    assert found is not None
    return found


def ternary(seed: int) -> cf.TernaryVector:
    values = np.random.default_rng(seed).standard_normal(1024).astype(np.float32)
    return cf.compress(cf.TaskVector(LAYOUT, values), 0.1)


@pytest.fixture
def runs(tmp_path) -> list[dict]:
    """Dense and compressed runs of two seeds; the compressed ones gain one round later."""
    dense = Setting("dense-fp32", "dense", "dense")
    ours = Setting("compeft-0.1", "golomb", "golomb", 0.1, 0.2)
    found = []
    for seed, more in ((1, 0.0), (2, 0.02)):
        found.append(
            stored(tmp_path, dense, seed, [0.5, 0.6 + more, 0.7 + more, 0.7 + more], 8192, 8192)
        )
        blobs = [cf.encode(ternary(10 * seed + i), layout_by_id=True) for i in range(3)]
        updates = [_packed(i + 1, "up", 2, blob) for i, blob in enumerate(blobs)]
        size = 2 * len(blobs[0])
        found.append(stored(tmp_path, ours, seed, [0.5, 0.55, 0.6, 0.71 + more], size, 0, updates))
    return found


def test_the_table_and_the_files(runs, tmp_path, capsys):
    rows = learning_report.write(tmp_path, "the command", runs, tmp_path)
    cells = {(row[0], row[1]): dict(zip(learning_report.HEADS[2:5], row[2:5], strict=True)) | {
        "up": row[5], "up part": row[6], "both part": row[8],
        "round": row[9], "up goal": row[10], "both goal": row[11],
    } for row in rows}  # fmt: skip
    dense = cells["dense-fp32", "dense"]
    assert dense["accuracy"] == "71.0 ± 1.4 %"
    assert (dense["up"], dense["up part"], dense["both part"]) == ("24.6 kB", "1/1.0", "1/1.0")
    assert (dense["round"], dense["up goal"]) == ("2", "1/1.0")
    ours = cells["compeft-0.1", "golomb"]
    assert ours["accuracy"] == "72.0 ± 1.4 %"
    assert ours["round"] == "3"
    assert float(ours["up part"][2:]) == pytest.approx(3 * 8192 / _sent(runs), rel=0.01)
    assert float(ours["up goal"][2:]) == pytest.approx(2 * 8192 / _sent(runs), rel=0.01)
    assert float(ours["both goal"][2:]) == pytest.approx(4 * 8192 / _sent(runs), rel=0.01)
    # The same updates over other codecs: the same accuracy, other bytes.
    assert cells["compeft-0.1", "bitmask"]["accuracy"] == ours["accuracy"]
    said = capsys.readouterr().out
    assert "compeft-0.1 against dense-fp32, 2 seeds: +1.0 points of accuracy (+1.0, +1.0)" in said

    with (tmp_path / "learning.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    last = [r for r in found if (r["codec"], r["seed"], r["round"]) == ("golomb", "1", "3")]
    assert [int(r["up_bytes"]) for r in last] == [3 * runs[1]["rounds"][1]["up"]]
    assert (tmp_path / "learning.png").stat().st_size > 20_000
    text = (tmp_path / "learning.md").read_text(encoding="utf-8")
    assert text.startswith("`the command`: compeft-fl ")


def _sent(runs) -> float:
    return np.mean([3 * run["rounds"][1]["up"] for run in (runs[1], runs[3])])


def test_bytes_over_another_codec_are_those_of_the_same_updates(runs, tmp_path):
    curves = {curve.codec: curve for curve in learning_report.curves_of(runs[1], tmp_path)}
    sizes = [2 * len(cf.encode(ternary(10 + i), "bitmask", layout_by_id=True)) for i in range(3)]
    assert curves["bitmask"].up == [0, *np.cumsum(sizes).tolist()]
    assert curves["bitmask"].down == [0, 0, 0, 0]


def test_a_setting_that_never_gets_there_has_no_bytes_to_show(runs, tmp_path):
    weak = stored(tmp_path, Setting("weak", "golomb", "golomb", 0.1), 1, [0.5, 0.5, 0.5, 0.6], 9, 9)
    rows = learning_report.write(tmp_path, "c", [*runs, weak], tmp_path)
    assert next(row[9:] for row in rows if row[0] == "weak") == ["-", "-", "-"]


def test_the_settings_have_names_of_their_own():
    names = [setting.name for setting in learning.settings()]
    assert len(set(names)) == len(names)
    assert names[0] == learning_report.BASELINE
    keys = [job.key for job in learning.jobs_of(quick=False)]
    assert len(set(keys)) == len(keys)
    assert {"dense-fp32-44", "compeft-0.1-44"} <= set(keys)
    assert set(learning.QUICK) <= set(names)


def test_what_cannot_be_is_said(tmp_path, capsys):
    for arguments, message in (
        (["--settings", "compeft-0.3"], "expected a setting among dense-fp32, compeft-0.1"),
        (["--seeds", "a"], "--seeds: expected numbers as in 42,43; found a"),
        (["--report"], "no finished run in "),
    ):
        assert main(["bench", "learning", "--out", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err
