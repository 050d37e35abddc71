"""`compeft-fl run` for real: Flower's simulation engine, with Ray, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks.model import load_adapter
from compeft_fl.cli.main import main
from compeft_fl.runs import launch

ROUNDS = 8
WEIGHTS = "adapter_model.safetensors"


ONE_AT_A_TIME = f"client-resources-num-cpus={min(2, os.cpu_count() or 1)}"  # a client less to start


class Watched:
    """`compeft-fl run` in a process, and every process that comes of it."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.family: dict[int, psutil.Process] = {}
        self.folder = folder
        out = [] if "--resume" in arguments else ["--out", str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "compeft_fl.cli", "run", *arguments, *out],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while self.process.poll() is None:
            try:
                parent = psutil.Process(self.process.pid)
                for child in parent.children(recursive=True):
                    self.family.setdefault(child.pid, child)
            except psutil.NoSuchProcess:
                return
            time.sleep(0.1)

    def wait_for(self, file: str, text: str, times: int = 1) -> None:
        """Until a file of the run's folder has a text so many times."""
        while self.process.poll() is None:
            for found in self.folder.glob(f"latest/{file}"):
                if found.read_text(encoding="utf-8").count(text) >= times:
                    return
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        """Exit code and output."""
        out, err = self.process.communicate(timeout=240)
        self._watch.join()
        return self.process.returncode, out, err

    def left(self) -> list[str]:
        """The processes that are still there."""
        found = []
        for process in self.family.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return found

    def one(self, argument: str) -> psutil.Process:
        """The one process that was started with an argument."""
        found = []
        for process in list(self.family.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if argument in process.cmdline():
                    found.append(process)
        (process,) = found
        return process

    def programs(self) -> int:
        return len(self.family)


@pytest.fixture(scope="module")
def scenario(tiny_config, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("scenario") / "tiny.toml"
    file.write_text(
        f"""
[run]
model = "{tiny_config.model}"
data = "{tiny_config.data}"
rounds = {ROUNDS}
local-steps = 3
batch-size = 8
alpha = 1.0
device = "cpu"

[simulation]
num-supernodes = 2
""",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def whole(scenario, tmp_path_factory) -> tuple[Watched, tuple[int, str, str]]:
    """A run that nobody disturbed, and how it ended."""
    run = Watched(str(scenario), folder=tmp_path_factory.mktemp("whole"))
    return run, run.end()


def home_of(log: Path) -> Path:
    """The private Flower home, which a run's log names."""
    found = re.search(r"installed compeft-fl-run to (\S+)/apps/", log.read_text(encoding="utf-8"))
    assert found
    return Path(found[1])


@pytest.mark.ray
def test_a_run_completes_and_leaves_nothing_but_its_folder(whole, tiny_config):
    run, (code, out, err) = whole
    assert (code, err) == (0, "")
    assert run.programs() > 5  # the SuperLink, the simulation, Ray's
    assert run.left() == []
    folder = (run.folder / "latest").resolve()
    assert folder.name.startswith("tiny-")
    assert not home_of(folder / launch.LOG_FILE).exists()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["rounds"], summary["nodes"]) == (ROUNDS, 2)
    assert summary["replies"] == [2] * ROUNDS
    assert f"round  {ROUNDS}/{ROUNDS}  accuracy" in out
    assert "2 nodes" in out
    assert "done in" in out
    assert "dense float32 would take" in out
    assert load_adapter(folder / "adapter", tiny_config.model, "cpu").labels


@pytest.mark.ray
def test_a_run_that_fails_says_why_and_leaves_nothing(scenario, tmp_path):
    wrong = ("learning-rate=1e30", "rounds=2")
    run = Watched(str(scenario), *wrong, ONE_AT_A_TIME, folder=tmp_path)
    code, out, err = run.end()
    assert code == 1
    assert run.left() == []
    assert "no reply of any node could be used" in err
    assert "the loss became" in err
    assert "Flower's log: " in err
    assert "is set aside" in out
    assert "Traceback" not in out + err


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code", "file", "text"),
    [
        (signal.SIGINT, 130, "progress.jsonl", '"event": "sent"'),
        (signal.SIGTERM, 143, launch.SUPERLINK_LOG_FILE, "Uvicorn running"),
        (signal.SIGHUP, 129, launch.SUPERLINK_LOG_FILE, "Uvicorn running"),
    ],
)
def test_a_run_can_be_stopped(scenario, tmp_path, number, code, file, text):
    run = Watched(str(scenario), "rounds=1000", ONE_AT_A_TIME, folder=tmp_path)
    run.wait_for(file, text)
    run.process.send_signal(number)
    found, _, err = run.end()
    assert found == code
    assert run.left() == []
    assert "stopped; what there is lies in" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*/summary.json"))


@pytest.mark.ray
@pytest.mark.faults
def test_a_run_whose_command_is_killed_leaves_nothing_and_is_resumed_to_the_same_bytes(
    scenario, whole, tmp_path, fault_seen
):
    """kill -9: its children notice, and so does the folder with Flower's state."""
    run = Watched(str(scenario), ONE_AT_A_TIME, folder=tmp_path)
    run.wait_for("progress.jsonl", '"event": "score", "time"', 3)  # the start's, and two rounds'
    home = Path(run.one("--simulation").environ()["FLWR_HOME"])
    assert home.exists()
    run.process.kill()
    code, _, _ = run.end()
    assert code == -signal.SIGKILL
    psutil.wait_procs(list(run.family.values()), timeout=60)
    assert run.left() == []
    assert not home.exists()

    folder = (tmp_path / "latest").resolve()
    assert not (folder / "summary.json").exists()
    assert list(folder.glob("checkpoints/*.safetensors"))
    resumed = Watched("--resume", str(folder), folder=tmp_path)
    code, out, err = resumed.end()
    assert (code, err) == (0, ""), out
    undisturbed = (whole[0].folder / "latest").resolve()
    weights = [load_file(each / "adapter" / WEIGHTS) for each in (undisturbed, folder)]
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name], err_msg=name)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (undisturbed, folder)]
    for key in ("accuracy", "uplink_payload_bytes"):
        assert summaries[0][key] == summaries[1][key]
    log = (folder / launch.LOG_FILE).read_text(encoding="utf-8")
    said = next(line for line in log.splitlines() if "Going on after round" in line)
    fault_seen(
        "kill -9 of the command of a simulation, `compeft-fl run --resume`",
        said[said.index("Going on") :],
        "all it had started ends; resumed, the bytes, accuracy and traffic of the undisturbed run",
    )


@pytest.mark.ray
def test_a_run_whose_superlink_dies_says_so_and_leaves_nothing(scenario, tmp_path):
    run = Watched(str(scenario), "rounds=1000", folder=tmp_path)
    run.wait_for(launch.SUPERLINK_LOG_FILE, "StreamLogs")
    run.one("--simulation").kill()
    code, _, err = run.end()
    assert code == 1
    assert "error: the SuperLink ended, exit code -9" in err
    assert run.left() == []


def test_wrong_arguments_stop_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["round=3"], 'unknown key "round": did you mean "rounds"'),
        (["rounds=many"], 'rounds: expected integer, found "many"'),
        (["no.toml"], "no.toml cannot be read"),
        (["a.toml", "b.toml"], "expected one scenario file, found a.toml and b.toml"),
        (["strategy=compressed:FedAdm"], 'did you mean "FedAdam"'),
        (["peft-method=lorra"], 'did you mean "lora"'),
        (["data=no.jsonl"], "data: no file no.jsonl"),
    ):
        assert main(["run", *arguments]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.startswith("compeft-fl run: error: ")
        assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_keys_are_listed(capsys):
    assert main(["run", "--keys"]) == 0
    out = capsys.readouterr().out
    for name in ("learning-rate", "peft.lora_alpha", "num-supernodes", "golomb"):
        assert name in out


def test_the_app_is_a_folder_of_names(tmp_path):
    config = AppConfig(scenario='odd "name"\\', alpha=1e-05, scale=2.0, error_feedback=False)
    launch.write_app(tmp_path / "app", config)
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["pyproject.toml"]
    found = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))
    app = found["tool"]["flwr"]["app"]
    assert AppConfig.from_run_config(app["config"]) == config
    assert app["components"]["clientapp"] == "compeft_fl.app.client_app:app"


def test_flower_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    session = launch.FlowerSession(tmp_path / "log")
    with pytest.raises(launch.FlowerError, match="flower-superlink is not installed"):
        session.__enter__()
    assert not session.home.exists()


def test_a_superlink_that_ends_at_once_is_an_error(tmp_path, monkeypatch):
    program = tmp_path / "flower-superlink"
    program.write_text("#!/bin/sh\necho no room here; exit 3\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with (
        pytest.raises(launch.FlowerError, match=r"does not start; .*log ends: no room here"),
        launch.FlowerSession(tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_flower_that_does_not_start_is_a_failed_run(command, tmp_path, monkeypatch, capsys):
    """Exit code 1 and not 2: nothing is wrong with the arguments."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([command, "rounds=1", "--out", str(tmp_path / "runs")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"compeft-fl {command}: error: flower-superlink is not ")
    assert "Flower's log: " in err


def test_the_last_line_of_a_log_is_plain(tmp_path):
    log = tmp_path / "log"
    assert launch.last_line(log) == ""
    log.write_text("first\n\x1b[92mINFO \x1b[0m:  last\n\n", encoding="utf-8")
    assert launch.last_line(log) == "INFO :  last"


def test_ray_has_room_for_its_sockets(monkeypatch):
    monkeypatch.setattr(launch.tempfile, "tempdir", "/tmp/" + "long/" * 20)
    assert launch._temporary_folder() == "/tmp"
    monkeypatch.setattr(launch.tempfile, "tempdir", "/tmp/short")
    assert launch._temporary_folder() == "/tmp/short"
