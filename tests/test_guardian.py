"""runs/guardian.py: what a command had started ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from test_processes import READY, SLEEP, alive, server_over, wait_for

HERE = Path(__file__).parent

# A command as `compeft-fl run` is: a temporary folder with keys, and a family of processes.
_COMMAND = """
import os, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_processes import script
from compeft_fl.runs.processes import ProcessFamily
out = Path(sys.argv[1])
home = Path(tempfile.mkdtemp(prefix="cfl-", dir=out))
(home / "node.key").write_text("private")
family = ProcessFamily({"PATH": os.environ["PATH"]}, home)
family.guard()
deaf, orphan = "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.fork() and os._exit(0)"
for name, body in (("a", "pass"), ("deaf", deaf), ("orphan", f"{orphan}; os.setsid()")):
    family.start(script(str(out / name), body), out / "log")
family.start([sys.executable, "-c", sys.argv[3]], out / "log")
while len(list(out.glob("*.seen"))) < 1:
    family.members()
    if all((out / name).exists() for name in ("a", "deaf", "orphan", "bare")):
        family.members()
        (out / "all.seen").touch()
    time.sleep(0.05)
time.sleep(600)
"""
# As Ray's: a descendant whose environment says nothing.
_BARE = "import os, sys; os.execve(sys.executable, [sys.executable, '-c', {!r}], {{}})"


def ended(processes) -> list[psutil.Process]:
    _, living = psutil.wait_procs(processes, timeout=60)
    return living


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_outlives_a_command_that_was_killed(number, tmp_path):
    """Its Python had no say: a kill -9, or a signal that it does not handle."""
    bare = _BARE.format(READY.format(name=tmp_path / "bare", body="pass", end=SLEEP))
    command = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, str(tmp_path), str(HERE), bare], start_new_session=True
    )
    try:
        pids = [wait_for(tmp_path / name) for name in ("a", "deaf", "orphan", "bare")]
        family = [psutil.Process(pid) for pid in pids]
        while not (tmp_path / "all.seen").exists():
            assert command.poll() is None
            os.sched_yield()
        (home,) = tmp_path.glob("cfl-*")
        assert (home / "node.key").exists()
        guardians = [
            child for child in psutil.Process(command.pid).children()
            if "guardian.py" in " ".join(child.cmdline())
        ]  # fmt: skip
        assert len(guardians) == 1
        os.killpg(command.pid, number)  # as a terminal does it
        command.wait()
        assert ended([*family, *guardians]) == []
        assert not home.exists()
    finally:
        command.kill()
        command.wait()


def test_a_server_sees_no_node_end(tmp_path):
    from compeft_fl.runs.guardian import Guardian

    folder = Path(tempfile.mkdtemp(prefix="cfl-", dir=tmp_path))
    node = subprocess.Popen([sys.executable, "-c", f"import time; {SLEEP}"])
    server = subprocess.Popen(server_over(node.pid, tmp_path))
    try:
        wait_for(tmp_path / "server")
        guardian = Guardian(folder)
        guardian.tell([psutil.Process(node.pid), psutil.Process(server.pid)])
        guardian._process.stdin.close()
        assert guardian._process.wait(60) == 0
        assert (node.wait(60), server.wait(60)) == (-signal.SIGTERM, -signal.SIGKILL)
        assert not (tmp_path / "merged").exists()
    finally:
        for process in (node, server):
            process.kill()
            process.wait()


def test_a_guardian_that_is_taken_leave_of_touches_nothing(tmp_path):
    from compeft_fl.runs.guardian import Guardian

    folder = Path(tempfile.mkdtemp(prefix="cfl-", dir=tmp_path))
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        guardian = Guardian(folder)
        guardian.tell([psutil.Process(stranger.pid)])
        guardian.leave()
        assert guardian._process.returncode == 0
        assert folder.exists()
        assert alive(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()


def test_only_a_temporary_folder_is_removed(tmp_path):
    from compeft_fl.runs.guardian import Guardian

    guardian = Guardian(tmp_path)
    guardian._process.stdin.close()
    assert guardian._process.wait(60) == 0
    assert tmp_path.exists()


# A node with warm clients, whose command is killed: argv is a file for the node's id.
_WARM = """
import sys
from compeft_fl.deploy import warm
warm.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_node_ends_with_its_warm_command(number, tmp_path):
    node = READY.format(name=tmp_path / "node", body="pass", end=SLEEP)
    command = subprocess.Popen(
        [sys.executable, "-c", _WARM, node],
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        wait_for(tmp_path / "node")
        family = psutil.Process(command.pid).children(recursive=True)
        assert len(family) >= 2  # the node, the guardian, and what clients are forked from
        os.kill(command.pid, number)
        command.wait()
        assert ended(family) == []
        assert not list(tmp_path.glob("compeft-warm-*"))
    finally:
        command.kill()
        command.wait()
