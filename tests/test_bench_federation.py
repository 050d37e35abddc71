"""The federation of the learning benchmark is that of the strategies and the client mod."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from local_grid import LocalGrid
from safetensors.numpy import load_file

from compeft_fl.app import client_app, server_app
from compeft_fl.bench.federation import Federation, Setting
from compeft_fl.bench.sweep import Job, read_updates, run_jobs, work
from compeft_fl.errors import CompeftError
from compeft_fl.results import report

NODES = 3
OURS = Setting("ours", "golomb", "golomb", 0.1, 0.2)


def flower(config, folder) -> dict:
    config = dataclasses.replace(config, run_dir=str(folder), min_nodes=NODES)
    flat = config.to_run_config()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.app(LocalGrid(client_app.app, NODES, run_config=flat), context)
    return json.loads((folder / report.SUMMARY_FILE).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "setting",
    [
        OURS,
        dataclasses.replace(OURS, strategy="ties", scaling=0.5),
        dataclasses.replace(OURS, strategy="task-arithmetic", scaling=0.2, density=0.05),
    ],
    ids=lambda setting: setting.strategy,
)
def test_it_learns_and_sends_what_the_strategies_do(tiny_config, tmp_path, setting):
    config = dataclasses.replace(
        tiny_config, rounds=3, learning_rate=0.02, strategy=setting.strategy,
        scaling=setting.scaling, density=setting.density, downlink_density=setting.down_density,
    )  # fmt: skip
    summary = flower(config, tmp_path)
    federation = Federation(setting, config, NODES)
    rounds = list(federation.run())
    assert [r.up for r in rounds[1:]] == summary["uplink_payload_bytes"]
    assert [r.down for r in rounds[1:]] == summary["downlink_payload_bytes"]
    assert [r.accuracy for r in rounds] == pytest.approx(summary["accuracy"])
    assert [r.loss for r in rounds] == pytest.approx(summary["loss"], rel=1e-5)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    flat = np.concatenate([value.ravel() for value in state.values()])
    np.testing.assert_allclose(
        np.sort(federation.adapter.values), np.sort(flat), rtol=1e-5, atol=1e-7
    )


def test_a_dense_run_sends_the_adapter_both_ways_in_each_round(tiny_config):
    federation = Federation(Setting("dense-fp32", "dense", "dense"), tiny_config, NODES)
    first, second, third = federation.run()
    size = 4 * federation.adapter.num_parameters * NODES
    assert (first.up, first.down) == (0, 0)
    assert second.down == size
    assert size < third.up < 1.1 * size
    assert size < third.down < 1.3 * size  # a snapshot names its tensors
    assert not third.updates


def test_a_sweep_stores_its_runs_and_goes_on(tiny_config, tmp_path):
    keys = tuple(
        (key, value)
        for key, value in tiny_config.to_run_config().items()
        if key in {"model", "data", "rounds", "local-steps", "batch-size", "alpha", "device"}
    )
    job = Job(OURS, 7, NODES, keys)
    assert job.finished(tmp_path) is None
    assert list(run_jobs([job], tmp_path, workers=1))
    found = job.finished(tmp_path)
    assert found is not None
    assert len(found["rounds"]) == 3
    assert list(run_jobs([job], tmp_path, workers=1)) == []
    assert dataclasses.replace(job, num_nodes=2).finished(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours-7.json", "ours-7.updates"]
    updates = list(read_updates(tmp_path / "ours-7.updates"))
    assert [(number, way, nodes) for number, way, nodes, _ in updates] == [
        (1, "up", 1), (1, "up", 1), (1, "up", 1),
        (2, "down", 3), (2, "up", 1), (2, "up", 1), (2, "up", 1),
    ]  # fmt: skip
    assert sum(len(blob) for *_, blob in updates[:3]) == found["rounds"][1]["up"]


def test_a_run_that_fails_stops_the_sweep_and_says_why(tmp_path):
    job = Job(OURS, 1, NODES, (("data", str(tmp_path / "none.jsonl")), ("rounds", 1)))
    with pytest.raises(CompeftError, match=r"ours-1 ended with 1; .*ours-1.log ends: "):
        list(run_jobs([job], tmp_path, workers=2))
    assert not job.file(tmp_path).exists()
    with pytest.raises(CompeftError):
        work(job, tmp_path)


@pytest.fixture(scope="module")
def dense(tiny_config):
    """The rounds of dense links."""
    return list(Federation(Setting("d", "dense", "dense"), tiny_config, NODES).run())


@pytest.mark.parametrize(
    "name", ["int8-blockwise", "topk-fp16@0.1", "stc@0.05", "signsgd", "qsgd-s16"]
)
def test_a_peer_s_codec_carries_changes_both_ways(tiny_config, dense, name):
    federation = Federation(Setting(name, name, name), tiny_config, NODES)
    rounds = list(federation.run())
    assert rounds[0].loss == dense[0].loss
    assert rounds[1].down == 0  # every node makes the start by itself
    assert 0 < rounds[2].down < dense[2].down / 3
    assert all(0 < r.up < d.up / 3 for r, d in zip(rounds[1:], dense[1:], strict=True))
    assert rounds[-1].loss < rounds[0].loss
    again = list(Federation(Setting(name, name, name), tiny_config, NODES).run())
    assert [r.numbers() for r in again] == [r.numbers() for r in rounds]
