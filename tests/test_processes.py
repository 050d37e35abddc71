from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from compeft_fl.app.processes import ProcessFamily


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
