"""`make faults`: a whole run and all its processes, killed with kill -9, and resumed.

That the command alone is killed is in test_launch, for `make test`. Parts of a deployment are
killed in test_faults_deployed; broken files and disks, other starts and hostile replies are in
test_faults_local, and each part's own faults in the part's tests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

# Three runs, of half a minute on an idle machine.
pytestmark = [pytest.mark.slow_faults, pytest.mark.timeout(900)]

_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_stays():
    """A run that a failed test has left ends in order."""
    yield
    for process in _started:
        if process.poll() is None:
            process.terminate()
        process.communicate()
    _started.clear()


def start(*arguments: str, folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "compeft_fl.cli", "run", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


def scored(folder: Path) -> int:
    """The last round that the run in a folder has scored; -1: none."""
    rounds = [-1]
    for file in folder.glob("latest/progress.jsonl"):
        events = (json.loads(line) for line in file.read_text().splitlines())
        rounds += [event["round"] for event in events if event["event"] == "score"]
    return max(rounds)


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 of a process and of all that came of it, as if the machine had gone."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    while family:
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        _, family = psutil.wait_procs(family, timeout=5)
    process.communicate()


def homes_of(process: subprocess.Popen) -> set[Path]:
    """The private Flower homes that a run's processes work in."""
    found = set()
    for member in psutil.Process(process.pid).children(recursive=True):
        try:
            home = member.environ().get("FLWR_HOME")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if home:
            found.add(Path(home))
    return found


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "latest" / "adapter" / "adapter_model.safetensors")


def test_a_run_that_was_killed_is_resumed_to_the_same_bytes(tiny_config, tmp_path, fault_seen):
    scenario = tmp_path / "tiny.toml"
    scenario.write_text(
        f"""
[run]
model = "{tiny_config.model}"
data = "{tiny_config.data}"
rounds = 12
local-steps = 3
batch-size = 8
alpha = 1.0
device = "cpu"

[simulation]
num-supernodes = 2
""",
        encoding="utf-8",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(str(scenario), "--out", str(whole), folder=tmp_path)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, ""), out

    homes = set(Path(tempfile.gettempdir()).glob("cfl-*"))
    process = start(str(scenario), "--out", str(broken), folder=tmp_path)
    until = time.monotonic() + 240
    while scored(broken) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None
    own = homes_of(process)
    kill_all(process)
    for home in own - homes:  # which a launcher that was killed could not remove
        shutil.rmtree(home, ignore_errors=True)
    run = (broken / "latest").resolve()
    assert not (run / "summary.json").exists()
    assert list(run.glob("checkpoints/*.safetensors"))

    resumed = start("--resume", str(run), folder=tmp_path)
    out, err = resumed.communicate(timeout=240)
    assert (resumed.returncode, err) == (0, ""), out
    before, after = weights(whole), weights(broken)
    assert list(before) == list(after)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    summaries = [json.loads((f / "latest" / "summary.json").read_text()) for f in (whole, broken)]
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    assert summaries[0]["uplink_payload_bytes"] == summaries[1]["uplink_payload_bytes"]
    log = (run / "flower.log").read_text(encoding="utf-8")
    said = next(line for line in log.splitlines() if "Going on after round" in line)
    fault_seen(
        "kill -9 of a whole simulation, `compeft-fl run --resume`",
        said.partition("Going")[1] + said.partition("Going")[2],
        "goes on from the checkpoint; the bytes, accuracy and traffic of the undisturbed run",
    )  # fmt: skip
