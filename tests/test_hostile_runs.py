"""Hostile scenario files and arguments of ``run``, ``deploy`` and ``bench``: one line, code 2."""

from __future__ import annotations

import pytest
from test_hostile_commands import ESCAPE, check_one_line

from compeft_fl.deploy import deployment
from compeft_fl.runs import display

HUGE = "9" * 5000
SCENARIOS = {
    "digits": f"[run]\nrounds = {HUGE}",
    "hexadecimal": "[run]\nrounds = 0x" + "f" * 5000,
    "a number for a float": "[run]\ndensity = 1" + "0" * 400,
    "a scale": "[run]\nscale = 1" + "0" * 400,
    "brackets": "[run]\nrounds = " + "[" * 50_000,
    "a key": '[run]\n"x\\u001b[2J" = 1',
    "a table": '["run\\u009b"]\nx = 1',
    "a text": '[run]\nmodel = "x\\u001b[2J"',
    "a path": '[run]\ndata = "x\\u0000"',
    "json": "[run]\npeft-options = '" + "[" * 50_000 + "'",
    "json's digits": '[run]\nstrategy-options = \'{"x": ' + HUGE + "}'",
    "peft": "[run]\npeft.r = 1" + "0" * 400,
    "nodes": "[simulation]\nnum-supernodes = 1" + "0" * 400,
    "nan": "[simulation]\nclient-resources-num-gpus = nan",
    "not utf-8": b"[run]\nmodel = '\xff'",
}


@pytest.mark.parametrize("kind", SCENARIOS)
@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_hostile_scenario(kind, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = SCENARIOS[kind]
    file = tmp_path / f"s{ESCAPE}.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_one_line(capsys, command, file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["run", "deploy"])
@pytest.mark.parametrize(
    "argument",
    [
        f"rounds={HUGE}", f"x{ESCAPE}=1", f"model={ESCAPE}", "out=a\0b", "model=\udcff", "=1",
        f"none{ESCAPE}.toml", "rounds=0x" + "f" * 5000, "max-length=" + "[" * 50_000, "scale=1e999",
        "num-supernodes=0", "a=1=2", "min-nodes=-1", "peft-method=\udcff",
    ],
)  # fmt: skip
def test_hostile_arguments_of_a_run(command, argument, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_one_line(capsys, command, argument)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"run": 1, "simulation": 2}',
     f'{{"run": {{"rounds": {HUGE}}}, "simulation": {{}}}}',
     "[" * 100_000, '{"run": {"x\\u001b": 1}, "simulation": {}}', '{"run": [], "simulation": {}}'],
)  # fmt: skip
def test_a_hostile_folder_to_resume(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / f"run{ESCAPE}"
    run.mkdir()
    (run / "scenario.json").write_text(content)
    check_one_line(capsys, "run", "--resume", run)


@pytest.mark.parametrize(
    "line",
    [
        ["deploy", "--mbit", "x\x1b"], ["deploy", "--mbit", "-1"], ["deploy", "--mbit", "nan"],
        ["deploy", "--mbit", "0"], ["deploy", "--latency", "-5"], ["deploy", "--latency", "inf"],
        ["deploy", "--latency", "nan"], ["bench"], ["bench", "nothing\x1b"],
        ["bench", "learning", "--seeds", "x\x1b"], ["bench", "learning", "--seeds", HUGE],
        ["bench", "learning", "--settings", "none\x1b"], ["bench", "learning", "--workers", "0"],
        ["bench", "learning", "--workers", "-3"], ["bench", "learning", "--workers", HUGE],
        ["bench", "codecs", "--taus", "none\x1b"], ["bench", "codecs", "--only", "none\x1b"],
        ["bench", "merge", "--out", "file/beside"], ["run", "--out", "file"],
        ["run", "--out", "a\0b"], ["run", "a.toml", "b.toml\x1b"], ["run", "--resume", "none\x1b"],
        ["warm"], ["inspect", "file", "--max-parameters", "x\x1b"],
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(line, tmp_path, monkeypatch, capsys):
    """None of these starts anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    for start in (display.launch.simulate, deployment.deploy):
        monkeypatch.setattr(f"{start.__module__}.{start.__name__}", None)
    check_one_line(capsys, *line)
