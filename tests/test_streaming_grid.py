from __future__ import annotations

import time

import pytest
import tiny
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from local_grid import LocalGrid, gone, node_ids

from compeft_fl.server.streaming_grid import name_nodes
from compeft_fl.strategies import ReplyStream, StreamingGrid


def echo() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(msg, ctx):
        return Message(RecordDict({"c": ConfigRecord({"node": ctx.node_id})}), reply_to=msg)

    return app


def messages(nodes: int = 3) -> list[Message]:
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    return [Message(content, node, MessageType.QUERY) for node in node_ids(nodes)]


class Pulls(LocalGrid):
    """Counts pulls, and who is asked for at once."""

    def pull_messages(self, message_ids):
        message_ids = list(message_ids)
        self.pulled = [*getattr(self, "pulled", []), len(message_ids)]
        return super().pull_messages(message_ids)


def test_replies_are_pulled_one_at_a_time_as_they_are_read():
    grid = Pulls(echo(), 3)
    stream = StreamingGrid(grid).send_and_receive(messages())
    assert isinstance(stream, ReplyStream)
    assert len(grid.sent) == 3  # the messages are on their way before the first is read
    assert not hasattr(grid, "pulled")
    nodes = []
    for count, reply in enumerate(stream, 1):
        nodes.append(stream.node_id(reply))
        assert grid.pulled == [1] * count
        assert reply.content["c"]["node"] == nodes[-1]
    assert nodes == node_ids(3)
    assert stream.missing == []
    assert list(stream) == []


def test_replies_come_in_the_order_in_which_they_are_ready():
    first, second, third = node_ids(3)
    grid = LocalGrid(echo(), 3, delays={first: 1.0})
    stream = StreamingGrid(grid).send_and_receive(messages(), timeout=30)
    assert [stream.node_id(reply) for reply in stream] == [second, third, first]


def test_at_the_deadline_it_ends_and_names_who_is_missing(caplog):
    first, _, third = node_ids(3)
    grid = LocalGrid(echo(), 3, delays={first: 60, third: 60})
    begin = time.monotonic()
    stream = StreamingGrid(grid).send_and_receive(messages(), timeout=0.1)
    assert [stream.node_id(reply) for reply in stream] == [node_ids(3)[1]]
    assert time.monotonic() - begin < 30
    assert stream.missing == [first, third]
    assert f"no reply from nodes {first}, {third} after 0.1 s" in caplog.text


def test_a_late_reply_is_not_taken_for_the_next_rounds():
    late = node_ids(1)[0]
    grid = LocalGrid(echo(), 1, delays={late: 0.2})
    streaming = StreamingGrid(grid)
    assert list(streaming.send_and_receive(messages(1), timeout=0.01)) == []
    grid.delays = {}
    (reply,) = streaming.send_and_receive(messages(1))
    assert reply.metadata.reply_to_message_id != ""


def test_the_deadline_does_not_cut_off_what_has_come():
    stream = StreamingGrid(LocalGrid(echo(), 3)).send_and_receive(messages(), timeout=0)
    time.sleep(0.01)
    assert len(list(stream)) == 3


def test_messages_that_cannot_be_sent_are_said_and_not_waited_for(caplog):
    first, second, third = node_ids(3)
    grid = LocalGrid(echo(), 3, unsent=[second])
    stream = StreamingGrid(grid).send_and_receive(messages())
    assert [stream.node_id(reply) for reply in stream] == [first, third]
    assert f"the message to node {second} could not be sent" in caplog.text


class WithNone(LocalGrid):
    """As Flower's HttpGrid: None for what could not be pushed."""

    def push_messages(self, messages):
        return [*super().push_messages(messages[:-1]), None]


def test_messages_that_the_server_rejects_are_said(caplog):
    stream = StreamingGrid(WithNone(echo(), 3)).send_and_receive(messages())
    assert len(list(stream)) == 2
    assert f"the message to node {node_ids(3)[2]} could not be sent" in caplog.text


def test_the_node_of_an_error_is_the_one_that_was_asked():
    """Errors of code 3 and 5 come with the server's node id for a sender."""
    bad = node_ids(3)[1]
    grid = LocalGrid(echo(), 3, fault=lambda n, reply: [gone(reply)] if n == bad else [reply])
    stream = StreamingGrid(grid).send_and_receive(messages())
    (error,) = [reply for reply in stream if reply.has_error()]
    assert error.metadata.src_node_id == 1
    assert stream.node_id(error) == bad


class Unreadable(LocalGrid):
    """A reply whose objects Flower cannot inflate."""

    error: Exception

    def pull_messages(self, message_ids):
        for reply in super().pull_messages(message_ids):
            if reply.metadata.src_node_id == node_ids(2)[1]:
                raise self.error
            yield reply


@pytest.mark.parametrize(
    "error", [ValueError("bad head"), KeyError("id"), AttributeError("values")]
)
def test_a_reply_that_flower_cannot_read_stops_nothing(error):
    grid = Unreadable(echo(), 3)
    grid.error = error
    stream = StreamingGrid(grid).send_and_receive(messages())
    assert [stream.node_id(reply) for reply in stream] == [node_ids(3)[0], node_ids(3)[2]]
    ((node, reason),) = stream.unreadable
    assert node == node_ids(2)[1]
    assert type(error).__name__ in reason
    assert stream.missing == []


def test_unreadable_replies_reach_the_log_and_the_observer(caplog):
    from compeft_fl.mod import CompressionMod
    from compeft_fl.strategies import ComPEFTAverage

    grid = Unreadable(tiny.client_app(CompressionMod()), 3)
    grid.error = ValueError("bad head")
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    strategy.start(grid, tiny.arrays(), num_rounds=1)
    node = node_ids(2)[1]
    assert (
        f"reply of node {node} is set aside: unreadable reply: ValueError: bad head" in caplog.text
    )
    assert strategy.observer.train[1].replies == 2
    assert [bad for bad, _ in strategy.observer.train[1].set_aside] == [node]


def test_an_error_of_the_connection_is_raised():
    grid = Unreadable(echo(), 3)
    grid.error = ConnectionError("the server is gone")
    with pytest.raises(ConnectionError):
        list(StreamingGrid(grid).send_and_receive(messages()))


def test_all_else_is_the_wrapped_grids():
    grid = LocalGrid(echo(), 2)
    streaming = StreamingGrid(grid)
    assert isinstance(streaming, Grid)
    assert StreamingGrid.around(streaming) is streaming
    assert StreamingGrid.around(grid).bytes_up == 0
    streaming.set_run("a run")
    assert streaming.run == grid.run == "a run"
    assert list(streaming.get_node_ids()) == node_ids(2)
    assert [node.node_id for node in streaming.get_nodes()] == node_ids(2)
    message = streaming.create_message(RecordDict(), "query", 1001, "1")
    (message_id,) = streaming.push_messages([message])
    (reply,) = streaming.pull_messages([message_id])
    assert reply.content["c"]["node"] == 1001
    with pytest.raises(AttributeError):
        _ = streaming.nothing


def test_many_nodes_make_a_short_line():
    assert name_nodes([7]) == "node 7"
    assert name_nodes([7, 8]) == "nodes 7, 8"
    assert name_nodes(list(range(30)), most=2) == "nodes 0, 1 and 28 more"
