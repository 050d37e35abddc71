"""What others install: source archive, wheel, Flower's app bundle; and apps with names of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import compeft_fl
from compeft_fl.runs.launch import LOG_FILE, FlowerSession

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = Path(sys.executable).parent


def sources():
    """The path of each Python file of the package, as it is imported."""
    ours = [file.relative_to(ROOT) for file in (ROOT / "compeft_fl").rglob("*.py")]
    rules = ["compeft_fl" / file.relative_to(ROOT) for file in (ROOT / "strategies").glob("*.py")]
    return {path.as_posix() for path in [*ours, *rules] if "__pycache__" not in path.parts}


def imported_from(folder):
    """Where the public import paths come from, in a process that has `folder` first."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import compeft_fl, compeft_fl.mod, compeft_fl.strategies, compeft_fl.adapters
import compeft_fl.app.server_app, compeft_fl.app.client_app
for module in (compeft_fl, compeft_fl.mod, compeft_fl.strategies, compeft_fl.adapters):
    print(module.__file__)
assert compeft_fl.strategies.ComPEFTAverage().accumulator
assert "strategies" not in sys.modules
"""
    command = [sys.executable, "-I", "-c", program, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A wheel, and the source archive that it is built from: no network is asked."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


def test_the_wheel_has_one_top_level(packed):
    names = zipfile.ZipFile(packed[1]).namelist()
    assert {name.split("/")[0] for name in names} == {
        "compeft_fl",
        f"compeft_fl-{compeft_fl.__version__}.dist-info",
    }
    assert {name for name in names if name.endswith(".py")} == sources()
    assert "compeft_fl/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert len(names) == len(set(names))


def test_the_wheel_is_imported_from_itself(packed, tmp_path):
    zipfile.ZipFile(packed[1]).extractall(tmp_path)
    assert [tmp_path in file.parents for file in imported_from(tmp_path)] == [True] * 4


def test_the_source_archive_has_what_a_clone_has(packed):
    with tarfile.open(packed[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "Makefile", "pyproject.toml", "constraints.txt", "LICENSE"} <= names
    assert {"strategies/ties.py", "tests/conftest.py", "proto/FORMAT.md"} <= names
    assert not [name for name in names if name.startswith("compeft_fl/strategies")]  # twice


LEFT_OUT = (
    ".venv/lib/python3/site-packages/other/module.py",
    "build/lib/compeft_fl/mod.py",
    "runs/latest/rows.jsonl",
    "simulations/bench.py",
    "tests/test_app.py",
    "compeft_fl/app/__pycache__/config.cpython-311.pyc",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Flower's bundle of the ready-made app, as ``flwr build`` makes it.

    It is made of the package's own files, and of one where each thing lies that must stay out: to
    walk over all of a checkout's .venv takes five seconds.
    """
    folder = tmp_path_factory.mktemp("bundle")
    checkout = folder / "checkout"
    shutil.copytree(
        ROOT / "compeft_fl",
        checkout / "compeft_fl",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copytree(
        ROOT / "strategies", checkout / "strategies", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, checkout / name)
    for name in LEFT_OUT:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("", encoding="utf-8")
    environment = {**os.environ, "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"}
    command = [PROGRAMS / "flwr", "build", "--app", checkout]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.fab")
    return file


def test_the_flower_bundle_has_what_the_app_needs(bundle):
    assert bundle.stat().st_size < 5_000_000
    names = set(zipfile.ZipFile(bundle).namelist())
    needed = {path.replace("compeft_fl/strategies/", "strategies/") for path in sources()}
    needed |= {f.relative_to(ROOT).as_posix() for f in (ROOT / "compeft_fl").rglob("*.jsonl")}
    assert needed <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/", ".venv/", "build/"))]
    assert not names & set(LEFT_OUT)


def test_the_flower_bundle_is_imported_from_itself(bundle, tmp_path):
    zipfile.ZipFile(bundle).extractall(tmp_path)
    assert not (tmp_path / "compeft_fl" / "strategies").exists()  # Flower leaves links out
    assert [tmp_path in file.parents for file in imported_from(tmp_path)] == [True] * 4


def test_flower_is_taken_up_to_the_next_major_release():
    (flwr,) = (r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "flwr")
    assert flwr.specifier.contains("1.39.0")
    assert flwr.specifier.contains("1.99.0")
    extras = PROJECT["project"]["optional-dependencies"]
    (grpc,) = (Requirement(text) for text in extras["grpc"])
    assert grpc.specifier.contains("1.39.0")
    assert not grpc.specifier.contains("1.40.0")
    assert "grpc" in Requirement(extras["dev"][0]).extras  # what `make install` takes


# --- an app with names of ours ----------------------------------------------------------------

APP = {
    "pyproject.toml": """\
[project]
name = "crowded"
version = "1.0.0"
description = "An app whose folder has names of this project's"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "app:server_app"
clientapp = "app:client_app"
""",
    "strategies/__init__.py": """\
from flwr.serverapp.strategy import FedAvg


class MyStrategy(FedAvg):
    pass
""",
    "mod.py": "DENSITY = 0.5\n",
    "tasks/__init__.py": "",
    "tasks/model.py": "SIZE = 2000\n",
    "server.py": "ROUNDS = 2\n",
    "client.py": "STEP = 0.5\n",
    "app.py": """\
import numpy as np
from client import STEP
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import Compressed
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from mod import DENSITY
from server import ROUNDS
from strategies import MyStrategy
from tasks.model import SIZE

server_app = ServerApp()
client_app = ClientApp(mods=[CompressionMod(density=DENSITY)])


@client_app.train()
def train(message, context):
    weights = message.content["arrays"]["w"].numpy()
    arrays = ArrayRecord({"w": Array((weights + STEP).astype(np.float32))})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid, context):
    strategy = Compressed(MyStrategy(fraction_evaluate=0.0, min_available_nodes=2))
    start = ArrayRecord({"w": Array(np.zeros(SIZE, np.float32))})
    result = strategy.start(grid, start, num_rounds=ROUNDS)
    print("the mean is", round(float(result.arrays["w"].numpy().mean()), 3), flush=True)
""",
}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_app_may_have_names_of_ours(tmp_path):
    """Its own strategies, app, mod, tasks, server and client take nobody's place."""
    for name, text in APP.items():
        file = tmp_path / "crowded" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    log = tmp_path / LOG_FILE
    with FlowerSession(tmp_path / "superlink.log") as session:
        one_at_a_time = {"client-resources-num-cpus": min(2, os.cpu_count() or 1)}
        run = session.submit(tmp_path / "crowded", {"num-supernodes": 2, **one_at_a_time})
        session.stream_log(run, log).wait(300)  # ends with the run
        while not (status := session.status(run)[0]).startswith("finished"):
            time.sleep(0.5)
    said = log.read_text(encoding="utf-8")
    assert status == "finished:completed", said
    assert "the mean is" in said
    assert 0.25 <= float(said.partition("the mean is ")[2].split()[0]) <= 1.0
