"""compeft_fl/server/checkpoint.py, rounds.py: a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import tiny
from flwr.serverapp.strategy import FedAdam, FedAvgM
from test_exchange import N, flat, grid_of, remembered, start

from compeft_fl.errors import StateError
from compeft_fl.exchange.node_state import NO_UPDATE
from compeft_fl.server import checkpoint
from compeft_fl.strategies import (
    CheckpointFolder,
    Checkpointing,
    ComPEFTAverage,
    ComPEFTTies,
    Compressed,
)


class Killed(BaseException):
    """The server's end, at a moment of the test's choice."""


STRATEGIES = {
    "average": lambda: ComPEFTAverage(),
    "ties": lambda: ComPEFTTies(),
    "adam": lambda: Compressed(FedAdam(eta=0.01)),
    "momentum": lambda: Compressed(FedAvgM(server_momentum=0.9)),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("moment", ["configure_train", "aggregate_train", "configure_evaluate"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(name, moment, tmp_path, monkeypatch):
    random.seed(5)  # Flower asks the nodes in a random order, which is that of its sums
    whole = start(STRATEGIES[name](), grid_of(), 5)
    monkeypatch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path / "state"))

    folder = CheckpointFolder(tmp_path / "checkpoints")
    killed = STRATEGIES[name]()
    step = getattr(killed, moment)

    def die(server_round, *args):
        if server_round == 4 - (moment == "configure_evaluate"):
            if moment == "aggregate_train":
                list(args[0])  # the nodes have trained, and their replies are gone
            raise Killed
        return step(server_round, *args)

    setattr(killed, moment, die)
    random.seed(5)
    with pytest.raises(Killed):
        start(killed, grid_of(), 5, checkpointing=Checkpointing(folder))
    random.seed(99)
    resumed = STRATEGIES[name]()
    result = start(resumed, grid_of(), 5, checkpointing=Checkpointing(folder, resume=True))
    np.testing.assert_array_equal(flat(result.arrays), flat(whole.arrays))
    assert set(result.train_metrics_clientapp) == {1, 2, 3, 4, 5}
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3, 4, 5}
    assert len(folder.files()) == 3


def test_a_new_node_id_is_known_by_what_it_sent_last(tmp_path):
    """A resumed simulation has other node ids; what the nodes remember is theirs still."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first = ComPEFTAverage(fraction_evaluate=0.0)
    start(first, grid_of(), 3, checkpointing=Checkpointing(folder))
    taken = remembered(first).trained
    grid = grid_of()
    for old in list(grid.contexts):
        grid.contexts[old + 500] = grid.contexts.pop(old)
        grid.apps[old + 500] = grid.apps.pop(old)
    second = ComPEFTAverage(fraction_evaluate=0.0)
    start(second, grid, 4, checkpointing=Checkpointing(folder, resume=True))
    fourth = second.observer.train[4]
    # Each says once what it has and what it sent last; nobody needs the whole adapter again.
    assert (fourth.replies, fourth.resyncs) == (N, N)
    assert fourth.down_bytes < N * 120
    assert remembered(second).taken == taken != NO_UPDATE


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path)
    start(ComPEFTAverage(), grid_of(), 3, checkpointing=Checkpointing(folder))
    newest, middle, oldest = folder.files()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    assert folder.load().server_round == 2
    assert "is passed over" in caplog.text
    middle.write_bytes(middle.read_bytes()[:100])
    assert folder.load().server_round == 1
    oldest.write_bytes(b"")
    with pytest.raises(StateError, match="none that is whole"):
        folder.load()


@pytest.mark.parametrize(
    "told",
    ["[", "[" * 100_000, "{}", "[]", '{"round": -1}', '{"random": [3, [1, 2], null]}',
     '{"random": 5}', '{"history": []}', '{"history": {"train": 3}}', '{"exchange": 7}',
     '{"exchange": {"items": [["log", {"items": [["one", 1]]}]]}}', '{"arrays": {"": "none"}}'],
    ids=lambda told: told[:40],
)  # fmt: skip
def test_nonsense_under_a_right_checksum(told, tmp_path, caplog):
    from safetensors.numpy import load, save

    folder = CheckpointFolder(tmp_path)
    start(ComPEFTAverage(), grid_of(), 1, checkpointing=Checkpointing(folder))
    (file,) = folder.files()
    content = file.read_bytes()
    arrays = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if told.startswith("{") and told != "{}":
        told = json.dumps(json.loads(header["told"]) | json.loads(told))
    header["told"], header["checksum"] = told, checkpoint._checksum(told, arrays)
    file.write_bytes(save(arrays, metadata=header))
    with pytest.raises(StateError, match="none that is whole"):
        folder.load()
    assert "is none of this program's" in caplog.text


def without(told, names):
    """What a checkpoint tells, less these of its items, however deep."""
    if isinstance(told, dict):
        return {key: without(value, names) for key, value in told.items() if key not in names}
    if isinstance(told, list):
        return [
            without(each, names)
            for each in told
            if not (isinstance(each, list) and each and str(each[0]) in names)
        ]
    return told


def test_a_checkpoint_of_before_the_grid_is_refused_in_a_line(tmp_path):
    """The first version's downlink kept a version, theta_shared and a log, on no grid."""
    from safetensors.numpy import load, save

    folder = CheckpointFolder(tmp_path)
    start(ComPEFTAverage(), grid_of(), 2, checkpointing=Checkpointing(folder))
    for file in folder.files():
        content = file.read_bytes()
        arrays = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        new = {"grid", "start", "started", "cuts"}
        told = json.dumps(without(json.loads(header["told"]), new))
        assert told != header["told"]
        header["told"], header["checksum"] = told, checkpoint._checksum(told, arrays)
        file.write_bytes(save(arrays, metadata=header))
    with pytest.raises(StateError) as error:
        start(ComPEFTAverage(), grid_of(), 3, checkpointing=Checkpointing(folder, resume=True))
    said = str(error.value)
    assert "expected a checkpoint whose adapter lies on a grid, found one that an earlier" in said
    assert "begin again from the adapter that it led to" in said
    assert "\n" not in said


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path)
    start(ComPEFTAverage(), grid_of(), 1, checkpointing=Checkpointing(folder))
    other = tiny.arrays({"w": np.zeros(3, np.float32)})
    with pytest.raises(StateError, match="another adapter"):
        ComPEFTAverage().start(
            grid_of(), other, num_rounds=2, checkpointing=Checkpointing(folder, resume=True)
        )


def test_a_checkpoint_that_cannot_be_written_stops_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = CheckpointFolder(tmp_path / "file" / "folder")
    strategy = ComPEFTAverage()
    start(strategy, grid_of(), 2, checkpointing=Checkpointing(folder))
    assert strategy.observer.train[2].replies == N
    assert "no checkpoint" in caplog.text


def test_what_the_caller_keeps_comes_back(tmp_path):
    folder, told = CheckpointFolder(tmp_path), []
    keep = Checkpointing(folder, extra=lambda: {"rows": [1, 2]})
    start(ComPEFTAverage(), grid_of(), 1, checkpointing=keep)
    again = Checkpointing(folder, resume=True, restored=told.append)
    start(ComPEFTAverage(), grid_of(), 2, checkpointing=again)
    assert told == [{"rows": [1, 2]}]


def test_resuming_without_a_checkpoint_begins(tmp_path):
    strategy = ComPEFTAverage()
    keep = Checkpointing(CheckpointFolder(tmp_path), resume=True)
    start(strategy, grid_of(), 2, checkpointing=keep)
    assert set(strategy.observer.train) == {1, 2}


def test_a_federation_that_begins_takes_no_folder_of_another(tmp_path):
    """Its own checkpoints would be the oldest there, and a later resume would go on with those."""
    folder = CheckpointFolder(tmp_path)
    first = ComPEFTAverage()
    start(first, grid_of(), 3, checkpointing=Checkpointing(folder))
    before = {file: file.read_bytes() for file in folder.files()}
    with pytest.raises(StateError, match="expected no checkpoints in") as error:
        start(ComPEFTAverage(), grid_of(), 1, checkpointing=Checkpointing(folder))
    assert first._broadcaster.federation in str(error.value)
    assert "round-000003" in str(error.value)
    assert {file: file.read_bytes() for file in folder.files()} == before
    resumed = ComPEFTAverage()
    start(resumed, grid_of(), 4, checkpointing=Checkpointing(folder, resume=True))
    assert resumed._broadcaster.federation == first._broadcaster.federation
    assert set(resumed.observer.train) == {4}


def test_a_checkpoint_of_another_federation_in_the_folder_is_named(tmp_path):
    ours, theirs = CheckpointFolder(tmp_path / "ours"), CheckpointFolder(tmp_path / "theirs")
    names = []
    for folder, rounds in ((ours, 1), (theirs, 2)):
        strategy = ComPEFTAverage()
        start(strategy, grid_of(), rounds, checkpointing=Checkpointing(folder))
        names.append(strategy._broadcaster.federation)
    shutil.copy(theirs.files()[0], ours.folder)
    with pytest.raises(StateError, match="which is to go on") as error:
        start(ComPEFTAverage(), grid_of(), 3, checkpointing=Checkpointing(ours, resume=True))
    assert all(name in str(error.value) for name in names)


def test_a_folder_of_an_older_version_is_gone_on_with(tmp_path):
    """It does not say whose it is; its checkpoints do."""
    folder = CheckpointFolder(tmp_path)
    start(ComPEFTAverage(), grid_of(), 1, checkpointing=Checkpointing(folder))
    (tmp_path / "federation.json").unlink()
    start(ComPEFTAverage(), grid_of(), 2, checkpointing=Checkpointing(folder, resume=True))
    assert (tmp_path / "federation.json").exists()


def test_one_server_works_in_a_folder(tmp_path):
    folder, refused = CheckpointFolder(tmp_path), []

    def evaluate(server_round, arrays):
        for resume in (True, False):
            second = Checkpointing(CheckpointFolder(tmp_path), resume=resume)
            with pytest.raises(StateError, match="one at a time") as error:
                start(ComPEFTAverage(), grid_of(), 1, checkpointing=second)
            refused.append(str(error.value))

    start(ComPEFTAverage(), grid_of(), 1, evaluate_fn=evaluate, checkpointing=Checkpointing(folder))
    assert len(refused) == 4
    assert all(f"another server, process {os.getpid()} on " in each for each in refused)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "federation.json", "round-000001.safetensors",
    ]  # fmt: skip


_HOLD = """
import sys, time
from pathlib import Path
from compeft_fl.server.checkpoint import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_server_that_was_killed_holds_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StateError, match=f"process {process.pid} on"):
            start(ComPEFTAverage(), grid_of(), 1,
                  checkpointing=Checkpointing(CheckpointFolder(tmp_path)))  # fmt: skip
    finally:
        process.kill()
        process.communicate()
    start(ComPEFTAverage(), grid_of(), 1, checkpointing=Checkpointing(CheckpointFolder(tmp_path)))


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "round-notes.safetensors").write_text("mine")
    (tmp_path / "round-1.safetensors").write_text("mine")
    folder = CheckpointFolder(tmp_path, kept=1)
    start(ComPEFTAverage(), grid_of(), 3, checkpointing=Checkpointing(folder))
    assert [file.name for file in folder.files()] == ["round-000003.safetensors"]
    assert (tmp_path / "round-notes.safetensors").read_text() == "mine"
    assert (tmp_path / "round-1.safetensors").read_text() == "mine"


def test_checkpoints_are_for_their_owner(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    before = os.umask(0)
    try:
        start(ComPEFTAverage(), grid_of(), 1, checkpointing=Checkpointing(folder))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700
    for file in folder.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
