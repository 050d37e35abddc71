"""The project itself: what lies where, what is exported, what is packed, and its map."""

from __future__ import annotations

import ast
import doctest
import importlib
import linecache
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import compeft_fl
import compeft_fl.strategies

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAP = (ROOT / "compeft_fl" / "README.md").read_text()
GENERATED = {
    "compeft_fl.experts.v1.experts_pb2",
    "compeft_fl.experts.v1.experts_pb2_grpc",
    "compeft_fl.wire.v1.update_pb2",
}
MAX_LINES = 450


def modules():
    """The name of each module that is written by hand."""
    names = []
    for package in (compeft_fl,):
        found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        names += [package.__name__, *(info.name for info in found)]
    return [name for name in names if name not in GENERATED]


def sources(*folders):
    """Each Python file written by hand below some folders."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [file for file in files if not file.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


# --- layout -----------------------------------------------------------------------------------


def tracked(*options):
    """What git lists of this clone; None where it is none."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "ls-files", *options]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {Path(line) for line in listed.splitlines()}


def test_the_top_level_is_the_designs():
    files = tracked("--cached", "--others", "--exclude-standard")
    if files is None:
        pytest.skip("not a clone")
    assert {file.parts[0] for file in files} == {
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "compeft_fl",
        "constraints.txt",
        "proto",
        "pyproject.toml",
        "simulations",
        "strategies",
        "tests",
    }


def test_files_are_short():
    folders = ("compeft_fl", "strategies", "simulations", "tests")
    lines = {file: len(file.read_text().splitlines()) for file in sources(*folders)}
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_each_module_has_a_docstring():
    assert [name for name in modules() if not importlib.import_module(name).__doc__] == []


def test_all_names_what_is_there():
    for name in modules():
        module = importlib.import_module(name)
        exported = getattr(module, "__all__", [])
        assert list(exported) == sorted(set(exported), key=_isort_key), name
        assert [entry for entry in exported if not hasattr(module, entry)] == [], name


def _isort_key(name):
    """Constants, then classes, then the rest: ruff's order."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


@pytest.mark.parametrize("package", [compeft_fl, compeft_fl.strategies])
def test_all_is_what_is_exported(package):
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name not in {"annotations"}
    }
    modules_named = {n for n in package.__all__ if isinstance(vars(package)[n], types.ModuleType)}
    assert set(package.__all__) - modules_named == public


def test_the_library_asks_only_flowers_public_modules():
    public = {"flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    public |= {"flwr.clientapp.mod"}  # from which apps import Flower's mods
    for file in sources("compeft_fl", "strategies"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            private = [n for n in names if n.split(".")[0] == "flwr" and n not in public]
            assert not private, f"{file}, line {node.lineno}: {private[0]}"


def test_importing_the_library_is_light():
    program = """
import sys
import flwr.app, flwr.clientapp, flwr.serverapp, flwr.serverapp.strategy
before = set(sys.modules)
import compeft_fl, compeft_fl.mod, compeft_fl.strategies
import compeft_fl.adapters, compeft_fl.app.client_app, compeft_fl.cli.main
import compeft_fl.experts.serving
heavy = {"torch", "transformers", "peft", "matplotlib", "rich", "datasets", "pandas", "ray"}
heavy |= {"numba", "scipy"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", modules())
@pytest.mark.usefixtures("examples_leave_nothing")
def test_examples_in_docstrings_run(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(verbose=False)
    known = {"np": np, "cf": compeft_fl}
    linecache.clearcache()  # doctest looks after each file of torch's in it
    for test in finder.find(importlib.import_module(name), extraglobs=known):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_each_make_target_knows_how():
    for target in re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_map_is_the_tree():
    (tree,) = re.findall(r"^```text\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)
    stack: list[str] = []
    listed = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, says = line.strip().partition(" ")
        assert says.strip(), line
        stack[depth:] = [name]
        path = Path("".join(stack))
        inside = path if path.parts[0] == "strategies" else "compeft_fl" / path
        assert (ROOT / inside).exists(), inside
        listed.add(inside)
    written = {file.relative_to(ROOT) for file in sources("compeft_fl", "strategies")}
    shown = {path for path in written & (tracked() or written) if path.name != "__init__.py"}
    rooms = {path.parent for path in written if len(path.parts) == 3} | {Path("strategies")}
    assert (shown | rooms) - listed == set()


def test_the_rooms_of_the_map_are_the_layers():
    (tree,) = re.findall(r"^```text\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)
    floors = [line.split()[0] for line in tree.splitlines() if not line.startswith(" ")]
    named = [re.sub(r"(/|\.py)$", "", floor) for floor in floors]
    (contract,) = (
        each for each in PROJECT["tool"]["importlinter"]["contracts"] if each["type"] == "layers"
    )
    layers = [name for layer in contract["layers"] for name in re.split(r" [|:] ", layer)]
    assert sorted(named) == sorted(set(layers) | {"mod"})
    assert [name for name in named if name in layers] == layers


# --- packaging --------------------------------------------------------------------------------


def test_the_version_is_said_once():
    assert compeft_fl.__version__ == PROJECT["project"]["version"]


def test_each_requirement_has_a_pin_that_fits():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        if requirement.name != "compeft-fl":
            assert requirement.specifier.contains(pins[requirement.name]), text
