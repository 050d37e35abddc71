"""Fixtures of the app's tests: a tiny model and data on disk, and the embedded MiniLM.

Everything is offline, and what is made once a session is left as it was by every test.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import language_models
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices gain nothing from more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes has C++ compiled for one call

WORDS = {
    "animals": ["cat", "dog", "horse", "cow", "sheep", "bird", "fish"],
    "colours": ["red", "green", "blue", "yellow", "black", "white", "brown"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven"],
}

_LONGEST_ID = 200

gc.disable()  # until all is imported, see _modules


def pytest_configure(config: pytest.Config) -> None:
    """Workers of a whole run need PEFT sooner or later: it is imported as the app does it."""
    if "PYTEST_XDIST_WORKER" in os.environ and "not models" not in config.option.markexpr:
        from compeft_fl.app.imports import import_peft

        import_peft()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if "not models" in config.option.markexpr and collection_path.name.startswith("test_"):
        return kinds.is_of_models(collection_path) or None
    return None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    for item in items:
        kinds.mark(item)
    if session.config.getoption("loadgroup", False):
        kinds.longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes a file at a time: what a file or its fixtures make is made once."""
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group: str = super()._split_scope(nodeid)
            return group.partition("::")[0]

    return ByFile(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_make_parametrize_id(val: object) -> str | None:
    """A megabyte of zeros is not spelled out in a test's name, which workers tell many times."""
    if not isinstance(val, str | bytes) or len(val) <= _LONGEST_ID:
        return None
    return f"{val[:20]!r} and so on, {len(val)} in all"


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()
    _modules[0], _blocks[0] = len(sys.modules), sys.getallocatedblocks()
    _groups_hold(session)


def _groups_hold(session: pytest.Session) -> None:
    """Groups hold: an xdist that does not know this pytest leaves them out without a word."""
    if session.config.getoption("loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(f"expected a group in the id of {item.nodeid}, found none")


_modules = [0]  # how many there were when their objects were put aside
_blocks = [sys.maxsize]  # of memory then


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What modules hold is no garbage: to look through PEFT's takes half a second each time.

    Nor is what they come to hold: the tasks that lm-eval reads, a quarter of one.
    """
    if len(sys.modules) > _modules[0] + 200 or sys.getallocatedblocks() > _blocks[0] + 500_000:
        gc.collect()
        gc.freeze()
        _modules[0], _blocks[0] = len(sys.modules), sys.getallocatedblocks()


@pytest.fixture(scope="session")
def _states() -> Iterator[str]:
    """A folder in memory, where there is room: what nodes remember is synced to disk each time."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(prefix="cfl-", dir=memory if roomy else None) as folder:
        yield folder


@pytest.fixture(autouse=True)
def _state_dir(_states, monkeypatch) -> Iterator[None]:
    """What nodes remember lies in a folder of each test."""
    folder = tempfile.mkdtemp(dir=_states)
    monkeypatch.setenv("COMPEFT_FL_STATE_DIR", folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def examples_leave_nothing(_states, monkeypatch) -> None:
    """Examples do not show how the folders that they make are removed."""
    monkeypatch.setattr(tempfile, "tempdir", _states)


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, str]]:
    """Texts of three classes that words tell apart: 240 to train on, 60 and 60 else."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(360):
        label = sorted(WORDS)[index % 3]
        words = [*rng.choice(WORDS[label], 3), *rng.choice(["the", "a", "of"], 2)]
        split = "train" if index < 240 else "val" if index < 300 else "test"
        text = " ".join(rng.permutation(words))
        rows.append(
            {"text": text, "label": label, "split": split, "source": f"s{rng.integers(40)}"}
        )
    return rows


@pytest.fixture(scope="session")
def tiny_data(tiny_rows, tmp_path_factory) -> Path:
    """The rows as a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_rows, tmp_path_factory) -> Path:
    """A random two-layer BERT with a tokenizer like the embedded model's, as a folder.

    Of a vocabulary of its own: most of what loads a small model is else a large one's words.
    """
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from compeft_fl.app.tasks.model import embedded_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alike = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer = alike.train_new_from_iterator([row["text"] for row in tiny_rows], 300)
    torch.manual_seed(4)  # a start that leaves something to learn
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_data, tiny_model):
    """The configuration of a run that takes a second."""
    from compeft_fl.app.config import AppConfig

    return AppConfig(
        model=str(tiny_model),
        data=str(tiny_data),
        rounds=2,
        local_steps=3,
        batch_size=8,
        alpha=1.0,
        device="cpu",
        preset="compeft",
    )


@pytest.fixture(scope="session")
def minilm():
    """The embedded MiniLM with its default adapter, over 48 rows of the embedded data a split."""
    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.tasks import data, model

    config = AppConfig(limit_rows=48, device="cpu", head="linear")
    rows = data.load(config)
    return config, rows, model.build(config, rows)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random two-layer Llama with a chat template, as a folder."""
    return language_models.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    """A random T5 of two layers, as a folder."""
    return language_models.save_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="session")
def instruct_config(tiny_llama, tmp_path_factory):
    """The configuration of an instruction run that takes seconds."""
    from compeft_fl.app.config import AppConfig

    rows = language_models.pairs(120)
    data = language_models.write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)
    return AppConfig(
        task="instruction",
        model=str(tiny_llama),
        data=str(data),
        peft={"r": 4, "target_modules": "all-linear"},
        rounds=2,
        local_steps=3,
        batch_size=8,
        max_length=96,
        alpha=1.0,
        learning_rate=0.01,
        device="cpu",
    )


_FAULTS: list[tuple[str, str, str]] = []


@pytest.fixture(scope="session")
def fault_seen():
    """Called by a test that has seen a fault through: what it was, what is logged, what follows.

    `make faults` makes a table of them: the file that COMPEFT_FL_FAULTS_TABLE names.
    """
    return lambda fault, said, outcome: _FAULTS.append((fault, said, outcome))


def pytest_sessionfinish(session, exitstatus) -> None:
    path = os.environ.get("COMPEFT_FL_FAULTS_TABLE")
    if not path or not _FAULTS:
        return
    import compeft_fl

    heads = ("| fault | what is logged | what comes of it |", "|---|---|---|")
    file, rows = Path(path), {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        if line.startswith("|") and line not in heads:  # of a run of other tests
            rows[line.split("|")[1].strip()] = line
    for fault, said, outcome in _FAULTS:
        plain = re.sub(r"(?<![\w.])/(?:[^/\s:]+/)+", "", said)  # where it lay is of no use
        rows[fault] = f"| {fault} | `{plain}` | {outcome} |".replace("\n", " ")
    about = (
        f"Written by `make faults`: compeft-fl {compeft_fl.__version__}, {platform.machine()}, "
        f"{datetime.date.today()}. Each row is from a test that has passed.\n"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([about, *heads, *rows.values()]) + "\n", encoding="utf-8")
