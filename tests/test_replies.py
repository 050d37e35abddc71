"""What foreign code may do with a round's messages and replies, and what a run without any is."""

from __future__ import annotations

import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result
from local_grid import LocalGrid, identify, node_ids, over_the_wire

from compeft_fl.client import mod as mod_module
from compeft_fl.errors import NoUsableReplyError, ParameterError
from compeft_fl.exchange.message_size import MessageSizes
from compeft_fl.exchange.records import EXCHANGE_KEY
from compeft_fl.mod import CompressionMod
from compeft_fl.server import replies as replies_module
from compeft_fl.server.intake import received
from compeft_fl.server.replies import Replies, SizedArrays
from compeft_fl.strategies import Checkpointing, ComPEFTAverage, Compressed

N = 4
NODES = node_ids(N)


def grid_of(*mods, **more) -> LocalGrid:
    return LocalGrid(tiny.client_app(*(mods or (CompressionMod(density=0.5),))), N, **more)


def forget_states(grid: LocalGrid) -> None:
    """All nodes lose what they have kept, under their feet."""
    shutil.rmtree(os.environ["COMPEFT_FL_STATE_DIR"])


# --- walking -----------------------------------------------------------------------------------


class Walks(ComPEFTAverage):
    """Looks at everything, before and after, and hands on a list of its own."""

    def aggregate_train(self, server_round, replies):
        before = [reply.content["metrics"]["loss"] for reply in replies]
        assert len(replies) == len(list(replies)) == len(before) == N
        assert replies[0] is next(iter(replies))
        assert [*replies[1:3]] == list(replies)[1:3]
        assert bool(replies)
        arrays, metrics = super().aggregate_train(server_round, list(reversed(list(replies))))
        assert [reply.content["metrics"]["loss"] for reply in replies] == before
        return arrays, metrics

    def aggregate_evaluate(self, server_round, replies):
        assert not any(reply.has_error() for reply in replies)
        return super().aggregate_evaluate(server_round, (reply for reply in replies))


def test_replies_can_be_walked_over_and_a_node_that_asks_is_answered_before():
    plain, walked = ComPEFTAverage(), Walks()
    results = []
    for strategy in (plain, walked):
        grid = grid_of()

        seen: list = []

        def lose(node, reply, grid=grid, seen=seen):
            seen.append(node)
            if len(seen) == 2 * N:  # at the end of round 1
                forget_states(grid)
            return [reply]

        grid.fault = lose
        results.append(strategy.start(grid, tiny.arrays(), num_rounds=3))
        shutil.rmtree(os.environ["COMPEFT_FL_STATE_DIR"], ignore_errors=True)
    counts = walked.observer.train
    assert [count.replies for count in counts.values()] == [N] * 3
    assert counts[2].resyncs == N
    assert [plain.observer.train[r].up_bytes for r in (1, 2, 3)] == [
        counts[r].up_bytes for r in (1, 2, 3)
    ]
    a, b = (tiny.flat(tiny.state_of(result.arrays)) for result in results)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # the order of the sum differs


class TakesTwo(ComPEFTAverage):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies)[:2])


def test_replies_that_a_strategy_leaves_out_are_said(caplog):
    strategy = TakesTwo(fraction_evaluate=0.0)
    strategy.start(grid_of(), tiny.arrays(), num_rounds=1)
    count = strategy.observer.train[1]
    assert count.replies == 2
    assert [reason for _, reason in count.set_aside] == ["left out by the strategy's own code"] * 2
    assert caplog.text.count("left out by the strategy's own code") == 2


class Clusters(ComPEFTAverage):
    """Merges the same replies twice, as strategies with more than one model do."""

    def aggregate_train(self, server_round, replies):
        super().aggregate_train(server_round, [replies[0], replies[1]])
        return super().aggregate_train(server_round, replies)


def test_replies_that_are_merged_twice_count_once():
    strategy = Clusters(fraction_evaluate=0.0)
    strategy.start(grid_of(), tiny.arrays(), num_rounds=1)
    assert (strategy.observer.train[1].replies, strategy.observer.train[1].set_aside) == (N, [])


def arrivals(sizes):
    identify()
    for index, size in enumerate(sizes):
        record = ArrayRecord({"w": Array(np.full(size, index, np.float32))})
        message = Message(RecordDict({"arrays": record}), NODES[0], "train")
        yield received(message, None, set())


def test_kept_arrays_lie_in_a_file_and_are_what_they_were(monkeypatch, tmp_path):
    monkeypatch.setattr(replies_module, "_MEMORY_BYTES", 1)
    sizes = [3, 5000, 70_000]
    walked = Replies(arrivals(sizes), keep=True)
    for index, (message, size) in enumerate(zip(walked, sizes, strict=True)):
        array = message.content["arrays"]["w"]
        np.testing.assert_array_equal(array.numpy(), np.full(size, index, np.float32))
        assert ("data" in vars(array)) == (size == 3)  # a small one is not worth a place
        copy = pickle.loads(pickle.dumps(array))
        assert (type(copy), copy.data) == (Array, array.data)
        whole = ArrayRecord({"w": Array(array.numpy())})
        assert message.content["arrays"].count_bytes() == whole.count_bytes()
        of = MessageSizes().of_content
        assert of(message.content) == of(RecordDict({"arrays": whole}))
    assert over_the_wire(walked[2])[0].content["arrays"]["w"].numpy().sum() == 140_000


def test_replies_that_are_gone_are_not_an_empty_list():
    passed = Replies(arrivals([3, 4]), keep=False)
    assert len([reply.num_bytes for reply in passed.read()]) == 2
    with pytest.raises(ParameterError, match="take list"):
        list(passed)


def test_sized_arrays_are_ordinary_otherwise():
    sized = SizedArrays(tiny.arrays(), lambda: 7)
    assert sized.count_bytes() == 7
    assert sized == tiny.arrays()
    assert type(pickle.loads(pickle.dumps(sized))) is ArrayRecord
    content, plain = RecordDict({"arrays": sized}), RecordDict({"arrays": tiny.arrays()})
    assert MessageSizes().of_content(content) == MessageSizes().of_content(plain)


# --- messages of a strategy's own --------------------------------------------------------------


def recording_app(seen: list) -> ClientApp:
    app = ClientApp(mods=[CompressionMod(density=0.5)])

    def work(message: Message, context: Context) -> Message:
        metadata = message.metadata
        mine = message.content["config"].get("mine")
        seen.append((metadata.message_type, context.node_id, mine))
        state = tiny.state_of(message.content["arrays"])
        return tiny.reply_with(message, tiny.train_step(state, context), context.node_id)

    app.train()(work)
    app.train("other")(work)
    return app


def own_messages(messages):
    """Two types in a round, and a content for each node."""
    for message in messages:
        node = message.metadata.dst_node_id
        message_type = "train" if node in NODES[:2] else "train.other"
        config = ConfigRecord({"mine": node})
        content = RecordDict({"arrays": message.content["arrays"], "config": config})
        yield Message(content, node, message_type)


class OwnMessages(ComPEFTAverage):
    def configure_train(self, *args):
        return own_messages(list(super().configure_train(*args)))


class OwnMessagesInside(FedAvg):
    def configure_train(self, *args):
        return own_messages(super().configure_train(*args))


@pytest.mark.parametrize(
    "make", [OwnMessages, lambda **kw: Compressed(OwnMessagesInside(**kw))], ids=["own", "inner"]
)
def test_a_node_that_lost_its_state_is_sent_its_own_message_again(make):
    seen: list = []
    grid = LocalGrid(recording_app(seen), N)
    strategy = make(fraction_evaluate=0.0)

    def forget(node, reply):
        if len(seen) == N and node == seen[-1][1]:  # the last one of round 1
            forget_states(grid)
        return [reply]

    grid.fault = forget
    strategy.start(grid, tiny.arrays(), num_rounds=3)
    wanted = [("train" if n in NODES[:2] else "train.other", n, n) for n in NODES]
    for server_round in range(3):
        assert sorted(seen[N * server_round : N * (server_round + 1)], key=str) == sorted(
            wanted, key=str
        )
    assert strategy.observer.train[2].resyncs == N
    assert [count.replies for count in strategy.observer.train.values()] == [N] * 3


class Asks(FedAvg):
    """A question without arrays beside the training messages of a round."""

    def configure_train(self, *args):
        yield from super().configure_train(*args)
        yield Message(RecordDict({"config": ConfigRecord({"q": 1})}), NODES[0], "query")

    def aggregate_train(self, server_round, replies):
        self.answers = [r for r in replies if r.metadata.message_type == "query"]
        rest = [r for r in replies if r.metadata.message_type != "query"]
        return super().aggregate_train(server_round, rest)


def test_an_answer_to_a_question_without_arrays_reaches_the_inner_strategy():
    app = tiny.client_app(CompressionMod())

    @app.query()
    def query(message, context):
        return Message(RecordDict({"config": ConfigRecord({"a": 42})}), reply_to=message)

    strategy = Compressed(Asks(fraction_evaluate=0.0))
    strategy.start(LocalGrid(app, N), tiny.arrays(), num_rounds=1)
    (answer,) = strategy.answers
    assert answer.content["config"]["a"] == 42
    assert strategy.observer.train[1].set_aside == []


@pytest.mark.parametrize("make", [ComPEFTAverage, lambda: Compressed(FedAvg())])
def test_a_strategy_that_is_started_twice_begins_afresh(make):
    strategy, first = make(), make()
    grid = grid_of()
    strategy.start(grid, tiny.arrays(tiny.adapter(seed=3)), num_rounds=2)
    federation = strategy._broadcaster.federation
    other = {"w": np.arange(50, dtype=np.float32)}
    strategy.start(grid, tiny.arrays(other), num_rounds=1)  # even of another layout
    again = strategy.start(grid, tiny.arrays(), num_rounds=2)
    assert strategy._broadcaster.federation != federation
    wanted = first.start(grid_of(), tiny.arrays(), num_rounds=2)
    a, b = (tiny.flat(tiny.state_of(result.arrays)) for result in (again, wanted))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- a start of one's own ----------------------------------------------------------------------


class OwnLoop(ComPEFTAverage):
    def start(self, grid, initial_arrays, num_rounds=3):
        result = Result(arrays=initial_arrays)
        for server_round in range(1, num_rounds + 1):
            messages = self.configure_train(server_round, result.arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages=messages, timeout=60)
            result.arrays, _ = self.aggregate_train(server_round, replies)
        return result


def test_an_own_loop_of_a_strategy_that_reads_updates_is_as_good():
    grid, seen = grid_of(), []

    def forget(node, reply):
        seen.append(node)
        if len(seen) == N:
            forget_states(grid)
        return [reply]

    grid.fault = forget
    strategy = OwnLoop(fraction_evaluate=0.0)
    strategy.start(grid, tiny.arrays(), num_rounds=2)
    assert [count.replies for count in strategy.observer.train.values()] == [N, N]
    assert strategy.observer.train[2].resyncs == N
    with pytest.raises(NoUsableReplyError):
        OwnLoop().start(LocalGrid(tiny.client_app(), N), tiny.arrays(), num_rounds=1)


class CallsStart(FedAvg):
    def start(self, *args, **kwargs):
        self.before = True
        result = super().start(*args, **kwargs)
        self.after = True
        return result


def test_an_inner_start_runs_and_ends_as_without_it():
    own, plain = Compressed(CallsStart()), Compressed(FedAvg())
    found = own.start(grid_of(), tiny.arrays(), num_rounds=3)
    wanted = plain.start(grid_of(), tiny.arrays(), num_rounds=3)
    assert own.before
    assert own.after
    a, b = (tiny.flat(tiny.state_of(result.arrays)) for result in (found, wanted))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [c.up_bytes for c in own.observer.train.values()] == [
        c.up_bytes for c in plain.observer.train.values()
    ]
    assert set(own.observer.evaluate) == {1, 2, 3}
    with pytest.raises(NoUsableReplyError):
        Compressed(CallsStart()).start(LocalGrid(tiny.client_app(), N), tiny.arrays(), num_rounds=1)


def test_what_an_inner_start_cannot_have_is_said():
    with pytest.raises(ParameterError, match="no checkpointing: CallsStart has a start of its own"):
        Compressed(CallsStart()).start(grid_of(), tiny.arrays(), checkpointing=Checkpointing())

    class Pushes(FedAvg):
        def start(self, grid, arrays):
            grid.push_messages(self.configure_train(1, arrays, ConfigRecord(), grid))

    with pytest.raises(ParameterError, match="expected send_and_receive for messages with arrays"):
        Compressed(Pushes()).start(grid_of(), tiny.arrays())


class MakesNaN(CallsStart):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round == 1:
            arrays = tiny.arrays({k: np.full_like(v, np.nan) for k, v in tiny.adapter().items()})
        return arrays, metrics


def test_a_result_of_no_use_goes_to_no_node(caplog):
    result = Compressed(MakesNaN(fraction_evaluate=0.0)).start(
        grid_of(), tiny.arrays(), num_rounds=2
    )
    assert "what MakesNaN made cannot be used" in caplog.text
    assert np.isfinite(tiny.flat(tiny.state_of(result.arrays))).all()


def test_attributes_of_the_inner_strategy_are_its_own():
    strategy = Compressed(FedAvg(fraction_train=0.5))
    assert strategy.fraction_train == 0.5
    strategy.fraction_train = 1.0
    assert strategy.inner.fraction_train == 1.0
    strategy.note = "mine"
    assert "note" not in vars(strategy.inner)
    with pytest.raises(AttributeError, match="nothing"):
        _ = strategy.nothing
    assert isinstance(pickle.loads(pickle.dumps(strategy)), Compressed)


# --- nothing of use ----------------------------------------------------------------------------


def looking_mod(message, context, call_next):
    """As Flower's mods for differential privacy: it wants ordinary arrays."""
    message.content["arrays"].to_numpy_ndarrays()
    return call_next(message, context)


def plain_arrays(node, reply):
    content = RecordDict({"arrays": tiny.arrays(), "metrics": reply.content["metrics"]})
    reply.content = content
    return [reply]


@pytest.mark.parametrize("make", [ComPEFTAverage, lambda: Compressed(FedAvg())])
@pytest.mark.parametrize(
    ("mods", "fault", "said"),
    [
        ((), None, "put CompressionMod into the client, as the first of its mods"),
        ((looking_mod, CompressionMod()), None, "as the first of its mods"),
        ((CompressionMod(),), plain_arrays, "found plain arrays; put CompressionMod into the cl"),
        ((CompressionMod(), CompressionMod()), None, "is CompressionMod there twice?"),
    ],
    ids=["no mod", "wrong order", "plain arrays", "twice"],
)
def test_a_run_without_any_usable_reply_names_the_missing_half(make, mods, fault, said):
    grid = LocalGrid(tiny.client_app(*mods), N, fault=fault)
    strategy = make()
    with pytest.raises(NoUsableReplyError) as failure:
        strategy.start(grid, tiny.arrays(), num_rounds=2)
    text = str(failure.value)
    assert said in text
    assert "\n" not in text
    assert f"{2 * N} training messages" in text


def test_nodes_that_never_answer_are_a_failure_too():
    grid = grid_of(delays=dict.fromkeys(NODES, 60.0))
    with pytest.raises(NoUsableReplyError, match="of 4: no reply in time"):
        ComPEFTAverage().start(grid, tiny.arrays(), num_rounds=1, timeout=0.05)


def test_one_usable_reply_is_none():
    grid = grid_of(fault=lambda node, reply: [reply] if node == NODES[0] else [])
    ComPEFTAverage().start(grid, tiny.arrays(), num_rounds=1, timeout=0.05)


def test_a_node_says_that_a_stock_server_cannot_read_its_updates(caplog, monkeypatch):
    monkeypatch.setattr(mod_module, "_said", set())
    with caplog.at_level(logging.WARNING, logger="flwr"), pytest.raises(TypeError):
        FedAvg().start(grid_of(), tiny.arrays(), num_rounds=1)
    assert caplog.text.count("wrap it in compeft_fl.strategies.Compressed") == 1
    assert EXCHANGE_KEY not in caplog.text
