"""Trackers: what they are told of a run, offline, in the run's own folder."""

from __future__ import annotations

import dataclasses
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from compeft_fl.app.config import AppConfig
from compeft_fl.errors import ConfigError, MissingPackageError
from compeft_fl.exchange.ledger import Ledger
from compeft_fl.results import trackers
from compeft_fl.results.journal import RoundRecord
from compeft_fl.results.trackers import Trackers, check_installed

SETTINGS = {"task": "classification", "rounds": 2, "alpha": 0.3, "resume": False, "out": ""}


@pytest.fixture(autouse=True)
def _nothing_set_up(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)


def write_two_rounds(name, folder):
    board = Trackers((name,), folder, SETTINGS)
    ledger = Ledger(folder)
    for server_round, accuracy in enumerate((0.5, 0.75)):
        record = RoundRecord(accuracy=accuracy, loss=1.0 - accuracy, more={"perplexity": 2.0})
        board.write(server_round, record, ledger)
    board.close()


def test_tensorboard_gets_scores_and_bytes(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    write_two_rounds("tensorboard", tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        data = data[16 + size :]
    assert [found["test/accuracy", r] for r in range(2)] == [0.5, 0.75]
    assert found["test/perplexity", 1] == 2.0
    assert found["up/message_bytes", 1] == found["up_so_far/message_bytes", 1] == 0


def test_mlflow_gets_scores_and_keys(tmp_path):
    pytest.importorskip("mlflow")
    write_two_rounds("mlflow", tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        scores = store.execute(
            "select step, value from metrics where key = 'test/accuracy' order by step"
        ).fetchall()
        keys = dict(store.execute("select key, value from params").fetchall())
        (status,) = store.execute("select status from runs").fetchone()
    assert scores == [(0, 0.5), (1, 0.75)]
    assert keys["task"] == "classification"
    assert status == "FINISHED"


def write_elsewhere(name, folder):
    """In a process of its own: wandb leaves one behind, and trackio reads its folder at import."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, test_trackers;"
        "test_trackers.write_two_rounds(sys.argv[2], pathlib.Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), name, str(folder)]
    subprocess.run(command, check=True, timeout=120)


def test_wandb_stays_offline(tmp_path):
    pytest.importorskip("wandb")
    write_elsewhere("wandb", tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = run.glob("run-*.wandb")
    assert b"test/accuracy" in file.read_bytes()


def test_trackio_stays_here(tmp_path):
    pytest.importorskip("trackio")
    write_elsewhere("trackio", tmp_path)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as store:
        told = [row[0] for row in store.execute("select metrics from metrics")]
    assert len(told) == 2
    assert "test/accuracy" in str(told[1])


def test_a_tracker_that_fails_costs_its_figures_alone(tmp_path, monkeypatch, caplog):
    board = Trackers(("tensorboard",), tmp_path, SETTINGS)

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(board._trackers["tensorboard"], "log", fail)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        for server_round in range(3):
            board.write(server_round, RoundRecord(), Ledger(tmp_path))
    assert caplog.text.count("nothing more is written for tensorboard: No space left") == 1
    board.close()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"track: wandb needs .* pip install"):
        check_installed(("wandb",))
    check_installed(())


def test_names_are_checked_at_once():
    assert AppConfig(track="wandb, tensorboard,wandb").trackers() == ("wandb", "tensorboard")
    assert AppConfig().trackers() == ()
    with pytest.raises(ConfigError, match='track: no tracker "wandbb": did you mean "wandb"'):
        AppConfig(track="wandbb")


def test_a_run_is_tracked(tiny_config, tmp_path):
    from test_app_federation import run

    run(dataclasses.replace(tiny_config, track="tensorboard", rounds=1), tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"up_so_far/message_bytes" in file.read_bytes()
