from __future__ import annotations

import gc
import logging
import random

import numpy as np
import pytest
import tiny
from bad_replies import BAD_REPLIES
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from heap import put_aside_as_before
from local_grid import LocalGrid, node_ids

from compeft_fl.compeft import compress
from compeft_fl.errors import LayoutError, NonFiniteError, NoUsableReplyError, ParameterError
from compeft_fl.mod import CompressionMod
from compeft_fl.server.base import Base, conform
from compeft_fl.strategies import ComPEFTAverage, Compressed, DownlinkOptions
from compeft_fl.task_vector import TaskVector

N = 8
NODES = node_ids(N)

EVERY = {
    "FedAvg": lambda: flower.FedAvg(),
    "FedAvgM": lambda: flower.FedAvgM(server_learning_rate=0.8, server_momentum=0.5),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedMedian": lambda: flower.FedMedian(),
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.2),
    "FedAdam": lambda: flower.FedAdam(eta=0.02),
    "FedAdagrad": lambda: flower.FedAdagrad(eta=0.02),
    "FedYogi": lambda: flower.FedYogi(eta=0.02),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1, train_loss_key="loss"),
    "DifferentialPrivacyServerSideFixedClipping": lambda: (
        flower.DifferentialPrivacyServerSideFixedClipping(
            flower.FedAvg(), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=N
        )
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": lambda: (
        flower.DifferentialPrivacyServerSideAdaptiveClipping(
            flower.FedAvg(), noise_multiplier=0.0, num_sampled_clients=N, clipped_count_stddev=0.0
        )
    ),
}
# Those that the mod's messages are not for: trees instead of tensors, or a client mod of their own.
LEFT_OUT = {
    "FedXgbBagging",
    "FedXgbCyclic",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "Result",
    "Strategy",
}
DENSE = DownlinkOptions(codec="dense")  # what the clients start from is what the server holds
every_strategy = pytest.mark.parametrize("name", EVERY)


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """Some of Flower's strategies collect garbage for each reply: slow where torch is loaded."""
    with put_aside_as_before():
        gc.collect()
        gc.freeze()
        yield


def lossy(state: dict, context) -> dict:
    """What the server makes of a compressed reply, computed by an uncompressed client."""
    tau = TaskVector.between(state, tiny.train_step(state, context))
    return compress(tau, 0.2, "mean").to_task_vector().apply(state)


def compressed_grid(**more) -> LocalGrid:
    mod = CompressionMod(density=0.2, error_feedback=False)
    return LocalGrid(tiny.client_app(mod), N, **more)


def reference(inner: Strategy, rounds: int, nodes=NODES) -> dict:
    """The inner strategy without compressed links, fed what decompression gives."""
    random.seed(1)  # Flower samples nodes in a random order, which is that of the sums
    grid = LocalGrid(dict.fromkeys(nodes, tiny.client_app(train=lossy)), len(nodes))
    record = tiny.arrays()
    for server_round in range(1, rounds + 1):
        messages = inner.configure_train(server_round, record, ConfigRecord(), grid)
        made, _ = inner.aggregate_train(server_round, grid.send_and_receive(list(messages)))
        record = conform(made, Base(record, 0))
        list(inner.configure_evaluate(server_round, record, ConfigRecord(), grid))  # samples too
    return tiny.state_of(record)


def assert_same(record: ArrayRecord, state: dict, tolerance: float = 0.0) -> None:
    found = tiny.state_of(record)
    assert list(found) == list(state)
    for name, value in state.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_every_strategy_of_flower_is_tried():
    assert set(EVERY) | LEFT_OUT == set(flower.__all__)


@every_strategy
def test_it_does_what_the_inner_strategy_does_with_decompressed_replies(name):
    strategy = Compressed(EVERY[name](), downlink=DENSE)
    grid = compressed_grid()
    random.seed(1)
    result = strategy.start(grid, tiny.arrays(), num_rounds=2)
    wanted = reference(EVERY[name](), 2)
    assert_same(result.arrays, wanted)
    assert np.abs(tiny.flat(wanted) - tiny.flat(tiny.adapter())).max() > 1e-3
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    for count in strategy.observer.train.values():
        assert (count.nodes, count.replies, count.set_aside) == (N, N, [])
        assert count.up_bytes < N * 120
    # The start goes down once; evaluation brings what the next round of training starts from.
    assert strategy.observer.train[1].down_bytes > N * 800
    assert strategy.observer.train[2].down_bytes == 0


def test_clients_get_one_update_and_the_inner_config():
    strategy = Compressed(flower.FedProx(proximal_mu=0.25))
    messages = strategy.configure_train(1, tiny.arrays(), ConfigRecord(), compressed_grid())
    assert len({id(message.content) for message in messages}) == 1
    content = messages[0].content
    assert list(content["arrays"]) == ["start-0", "start-1"]
    assert dict(content["config"]) == {"proximal-mu": 0.25, "server-round": 1}


def test_the_float64_that_adaptive_strategies_make_goes_no_further():
    stock = FedAdam()
    grid = LocalGrid(tiny.client_app(train=lossy), N)
    messages = stock.configure_train(1, tiny.arrays(), ConfigRecord(), grid)
    made, _ = stock.aggregate_train(1, grid.send_and_receive(list(messages)))
    assert made["q.lora_A"].dtype == "float64"  # what Flower does, and why `conform` is there
    result = Compressed(FedAdam()).start(compressed_grid(), tiny.arrays(), num_rounds=2)
    assert {array.dtype for array in result.arrays.values()} == {"float32"}


def goes_wrong(fault: str):
    make, bad = BAD_REPLIES[fault][0], NODES[1]
    train = lambda reply: reply.metadata.message_type == "train"  # noqa: E731
    return lambda node, reply: make(reply) if node == bad and train(reply) else [reply]


def test_bad_replies_are_set_aside_and_the_round_goes_on(caplog):
    nodes = node_ids(len(BAD_REPLIES) + 3)
    fault_of = dict(zip(nodes, BAD_REPLIES, strict=False))
    good = [node for node in nodes if node not in fault_of]

    def fault(node, reply):
        return BAD_REPLIES[fault_of[node]][0](reply) if node in fault_of else [reply]

    strategy = Compressed(FedAvg(fraction_evaluate=0.0))
    mod = CompressionMod(density=0.2, error_feedback=False)
    grid = LocalGrid(tiny.client_app(mod), len(nodes), fault=fault)
    result = strategy.start(grid, tiny.arrays(), num_rounds=1)
    assert_same(result.arrays, reference(FedAvg(), 1, good), 2e-6)
    count = strategy.observer.train[1]
    assert (count.replies, len(count.set_aside)) == (3, len(BAD_REPLIES))
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for node, name in fault_of.items():
        start = f"round 1: the train reply of node {node} is set aside: "
        (line,) = [line for line in lines if line.startswith(start)]
        assert BAD_REPLIES[name][1] in line


@every_strategy
def test_no_usable_reply_leaves_the_adapter(name, caplog):
    make, _ = BAD_REPLIES["cut off"]
    grid = compressed_grid(
        fault=lambda node, reply: make(reply) if "arrays" in reply.content else [reply]
    )
    with pytest.raises(NoUsableReplyError, match="of 16: ChecksumError: expected a ch") as failure:
        Compressed(EVERY[name]()).start(grid, tiny.arrays(), num_rounds=2)
    assert_same(failure.value.result.arrays, tiny.adapter())
    assert "round 2: the global adapter stays as it was" in caplog.text


def test_the_inner_strategy_is_told_of_failures():
    """Differential privacy, say: noise for N clients must not be put on a mean of fewer."""
    seen = []

    class Inner(FedAvg):
        def aggregate_train(self, server_round, replies):
            seen.extend(replies)
            return super().aggregate_train(server_round, seen)

    delays = {NODES[5]: 60.0}
    grid = compressed_grid(fault=goes_wrong("a node that is gone"), delays=delays)
    strategy = Compressed(Inner(fraction_evaluate=0.0))
    strategy.start(grid, tiny.arrays(), num_rounds=1, timeout=0.1)
    assert len(seen) == N - 1
    (error,) = [reply for reply in seen if reply.has_error()]
    assert error.metadata.src_node_id == NODES[1]  # not the server's, which the error came with
    assert error.error.reason == "error reply, code 5: Node is unavailable"
    assert (NODES[5], "no reply in time") in strategy.observer.train[1].set_aside


def test_a_second_reply_is_no_failure_of_the_first():
    seen = []

    class Inner(FedAvg):
        def aggregate_train(self, server_round, replies):
            seen.extend(replies)
            return super().aggregate_train(server_round, seen)

    grid = compressed_grid(fault=lambda node, reply: [reply, reply])
    Compressed(Inner(fraction_evaluate=0.0)).start(grid, tiny.arrays(), num_rounds=1)
    assert len(seen) == N
    assert not any(reply.has_error() for reply in seen)


@pytest.mark.parametrize("values", [{}, {"loss": [1.0]}, {"loss": 1.0, "more": 2}])
def test_odd_metrics_are_set_aside_where_flower_would_stop(values, caplog):
    def fault(node, reply):
        if node == NODES[0]:
            (key,) = reply.content.metric_records
            reply.content[key] = MetricRecord({"num-examples": 10} | values)
        return [reply]

    result = Compressed(FedAvg()).start(compressed_grid(fault=fault), tiny.arrays(), num_rounds=1)
    assert_same(result.arrays, reference(FedAvg(), 1, NODES[1:]), 2e-6)
    assert result.evaluate_metrics_clientapp[1]["sum"]
    for kind in ("train", "evaluate"):
        wanted = f"the {kind} reply of node {NODES[0]} is set aside: its records or metrics"
        assert wanted in caplog.text


def test_differential_privacy_on_the_client():
    def train(state, context):
        """Not the tensor of no dimension, which Flower's clipping does not bound."""
        return tiny.train_step(state, context) | {"scalar": state["scalar"]}

    def inner() -> Strategy:
        return flower.DifferentialPrivacyClientSideFixedClipping(
            FedAvg(), noise_multiplier=0.0, clipping_norm=0.01, num_sampled_clients=N
        )

    random.seed(1)
    stock = inner().start(
        LocalGrid(tiny.client_app(fixedclipping_mod, train=train), N), tiny.arrays()
    )
    random.seed(1)
    grid = LocalGrid(
        tiny.client_app(CompressionMod(codec="dense"), fixedclipping_mod, train=train), N
    )
    mine = Compressed(inner(), downlink=DENSE).start(grid, tiny.arrays())
    assert_same(mine.arrays, tiny.state_of(stock.arrays), 1e-6)


@pytest.mark.parametrize("key", ["more", "renamed"])
def test_odd_records_are_set_aside_where_flower_would_stop(key, caplog):
    def fault(node, reply):
        if node == NODES[0] and "arrays" in reply.content:
            reply.content[key] = reply.content["arrays"] if key == "renamed" else tiny.arrays()
            if key == "renamed":
                del reply.content["arrays"]
        return [reply]

    result = Compressed(FedAvg()).start(compressed_grid(fault=fault), tiny.arrays(), num_rounds=1)
    assert_same(result.arrays, reference(FedAvg(), 1, NODES[1:]), 2e-6)
    assert f"reply of node {NODES[0]} is set aside: its records or metrics" in caplog.text


def test_a_loss_that_is_no_number_counts_as_the_others_mean(caplog):
    """QFedAvg weighs replies by it: one NaN would be the end of every round."""

    def fault(node, reply):
        if node == NODES[0]:
            metrics = {"num-examples": 10, "loss": float("nan")}
            reply.content["metrics"] = MetricRecord(metrics)
        return [reply]

    inner = EVERY["QFedAvg"]
    result = Compressed(inner()).start(compressed_grid(fault=fault), tiny.arrays(), num_rounds=1)
    assert np.isfinite(tiny.flat(tiny.state_of(result.arrays))).all()
    assert np.isfinite(result.train_metrics_clientapp[1]["loss"])
    assert "metrics of 1 replies are left out: NaN or absurd" in caplog.text
    assert "the train reply of node" not in caplog.text


class PerNode(FedAvg):
    """Sends each node an adapter of its own."""

    def configure_train(self, server_round, arrays, config, grid):
        for index, message in enumerate(
            super().configure_train(server_round, arrays, config, grid)
        ):
            state = tiny.state_of(arrays)
            mine = {name: np.asarray(value + np.float32(index)) for name, value in state.items()}
            message.content = RecordDict({"arrays": tiny.arrays(mine), "config": config})
            yield message


def test_an_inner_strategy_may_send_each_node_its_own():
    app = tiny.client_app(CompressionMod(), train=lambda state, context: state)
    result = Compressed(PerNode(fraction_evaluate=0.0)).start(
        LocalGrid(app, 3), tiny.arrays(), num_rounds=1
    )
    moved = tiny.flat(tiny.state_of(result.arrays)) - tiny.flat(tiny.adapter())
    assert 0 < moved.min() < moved.max() + 1e-5 < 2  # a weighted mean of +0, +1 and +2
    assert moved.std() < 1e-6


class TwoRecords(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        for message in super().configure_train(server_round, arrays, config, grid):
            message.content = RecordDict({"arrays": arrays, "controls": arrays})
            yield message


def test_a_message_with_two_sets_of_arrays_is_said():
    with pytest.raises(
        ParameterError, match="one ArrayRecord in a message, found 2: arrays, contr"
    ):
        Compressed(TwoRecords()).start(compressed_grid(), tiny.arrays(), num_rounds=1)


class NoArrays(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        return super().configure_train(server_round, ArrayRecord(), config, grid)

    def _construct_messages(self, record, node_ids, message_type):
        config = RecordDict({"config": record["config"]})
        return super()._construct_messages(config, node_ids, message_type)


def test_a_reply_to_a_message_without_arrays_has_nothing_to_be_added_to():
    app = ClientApp()

    @app.train()
    def train(msg, ctx):
        honest = tiny.client_app(CompressionMod())
        question = Message(RecordDict({"arrays": tiny.arrays()}), ctx.node_id, "train")
        return Message(honest(question, ctx).content, reply_to=msg)

    with pytest.raises(NoUsableReplyError, match="a reply from a node that was sent the adapter"):
        Compressed(NoArrays(fraction_evaluate=0.0)).start(
            LocalGrid(app, 2), tiny.arrays(), num_rounds=1
        )


class Makes(FedAvg):
    """An inner strategy whose result is of no use."""

    def __init__(self, state: dict) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.state = state

    def aggregate_train(self, server_round, replies):
        return tiny.arrays(self.state), None


@pytest.mark.parametrize(
    "state",
    [
        {"other": np.zeros(3, np.float32)},
        tiny.adapter() | {"scalar": np.zeros(3, np.float32)},
        tiny.adapter() | {"head.bias": np.full(7, np.nan, np.float32)},
        tiny.adapter() | {"head.bias": np.full(7, 1e300)},
    ],
    ids=["names", "shape", "nan", "overflow"],
)
def test_a_result_that_is_no_adapter_leaves_the_adapter(state, caplog):
    result = Compressed(Makes(state)).start(compressed_grid(), tiny.arrays(), num_rounds=1)
    assert_same(result.arrays, tiny.adapter())
    assert "what Makes made cannot be used, the global adapter stays as it was" in caplog.text


@pytest.mark.parametrize(
    "inner", [lambda: Compressed(FedAvg()), ComPEFTAverage, lambda: FedAvg, lambda: None]
)
def test_only_strategies_that_read_ordinary_arrays_can_be_wrapped(inner):
    with pytest.raises(ParameterError, match="reads ordinary arrays"):
        Compressed(inner())


def test_bad_initial_arrays_are_rejected_before_any_message():
    grid = compressed_grid()
    for array, error in [
        (np.zeros(2, int), LayoutError),
        (np.full(2, np.nan, "f4"), NonFiniteError),
    ]:
        with pytest.raises(error):
            Compressed(FedAvg()).start(grid, ArrayRecord({"w": Array(array)}))
    assert grid.sent == []
    with pytest.raises(ParameterError, match="configure_train before"):
        Compressed(FedAvg()).aggregate_train(1, [])


def test_a_stock_strategy_cannot_read_the_mods_replies():
    """Why there is `Compressed`: this is what a user sees who changes the client only."""
    with pytest.raises(
        TypeError, match=r"Unsupported serialization type.*compeft_fl.wire.v1.Update"
    ):
        FedAvg().start(compressed_grid(), tiny.arrays(), num_rounds=1)


def test_a_client_without_the_mod_is_said(caplog):
    """And what one sees who changes the server only."""
    grid = LocalGrid(tiny.client_app(), 2)
    with pytest.raises(NoUsableReplyError, match="put CompressionMod into the client, as the fi"):
        ComPEFTAverage(fraction_evaluate=0.0).start(grid, tiny.arrays(), num_rounds=1)
    assert "error reply, code 2: <class 'TypeError'>" in caplog.text
    assert "compeft_fl.wire.v1.Update" in caplog.text


def test_the_inner_settings_are_logged(caplog):
    caplog.set_level(logging.INFO)
    Compressed(FedAdam(eta=0.125)).summary()
    assert "Compressed links around FedAdam" in caplog.text
    assert "eta (0.125)" in caplog.text
