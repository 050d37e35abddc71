"""What a run gives: the server's own adapter, or what nodes have of it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid

from compeft_fl.errors import ParameterError
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import (
    CheckpointFolder,
    Checkpointing,
    ComPEFTAverage,
    Compressed,
    DownlinkOptions,
)

NODES = 8
FEW = {"fraction_train": 0.25, "min_train_nodes": 1}
KINDS = {
    "average": lambda **more: ComPEFTAverage(fraction_evaluate=1.0, **more),
    "wrapped": lambda downlink=None, **more: Compressed(
        FedAvg(fraction_evaluate=1.0, **more), downlink=downlink
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def app_that_keeps(seen: list[np.ndarray]) -> ClientApp:
    """The tiny clients; what each is sent to evaluate is kept."""

    def keep(message: Message, context: object, call_next) -> Message:
        if message.metadata.message_type.startswith("evaluate"):
            seen.append(tiny.flat(tiny.state_of(message.content["arrays"])))
        return call_next(message, context)

    return tiny.client_app(CompressionMod(), keep)


def run(kind: str, rounds: int = 4, dtype=np.float32, start=1, more=None, **options):
    """The result, and by round what ``evaluate_fn`` got and what each node was sent."""
    random.seed(7)
    seen: list[np.ndarray] = []
    scored: dict[int, np.ndarray] = {}

    def evaluate(server_round, arrays):
        scored[server_round] = tiny.flat(tiny.state_of(arrays))

    result = KINDS[kind](**options).start(
        LocalGrid(app_that_keeps(seen), NODES), tiny.arrays(tiny.adapter(dtype)),
        num_rounds=rounds, evaluate_fn=evaluate, **(more or {}),
    )  # fmt: skip
    sent = [seen[i : i + NODES] for i in range(0, len(seen), NODES)]
    return result, scored, dict(enumerate(sent, start))


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_where_few_nodes_train_a_run_gives_what_nodes_have(kind, dtype):
    result, scored, sent = run(kind, dtype=dtype, **FEW)
    for server_round in range(1, 5):
        assert len(sent[server_round]) == NODES
        for each in sent[server_round]:
            np.testing.assert_array_equal(scored[server_round].astype(dtype), each.astype(dtype))
    given = tiny.state_of(result.arrays)
    np.testing.assert_array_equal(tiny.flat(given), scored[4])
    assert {name: (v.shape, v.dtype) for name, v in given.items()} == {
        name: (v.shape, v.dtype) for name, v in tiny.adapter(dtype).items()
    }


@every_kind
def test_where_most_nodes_train_it_is_the_servers_own(kind):
    result, scored, sent = run(kind)
    np.testing.assert_array_equal(tiny.flat(tiny.state_of(result.arrays)), scored[4])
    assert not np.array_equal(scored[4], sent[4][0])  # which has what has not gone down yet
    own, _, _ = run(kind, downlink=DownlinkOptions(result="server"))
    assert result.arrays == own.arrays


@every_kind
def test_the_option_decides(kind):
    few, _, _ = run(kind, **FEW)
    own, scored, sent = run(kind, downlink=DownlinkOptions(result="server"), **FEW)
    np.testing.assert_array_equal(tiny.flat(tiny.state_of(own.arrays)), scored[4])
    assert not np.array_equal(scored[4], sent[4][0])
    np.testing.assert_array_equal(tiny.flat(tiny.state_of(few.arrays)), sent[4][0])
    _, scored, sent = run(kind, downlink=DownlinkOptions(result="nodes"))
    np.testing.assert_array_equal(scored[4], sent[4][0])


def test_without_a_round_it_is_the_start():
    result, scored, _ = run("average", rounds=0, **FEW)
    np.testing.assert_array_equal(scored[0], tiny.flat(tiny.adapter()))
    assert tiny.state_of(result.arrays).keys() == tiny.adapter().keys()
    np.testing.assert_array_equal(tiny.flat(tiny.state_of(result.arrays)), scored[0])


def test_a_run_that_is_resumed_gives_the_same(tmp_path):
    whole, scored, _ = run("average", **FEW)

    def kept(resume):
        return {"checkpointing": Checkpointing(CheckpointFolder(tmp_path / "kept"), resume=resume)}

    run("average", rounds=2, more=kept(False), **FEW)
    resumed, again, _ = run("average", start=2, more=kept(True), **FEW)
    assert sorted(again) == [2, 3, 4]
    for server_round, values in again.items():
        np.testing.assert_array_equal(values, scored[server_round])
    assert resumed.arrays == whole.arrays


def test_another_result_is_an_error():
    with pytest.raises(ParameterError, match="expected a result among server, nodes; found 'mine'"):
        DownlinkOptions(result="mine")
