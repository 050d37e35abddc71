"""`make faults`: what can go wrong where a node that was away is sent the sum of what it missed."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import tiny
from bad_replies import BAD_REPLIES
from flwr.app import Error, Message, RecordDict
from hostile import seal
from local_grid import LocalGrid
from test_exchange import NODES, N, flat, remembered, start
from test_faults_local import DAMAGES, line_of

from compeft_fl.exchange.node_state import StateFile
from compeft_fl.exchange.records import EXCHANGE_KEY, find_offer
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage, DownlinkOptions
from compeft_fl.wire.v1 import update_pb2

pytestmark = pytest.mark.faults
AWAY = NODES[0]


class Roaming(LocalGrid):
    """The node `AWAY` is asked in some rounds alone; its messages and its process can be harmed."""

    def __init__(self, rounds, *, harm=None, kill_in=None, mod=None) -> None:
        super().__init__(tiny.client_app(mod or CompressionMod(density=0.2)), N)
        self.rounds, self.harm, self.kill_in = rounds, harm, kill_in
        self.kinds: list[tuple[int, str]] = []  # of what it was sent, by round
        self.now = 1  # the round

    def after(self, server_round, record):
        """For ``evaluate_fn``."""
        self.now = server_round + 1

    def get_node_ids(self):
        return [node for node in self.contexts if node != AWAY or self.now in self.rounds]

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id == AWAY:
                kind = find_offer(message.content)[2].kind
                self.kinds.append((self.now, kind))
                if self.harm is not None and kind == "catchup":
                    message.content = self.harm(message.content)
        return super().push_messages(messages)

    def _replies(self, message):
        if message.metadata.dst_node_id != AWAY or self.now != self.kill_in:
            return super()._replies(message)
        process = os.fork()
        if not process:  # the node's own: it dies where it would write what it has received
            StateFile.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            self.apps[AWAY](message, self.contexts[AWAY])
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        return [Message(Error(8, "ClientApp stopped responding."), reply_to=message)]


def strategy_of(first_contact="coarse", **options):
    downlink = DownlinkOptions(first_contact=first_contact, **options)
    return ComPEFTAverage(fraction_evaluate=0.0, downlink=downlink)


def run(strategy, grid, rounds):
    random.seed(5)
    after = grid.after if isinstance(grid, Roaming) else None
    return flat(start(strategy, grid, rounds, evaluate_fn=after).arrays)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_node_killed_between_receiving_a_catch_up_and_writing_it(
    caplog, fault_seen, monkeypatch, tmp_path
):
    strategy = strategy_of()
    grid = Roaming({1, 6, 7, 8}, kill_in=6)
    result = run(strategy, grid, 8)
    assert grid.kinds == [(1, "start"), (6, "catchup"), (7, "catchup"), (8, "deltas")]
    assert [count.resyncs for count in strategy.observer.train.values()] == [0] * 8
    assert remembered(strategy).replica.version == 7
    monkeypatch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path / "plain"))
    np.testing.assert_array_equal(result, run(strategy_of(), Roaming({1, 7, 8}), 8))
    fault_seen(
        "kill -9 of a node between receiving a catch-up and writing it",
        line_of(caplog, "is set aside", "stopped responding"),
        "it still has the version from before, and is sent the sum since then when it is asked "
        "again; the bytes of a run in which it was not asked",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first_contact", "kind", "what"),
    [
        ("coarse", "start", "the start on a coarse grid and the sum since then"),
        ("seed", "catchup", "the sum since the start, which it makes anew"),
        ("snapshot", "snapshot", "the adapter in float32"),
    ],
)
def test_a_version_that_the_server_no_longer_has(first_contact, kind, what, caplog, fault_seen):
    caplog.set_level("INFO", "flwr")
    strategy = strategy_of(first_contact)
    made = CompressionMod(density=0.2, initial_adapter=lambda context: tiny.adapter())
    grid = Roaming({2, 30}, mod=made if first_contact == "seed" else None)
    run(strategy, grid, 30)
    downlink = strategy._broadcaster._downlink
    assert 2 not in downlink.state()["log"]
    assert grid.kinds[-1] == (30, kind)
    assert [count.resyncs for count in strategy.observer.train.values()] == [0] * 30
    assert strategy.observer.train[30].replies == N
    assert remembered(strategy).replica.version == 29
    fault_seen(
        f"a node at a version that the server no longer has, first contact by {first_contact}",
        line_of(caplog, f"aggregate_train: {N} replies taken"), f"it is sent {what}, in that round",
    )  # fmt: skip


def broken(change):
    """The content of a message whose one catch-up is changed as bytes."""

    def harm(content: RecordDict) -> RecordDict:
        (key,) = (k for k, r in content.array_records.items() if k != EXCHANGE_KEY)
        ((_, array),) = content[key].items()
        array.data = change(array.data)
        return content

    return harm


def with_steps(**fields):
    """The same update with other fields of its steps body, under a right checksum."""

    def change(blob: bytes) -> bytes:
        message = update_pb2.Update.FromString(blob[:-5])
        for name, value in fields.items():
            setattr(message.steps, name, value)
        return seal(message)

    return change


HARMS = {
    "that is truncated": (DAMAGES["truncated"], "ChecksumError"),
    "with a flipped bit": (DAMAGES["with a flipped bit"], "ChecksumError"),
    "whose exponent float32 does not hold": (with_steps(exponent=-150), "StepRangeError"),
    "with a billion nonzeros": (with_steps(num_nonzeros=10**9), "NonzeroCountError"),
    "with a code of garbage": (with_steps(code=b"\xff" * 60), "Error"),
    "of other steps": (with_steps(exponent=3), "expected digest"),
}


@pytest.mark.parametrize("what", HARMS)
def test_a_hostile_catch_up(what, caplog, fault_seen):
    change, said = HARMS[what]
    strategy = strategy_of()
    grid = Roaming({1, 6, 7}, harm=broken(change))
    run(strategy, grid, 7)
    counts = strategy.observer.train
    assert [count.resyncs for count in counts.values()] == [0] * 5 + [1, 0]
    assert [count.replies for count in counts.values()] == [N, *[N - 1] * 4, N, N]
    assert remembered(strategy).replica.version == 6
    fault_seen(
        f"a catch-up {what}", line_of(caplog, "is sent what it lacks", said),
        "the node's copy stays as it was; it is sent the start and all after it within the round",
    )  # fmt: skip


@pytest.mark.parametrize("name", [each for each in BAD_REPLIES if "steps" in each])
def test_a_reply_with_hostile_steps(name, caplog, fault_seen):
    make, said = BAD_REPLIES[name]
    grid = LocalGrid(
        tiny.client_app(CompressionMod(density=0.2)), N,
        fault=lambda node, reply: make(reply) if node == AWAY else [reply],
    )  # fmt: skip
    strategy = strategy_of()
    run(strategy, grid, 1)
    assert strategy.observer.train[1].replies == N - 1
    fault_seen(
        f"a reply with {name}", line_of(caplog, "is set aside", said),
        "the adapter of a round in which the node was not asked",
    )  # fmt: skip
