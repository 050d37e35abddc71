from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from compeft_fl.runs.processes import ProcessFamily


@pytest.fixture
def family(tmp_path):
    family = ProcessFamily({"PATH": os.environ["PATH"]}, tmp_path)
    yield family
    family.end(patience=1.0)


def wait_for(path) -> int:
    """The process id that a process writes when it is ready."""
    for _ in range(600):
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


READY = "import os, signal, sys, time; {body}; open('{name}', 'w').write(str(os.getpid())); {end}"
SLEEP = "time.sleep(600)"


def script(name: str, body: str = "pass", end: str = SLEEP) -> list[str]:
    return [sys.executable, "-c", READY.format(name=name, body=body, end=end)]


def test_what_was_started_ends(family, tmp_path):
    family.start(script("a"), tmp_path / "log")
    pid = wait_for(tmp_path / "a")
    assert [process.pid for process in family.members()] == [pid]
    family.end()
    assert not alive(pid)
    assert not family.members()


def test_who_does_not_listen_is_killed(family, tmp_path):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    family.start(script("a", deaf), tmp_path / "log")
    pid = wait_for(tmp_path / "a")
    family.end(patience=1.0)
    assert not alive(pid)


# As a ServerApp: it sees a node end, and does not listen itself.
SERVER = """
import os, signal, sys, time
from pathlib import Path
import psutil
signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder, node = Path(sys.argv[1]), psutil.Process(int(sys.argv[2]))
(folder / "server").write_text(str(os.getpid()))
try:
    while node.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
except psutil.NoSuchProcess:
    pass
(folder / "merged").touch()
"""


def server_over(node: int, folder) -> list[str]:
    """A program with the name of Flower's."""
    program = folder / "flwr-simulation"
    program.write_text(SERVER)
    return [sys.executable, str(program), str(folder), str(node)]


def test_a_server_sees_no_node_end(family, tmp_path):
    """It would merge the round without it, and a run that is resumed would be another one."""
    family.start(script("a"), tmp_path / "log")
    node = wait_for(tmp_path / "a")
    family.start(server_over(node, tmp_path), tmp_path / "log")
    server = wait_for(tmp_path / "server")
    family.end()
    assert not alive(node)
    assert not alive(server)
    assert not (tmp_path / "merged").exists()


def test_an_orphan_in_a_session_of_its_own_ends(family, tmp_path):
    """Its parent is gone: only the mark in its environment is left."""
    fork = "os.fork() and os._exit(0); os.setsid()"
    family.start(script("a", fork), tmp_path / "log").wait()
    pid = wait_for(tmp_path / "a")
    family.end()
    assert not alive(pid)


def test_an_orphan_without_the_mark_ends(family, tmp_path):
    """As Ray's: it has overwritten its environment, and its parent is gone."""
    bare = "os.execve(sys.executable, [sys.executable, '-c', {!r}], {{}})".format(
        READY.format(name="a", body="pass", end=SLEEP).replace("'", '"')
    )
    family.start(script("unused", "os.fork() and os._exit(0)", bare), tmp_path / "log").wait()
    pid = wait_for(tmp_path / "a")
    assert not psutil.Process(pid).environ()
    family.end()
    assert not alive(pid)


def test_others_are_left_alone(family, tmp_path):
    other = ProcessFamily({"PATH": os.environ["PATH"]}, tmp_path)
    other.start(script("b"), tmp_path / "log")
    pid = wait_for(tmp_path / "b")
    family.start(script("a"), tmp_path / "log")
    wait_for(tmp_path / "a")
    family.end()
    assert alive(pid)
    assert alive(os.getpid())
    other.end()
    assert not alive(pid)


def test_who_got_the_id_of_a_session_that_was_is_left_alone(family, tmp_path, monkeypatch):
    family.start([sys.executable, "-c", "pass"], tmp_path / "log").wait()
    (session,) = family._sessions
    time.sleep(0.05)  # births are known to a hundredth of a second
    other = ProcessFamily({"PATH": os.environ["PATH"]}, tmp_path)
    other.start(script("b"), tmp_path / "log")
    pid = wait_for(tmp_path / "b")
    really = os.getsid
    monkeypatch.setattr(os, "getsid", lambda of: session if of == pid else really(of))
    assert not family.members()
    family.end()
    assert alive(pid)
    monkeypatch.undo()
    other.end()
    assert not alive(pid)


# In a namespace of its own, where the next id can be chosen: a member's session ends, and a
# stranger gets its id, for itself and for its session.
_SAME_ID = """
import os, pathlib, subprocess, sys, time
import psutil
from compeft_fl.runs.processes import ProcessFamily

family = ProcessFamily(dict(os.environ), pathlib.Path(sys.argv[1]))
child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'pass'])"
first = family.start([sys.executable, "-c", child], pathlib.Path(sys.argv[1]) / "log")
while family.members():
    time.sleep(0.01)
first.wait()
time.sleep(0.05)
pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(first.pid - 1))
stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
assert stranger.pid == first.pid == os.getsid(stranger.pid), (stranger.pid, first.pid)
assert first.pid in family._sessions
family.end()
print("spared" if stranger.poll() is None else "ended")
stranger.kill()
"""


def test_a_stranger_with_the_very_id_of_a_member_is_left_alone(tmp_path):
    own = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    can = "echo 4000 > /proc/sys/kernel/ns_last_pid"
    try:
        done = subprocess.run([*own, "sh", "-c", can], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode != 0:
        pytest.skip("no namespaces for this user here")
    done = subprocess.run(
        [*own, sys.executable, "-c", _SAME_ID, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "spared\n", done.stderr


def test_a_descendant_is_found_by_its_program(family, tmp_path):
    program = tmp_path / "some-program"
    program.write_text(f"#!{sys.executable}\n" + READY.format(name="a", body="pass", end=SLEEP))
    program.chmod(0o755)
    child = f"import subprocess; subprocess.run([{str(program)!r}])"
    family.start([sys.executable, "-c", child], tmp_path / "log")
    pid = wait_for(tmp_path / "a")
    assert family.running("some-program")
    assert not family.running("another-program")
    psutil.Process(pid).kill()
    for _ in range(200):
        if not family.running("some-program"):
            break
        time.sleep(0.05)
    assert not family.running("some-program")


def test_a_command_is_run_to_its_end(family, tmp_path):
    done = family.call([sys.executable, "-c", "import os; print(os.getcwd())"], timeout=60)
    assert done.stdout.strip() == str(tmp_path)
    assert done.returncode == 0


def test_a_missing_program_is_an_error(family, tmp_path):
    with pytest.raises(FileNotFoundError):
        family.start(["no-such-program-here"], tmp_path / "log")
