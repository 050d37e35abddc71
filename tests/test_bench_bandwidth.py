"""The bandwidth benchmark: its model, its plan, and real rounds over a throttled link."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.metadata
import json
from typing import Any, ClassVar

import numpy as np
import pytest
from http2 import PREFACE, frames, new_paths

from compeft_fl import codecs
from compeft_fl.bench import bandwidth, link_runs
from compeft_fl.bench.link_app import synthetic_layout, synthetic_task_vector
from compeft_fl.bench.link_model import CodecCost, WayCost, measure, round_seconds
from compeft_fl.bench.link_runs import LinkPoint, MeasuredRound, Plan, finished, run_plan
from compeft_fl.deploy.deployment import Deployment, speaks_grpc
from compeft_fl.deploy.relay import UP, Connection

FLWR = importlib.metadata.version("flwr")

POINT = LinkPoint("golomb", 10.0, 0.0)
ROUND = MeasuredRound(
    POINT, 2, 4096, False, 6.5, (2000, 3000), (4000, 5000), (9000, 8000), 0.2, 1.5, 1.0, 2.0
)


@pytest.mark.parametrize("codec", codecs.names())
def test_costs_are_those_of_the_codec(codec):
    cost = measure(codec, 20_000, repeats=1)
    assert cost.num_parameters == synthetic_layout(20_000).num_parameters
    for way in (cost.up, cost.down):
        assert 0 < way.payload_bytes < way.message_bytes < way.payload_bytes + 2000
        assert way.encode_seconds > 0
        assert way.decode_seconds > 0
    assert cost.up.payload_bytes <= cost.down.payload_bytes  # density 0.1 and 0.2
    if codec == "dense":
        assert cost.up.payload_bytes > 4 * cost.num_parameters


def test_the_model_is_the_one_that_is_stated():
    cost = CodecCost("any", 1, WayCost(9, 500, 1.0, 2.0), WayCost(9, 2000, 4.0, 8.0))
    wire = 2500 * 8 / 1e6
    assert round_seconds(cost, 1.0, 0.0, 1) == pytest.approx(1 + 2 + 4 + 8 + wire)
    # The nodes' links are side by side; the server decodes one reply after another.
    assert round_seconds(cost, 1.0, 0.0, 5) == pytest.approx(1 + 5 * 2 + 4 + 8 + wire)
    assert round_seconds(cost, 0.5, 0.25, 1) == pytest.approx(15 + 2 * wire + 0.5)


def test_synthetic_task_vectors_are_of_their_seed_and_of_uneven_tensors():
    layout = synthetic_layout(100_000)
    one, again, other = (synthetic_task_vector(layout, *seed) for seed in ((1, 2), (1, 2), (2, 2)))
    np.testing.assert_array_equal(one.values, again.values)
    assert not np.array_equal(one.values, other.values)
    sizes = [float(np.std(one.values[where])) for _, where in layout.slices()]
    assert 6 < max(sizes) / min(sizes) < 10


def test_a_plan_leaves_out_what_has_been_measured():
    slow = LinkPoint("golomb", 1.0, 0.1)
    plan = Plan([POINT, slow, LinkPoint("dense", 10.0, 0.0)], 2, nodes=2, parameters=4096)
    warm = {"mbit_per_second": 1000.0, "latency": 0.0}
    every = plan.without([])
    assert every["golomb"] == [warm, POINT.link(), POINT.link(), slow.link(), slow.link()]
    assert len(every["dense"]) == 3
    others = [
        dataclasses.replace(ROUND, warm_up=True),
        dataclasses.replace(ROUND, nodes=3),
        dataclasses.replace(ROUND, parameters=8192),
    ]
    assert plan.without(others) == every
    done = [ROUND, dataclasses.replace(ROUND, point=plan.points[2])] * 2
    assert plan.without(done[:3])["golomb"] == [warm, slow.link(), slow.link()]
    assert "dense" not in plan.without(done)
    done += [dataclasses.replace(ROUND, point=slow)] * 2
    assert plan.without(done) == {}


def test_a_round_that_was_measured_is_read_back(tmp_path):
    assert finished(tmp_path) == []
    line = json.dumps(link_runs._to_plain(ROUND)) + "\n"
    (tmp_path / link_runs.ROUNDS_FILE).write_text(line + line[: len(line) // 2])  # and a kill
    assert finished(tmp_path) == [ROUND]


def test_nothing_starts_where_all_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(link_runs, "Deployment", None)
    (tmp_path / link_runs.ROUNDS_FILE).write_text(json.dumps(link_runs._to_plain(ROUND)) + "\n")
    assert run_plan(Plan([POINT], 1, 2, 4096), tmp_path, print) == [ROUND]


def test_the_full_plan_leaves_out_what_takes_too_long():
    way = WayCost(0, 2_000_000, 0.0, 0.0)
    small = WayCost(0, 20_000, 0.0, 0.0)
    costs = {
        "golomb": CodecCost("golomb", 1, small, small),
        "dense": CodecCost("dense", 1, way, way),
        "dense-bf16": CodecCost("dense-bf16", 1, small, small),
    }
    points = bandwidth._plan(costs, 3, 1, False).points
    near = {(p.codec, p.mbit_per_second) for p in points if not p.latency}
    assert ("golomb", 0.1) in near
    assert ("dense", 0.1) not in near
    assert ("dense", 1.0) in near
    assert not [p for p in points if p.codec == "dense-bf16"]
    assert {(p.codec, p.latency) for p in points if p.latency} == {
        ("golomb", 0.1), ("golomb", 0.3), ("dense", 0.1), ("dense", 0.3),
    }  # fmt: skip


def test_the_files_and_what_they_say(tmp_path, monkeypatch, capsys):
    """With rounds as they would be measured, the report is drawn from them."""

    def measured(plan, out, on_round):
        found = []
        for point in plan.points:
            seconds = 8.0 + 40 * point.latency  # as if a round had 20 round trips
            found.append(
                dataclasses.replace(
                    ROUND, point=point, nodes=plan.nodes, parameters=plan.parameters,
                    seconds=seconds,
                )
            )  # fmt: skip
            on_round(found[-1])
        return found

    monkeypatch.setattr(bandwidth, "run_plan", measured)
    monkeypatch.setattr(bandwidth, "measure", lambda name, _: measure(name, 8_192, repeats=1))
    assert bandwidth.run(argparse.Namespace(out=tmp_path, quick=False)) == 0
    with (tmp_path / "bandwidth.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    computed = [row for row in rows if row["kind"] == "computed"]
    assert {row["codec"] for row in computed} == set(codecs.names())
    assert {float(row["mbit_per_second"]) for row in computed} >= {0.1, 1, 10, 100, 1000}
    assert {float(row["latency_ms"]) for row in computed} >= {0, 300}
    there = [row for row in rows if row["kind"] == "measured"]
    assert all(float(row["seconds"]) > float(row["computed_seconds"]) for row in there)
    assert {row["socket_up"] for row in there} == {"3000"}
    text = (tmp_path / "bandwidth.md").read_text()
    assert "a round takes 8.0 s beyond what is computed" in text
    assert "as 19 round trips more" in text or "as 20 round trips more" in text
    assert "1.5 s from the push to a client process" in text
    assert (tmp_path / "bandwidth.png").stat().st_size > 20_000
    assert "rounds of 3 nodes: about" in capsys.readouterr().out


@pytest.mark.deploy
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not speaks_grpc(),
    reason=f"SuperNodes speak gRPC up to flwr 1.39; {FLWR} is installed, whose speak HTTP",
)
def test_rounds_over_a_real_deployment_are_grpc_and_add_up(tmp_path, monkeypatch):
    """The command over real processes; without TLS, so that what they say can be read."""
    points = [LinkPoint("golomb", 20.0, 0.01), LinkPoint("dense", 100.0, 0.0)]
    plan = Plan(points, rounds=1, nodes=2, parameters=200_000)
    monkeypatch.setattr(bandwidth, "_plan", lambda *_: plan)
    monkeypatch.setattr(bandwidth, "measure", lambda name, size: measure(name, size, repeats=1))
    monkeypatch.setattr(link_runs, "Deployment", Tapped)
    rounds: list[MeasuredRound] = []

    def noted(plan, out, on_round):
        seen = []
        rounds.extend(run_plan(plan, out, lambda each: (seen.append(each), on_round(each))))
        assert rounds == seen == finished(out)
        return rounds

    monkeypatch.setattr(bandwidth, "run_plan", noted)
    assert bandwidth.run(argparse.Namespace(out=tmp_path, quick=True)) == 0

    (deployment,) = Tapped.made
    assert deployment.relay is not None
    carried = [each.up for each in deployment.relay.connections if each.up]
    assert sorted(map(len, deployment.sent.values())) == sorted(carried)
    streams = [bytes(stream) for stream in deployment.sent.values()]
    assert streams
    assert all(stream.startswith(PREFACE) for stream in streams)
    paths = [path for stream in streams for path in new_paths(stream)]
    assert "/flwr.proto.Fleet/PushObject" in paths
    assert all(path.startswith("/flwr.proto.Fleet/") for path in paths)
    headers = b"".join(payload for s in streams for kind, payload in frames(s) if kind == 1)
    assert b"application/grpc" in headers

    assert [(each.point.codec, each.warm_up) for each in rounds] == [
        ("golomb", True), ("golomb", False), ("dense", True), ("dense", False),
    ]  # fmt: skip
    for each in rounds:
        for way in (0, 1):
            assert each.payload[way] <= each.message[way] <= each.socket[way]
        assert each.waiting > 0
        assert each.starting > 0
        assert each.returning > 0
        parts = each.waiting + each.starting + each.returning
        assert each.codec_seconds > 0
        assert each.seconds > parts / 2
    golomb, dense = rounds[1], rounds[3]
    assert [golomb.point, dense.point] == points
    size = 2 * 4 * synthetic_layout(200_000).num_parameters
    assert dense.payload[0] > size > 20 * golomb.payload[0]
    assert rounds[0].payload[1] == 0  # the first round: every node makes the start by itself
    assert golomb.payload[1] > 0
    with (tmp_path / "bandwidth.csv").open(newline="") as file:
        there = [row for row in csv.DictReader(file) if row["kind"] == "measured"]
    assert [(row["codec"], int(row["socket_up"])) for row in there] == [
        (each.point.codec, round(each.socket[0] / 2)) for each in (golomb, dense)
    ]


class Tapped(Deployment):
    """A deployment without TLS, its clients started cold, that keeps what its nodes send."""

    made: ClassVar[list[Tapped]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, secure=False, warm=False, **options)
        assert self.relay is not None
        self.sent: dict[int, bytearray] = {}
        self.relay._tap = self._keep
        self.made.append(self)

    def _keep(self, node: int, connection: Connection, direction: str, data: bytes) -> None:
        if direction == UP:
            self.sent.setdefault(id(connection), bytearray()).extend(data)
