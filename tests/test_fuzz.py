"""simulations/fuzz.py, short: every reader reads or rejects; nothing else."""

from __future__ import annotations

import collections
import random
import subprocess
import sys
from pathlib import Path

import pytest

from compeft_fl import codecs

SIMULATIONS = Path(__file__).parents[1] / "simulations"
sys.path.append(str(SIMULATIONS))

import fuzz  # noqa: E402
import fuzz_commands  # noqa: E402
import fuzz_targets  # noqa: E402

pytestmark = pytest.mark.long


def test_every_target_reads_or_rejects(tmp_path):
    names = []
    for name, run in fuzz.runs(tmp_path, inputs=150, seed=1, packages=None):
        if "atheris" in name:
            continue
        outcomes = run()
        assert outcomes.total() >= 15, name
        assert len(outcomes) > 1 or "any bytes" in name, (name, outcomes)
        names.append(name)
    for codec in codecs.names():
        assert f"update, {codec}: changed" in names
    for command in ("compress", "decompress", "inspect", "merge", "similarity"):
        assert f"compeft-fl {command}: changed" in names


def test_what_a_command_must_not_do_is_a_finding(tmp_path, monkeypatch):
    """Not one line, or a control character, or something left behind."""
    output = tmp_path / "out"

    def command(code, shown="", told="", leaves=False):
        def main(arguments):
            print(shown, end="")
            print(told, end="", file=sys.stderr)
            if leaves:
                output.mkdir()
                (output / "half").write_bytes(b"")
            return code

        monkeypatch.setattr(fuzz_commands, "main", main)
        return fuzz_commands.run([], output)

    assert command(0, "fine\n", leaves=True) == "fine\n"
    assert not output.exists()
    with pytest.raises(fuzz_commands.RefusedError):
        command(2, told="one line\n")
    for wrong in (
        {"code": 1, "told": "one line\n"},
        {"code": 2, "told": "two\nlines\n"},
        {"code": 2, "told": "one line\n", "shown": "x"},
        {"code": 2, "told": "one line\n", "leaves": True},
        {"code": 2, "told": "an error: unexpected TypeError\n"},
        {"code": 0, "shown": "\x1b[2J"},
    ):
        with pytest.raises(fuzz_commands.MisbehavedError):
            command(**wrong)


def test_what_is_neither_is_a_finding():
    def reads_badly(content: bytes) -> None:
        raise ZeroDivisionError("found")

    target = fuzz_targets.Target("x", lambda source: source.randbytes(5), reads_badly)
    with pytest.raises(fuzz.FoundError, match="ZeroDivisionError: found; the input: b'"):
        fuzz.changed(target, 1, seed=0)
    counts: fuzz.Counts = collections.Counter()
    with pytest.raises(fuzz.FoundError, match="MemoryError"):
        fuzz.attempt(lambda content: bytes(1 << 62), b"", counts)


def test_inputs_follow_from_the_seed(tmp_path):
    def inputs() -> list[bytes]:
        source = random.Random(3)
        return [fuzz_targets.update_targets()[0].make(source) for _ in range(20)]

    assert inputs() == inputs()


def test_the_script_limits_its_own_memory_and_writes_its_table(tmp_path):
    command = [sys.executable, SIMULATIONS / "fuzz.py", "--inputs", "20", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "fuzz.md").read_text()
    assert "at most 1024 MiB of memory beyond the start" in table
    for codec in codecs.names():
        assert f"| update, {codec}: changed | 20 |" in table
