"""client/state_store.py, node_memory.py: what is ours, whose it is, and what is removed when."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from flwr.app import Context, RecordDict
from local_grid import LocalGrid, node_ids
from test_exchange import flat, resumable, start

from compeft_fl.cli.main import main
from compeft_fl.client import state_store
from compeft_fl.client.node_memory import NodeMemory, default_root, node_name
from compeft_fl.client.state_store import MARKER, inventory, open_federation, remove
from compeft_fl.errors import StateError
from compeft_fl.exchange.node_state import NodeState
from compeft_fl.exchange.replica import Replica
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage

LONG_AGO = time.time() - 40 * 86400
LAYOUT = tiny.layout()


def context(node_id=1, run_id=1, **config):
    return Context(
        run_id=run_id, node_id=node_id, node_config=config, state=RecordDict(), run_config={}
    )


def state_of(number: float) -> NodeState:
    values = np.full(LAYOUT.num_parameters, number, np.float32)
    return NodeState(LAYOUT, Replica(LAYOUT, values, 0))


def keep(root, federation, number=1.0, node_id=1, run_id=1, **config):
    with NodeMemory.of(context(node_id, run_id, **config), federation, root) as memory:
        assert memory.save(state_of(number))
    return root / federation


def kept(root, federation, node_id=1, run_id=1, **config):
    with NodeMemory.of(context(node_id, run_id, **config), federation, root) as memory:
        replica = memory.state.replica
    return None if replica is None else float(replica.values[0])


def grow_old(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_home_as_state_folder_keeps_what_is_in_it(tmp_path, monkeypatch):
    """A whole federation over a folder with other old folders in it."""
    for file in ("photos/2020/a.jpg", "thesis/chapters/1.tex", ".ssh/keys/id", "0-of-2/lock", "x"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("mine")
    grow_old(tmp_path)
    before = tree(tmp_path)
    old = keep(tmp_path, "ours")
    grow_old(old)
    monkeypatch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path))
    app = tiny.client_app(CompressionMod())
    start(ComPEFTAverage(), LocalGrid(app, 2), 1, checkpointing=None)
    assert not old.exists()
    assert tree(tmp_path) == before


FOREIGN = {
    "a file": lambda folder: (folder / "notes").write_text(""),
    "a file of a node": lambda folder: (folder / "1" / "notes").write_text(""),
    "a folder": lambda folder: (folder / "photos").mkdir(),
    "a folder in a node's": lambda folder: (folder / "1" / "photos").mkdir(),
    "a link": lambda folder: (folder / "link").symlink_to(folder.parent),
    "a link for a state": lambda folder: (
        (folder / "1" / "state.safetensors").rename(folder.parent / "elsewhere")
        and (folder / "1" / "state.safetensors").symlink_to(folder.parent / "elsewhere")
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_with_something_foreign_in_it_stays_whole(what, tmp_path, caplog):
    caplog.set_level("INFO")
    old = keep(tmp_path, "old")
    FOREIGN[what](old)
    grow_old(old)
    before = tree(old)
    keep(tmp_path, "new")
    assert tree(old) == before
    assert "was not made here" in caplog.text


def test_a_folder_that_was_not_made_here_is_not_written_to(tmp_path, caplog):
    (tmp_path / "photos" / "2020").mkdir(parents=True)
    (tmp_path / "photos" / "2020" / "a.jpg").write_text("mine")
    with NodeMemory.of(context(**{"node-name": "2020"}), "photos", tmp_path) as memory:
        assert not memory.save(state_of(1))
    assert "is somebody else's" in caplog.text
    assert tree(tmp_path) == ["photos", "photos/2020", "photos/2020/a.jpg"]


@pytest.mark.parametrize("what", ["a copy", "a link", "another marker", "a marker cut off"])
def test_what_only_looks_like_ours_is_left(what, tmp_path):
    old = keep(tmp_path / "first", "old")
    folder = tmp_path / "root" / "backup"
    folder.parent.mkdir()
    if what == "a link":
        folder.symlink_to(old)
    else:
        old.rename(folder)
        marker = json.loads((folder / MARKER).read_text())
        if what == "another marker":
            marker |= {"folder": "backup", "format": "another program's"}
        text = json.dumps(marker)
        (folder / MARKER).write_text(text[:20] if what == "a marker cut off" else text)
    grow_old(folder)
    before = tree(tmp_path / "root")
    assert inventory(tmp_path / "root") == []
    keep(tmp_path / "root", "new")
    assert set(before) < set(tree(tmp_path / "root"))


def test_what_is_removed_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    old = keep(tmp_path, "old")
    grow_old(old)
    keep(tmp_path, "new")
    assert not old.exists()
    assert f"{old} was not heard of for 30 days: it is removed" in caplog.text


def test_a_federation_that_is_heard_of_is_young_again(tmp_path):
    old = keep(tmp_path, "old")
    grow_old(old)
    assert kept(tmp_path, "old") == 1.0
    keep(tmp_path, "new")
    assert old.exists()


def test_a_node_at_work_is_left_alone(tmp_path):
    old = keep(tmp_path, "old")
    grow_old(old)
    with (old / "1" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keep(tmp_path, "new")
        assert (old / "1" / "state.safetensors").exists()
        (state,) = (each for each in inventory(tmp_path) if each.federation == "old")
        assert "works in it" in remove(state)
    assert remove(state) == ""
    assert not old.exists()


def test_only_its_owner_sees_what_a_node_keeps(tmp_path):
    before = os.umask(0)
    try:
        keep(tmp_path / "some" / "root", "federation")
    finally:
        os.umask(before)
    found = [tmp_path / "some" / "root", *(tmp_path / "some" / "root").rglob("*")]
    assert len(found) == 7
    for path in found:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_server_that_invents_federations_fills_no_disk(tmp_path):
    """A run is one federation; of those that one run names, the last few are kept."""
    honest = keep(tmp_path, "honest", run_id=7)
    for number in range(20):
        keep(tmp_path, f"invented-{number:02}", run_id=8)
    assert honest.exists()
    found = {state.federation for state in inventory(tmp_path)}
    assert found == {"honest", "invented-16", "invented-17", "invented-18", "invented-19"}


def test_runs_that_are_invented_too_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(state_store, "KEPT_FEDERATIONS", 6)
    for number in range(20):
        keep(tmp_path, f"f{number:02}", run_id=number)
    assert {each.federation for each in inventory(tmp_path)} == {f"f{n:02}" for n in range(14, 20)}
    (size,) = {each.num_bytes for each in inventory(tmp_path)}
    monkeypatch.setattr(state_store, "KEPT_BYTES", 3 * size)
    keep(tmp_path, "last", run_id=99)
    assert {each.federation for each in inventory(tmp_path)} == {"last", "f17", "f18", "f19"}


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_end_of_a_run_takes_its_state_along(fraction, caplog):
    caplog.set_level("INFO")
    app = tiny.client_app(CompressionMod())
    strategy = ComPEFTAverage(fraction_evaluate=fraction)
    start(strategy, LocalGrid(app, 3), 2, checkpointing=None)
    assert tree(default_root()) == []
    assert "is of a run that has ended: it is removed" in caplog.text


def test_nodes_elsewhere_forget_with_the_last_evaluation(tmp_path):
    """The server does not see their folders; what they have, they have until then."""
    roots = {node: tmp_path / str(node) for node in node_ids(3)}
    apps = {node: tiny.client_app(CompressionMod(state_dir=root)) for node, root in roots.items()}
    seen = []

    def evaluate(server_round, arrays):
        seen.append([sum(state.nodes for state in inventory(root)) for root in roots.values()])

    strategy = ComPEFTAverage()
    start(strategy, LocalGrid(apps, 3), 3, checkpointing=None, evaluate_fn=evaluate)
    assert seen == [[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert tree(tmp_path) == [root.name for root in roots.values()]
    assert [count.replies for count in strategy.observer.evaluate.values()] == [3, 3, 3]
    assert [count.resyncs for count in strategy.observer.evaluate.values()] == [0, 0, 0]


def test_a_run_that_can_go_on_keeps_its_state():
    start(ComPEFTAverage(), LocalGrid(tiny.client_app(CompressionMod()), 3), 2)
    (state,) = inventory(default_root())
    assert state.nodes == 3


def test_nodes_of_one_name_share_nothing(tmp_path, caplog):
    same = {"node-name": "hospital"}
    keep(tmp_path, "f", 1.0, node_id=11, **same)
    assert kept(tmp_path, "f", node_id=12, **same) is None
    assert "node 12 is called hospital, as node 11 of this machine" in caplog.text
    keep(tmp_path, "f", 2.0, node_id=12, **same)
    assert kept(tmp_path, "f", node_id=11, **same) == 1.0
    assert kept(tmp_path, "f", node_id=12, **same) == 2.0
    # In the next run ids that hold are known, and nobody else is taken for one of the two.
    assert kept(tmp_path, "f", node_id=12, run_id=2, **same) == 2.0
    assert kept(tmp_path, "f", node_id=11, run_id=2, **same) == 1.0
    assert kept(tmp_path, "f", node_id=13, run_id=3, **same) is None
    assert "none of them is known by it" in caplog.text


def test_a_name_that_one_node_had_is_its_own_in_a_later_run(tmp_path):
    """A simulation that is resumed gives its nodes other ids."""
    same = {"partition-id": 3, "num-partitions": 5}
    keep(tmp_path, "f", 4.0, node_id=11, run_id=1, **same)
    assert kept(tmp_path, "f", node_id=99, run_id=2, **same) == 4.0
    assert kept(tmp_path, "f", node_id=98, run_id=2, **same) is None


def test_a_federation_of_nodes_with_one_name_is_that_of_nodes_with_names(caplog):
    """Residuals are each node's own: bit for bit what names of their own come to."""

    def run(name):
        grid = LocalGrid(tiny.client_app(CompressionMod(density=0.1)), 2)
        for node, each in grid.contexts.items():
            each.node_config = {"node-name": name(node)}
        strategy = ComPEFTAverage(fraction_evaluate=0.0)
        result = start(strategy, grid, 4, checkpointing=resumable())
        # After the first round nobody lacks anything.
        assert [count.resyncs for count in strategy.observer.train.values()][1:] == [0, 0, 0]
        return flat(result.arrays)

    one_name = run(lambda node: "node")
    assert "each keeps a state of its own" in caplog.text
    np.testing.assert_array_equal(one_name, run(str))


def test_what_a_kill_left_half_written_goes(tmp_path):
    folder = keep(tmp_path, "f")
    half = folder / "1" / ".state.safetensors.4711.tmp"
    half.write_bytes(b"half")
    assert kept(tmp_path, "f") == 1.0
    assert not half.exists()


def test_a_folder_that_is_cleared_meanwhile_is_made_again(tmp_path):
    keep(tmp_path, "f")
    (state,) = inventory(tmp_path)
    with NodeMemory.of(context(2), "f", tmp_path) as memory:
        assert "works in it" in remove(state)
        assert memory.save(state_of(5))
    assert remove(state) == ""
    assert kept(tmp_path, "f") is None


def test_the_command_lists_and_clears(tmp_path, capsys):
    for federation in ("first", "second", "third", "ours-and-theirs"):
        keep(tmp_path, federation)
    grow_old(tmp_path / "second")
    (tmp_path / "ours-and-theirs" / "thesis.tex").write_text("mine")
    (tmp_path / "photos").mkdir()
    at = ["--dir", str(tmp_path)]
    assert main(["state", *at]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("first", "second", "third", "ours-and-theirs"))
    assert "photos" not in out
    assert main(["state", "clear", "--older", "7", *at]) == 0
    assert capsys.readouterr().out.startswith(f"removed {tmp_path / 'second'}: 1 nodes, ")
    assert main(["state", "clear", "third", *at]) == 0
    assert not (tmp_path / "third").exists()
    assert main(["state", "clear", "fourth", *at]) == 2
    assert capsys.readouterr().err.startswith("compeft-fl state: error: expected a federation in")
    assert main(["state", "clear", *at]) == 2
    err = capsys.readouterr().err
    assert "ours-and-theirs (thesis.tex in it was not made here)" in err
    assert err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ours-and-theirs", "photos"]
    assert main(["state", "--dir", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.startswith("nothing in ")


def test_a_name_from_a_server_acts_on_no_terminal(tmp_path, capsys):
    keep(tmp_path, "a\x1b[2Jb")
    assert main(["state", "--dir", str(tmp_path)]) == 0
    assert main(["state", "clear", "--dir", str(tmp_path)]) == 0
    assert "\x1b[2J" not in capsys.readouterr().out


_NO_HOME = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.getuid = lambda: 4242424  # whom the system does not know
import tiny
from local_grid import LocalGrid, node_ids
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage
strategy = ComPEFTAverage(fraction_evaluate=0.0)
app = tiny.client_app(CompressionMod())
strategy.start(LocalGrid(app, 2), tiny.arrays(), num_rounds=2, timeout=60)
print([count.replies for count in strategy.observer.train.values()])
"""


def test_without_a_home_the_run_goes_on_without_memory():
    hidden = ("HOME", "XDG_STATE_HOME", "COMPEFT_FL_STATE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", _NO_HOME, str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[2, 2]", done.stderr
    assert "remembers nothing: expected a home folder" in done.stderr
    assert "set COMPEFT_FL_STATE_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_marker_that_cannot_be_written_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="expected a folder to keep state in"):
        open_federation(tmp_path / "file", "f", "1")
    assert node_name(context(5)) == "5"
