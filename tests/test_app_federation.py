"""The ready-made app as a whole, in one process: real apps, strategies and messages."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import random

import pytest
from flwr.app import Context, RecordDict
from local_grid import LocalGrid

from compeft_fl.app import client_app, server_app
from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import data, model, training
from compeft_fl.errors import CompeftError, ConfigError, StateError
from compeft_fl.exchange.records import find_update
from compeft_fl.results import report
from compeft_fl.server.checkpoint import alone_in
from compeft_fl.strategies import RoundCounts
from compeft_fl.wire.messages import inspect

NODES = 3


def run(config: AppConfig, folder, **options) -> dict:
    """Run a federation and return its summary."""
    config = dataclasses.replace(config, run_dir=str(folder), min_nodes=NODES)
    flat = config.to_run_config()
    grid = LocalGrid(client_app.app, NODES, run_config=flat, **options)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.app(grid, context)
    return json.loads((folder / report.SUMMARY_FILE).read_text(encoding="utf-8"))


def events(folder) -> list[dict]:
    lines = (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_what_a_run_leaves(tiny_config, tmp_path):
    summary = run(tiny_config, tmp_path)
    parameters = summary["num_parameters"]
    assert parameters == 2 * 2 * 2 * 8 * 32  # layers, query and value, A and B, rank, hidden
    assert (summary["scenario"], summary["rounds"], summary["nodes"]) == ("default", 2, NODES)
    assert len(summary["accuracy"]) == len(summary["loss"]) == 3
    dense = [4 * parameters * NODES] * 2
    assert summary["uplink_dense_bytes"] == summary["downlink_dense_bytes"] == dense
    assert all(0 < sent < dense[0] / 20 for sent in summary["uplink_payload_bytes"])
    first, second = summary["downlink_payload_bytes"]
    assert first == 0  # every node makes the start by itself
    assert 0 < second < dense[0] / 10
    assert summary["wall_seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.png",
        "adapter",
        "bytes.png",
        "checkpoints",
        "ledger.csv",
        "metrics.csv",
        "progress.jsonl",
        "report.html",
        "summary.json",
    ]
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    assert [int(row["uplink_payload_bytes"]) for row in rows[1:]] == summary["uplink_payload_bytes"]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(summary["accuracy"], abs=1e-6)


def test_by_default_updates_go_as_low_rank_signs_both_ways(tiny_config, tmp_path):
    given = {"model": tiny_config.model, "data": tiny_config.data, "alpha": 1.0, "device": "cpu"}
    given |= {"rounds": 2, "batch-size": 8, "local-steps": 10}
    config = AppConfig.from_run_config(given)
    seen: list[tuple[str, int]] = []

    def watched(node, reply):
        blob = find_update(reply.content)[1][0]
        seen.append((inspect(blob).codec, len(blob)))
        return [reply]

    summary = run(config, tmp_path / "lean", fault=watched)
    assert {codec for codec, _ in seen} == {"factored"}
    assert sum(size for _, size in seen) == sum(summary["uplink_payload_bytes"])
    assert summary["loss"][-1] < summary["loss"][0]
    classifier = model.load_adapter(tmp_path / "lean" / "adapter", config.model, "cpu")
    score = training.evaluate(classifier, data.load(config).test, config)
    assert score.loss == pytest.approx(summary["loss"][-1], rel=1e-5)
    ternary = AppConfig.from_run_config({**given, "preset": "compeft"})
    compeft = run(ternary, tmp_path / "compeft")
    for way in ("uplink_payload_bytes", "downlink_payload_bytes"):
        assert 0 < sum(summary[way]) < sum(compeft[way])


def test_the_adapter_scores_what_the_last_round_reported(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, local_steps=20, learning_rate=0.02)
    summary = run(config, tmp_path)
    assert summary["accuracy"][-1] > summary["accuracy"][0]
    classifier = model.load_adapter(tmp_path / "adapter", config.model, "cpu")
    score = training.evaluate(classifier, data.load(config).test, config)
    assert score.accuracy == summary["accuracy"][-1]
    assert score.loss == pytest.approx(summary["loss"][-1], rel=1e-5)


def test_what_happens_is_written_down_as_it_happens(tiny_config, tmp_path):
    run(dataclasses.replace(tiny_config, rounds=1, fraction_evaluate=1.0), tmp_path)
    found = events(tmp_path)
    kinds = [(event["event"], event.get("kind")) for event in found]
    assert kinds == [
        ("run", None),
        ("score", None),
        ("sent", "train"),
        *[("reply", "train")] * NODES,
        ("sent", "evaluate"),
        *[("reply", "evaluate")] * NODES,
        ("score", None),
        ("end", None),
    ]
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)
    for event in found:
        if event["event"] == "reply" and event["kind"] == "train":
            assert event["bytes"] > 0
            assert event["seconds"] > 0
            assert event["loss"] > 0
        elif event["event"] == "reply":
            assert event["bytes"] == 0
            assert 0 <= event["accuracy"] <= 1


def test_a_dense_downlink_sends_the_whole_adapter(tiny_config, tmp_path):
    summary = run(dataclasses.replace(tiny_config, downlink="dense"), tmp_path)
    sent, dense = summary["downlink_payload_bytes"], summary["downlink_dense_bytes"]
    assert all(full < bytes_ < 1.3 * full for bytes_, full in zip(sent, dense, strict=True))


def test_evaluation_on_nodes_does_not_send_the_adapter_again(tiny_config, tmp_path):
    without = run(tiny_config, tmp_path / "without")
    asked = run(dataclasses.replace(tiny_config, fraction_evaluate=1.0), tmp_path / "asked")
    once, again = without["downlink_dense_bytes"], asked["downlink_dense_bytes"]
    assert again == [2 * bytes_ for bytes_ in once]  # as Flower does it
    sent = without["downlink_payload_bytes"]
    assert sum(sent) < sum(asked["downlink_payload_bytes"]) < 3 * sum(sent)
    assert asked["uplink_payload_bytes"] == without["uplink_payload_bytes"]
    assert asked["accuracy"] == without["accuracy"]


def test_the_seed_gives_the_run(tiny_config, tmp_path):
    first, again = run(tiny_config, tmp_path / "1"), run(tiny_config, tmp_path / "2")
    other = run(dataclasses.replace(tiny_config, seed=43), tmp_path / "3")
    assert first["loss"] == again["loss"]
    assert first["uplink_payload_bytes"] == again["uplink_payload_bytes"]
    assert first["loss"] != other["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "ties", "tie": "majority"},
        {"strategy": "task-arithmetic"},
        {"strategy": "compressed:FedAdam", "strategy_options": '{"eta": 0.01}'},
        {"peft_method": "ia3", "density": 0.5},
        {"head": "linear", "error_feedback": False, "scale": "norm"},
        {"scale": 3.0, "codec": "bitmask"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_strategies_methods_and_rules_run(tiny_config, tmp_path, changes):
    summary = run(dataclasses.replace(tiny_config, rounds=1, **changes), tmp_path)
    assert summary["loss"][1] != summary["loss"][0]
    assert summary["replies"] == [NODES]
    assert 0 < summary["uplink_payload_bytes"][0] < summary["uplink_dense_bytes"][0] / 5


def test_flowers_own_fedavg_is_dense(tiny_config, tmp_path):
    """The yardstick: and the dense codec over our strategy comes to the same adapter."""
    config = dataclasses.replace(tiny_config, fraction_evaluate=1.0)
    summary = run(dataclasses.replace(config, strategy="fedavg"), tmp_path / "fedavg")
    for way in ("uplink", "downlink"):
        sent, dense = summary[f"{way}_payload_bytes"], summary[f"{way}_dense_bytes"]
        assert all(full < bytes_ < 1.3 * full for bytes_, full in zip(sent, dense, strict=True))
    ours = run(dataclasses.replace(config, codec="dense", downlink="dense"), tmp_path / "dense")
    assert ours["loss"] == pytest.approx(summary["loss"], rel=1e-4)


def test_a_part_of_the_nodes_trains(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, fraction_train=0.67)
    summary = run(config, tmp_path / "1")
    assert summary["replies"] == [2, 2]
    random.random()  # Flower draws nodes with the random module
    assert run(config, tmp_path / "2")["loss"] == summary["loss"]


def test_no_rounds_score_the_start(tiny_config, tmp_path):
    summary = run(dataclasses.replace(tiny_config, rounds=0), tmp_path)
    assert (summary["rounds"], summary["uplink_payload_bytes"]) == (0, [])
    assert len(summary["accuracy"]) == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_reply_that_is_set_aside_is_told(tiny_config, tmp_path, caplog):
    def lose_the_third(node, reply):
        if node == 1003:
            reply.content["arrays"]["update"].data = b"no Update at all"
        return [reply]

    with caplog.at_level(logging.WARNING, logger="flwr"):
        summary = run(tiny_config, tmp_path, fault=lose_the_third)
    assert (summary["replies"], summary["set_aside"]) == ([2, 2], [1, 1])
    told = [event for event in events(tmp_path) if "reason" in event]
    assert [event["node"] for event in told] == [1003, 1003]


def test_a_run_without_any_usable_reply_fails(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, learning_rate=1e30)
    with pytest.raises(CompeftError, match=r"no reply of any node could be used.*loss became"):
        run(config, tmp_path)
    last = events(tmp_path)[-1]
    assert last["event"] == "error"
    assert "the loss became" in last["reason"]


def test_a_folder_holds_one_run(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, rounds=1)
    run(config, tmp_path)
    before = {file: file.stat() for file in tmp_path.rglob("*")}
    with pytest.raises(StateError, match=r"without a run in it.*give another run-dir"):
        run(config, tmp_path)
    with (
        alone_in(tmp_path),
        pytest.raises(StateError, match=r"another server, process .* one at a time"),
    ):
        run(dataclasses.replace(config, resume=True), tmp_path)
    assert {file: file.stat().st_mtime for file in tmp_path.rglob("*")} == {
        file: stat.st_mtime for file, stat in before.items()
    }


def test_a_wrong_key_ends_the_run(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r'did you mean "r"|no such option'):
        run(dataclasses.replace(tiny_config, peft={"rr": 3}), tmp_path)
    assert events(tmp_path)[-1]["event"] == "error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "compressed:FedAdm"}, 'no strategy "FedAdm" .*did you mean "FedAdam"'),
        ({"strategy": "compressed:Result"}, 'no strategy "Result"'),
        (
            {"strategy": "compressed:FedAdam", "strategy_options": '{"etta": 1}'},
            'FedAdam has no such option: etta: did you mean "eta"',
        ),
        (
            {"strategy": "compressed:FedTrimmedAvg", "strategy_options": '{"fraction_train": 1}'},
            "has no such option: fraction_train",
        ),
    ],
)
def test_a_wrong_strategy_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        server_app.build_strategy(AppConfig(**changes), RoundCounts())


def test_runs_have_folders_of_their_own(tmp_path):
    config = AppConfig(out=str(tmp_path / "out"), scenario="mine")
    first = server_app.run_folder(config)
    assert first.parent == tmp_path / "out"
    assert first.name.startswith("mine-2")
    first.mkdir(parents=True)
    assert server_app.run_folder(config) != first
    assert server_app.run_folder(AppConfig(run_dir=str(tmp_path))) == tmp_path
