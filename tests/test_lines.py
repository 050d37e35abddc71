"""lines.py, and the journal and the ledger on it: full disks, cut-off and damaged files."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from compeft_fl.disk.lines import Lines
from compeft_fl.exchange.ledger import Ledger, Transfer, read_ledger
from compeft_fl.results.journal import Journal
from compeft_fl.runs.launch import _Events

HERE = Path(__file__).parent
LOGGER = logging.getLogger("flwr.compeft_fl.test")


def test_a_full_disk_is_told_once(tmp_path, caplog):
    path = tmp_path / "journal"
    path.symlink_to("/dev/full")
    lines = Lines(path, LOGGER)
    assert [lines.add("one"), lines.add("two")] == [False, False]
    assert lines.broken
    (record,) = caplog.records
    assert "journal has gaps from here on" in record.getMessage()
    assert "No space left on device" in record.getMessage()


def test_a_folder_that_is_gone_costs_lines(tmp_path, caplog):
    lines = Lines(tmp_path / "gone" / "journal", LOGGER)
    assert not lines.add("one")
    (tmp_path / "gone").mkdir()
    assert lines.add("two", "three")
    assert (tmp_path / "gone" / "journal").read_text() == "two\nthree\n"


# A federation that writes its journal and its ledger with no more than so many bytes a file.
_FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny
from local_grid import LocalGrid
from compeft_fl.mod import CompressionMod
from compeft_fl.results import report
from compeft_fl.results.journal import Journal
from compeft_fl.strategies import CheckpointFolder, Checkpointing, ComPEFTAverage
folder = Path(sys.argv[1])
journal = Journal(folder, "full", 6, {})
journal.begin(200)

def score(server_round, arrays):
    journal.on_score(server_round, 0.5, 1.0)
    soft = 1500 if server_round in (1, 2, 3) else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

strategy = ComPEFTAverage(observer=journal, fraction_evaluate=0.0)
strategy.start(
    LocalGrid(tiny.client_app(CompressionMod()), 4), tiny.arrays(), num_rounds=6, timeout=60,
    evaluate_fn=score, checkpointing=Checkpointing(CheckpointFolder(folder / "checkpoints")),
)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
try:
    report.write(folder, journal.record())
except OSError as error:
    print("no summary:", error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
report.write(folder, journal.record())
journal.end()
"""


def test_a_full_disk_under_a_run_s_folder_stops_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path), str(HERE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("progress.jsonl has gaps from here on") == 1
    assert done.stderr.count("ledger.csv has gaps from here on") == 1
    assert "no checkpoint" in done.stderr
    assert "accuracy.png is not written" in done.stderr
    assert done.stdout.strip() == "no summary: File too large"
    # Every line that is there is whole, those after the disk had room again too.
    events = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    rounds = {event["round"] for event in events if event["event"] == "score"}
    assert {0, 1, 5, 6} <= rounds
    assert 3 not in rounds
    assert events[-1]["event"] == "end"
    assert {transfer.round for _, transfer in read_ledger(tmp_path / "ledger.csv")} >= {1, 5, 6}
    # The sums know what the files lack.
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["replies"] == [4] * 6
    assert summary["ledger"]["uplink_messages"] == [4] * 6


def a_transfer(server_round=1) -> Transfer:
    return Transfer(1.5, server_round, 7, "up", "train", 100, 400, 20, 300, 0.25, 0.5, 0.125)


@pytest.mark.parametrize("cut", [1, 5, 40, 100_000])
def test_a_journal_and_a_ledger_that_were_cut_are_gone_on_with(cut, tmp_path):
    first = Journal(tmp_path, "cut", 3, {})
    first.begin(100)
    for server_round in range(3):
        first.on_transfer(a_transfer(server_round))
        first.on_score(server_round, 0.5, 1.0)
    for name in ("progress.jsonl", "ledger.csv"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: max(0, len(content) - cut)])
    second = Journal(tmp_path, "cut", 3, {})
    second.on_transfer(a_transfer(2))
    second.on_score(2, 0.75, 1.0)
    seen = []
    _Events(tmp_path / "progress.jsonl", seen.append).read()
    assert seen[-1]["accuracy"] == 0.75
    assert {event["event"] for event in seen} <= {"run", "score"}
    assert list(read_ledger(tmp_path / "ledger.csv"))[-1][1].round == 2


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 50, b"{\n", b"[1]\n", b'{"event": 3}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\n"],
    ids=lambda damage: repr(damage[:12]),
)
def test_damaged_lines_are_passed_over(damage, tmp_path):
    first = Journal(tmp_path, "damaged", 3, {})
    for server_round in range(2):
        first.on_transfer(a_transfer(server_round))
        first.on_score(server_round, 0.5, 1.0)
    for name in ("progress.jsonl", "ledger.csv"):
        with (tmp_path / name).open("ab") as file:
            file.write(damage)
    second = Journal(tmp_path, "damaged", 3, {})
    second.on_transfer(a_transfer(2))
    second.on_score(2, 0.75, 1.0)
    seen = []
    _Events(tmp_path / "progress.jsonl", seen.append).read()
    assert [event["round"] for event in seen] == [0, 1, 2]
    again = Ledger(tmp_path)
    assert (again.attempt, {number for number, _ in again.totals}) == (3, {0, 1, 2})


def test_the_end_of_an_earlier_run_is_not_that_of_the_run_that_goes_on(tmp_path):
    first = Journal(tmp_path, "ended", 1, {})
    first.begin(100)
    first.end()
    events = _Events(tmp_path / "progress.jsonl", lambda _: None)
    events.read()
    assert not events.ended
    second = Journal(tmp_path, "ended", 2, {})
    second.error("no file /x.csv")
    events.read()
    assert (events.ended, events.error) == (False, "no file /x.csv")
    third = _Events(tmp_path / "progress.jsonl", lambda _: None)
    Journal(tmp_path, "ended", 2, {}).end()
    third.read()
    assert (third.ended, third.error) == (True, "")


def test_a_file_that_is_no_ledger_is_put_aside(tmp_path, caplog):
    (tmp_path / "ledger.csv").write_text("a,b\n1,2\n")
    ledger = Ledger(tmp_path)
    ledger.add(a_transfer())
    assert "is no ledger: it is put aside as ledger-damaged.csv" in caplog.text
    assert (tmp_path / "ledger-damaged.csv").read_text() == "a,b\n1,2\n"
    assert [attempt for attempt, _ in read_ledger(ledger.path)] == [1]
