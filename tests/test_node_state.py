"""exchange/node_state.py: the old state or the new one, never a broken one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.errors import StateError
from compeft_fl.exchange import node_state
from compeft_fl.exchange.node_state import NO_UPDATE, NodeState, StateFile, state_folder
from compeft_fl.exchange.replica import Replica

D = 500
LAYOUT = cf.Layout([cf.TensorSpec("a", (20, 20)), cf.TensorSpec("b", (100,))])


def values(seed):
    return np.random.default_rng(seed).standard_normal(D).astype(np.float32)


def full_state():
    return NodeState(LAYOUT, Replica(LAYOUT, values(0), 7), values(1), b"5", values(2), b"7")


def same(a, b):
    def equal(x, y):
        return (x is None) == (y is None) and (x is None or np.array_equal(x, y))

    if a.layout != b.layout:
        return False
    replicas = (a.replica is None) == (b.replica is None)
    if replicas and a.replica is not None:
        replicas = a.replica.version == b.replica.version
        replicas &= equal(a.replica.values, b.replica.values)
    residuals = equal(a.residual, b.residual) and equal(a.next_residual, b.next_residual)
    return replicas and residuals and (a.taken, a.trained) == (b.taken, b.trained)


@pytest.mark.parametrize(
    "state",
    [
        NodeState(),
        NodeState(LAYOUT, Replica(LAYOUT, values(0), 0)),
        full_state(),
        NodeState(LAYOUT, None, values(1), b"3"),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, state):
    file = StateFile(tmp_path / "run" / "node")
    with file.locked():
        assert file.load() is None
        file.save(state)
        assert same(StateFile(tmp_path / "run" / "node").load(), state)
        file.forget()
        assert file.load() is None


def test_an_update_that_was_taken_and_one_that_was_not():
    state = NodeState(residual=values(1), taken=b"5").after_training(b"7", values(2))
    taken = state.settled(b"7")
    assert (taken.taken, taken.trained) == (b"7", NO_UPDATE)
    assert np.array_equal(taken.residual, values(2))
    lost = state.settled(b"5")
    assert (lost.taken, lost.trained) == (b"5", NO_UPDATE)
    assert np.array_equal(lost.residual, values(1))
    assert same(taken.settled(b"7"), taken)
    with pytest.raises(StateError, match="update 36 last"):
        state.settled(b"6")
    first = NodeState().after_training(b"0", values(3))
    assert first.settled(NO_UPDATE).residual is None


def test_trained_twice_for_one_message_is_as_once():
    state = NodeState(residual=values(1), taken=b"5")
    once = state.settled(b"5").after_training(b"7", values(2))
    twice = once.settled(b"5").after_training(b"7", values(2))
    assert same(once, twice)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = StateFile(tmp_path)
    with file.locked():
        file.save(full_state())
    content = file.path.read_bytes()
    file.path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(StateError, match=r"state\.safetensors"):
        file.load()


def test_every_flipped_bit_is_noticed(tmp_path):
    file = StateFile(tmp_path)
    with file.locked():
        file.save(full_state())
    content = bytearray(file.path.read_bytes())
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(header), *rng.integers(header, len(content), 300)]
    for place in places:
        bit = 1 << int(rng.integers(8))
        content[place] ^= bit
        file.path.write_bytes(content)
        try:
            found = file.load()
        except StateError:
            pass
        else:  # a bit of the header's own form (a space, say), which says the same
            assert same(found, full_state()), place
        content[place] ^= bit


HOSTILE = {
    "no JSON": ({"layout": "["}, {}),
    "deep JSON": ({"layout": "[" * 100_000}, {}),
    "no such dtype": ({"layout": '[["a", [500], "f99"]]'}, {}),
    "a negative shape": ({"layout": '[["a", [-500], "f32"]]'}, {}),
    "another size": ({"layout": '[["a", [499], "f32"]]'}, {}),
    "no number": ({"version": "seven"}, {}),
    "a long number": ({"version": "9" * 5000}, {}),
    "no such id": ({"taken": "xy"}, {}),
    "a long id": ({"taken": "00" * 65}, {}),
    "no such version": ({"version": "-3"}, {}),
    "an adapter of no version": ({"version": "-1"}, {}),
    "another data type": ({}, {"residual": values(1).astype(np.float64)}),
    "another shape": ({}, {"residual": values(1).reshape(5, 100)}),
    "NaN": ({}, {"shared": np.full(D, np.nan, np.float32)}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_nonsense_under_a_right_checksum(tmp_path, what):
    from safetensors.numpy import save

    told_else, arrays_else = HOSTILE[what]
    layout = json.dumps([(t.name, t.shape, t.dtype) for t in LAYOUT.tensors])
    told = {"format": node_state._FORMAT, "layout": layout, "version": "7", "taken": "05"}
    told |= {"trained": "07"} | told_else
    arrays = {"shared": values(0), "residual": values(1), "next_residual": values(2)} | arrays_else
    told["checksum"] = node_state._checksum(told, arrays)
    file = StateFile(tmp_path)
    file.path.write_bytes(save(arrays, metadata=told))
    with pytest.raises(StateError, match=r"state\.safetensors is none of this program's"):
        file.load()


def test_a_replica_of_another_adapter_leaves_nothing_else():
    other = cf.Layout([cf.TensorSpec("a", (D,))])
    state = full_state().following(Replica(other, values(4), 9))
    assert same(state, NodeState(other, Replica(other, values(4), 9)))
    newer = full_state().following(Replica(LAYOUT, values(4), 9))
    assert np.array_equal(newer.residual, values(1))
    assert newer.replica.version == 9


def test_other_files_are_no_state(tmp_path):
    from safetensors.numpy import save_file

    file = StateFile(tmp_path)
    save_file({"shared": values(0)}, file.path)
    with pytest.raises(StateError, match="node state 2"):
        file.load()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="folder"), StateFile(tmp_path / "file" / "node").locked():
        pass


_FULL_DISK = """
import resource, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_node_state import LAYOUT, StateError, StateFile, full_state
file = StateFile(__import__("pathlib").Path(sys.argv[1]))
with file.locked():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        file.save(full_state())
    except StateError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    file = StateFile(tmp_path)
    old = NodeState(LAYOUT, Replica(LAYOUT, values(9), 1))
    with file.locked():
        file.save(old)
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path), here],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be written" in done.stdout
    assert same(file.load(), old)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lock", "state.safetensors"]


def _save_for_ever(folder, started):
    file = StateFile(folder)
    big = cf.Layout([cf.TensorSpec("w", (200_000,))])
    i = 0
    with file.locked():
        while True:
            file.save(NodeState(big, Replica(big, np.full(200_000, i, np.float32), i)))
            started.set()
            i += 1


def test_killed_at_any_moment(tmp_path):
    """kill -9 while it saves: what is there is whole, and of one version."""
    context = multiprocessing.get_context("spawn")
    for attempt in range(4):
        started = context.Event()
        process = context.Process(target=_save_for_ever, args=(tmp_path, started))
        process.start()
        assert started.wait(60)
        time.sleep(0.01 + 0.007 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        state = StateFile(tmp_path).load()
        assert np.array_equal(state.replica.values, np.full(200_000, state.replica.version))
        with StateFile(tmp_path).locked():  # the kernel has released it
            pass


def _hold(folder, held, let_go):
    with StateFile(folder).locked():
        held.set()
        let_go.wait(60)


def test_processes_of_one_node_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, let_go))
    process.start()
    assert held.wait(60)
    import fcntl

    with open(tmp_path / "lock") as handle:
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        let_go.set()
        process.join(60)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert process.exitcode == 0


def test_names_become_folders_and_stay_apart(tmp_path):
    names = ["a/b", "a_b", "..", ".", "a b", "ä", "x" * 100, "x" * 101, ""]
    folders = [state_folder(tmp_path, "run", name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        assert folder.parent == tmp_path / "run"
