from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from compeft_fl.deploy import counted
from compeft_fl.deploy.relay import Relay
from compeft_fl.results import overhead, report, units
from compeft_fl.results.journal import Journal, RoundRecord, RunRecord

ROUNDS = [
    RoundRecord(accuracy=0.5, loss=1.0, seconds=1.5),
    RoundRecord(0.625, 0.75, 0.9, 3, 2, 1, 2_000, 40_000, 100_000, 150_000, 2.0),
    RoundRecord(0.75, 0.5, 0.7, 3, 3, 0, 3_000, 50_000, 150_000, 150_000, 2.25),
]
RECORD = RunRecord("mine", 3, 12_500, ROUNDS, 6.5, {"rounds": 2})


def shown(summary: dict) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(report.table(summary))
    return console.file.getvalue()


def test_the_summary_has_the_lists_by_round():
    assert RECORD.summary() == {
        "scenario": "mine",
        "rounds": 2,
        "nodes": 3,
        "num_parameters": 12_500,
        "accuracy": [0.5, 0.625, 0.75],
        "loss": [1.0, 0.75, 0.5],
        "uplink_payload_bytes": [2_000, 3_000],
        "downlink_payload_bytes": [40_000, 50_000],
        "uplink_dense_bytes": [100_000, 150_000],
        "downlink_dense_bytes": [150_000, 150_000],
        "replies": [2, 3],
        "set_aside": [1, 0],
        "wall_seconds": 6.5,
        "config": {"rounds": 2},
    }


def test_the_files_of_a_run(tmp_path):
    summary = report.write(tmp_path, RECORD)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["train_loss"] == ""
    assert rows[2]["uplink_payload_bytes"] == "3000"
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "rounds",
    [
        ROUNDS[:1],
        ROUNDS[:2],
        [RoundRecord(accuracy=0.5, loss=1.0), RoundRecord(nodes=2, set_aside=2)],
    ],
    ids=["no rounds", "one round", "nothing came back"],
)
def test_short_and_failed_runs_can_be_drawn(tmp_path, rounds):
    report.write(tmp_path, RunRecord("mine", 3, 12_500, rounds, 1.0, {}))
    assert (tmp_path / "accuracy.png").stat().st_size > 5_000


def test_the_plot_shows_what_was_sent_and_what_dense_would_take(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    report.plot(tmp_path / "unused.png", RECORD.summary())
    by_round, by_bytes = drawn[0].axes
    assert list(by_round.lines[0].get_ydata()) == [50.0, 62.5, 75.0]
    assert by_bytes.get_xscale() == "log"
    totals = {line.get_label(): list(line.get_xdata()) for line in by_bytes.lines}
    assert totals == {
        "up: 5 kB": [2_000, 5_000],
        "up, dense: 250 kB": [100_000, 250_000],
        "up + down: 95 kB": [42_000, 95_000],
        "up + down, dense: 550 kB": [250_000, 550_000],
    }


def test_the_table_says_the_same():
    text = shown(RECORD.summary())
    lines = [line.split() for line in text.splitlines() if line.strip("│ ")[:1].isdigit()]
    cells = [[cell for cell in line if cell != "│"] for line in lines]
    assert cells[0] == ["0", "50.0", "%", "1.000"]
    assert cells[1] == ["1", "62.5", "%", "0.750", "2", "kB", "1/50", "40", "kB", "1/3.75"]
    assert cells[2] == ["2", "75.0", "%", "0.500", "3", "kB", "1/50", "50", "kB", "1/3"]
    assert "all" in text
    assert "5 kB" in text
    assert "dense float32 would take 250 kB up and 300 kB down" in text
    assert "mine: 3 nodes, 2 rounds, 12,500 parameters" in text


def test_what_was_not_sent_is_no_fraction():
    quiet = RunRecord("mine", 2, 5, [ROUNDS[0], RoundRecord(accuracy=0.5, loss=1.0)], 1.0, {})
    (line,) = [line for line in shown(quiet.summary()).splitlines() if line.startswith("│     1")]
    assert line.count(" - ") == 2


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (53_500, "53.5 kB"),
        (999_700, "1 MB"),
        (2_949_120, "2.95 MB"),
        (41.6e9, "41.6 GB"),
        (5e12, "5e+03 GB"),
    ],
)
def test_sizes_are_written_for_people(num_bytes, text):
    assert units.size(num_bytes) == text


def test_latest_is_the_newest_run(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        report.link_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_latest_can_be_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "one").mkdir()
    report.link_latest(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"]
    assert not (tmp_path / "latest").is_symlink()


def test_a_journal_sums_up_what_it_writes(tmp_path):
    journal = Journal(tmp_path / "run", "default", 1, {})
    journal.begin(100)
    journal.on_score(0, 0.5, 1.0)
    journal.on_broadcast(1, "train", [1, 2], 0)
    journal.on_broadcast(1, "train", [3], 500)
    journal.on_reply(1, "train", 1, 30, {"loss": 2.0, "seconds": 0.5, "what": 1}, None)
    journal.on_broadcast(1, "resync", [2], 450)
    journal.on_reply(1, "train", 2, 40, {"loss": 4.0, "seconds": 0.5}, None)
    journal.on_reply(1, "train", 3, 0, None, "no reply in time")
    journal.on_broadcast(1, "evaluate", [1], 60)
    journal.on_reply(1, "evaluate", 1, 0, {"accuracy": 0.5, "loss": 1.0}, None)
    journal.on_score(1, 0.75, 0.5)
    journal.end()
    summary = journal.record().summary()
    assert (summary["nodes"], summary["replies"], summary["set_aside"]) == (3, [2], [1])
    assert summary["uplink_payload_bytes"] == [70]
    assert summary["uplink_dense_bytes"] == [800]
    assert summary["downlink_payload_bytes"] == [500 + 450 + 60]
    assert summary["downlink_dense_bytes"] == [4 * 400]  # a resync is none of a dense exchange
    assert journal.record().rounds[1].train_loss == 3.0
    assert journal.reasons == ["no reply in time"]
    written = (tmp_path / "run" / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in written]
    assert [event["event"] for event in events].count("reply") == 4
    replies = [event for event in events if event["event"] == "reply"]
    assert replies[0].keys() >= {"node", "bytes", "loss", "seconds"}
    assert "what" not in replies[0]
    assert replies[2]["reason"] == "no reply in time"


# --- bytes, layer by layer ----------------------------------------------------------------------

LEDGER = {
    "attempts": 1,
    "started": [1.0, 5.0],
    "ended": [4.0, 8.0],
    **{
        f"{way}_{name}": [factor * value, factor * value]
        for way, factor in (("uplink", 1), ("downlink", 2))
        for name, value in {
            "messages": 3,
            "raw_bytes": 60_000,
            "payload_bytes": 3_000,
            "message_bytes": 6_000,
            "encode_seconds": 0.25,
            "decode_seconds": 0.5,
            "node_decode_seconds": 0.125,
        }.items()
    },
}
SOCKETS = {
    "uplink_socket_bytes": [9_000, 9_000],
    "downlink_socket_bytes": [15_000, 15_000],
    "uplink_socket_bytes_outside": 700,
    "downlink_socket_bytes_outside": 300,
}


def layers(ledger: dict) -> str:
    console = Console(file=io.StringIO(), width=80)
    summary = dataclasses.replace(RECORD, ledger=ledger).summary()
    console.print(overhead.table(summary))
    return console.file.getvalue()


def test_the_table_says_what_updates_keep_where_nodes_said_it():
    def shown(**ledger):
        console = Console(file=io.StringIO(), width=80)
        summary = dataclasses.replace(RECORD, ledger=LEDGER | ledger).summary()
        console.print(report.table(summary))
        return console.file.getvalue()

    text = shown(cosine=[0.875, None], relative_error=[0.484, None])
    assert re.search(r"┃sent down ┃of dense ┃cosine ┃ *error", text)
    assert re.search(r"│ +0\.875 │ *0\.484", text)
    assert "cosine" not in shown(cosine=[None, None], relative_error=[None, None])
    assert "cosine" not in shown()


def test_the_table_of_layers_says_what_each_adds():
    text = layers(LEDGER)
    for line in (
        "payload +│ +6 kB │ +12 kB",
        r"\+ records and metadata +│ +6 kB \(1 kB each\) │ +12 kB \(1 kB each\)",
        "= messages +│ +12 kB │ +24 kB",
        "encoding +│ +0.500 s │ +1.000 s",
        "decoding +│ +1.000 s │ +0.250 s",
    ):
        assert re.search(line, text), line
    assert "sockets" not in text
    text = layers(LEDGER | SOCKETS)
    assert re.search(r"\+ RPCs, TLS, polling +│ +6 kB \(1 kB each\) │ +6 kB \(500 B each\)", text)
    assert re.search("= on the sockets +│ +18 kB │ +30 kB", text)
    assert "outside of rounds, connecting and polling: 1 kB on the sockets" in text


def test_the_plot_of_bytes_has_a_line_for_each_layer(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    ledger = LEDGER | SOCKETS | {"downlink_payload_bytes": [0, 6_000]}
    overhead.plot(tmp_path / "unused.png", dataclasses.replace(RECORD, ledger=ledger).summary())
    up, down = drawn[0].axes
    assert [list(line.get_ydata()) for line in up.lines] == [
        [60_000, 60_000],
        [9_000, 9_000],
        [6_000, 6_000],
        [3_000, 3_000],
    ]
    assert list(down.lines[-1].get_ydata()) == [None, 6_000]  # a logarithm knows no 0


def test_socket_bytes_go_to_the_rounds_in_which_they_passed(tmp_path):
    class Counted:
        """What a relay has counted."""

        ports = (1, 2)

        def passed(self, node, direction):
            size = 10 if direction == "up" else 1000
            return [(0.5, size), (2.0 + node, size), (4.5, size), (6.0, 5 * size), (9.0, size)]

    report.write(tmp_path, dataclasses.replace(RECORD, ledger=LEDGER))
    counted.write(tmp_path, Counted(), {0: 111})
    ledger = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["ledger"]
    assert ledger["uplink_socket_bytes"] == [20, 100]
    assert ledger["downlink_socket_bytes"] == [2_000, 10_000]
    assert ledger["uplink_socket_bytes_outside"] == 60
    with (tmp_path / "sockets.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    assert {row["node"] for row in rows} == {"111", "1"}
    total = sum(int(row["socket_bytes"]) for row in rows)
    assert total == 2 * 9 * (10 + 1000)


def test_socket_bytes_of_a_run_that_failed_are_kept(tmp_path):
    with Relay(1) as relay:
        pass
    counted.write(tmp_path, relay, {})
    assert len((tmp_path / "sockets.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "summary.json").exists()
