from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
from bad_replies import BAD_REPLIES
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from local_grid import LocalGrid, node_ids

import compeft_fl as cf
from compeft_fl import strategies as public
from compeft_fl.errors import LayoutError, NonFiniteError, NoUsableReplyError, ParameterError
from compeft_fl.exchange.records import EXCHANGE_KEY
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import (
    ComPEFTAverage,
    ComPEFTStrategy,
    ComPEFTTaskArithmetic,
    ComPEFTTies,
    DownlinkOptions,
)
from compeft_fl.wire.messages import STYPE, decode_parts

NODES = node_ids(4)
DENSE = DownlinkOptions(codec="dense")  # what the clients start from is what the server holds
EVERY = {
    "average": (ComPEFTAverage, lambda: cf.Average()),
    "task arithmetic": (ComPEFTTaskArithmetic, lambda: cf.TaskArithmetic(scaling=None)),
    "ties": (ComPEFTTies, lambda: cf.Ties(scaling=0.4, tie="zero")),
}
every_strategy = pytest.mark.parametrize("name", EVERY)


def tau_of(node: int, state: dict) -> cf.TaskVector:
    context = type("Node", (), {"node_id": node})
    return cf.TaskVector.between(state, tiny.train_step(state, context))


def tenth() -> CompressionMod:
    return CompressionMod(density=0.1)


def merged(name: str, state: dict, nodes, density: float = 0.1) -> dict:
    """One round, without Flower."""
    updates = [cf.compress(tau_of(node, state), density, "mean") for node in nodes]
    weights = [1.0 if name == "task arithmetic" else tiny.num_examples(node) for node in nodes]
    return cf.merge(updates, EVERY[name][1](), weights).apply(state)


def start(strategy: Strategy, grid: LocalGrid, rounds: int = 1, state=None, **more):
    return strategy.start(grid, tiny.arrays(state), num_rounds=rounds, **more)


def assert_same(record: ArrayRecord, state: dict, rtol: float = 0.0) -> None:
    found = tiny.state_of(record)
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol, err_msg=name)


def grid_of(*mods, nodes: int = 4, **more) -> LocalGrid:
    return LocalGrid(tiny.client_app(*mods), nodes, **more)


@every_strategy
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_round_is_the_merge_of_the_clients_updates(name, dtype):
    state = tiny.adapter(dtype)
    result = start(EVERY[name][0](), grid_of(tenth()), state=state)
    # Flower samples nodes in a random order, and sums in float64 differ in their last bits.
    assert_same(
        result.arrays, merged(name, state, NODES), rtol=1e-6 if dtype == np.float32 else 1e-3
    )
    change = tiny.flat(tiny.state_of(result.arrays)) - tiny.flat(state)
    assert np.count_nonzero(change) > 10


@every_strategy
def test_rounds_follow_each_other_and_evaluation_sees_the_merge(name):
    evaluated = {}

    def evaluate(server_round, record):
        evaluated[server_round] = tiny.flat(tiny.state_of(record)).sum()
        return MetricRecord({"sum": float(evaluated[server_round])})

    strategy = EVERY[name][0](downlink=DENSE)
    result = start(strategy, grid_of(tenth()), 3, evaluate_fn=evaluate)
    assert list(evaluated) == [0, 1, 2, 3]
    assert len(set(evaluated.values())) == 4
    for server_round in (1, 2, 3):
        mine = result.evaluate_metrics_clientapp[server_round]["sum"]
        assert mine == pytest.approx(evaluated[server_round], rel=1e-6)
    assert [count.replies for count in strategy.observer.train.values()] == [4, 4, 4]


def test_lossless_average_is_fedavg():
    stock = start(FedAvg(), grid_of(), 3)
    for mod in (CompressionMod(codec="dense"), CompressionMod(codec="dense", density=1.0)):
        mine = start(ComPEFTAverage(downlink=DENSE), grid_of(mod), 3)
        assert_same(mine.arrays, tiny.state_of(stock.arrays), rtol=1e-5)
        for metrics in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
            for server_round, record in getattr(stock, metrics).items():
                found = getattr(mine, metrics)[server_round]
                assert dict(found) == pytest.approx(dict(record), rel=1e-5)


def test_at_density_1_a_ternary_client_is_followed_exactly():
    def train(state, context):
        return {name: value + np.float32(0.25) for name, value in state.items()}

    state = tiny.adapter()
    grid = LocalGrid(tiny.client_app(CompressionMod(density=1.0), train=train), 3)
    result = start(ComPEFTAverage(), grid, state=state)
    wanted = {name: np.asarray(value + np.float32(0.25)) for name, value in state.items()}
    assert_same(result.arrays, wanted, rtol=1e-6)


@every_strategy
def test_bad_replies_are_set_aside_and_the_round_goes_on(name, caplog):
    state, nodes = tiny.adapter(), node_ids(len(BAD_REPLIES) + 3)
    fault_of = dict(zip(nodes, BAD_REPLIES, strict=False))
    good = [node for node in nodes if node not in fault_of]

    def fault(node, reply):
        return BAD_REPLIES[fault_of[node]][0](reply) if node in fault_of else [reply]

    strategy = EVERY[name][0](fraction_evaluate=0.0)
    grid = grid_of(tenth(), nodes=len(nodes), fault=fault)
    result = start(strategy, grid, state=state)
    assert_same(result.arrays, merged(name, state, good), rtol=1e-6)
    losses = 3 / sum(tiny.num_examples(node) for node in good)
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(losses)}
    count = strategy.observer.train[1]
    assert (count.nodes, count.replies) == (len(nodes), 3)
    assert sorted(node for node, _ in count.set_aside) == sorted(fault_of)
    assert_said(caplog, fault_of)


def assert_said(caplog, fault_of: dict[int, str]) -> None:
    """One line of the log for each bad reply: the node, and the reason."""
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for node, fault in fault_of.items():
        start = f"round 1: the train reply of node {node} is set aside: "
        (line,) = [line for line in lines if line.startswith(start)]
        assert BAD_REPLIES[fault][1] in line, fault
        assert len(line) < 600
        assert line.isprintable()


@every_strategy
@pytest.mark.parametrize("fault", ["cut off", "a node that is gone", "a NaN weight", "no mod"])
def test_with_no_usable_reply_the_adapter_stays(name, fault, caplog):
    make, said = BAD_REPLIES[fault]
    strategy = EVERY[name][0]()
    grid = grid_of(tenth(), fault=lambda node, reply: make(reply) if train(reply) else [reply])
    with pytest.raises(NoUsableReplyError, match="used: 8 training messages; of 8: ") as failure:
        start(strategy, grid, 2)
    assert said in str(failure.value)
    result = failure.value.result
    assert_same(result.arrays, tiny.adapter())
    assert result.train_metrics_clientapp == {}
    assert result.evaluate_metrics_clientapp[2]["sum"]
    for server_round in (1, 2):
        wanted = f"round {server_round}: no reply could be used; the global adapter stays as it was"
        assert wanted in caplog.text


def train(reply: Message) -> bool:
    return reply.metadata.message_type == "train"


def test_a_second_reply_to_one_message_is_set_aside(caplog):
    state = tiny.adapter()
    doubled = grid_of(tenth(), fault=lambda node, reply: [reply, reply])
    result = start(ComPEFTAverage(), doubled, state=state)
    assert_same(result.arrays, merged("average", state, NODES), rtol=1e-6)
    assert caplog.text.count("expected one reply to a message, found a second") == 8


@every_strategy
def test_a_node_that_does_not_answer_in_time_is_named(name, caplog):
    state = tiny.adapter()
    strategy = EVERY[name][0](fraction_evaluate=0.0)
    grid = grid_of(tenth(), delays={NODES[2]: 60.0})
    result = start(strategy, grid, state=state, timeout=0.05)
    assert_same(result.arrays, merged(name, state, [n for n in NODES if n != NODES[2]]), rtol=1e-6)
    assert f"no reply from node {NODES[2]} after 0.05 s" in caplog.text
    assert strategy.observer.train[1].set_aside == [(NODES[2], "no reply in time")]


def test_an_unexpected_error_stops_no_round(caplog, monkeypatch):
    """What a mistake of this program would do: the reply is set aside, the traceback is logged."""
    strategy, calls = ComPEFTAverage(fraction_evaluate=0.0), []

    def read(self, blob, said=0):
        calls.append(blob)
        if len(calls) == 2:
            raise RecursionError("a mistake")
        return cf.decode(blob[0], layout=self.layout), None

    monkeypatch.setattr("compeft_fl.server.base.Base.read", read)
    start(strategy, grid_of(tenth()))
    assert strategy.observer.train[1].replies == 3
    assert "RecursionError: a mistake" in caplog.text
    assert "Traceback" in caplog.text


def metrics_fault(values):
    def fault(node, reply):
        if node == NODES[0] and not reply.has_error():
            (key,) = reply.content.metric_records
            reply.content[key] = MetricRecord({"num-examples": 10} | values)
        return [reply]

    return fault


@every_strategy
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss": [1.0, 2.0]},
        {"loss": 1.0, "more": 2},
        {"loss": float("nan")},
        {"loss": [1.0] * 9999},
    ],
    ids=["missing", "list", "more", "nan", "huge"],
)
def test_odd_metrics_cost_the_metrics_and_not_the_update(name, values, caplog):
    state = tiny.adapter()
    grid = grid_of(tenth(), fault=metrics_fault(values))
    result = start(EVERY[name][0](), grid, state=state)
    assert_same(result.arrays, merged(name, state, NODES), rtol=1e-6)
    others = [tiny.num_examples(node) for node in NODES[1:]]
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(3 / sum(others))
    assert "sum" in result.evaluate_metrics_clientapp[1]
    assert "left out" in caplog.text


def test_metric_functions_of_the_user_are_called_with_the_metrics():
    seen = []

    def function(contents, key):
        seen.append([dict(record) for rd in contents for record in rd.metric_records.values()])
        assert key == "samples"
        assert not any(content.array_records for content in contents)
        return MetricRecord({"count": len(contents)})

    app = ClientApp(mods=[tenth()])

    @app.train()
    def _train(msg, ctx):
        state = tiny.state_of(msg.content["model"])
        metrics = MetricRecord({"samples": 2})
        content = RecordDict({"model": tiny.arrays(tiny.train_step(state, ctx)), "m": metrics})
        return Message(content, reply_to=msg)

    strategy = ComPEFTAverage(
        weighted_by_key="samples",
        arrayrecord_key="model",
        train_metrics_aggr_fn=function,
        fraction_evaluate=0.0,
    )
    result = start(strategy, LocalGrid(app, 33))
    assert dict(result.train_metrics_clientapp[1]) == {"count": 33}
    assert seen == [[{"samples": 2}] * 33]


def test_the_broadcast_is_encoded_once_and_shared():
    strategy, grid = ComPEFTAverage(), grid_of(tenth())
    record, config = tiny.arrays(), ConfigRecord({"lr": 0.5})
    messages = list(strategy.configure_train(1, record, config, grid))
    assert sorted(m.metadata.dst_node_id for m in messages) == NODES
    assert len({id(message.content) for message in messages}) == 1
    content = messages[0].content
    assert sorted(content) == ["arrays", EXCHANGE_KEY, "config"]
    assert dict(content["config"]) == {"lr": 0.5, "server-round": 1}
    arrays = list(content["arrays"].values())  # parts, one for each step of a coarse start
    assert {(a.stype, a.dtype, a.shape) for a in arrays} == {(STYPE, "float32", (200,))}
    adapter = decode_parts([array.data for array in arrays])
    np.testing.assert_array_equal(adapter.values, tiny.flat(tiny.adapter()).astype(np.float32))


def test_an_adapter_in_half_precision_arrives_as_it_is():
    state = tiny.adapter(np.float16)
    (message, *_) = ComPEFTAverage().configure_train(
        1, tiny.arrays(state), ConfigRecord(), grid_of()
    )
    blobs = [array.data for array in message.content["arrays"].values()]
    np.testing.assert_array_equal(decode_parts(blobs).values, tiny.flat(state))


def test_an_observer_is_told_of_every_message():
    class Observer:
        def __init__(self):
            self.calls = []

        def on_broadcast(self, server_round, kind, node_ids, num_bytes):
            assert (num_bytes > 200) == (kind == "train")  # the start, then one delta
            self.calls.append(("down", server_round, kind, sorted(node_ids)))

        def on_reply(self, server_round, kind, node_id, num_bytes, metrics, reason):
            if kind == "train":
                assert 40 < num_bytes < 120
                assert metrics is None if reason else metrics["num-examples"] > 0
            else:
                assert num_bytes == 0
            self.calls.append(("up", server_round, kind, node_id, reason is None))

    observer = Observer()
    make, _ = BAD_REPLIES["another base version"]
    grid = grid_of(
        tenth(),
        fault=lambda n, r: make(r) if n == NODES[3] and train(r) else [r],
    )
    start(ComPEFTAverage(observer=observer), grid)
    downs = [call for call in observer.calls if call[0] == "down"]
    assert downs == [("down", 1, "train", NODES), ("down", 1, "evaluate", NODES)]
    assert sorted(call for call in observer.calls if call[0] == "up") == sorted(
        ("up", 1, kind, node, kind == "evaluate" or node != NODES[3])
        for kind in ("train", "evaluate")
        for node in NODES
    )


def test_settings_out_of_range_are_rejected_at_once():
    with pytest.raises(ParameterError, match="scaling"):
        ComPEFTTies(scaling=0)
    with pytest.raises(ParameterError, match="tie"):
        ComPEFTTies(tie="odd")
    with pytest.raises(ParameterError, match="scaling"):
        ComPEFTTaskArithmetic(scaling=float("nan"))
    with pytest.raises(TypeError, match="unknown"):
        ComPEFTAverage(unknown=1)


def test_scaling_scales():
    state = tiny.adapter()
    one, two = (
        start(ComPEFTTaskArithmetic(scaling=s), grid_of(tenth()), state=state).arrays
        for s in (1.0, 2.0)
    )
    steps = [tiny.flat(tiny.state_of(record)) - tiny.flat(state) for record in (one, two)]
    np.testing.assert_allclose(steps[1], 2 * steps[0], atol=1e-6)


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ({"w": np.zeros(3, "c8")}, LayoutError, "found complex64 in tensor 'w'"),
        ({"w": np.full(3, 1e39)}, NonFiniteError, "found inf in tensor 'w'"),
        ({"n": np.zeros(3, np.int64)}, LayoutError, "found none to train"),
        ({"w": np.array([0, np.inf], np.float32)}, NonFiniteError, "found inf in tensor 'w'"),
        ({}, LayoutError, "expected a global adapter with parameters, found none"),
    ],
)
@every_strategy
def test_initial_arrays_that_are_no_adapter_are_rejected_before_any_message(
    name, state, error, said
):
    grid = grid_of(tenth())
    with pytest.raises(error, match=said):
        EVERY[name][0]().start(grid, ArrayRecord({k: Array(v) for k, v in state.items()}))
    assert grid.sent == []


def test_a_sum_beyond_the_data_type_leaves_the_adapter(caplog):
    def train(state, context):
        return {name: value + np.float16(60000) for name, value in state.items()}

    state = {"w": np.zeros(64, np.float16)}
    grid = LocalGrid(tiny.client_app(tenth(), train=train), 3)
    result = start(ComPEFTTaskArithmetic(scaling=1.0), grid, state=state)
    assert_same(result.arrays, state)
    assert "the merge cannot be used; the global adapter stays as it was" in caplog.text
    assert "found inf in tensor 'w'" in caplog.text


def test_aggregation_needs_a_round():
    with pytest.raises(ParameterError, match="configure_train before aggregate_train"):
        ComPEFTAverage().aggregate_train(1, [])


def test_rounds_without_training_or_evaluation():
    strategy = ComPEFTAverage(fraction_train=0.0)
    result = start(strategy, grid_of(tenth()))
    assert_same(result.arrays, tiny.adapter())
    assert set(strategy.observer.evaluate) == {1}
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    grid = grid_of(tenth())
    start(strategy, grid)
    assert {kind for kind, _ in grid.sent} == {"train"}


def test_a_part_of_the_nodes_is_sampled():
    strategy = ComPEFTTies(
        fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.25, min_evaluate_nodes=1
    )
    start(strategy, grid_of(tenth()))
    assert (strategy.observer.train[1].nodes, strategy.observer.evaluate[1].nodes) == (2, 1)


def test_the_settings_are_logged(caplog):
    caplog.set_level(logging.INFO)
    for kind, _ in EVERY.values():
        kind().summary()
    for line in ("average, weighted by 'num-examples'", "scaling 1 / replies", "TIES, scaling 0.4"):
        assert line in caplog.text


def test_two_lines_in_a_flower_app():
    """The README's example: an ordinary app, and the same with a mod and a strategy."""

    def app(**mods) -> ClientApp:
        app = ClientApp(**mods)

        @app.train()
        def train(msg, ctx):
            weights = msg.content["arrays"].to_numpy_ndarrays()
            trained = [w + np.float32(0.1) for w in weights]
            metrics = MetricRecord({"num-examples": 8, "loss": 0.5})
            content = RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics})
            return Message(content, reply_to=msg)

        return app

    def sizes(strategy, app) -> tuple[float, int]:
        grid = LocalGrid(app, 2)
        initial = ArrayRecord([np.zeros((40, 500), np.float32)])
        result = strategy.start(grid, initial, num_rounds=2)
        return result.arrays.to_numpy_ndarrays()[0].mean(), grid.bytes_up

    before = sizes(FedAvg(fraction_evaluate=0.0), app())
    after = sizes(ComPEFTAverage(fraction_evaluate=0.0), app(mods=[tenth()]))
    assert before[0] == pytest.approx(0.2)
    assert after[0] == pytest.approx(0.03, rel=0.1)  # a tenth at 0.1, then a tenth at 0.2
    assert before[1] > 20 * after[1]  # with Flower's own bytes, of two rounds and two nodes


def test_the_strategies_are_those_of_the_folder_beside_the_package():
    folder = Path(__file__).resolve().parents[1] / "strategies"
    assert Path(public.__file__).resolve().parent == folder
    assert issubclass(ComPEFTStrategy, FedAvg)
