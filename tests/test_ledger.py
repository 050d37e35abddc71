"""The ledger: every message both ways, its bytes those that Flower serialises."""

from __future__ import annotations

import csv
import dataclasses
import json

import local_grid
import numpy as np
import pytest
import tiny
from bad_replies import BAD_REPLIES
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid, gone, node_ids
from test_app_federation import run

from compeft_fl.app.baseline import ObservedFedAvg
from compeft_fl.errors import MalformedError
from compeft_fl.exchange.ledger import LEDGER_FILE, Ledger, Transfer, read_ledger
from compeft_fl.exchange.message_size import MessageSizes
from compeft_fl.exchange.protocol import Answer
from compeft_fl.exchange.records import EXCHANGE_KEY, answer_record, find_answer
from compeft_fl.mod import CompressionMod
from compeft_fl.results.journal import Journal
from compeft_fl.strategies import ComPEFTAverage, Compressed, RoundCounts

N = 4
NODES = node_ids(N)
PARAMETERS = sum(int(np.prod(shape)) for shape in tiny.SHAPES.values())
serialises = pytest.mark.skipif(
    local_grid.get_all_nested_objects is None, reason="another flwr: the grid counts no bytes"
)


class Told(RoundCounts):
    """Keeps the transfers."""

    def __init__(self):
        super().__init__()
        self.transfers: list[Transfer] = []

    def on_transfer(self, transfer):
        self.transfers.append(transfer)

    def bytes(self, direction):
        return sum(t.message_bytes for t in self.transfers if t.direction == direction)

    def of(self, **wanted):
        return [t for t in self.transfers if all(getattr(t, k) == v for k, v in wanted.items())]


def start(strategy, grid, rounds=2, **options):
    return strategy.start(grid, tiny.arrays(), num_rounds=rounds, timeout=5, **options)


def grid_of(*mods, **options):
    return LocalGrid(tiny.client_app(*mods), N, **options)


@serialises
@pytest.mark.parametrize("kind", ["average", "compressed", "fedavg"])
def test_message_bytes_are_those_that_flower_serialises(kind):
    told = Told()
    options = {"min_train_nodes": N, "min_available_nodes": N}
    strategy = {
        "average": lambda: ComPEFTAverage(observer=told, **options),
        "compressed": lambda: Compressed(FedAvg(**options), observer=told),
        "fedavg": lambda: ObservedFedAvg(observer=told, **options),
    }[kind]()
    grid = grid_of(*(() if kind == "fedavg" else (CompressionMod(),)))
    start(strategy, grid)
    assert len(told.transfers) == 2 * 2 * 2 * N  # ways, rounds, kinds
    assert (told.bytes("down"), told.bytes("up")) == (grid.bytes_down, grid.bytes_up)
    for each in told.transfers:
        assert 0 <= each.payload_bytes < each.message_bytes
        assert each.parameters == (
            0 if each.kind == "evaluate" and each.direction == "up" else PARAMETERS
        )
        assert each.raw_bytes == 4 * each.parameters
    counts = [*told.train.values(), *told.evaluate.values()]
    payloads = {d: sum(t.payload_bytes for t in told.of(direction=d)) for d in ("up", "down")}
    assert payloads["up"] == sum(count.up_bytes for count in counts)
    assert payloads["down"] == sum(count.down_bytes for count in counts)


def test_seconds_are_told_by_who_spends_them():
    told = Told()
    start(ComPEFTAverage(observer=told), grid_of(CompressionMod()))
    for each in told.of(direction="up", kind="train"):
        assert each.encode_seconds > 0
        assert each.decode_seconds > 0
        assert each.node_decode_seconds > 0
    for each in told.of(direction="up", kind="evaluate"):
        assert (each.encode_seconds, each.decode_seconds) == (None, None)
        assert each.node_decode_seconds >= 0
    # A version is encoded once, and said once: with the first message that carries it.
    for server_round, kind in ((1, "train"), (1, "evaluate"), (2, "evaluate")):
        first, *others = told.of(direction="down", round=server_round, kind=kind)
        assert first.encode_seconds > 0
        assert [each.encode_seconds for each in others] == [0.0] * (N - 1)


def test_a_node_that_lost_its_state_costs_a_resync(tmp_path):
    told = Told()

    def forget(node, reply):
        if node == NODES[0] and reply.metadata.message_type == "train":
            for file in tmp_path.rglob("*.safetensors"):
                if f"/{node}/" in str(file) or "/0-of-" in str(file):
                    file.unlink()
        return [reply]

    grid = grid_of(CompressionMod(state_dir=tmp_path), fault=forget)
    start(ComPEFTAverage(observer=told, fraction_evaluate=0.0), grid)
    assert told.train[2].resyncs == 1
    asked, answered = told.of(kind="resync")
    assert (asked.direction, asked.payload_bytes, asked.raw_bytes) == ("up", 0, 0)
    assert (answered.direction, answered.raw_bytes) == ("down", 0)
    assert answered.payload_bytes > PARAMETERS  # the start, and what came after it
    if local_grid.get_all_nested_objects is not None:
        assert (told.bytes("down"), told.bytes("up")) == (grid.bytes_down, grid.bytes_up)


def test_replies_that_are_set_aside_have_crossed_the_wire_too():
    told = Told()
    make, _ = BAD_REPLIES["another base version"]
    fault = {NODES[0]: make, NODES[1]: lambda r: [gone(r)], NODES[2]: lambda r: []}
    grid = grid_of(CompressionMod(), fault=lambda n, r: fault.get(n, lambda r: [r])(r))
    strategy = ComPEFTAverage(observer=told, fraction_evaluate=0.0)
    strategy.start(grid, tiny.arrays(), num_rounds=1, timeout=0.3)
    up = {each.node: each for each in told.of(direction="up")}
    assert set(up) == {NODES[0], NODES[1], NODES[3]}  # one did not answer
    assert up[NODES[0]].payload_bytes > 0
    assert up[NODES[1]].message_bytes == 0  # Flower's server made it: nothing crossed the wire


def test_a_message_that_could_not_be_sent_is_none():
    told = Told()
    grid = grid_of(CompressionMod(), unsent=NODES[:1])
    start(ComPEFTAverage(observer=told, fraction_evaluate=0.0), grid, rounds=1)
    assert {each.node for each in told.of(direction="down")} == set(NODES[1:])


def test_other_messages_of_a_strategy_count():
    """One of Flower's wrappers or a user's own may ask nodes things without any arrays."""

    class Asks(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            yield from super().configure_train(server_round, arrays, config, grid)
            content = RecordDict({"config": ConfigRecord({"question": 1})})
            yield Message(content, NODES[0], "query")

    told = Told()
    strategy = Compressed(Asks(fraction_evaluate=0.0), observer=told)
    grid = grid_of(CompressionMod())
    strategy._broadcaster.base(arrays := tiny.arrays())
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    strategy._broadcaster.transfers.pushed(messages)
    # The node that is asked has one of either.
    assert [t.parameters for t in told.transfers] == [PARAMETERS] * N + [0]
    assert [t.parameters for t in told.of(node=NODES[0])] == [PARAMETERS, 0]


def test_the_size_of_shared_contents_is_that_of_each():
    content = RecordDict({"arrays": tiny.arrays(), "config": ConfigRecord({"lr": 0.1})})
    one, two = (Message(content, node, "train") for node in NODES[:2])
    sizes = MessageSizes()
    alone = [MessageSizes().of(message) for message in (one, two)]
    assert [sizes.of(one), sizes.of(two)] == alone
    assert one.content is content


def test_equal_parts_of_a_message_are_sent_once():
    zeros = {name: np.zeros(1000, np.float32) for name in "ab"}
    same = MessageSizes().of(Message(RecordDict({"a": tiny.arrays(zeros)}), 1, "train"))
    zeros["b"] = np.ones(1000, np.float32)
    other = MessageSizes().of(Message(RecordDict({"a": tiny.arrays(zeros)}), 1, "train"))
    assert other - same > 4000


def test_a_release_that_serialises_otherwise_is_not_measured(monkeypatch):
    monkeypatch.delattr(ArrayRecord, "deflate")
    monkeypatch.delattr(ArrayRecord.__mro__[1], "deflate", raising=False)
    message = Message(RecordDict({"a": tiny.arrays()}), 1, "train")
    assert MessageSizes().of(message) is None


def test_a_nodes_seconds_cost_thirteen_bytes():
    said = Answer(17, b"12345678", seconds=(0.00123, 4.5))
    plain = answer_record(dataclasses.replace(said, seconds=None))
    record = answer_record(said)
    if hasattr(record, "deflate"):
        heads = len(str(len(record.deflate()))), len(str(len(plain.deflate())))
        assert len(record.deflate()) - len(plain.deflate()) <= 13 + heads[0] - heads[1] + 1
    back = find_answer(RecordDict({EXCHANGE_KEY: record}))
    assert back.seconds == pytest.approx((0.00123, 4.5), rel=1e-3)
    assert dataclasses.replace(back, seconds=None) == dataclasses.replace(said, seconds=None)
    assert find_answer(RecordDict({EXCHANGE_KEY: plain})).seconds is None
    longest = answer_record(Answer(1, seconds=(1e9, 0.0)))
    assert find_answer(RecordDict({EXCHANGE_KEY: longest})).seconds == (65504.0, 0.0)


@pytest.mark.parametrize(
    "times",
    [b"", b"abcde", b"\x00\x7c\x00\x00", b"\x00\xfe\x00\x00", b"\x00\xbc\x00\x00", "abcd", 3],
)
def test_seconds_that_are_none_are_rejected(times):
    record = answer_record(Answer(1))
    record["t"] = times
    with pytest.raises(MalformedError, match="expected an answer"):
        find_answer(RecordDict({EXCHANGE_KEY: record}))


# --- the file -----------------------------------------------------------------------------------


def a_transfer(server_round=1, direction="up", **fields):
    values = {"kind": "train", "parameters": 10, "raw_bytes": 40, "payload_bytes": 7}
    values |= {"message_bytes": 100, "encode_seconds": 0.25}
    return Transfer(1.5 + server_round, server_round, 11, direction, **(values | fields))


def test_what_updates_keep_is_in_the_ledger_and_in_the_mean_of_a_round(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(a_transfer(1, "down"))
    for cosine, error in ((0.5, 0.75), (0.25, 1.0)):
        ledger.add(a_transfer(1, cosine=cosine, relative_error=error))
    ledger.add(a_transfer(2))
    assert [row.cosine for _, row in read_ledger(ledger.path)] == [None, 0.5, 0.25, None]
    for found in (ledger, Ledger(tmp_path)):
        summary = found.summary()
        assert (summary["cosine"], summary["relative_error"]) == ([0.375, None], [0.875, None])


@pytest.mark.parametrize(
    "figures", [b"", b"\x00\x7e\x00\x00", b"\x00\x40\x00\x00", b"\x00\x38\x00\xbc"]
)
def test_figures_of_quality_that_are_none_are_rejected(figures):
    record = answer_record(Answer(1, quality=(0.5, 0.75)))
    assert find_answer(RecordDict({EXCHANGE_KEY: record})).quality == (0.5, 0.75)
    record["q"] = figures
    with pytest.raises(MalformedError, match="expected an answer"):
        find_answer(RecordDict({EXCHANGE_KEY: record}))


def test_nodes_say_what_their_updates_keep():
    told = Told()
    start(ComPEFTAverage(observer=told), grid_of(CompressionMod(density=0.2)))
    for each in told.of(direction="up", kind="train"):
        assert 0 < each.cosine < 1
        assert each.relative_error == pytest.approx((1 - each.cosine**2) ** 0.5, abs=2e-3)
        assert each.energy == pytest.approx(1 - each.relative_error**2, abs=1e-5)
    assert all(each.cosine is None for each in told.of(kind="evaluate"))


def test_a_row_is_there_as_soon_as_it_is_added(tmp_path):
    ledger = Ledger(tmp_path)
    assert not ledger.path.exists()
    for server_round in (1, 1, 2):
        ledger.add(a_transfer(server_round))
        _, last = list(read_ledger(ledger.path))[-1]
        assert last == a_transfer(server_round)
    ledger.add(a_transfer(2, "down", message_bytes=None, encode_seconds=None))
    assert list(read_ledger(ledger.path))[-1][1].message_bytes is None
    summary = ledger.summary()
    assert summary["uplink_messages"] == [2, 1]
    assert summary["uplink_message_bytes"] == [200, 100]
    assert summary["uplink_encode_seconds"] == [0.5, 0.25]
    assert summary["downlink_payload_bytes"] == [0, 7]
    assert summary["started"] == summary["ended"] == [2.5, 3.5]


def test_a_run_that_was_killed_goes_on_in_the_same_ledger(tmp_path):
    first = Ledger(tmp_path)
    for server_round in (1, 2):
        first.add(a_transfer(server_round))
    whole = first.path.read_bytes()
    first.path.write_bytes(whole + whole.splitlines()[-1][:20])  # killed while it was writing
    second = Ledger(tmp_path)
    assert (second.attempt, second.path.read_bytes()) == (2, whole)
    second.add(a_transfer(2))
    assert [attempt for attempt, _ in read_ledger(second.path)] == [1, 1, 2]
    assert second.summary()["uplink_message_bytes"] == [100, 200]  # sent twice, counted twice
    third = Ledger(tmp_path)
    assert third.attempt == 3
    assert third.totals == second.totals


def test_a_ledger_of_before_some_columns_is_read(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(a_transfer())
    lines = ledger.path.read_text().splitlines()
    kept = lines[0].split(",").index("energy")
    ledger.path.write_text("".join(",".join(line.split(",")[:kept]) + "\n" for line in lines))
    assert list(read_ledger(ledger.path)) == [(1, a_transfer())]


@pytest.mark.parametrize("left", [b"", b"time,att"])
def test_a_ledger_without_a_whole_line_begins_anew(tmp_path, left):
    (tmp_path / LEDGER_FILE).write_bytes(left)
    ledger = Ledger(tmp_path)
    ledger.add(a_transfer())
    assert [attempt for attempt, _ in read_ledger(ledger.path)] == [1]


# --- in the app ---------------------------------------------------------------------------------


def test_a_runs_ledger_adds_up_to_its_summary(tiny_config, tmp_path):
    summary = run(dataclasses.replace(tiny_config, fraction_evaluate=1.0), tmp_path)
    ledger = summary["ledger"]
    for way in ("uplink", "downlink"):
        assert ledger[f"{way}_payload_bytes"] == summary[f"{way}_payload_bytes"]
        assert ledger[f"{way}_raw_bytes"] == summary[f"{way}_dense_bytes"]
        assert all(np.less(ledger[f"{way}_payload_bytes"], ledger[f"{way}_message_bytes"]))
    with (tmp_path / LEDGER_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(ledger["uplink_messages"] + ledger["downlink_messages"]) == 2 * 3 * 4
    for way, direction in (("uplink", "up"), ("downlink", "down")):
        total = sum(int(r["message_bytes"]) for r in rows if r["direction"] == direction)
        assert total == sum(ledger[f"{way}_message_bytes"])
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
    times = [float(row["time"]) for row in rows]
    assert times == sorted(times)


def test_a_resumed_run_goes_on_in_its_ledger(tiny_config, tmp_path):
    run(dataclasses.replace(tiny_config, rounds=1), tmp_path)
    summary = run(dataclasses.replace(tiny_config, rounds=2, resume=True), tmp_path)
    assert summary["ledger"]["attempts"] == 2
    # The nodes have the ids that the checkpoint knows, and none has to ask.
    assert summary["ledger"]["uplink_messages"] == [3, 3]
    assert summary["ledger"]["uplink_payload_bytes"] == summary["uplink_payload_bytes"]


def test_the_journal_tells_a_display_how_many_bytes_a_round_took(tiny_config, tmp_path):
    run(dataclasses.replace(tiny_config, rounds=1), tmp_path)
    events = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    first, last = (event for event in events if event["event"] == "score")
    assert first["up_message"] == 0
    assert 0 < last["up_payload"] < last["up_message"] < last["up_raw"]
    assert last["down_payload"] == 0 < last["down_message"]


def test_a_journal_takes_transfers(tiny_config, tmp_path):
    journal = Journal(tmp_path, tiny_config.scenario, tiny_config.rounds, {})
    journal.on_transfer(a_transfer())
    assert journal.ledger.totals[1, "up"].messages == 1
