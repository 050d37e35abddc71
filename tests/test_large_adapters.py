"""Large adapters: a node has few copies of one in memory; what it keeps is read from its file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.disk.arrays import LARGE_BYTES, on_disk, pieces, release
from compeft_fl.exchange.node_state import NodeState, StateFile
from compeft_fl.exchange.replica import Replica
from compeft_fl.exchange.uplink import ErrorFeedback

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1 << 21


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_node_takes_three_copies_at_most():
    """Ten million parameters through real messages, first contacts and nodes that return."""
    script = ROOT / "simulations" / "bench_messages.py"
    options = ["--sizes", "10m", "--nodes", "5", "--more", "0"]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    copies = [float(found) for found in re.findall(r"([\d.]+) copies,", done.stdout)]
    assert len(copies) == 6  # 2 of 5 nodes, 3 rounds: few, as 2 of 20 are
    assert max(copies) < 3.2  # and what the first message of a process loads: a fifth of 40 MB


def test_a_large_state_is_read_where_it_lies(tmp_path, values):
    layout = cf.Layout([cf.TensorSpec("w", (SIZE,))])
    file = StateFile(tmp_path)
    file.save(NodeState(layout, Replica(layout, values, 3), residual=2 * values))
    state = file.load()
    assert all(isinstance(each, np.memmap) for each in (state.residual, state.replica.values))
    file.save(NodeState(layout, Replica(layout, -values, 4)))  # the old file is still there for it
    release(state.residual)
    assert np.array_equal(state.residual, 2 * values)
    assert np.array_equal(file.load().replica.values, -values)
    with pytest.raises(ValueError, match="read-only"):
        state.residual[0] = 1


def test_a_residual_of_a_file_gives_the_bytes_that_memory_gives(tmp_path, values):
    layout = cf.Layout([cf.TensorSpec("w", (SIZE,))])
    file = StateFile(tmp_path)
    file.save(NodeState(layout, None, residual=3 * values))
    change = np.roll(values, 7)
    found = []
    for residual, consume in ((3 * values, False), (file.load().residual, True)):
        feedback = ErrorFeedback(0.1, residual=residual)
        sent = feedback.compress(cf.TaskVector(layout, change.copy()), consume=consume)
        found.append((cf.encode(sent), feedback.residual, feedback.pressure, feedback.quality))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


def test_without_consume_the_task_vector_is_left_as_it_is(values):
    tau = cf.TaskVector.from_dict({"w": values.copy()})
    feedback = ErrorFeedback(0.1)
    for _ in range(2):
        feedback.compress(tau)
        assert np.array_equal(tau.values, values)


def test_large_arrays_lie_on_disk(values):
    few = on_disk({"w": values[:8]})
    assert not isinstance(few["w"], np.memmap)
    many = {"a": np.resize(values, LARGE_BYTES // 4), "b": values.reshape(2, -1), "c": values[:0]}
    kept = on_disk(many)
    assert isinstance(kept["a"], np.memmap)
    assert all(np.array_equal(kept[name], many[name]) for name in many)
    assert kept["b"].shape == (2, SIZE // 2)


def test_pieces_are_all_bytes(values):
    assert b"".join(pieces(values)) == values.tobytes()
    assert list(pieces(values[:0])) == []
