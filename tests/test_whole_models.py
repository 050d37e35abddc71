"""Whole models and their tensors of all kinds, through a federation: two lines, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from local_grid import LocalGrid, node_ids

from compeft_fl.exchange.ledger import Transfer
from compeft_fl.exchange.records import CARRIED_KEY, carried_record
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import (
    CheckpointFolder,
    Checkpointing,
    ComPEFTAverage,
    ComPEFTTaskArithmetic,
    ComPEFTTies,
    Compressed,
)

NODES = node_ids(3)
State = dict[str, np.ndarray]

STRATEGIES: dict[str, Callable[..., Any]] = {
    "average": ComPEFTAverage,
    "task arithmetic": ComPEFTTaskArithmetic,
    "ties": ComPEFTTies,
    "compressed": lambda **options: Compressed(FedAvg(), **options),
    "compressed adam": lambda **options: Compressed(FedAdam(eta=1.0, tau=1e-3), **options),
}


def model(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.standard_normal((4, 9)).astype("f4"),
        "bn.running_mean": np.zeros(4, "f4"),
        "bn.running_var": np.ones(4, "f4"),
        "bn.num_batches_tracked": np.array(0),
        "index": np.array([[2**60 + 1, 3], [0, 9]]),
        "mask": np.array([True, False, True]),
        "double": np.array([1 / 3, 1e-200]),
        "bytes": np.arange(5, dtype="u1"),
        "head.weight": rng.standard_normal((3, 4)).astype("f4"),
        "head.bias": np.zeros(3, "f4"),
    }


def moved(state: State, context: Context) -> State:
    """As training does it: weights, statistics and counters move, indices and masks stay."""
    node = context.node_id - NODES[0] + 1
    new = {name: value.copy() for name, value in state.items()}
    for name in ("conv.weight", "head.weight", "head.bias"):
        new[name] += np.float32(0.1 * node)
    new["bn.running_mean"] += np.float32(0.5 * node)
    new["bn.running_var"] *= np.float32(1 / 64)
    new["bn.num_batches_tracked"] += 10
    new["double"] += node / 3
    return new


def run(
    strategy: Any,
    train: Callable[[State, Context], State] = moved,
    state: State | None = None,
    rounds: int = 3,
    mod: CompressionMod | None = None,
    **options: Any,
) -> tuple[State, LocalGrid]:
    app = tiny.client_app(mod or CompressionMod(density=0.3), train=train)
    grid = LocalGrid(app, 3, **options)
    initial = tiny.arrays(model() if state is None else state)
    result = strategy.start(grid, initial, num_rounds=rounds)
    return tiny.state_of(result.arrays), grid


class Ledger:
    """An observer that keeps what crossed."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.failed: list[tuple[int, str]] = []

    def on_broadcast(self, *_: object) -> None: ...

    def on_reply(self, server_round, kind, node_id, num_bytes, metrics, failure) -> None:
        if failure is not None:
            self.failed.append((node_id, failure))

    def on_transfer(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_whole_model_with_two_lines(kind, caplog):
    found, _ = run(STRATEGIES[kind]())
    start = model()
    assert list(found) == list(start)
    for name, value in start.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        if name in ("index", "mask", "bytes"):
            np.testing.assert_array_equal(found[name], value)
    assert (found["bn.running_var"] >= 0).all()
    assert (found["conv.weight"] > start["conv.weight"]).any()
    assert "set aside" not in [r.msg for r in caplog.records if r.levelname == "WARNING"]
    assert "7 tensors are carried as they are" in caplog.text
    if kind != "compressed adam":
        assert found["bn.num_batches_tracked"] == 30
        np.testing.assert_allclose(found["bn.running_var"], 64.0**-3, rtol=1e-6)


def test_carried_floats_are_the_weighted_mean_and_float64_keeps_all_its_bits():
    found, _ = run(ComPEFTAverage(), rounds=1)
    weights = np.array([tiny.num_examples(node) for node in NODES], np.float64)
    mean = (weights * [1, 2, 3]).sum() / weights.sum()
    np.testing.assert_allclose(found["bn.running_mean"], 0.5 * mean, rtol=1e-6)
    np.testing.assert_allclose(found["double"], model()["double"] + mean / 3, rtol=1e-15)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_what_all_nodes_agree_on_is_exact(kind):
    agreed = {"double": np.array([np.pi, -1e30]), "index": np.array([[7, -(2**62)], [1, 2]])}
    found, _ = run(STRATEGIES[kind](), lambda state, context: moved(state, context) | agreed)
    for name, value in agreed.items():
        assert found[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_client_sees_all_tensors_in_their_order(kind):
    seen: list[State] = []

    def train(state: State, context: Context) -> State:
        seen.append(state)
        return moved(state, context)

    run(STRATEGIES[kind](), train)
    for state in seen:
        assert list(state) == list(model())
        assert all(state[name].dtype == value.dtype for name, value in model().items())


def test_a_list_of_arrays_is_a_whole_model_too():
    app = ClientApp(mods=[CompressionMod(density=0.3)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        values = message.content["arrays"].to_numpy_ndarrays()
        state = moved(dict(zip(model(), values, strict=True)), context)
        record = ArrayRecord(list(state.values()))
        return tiny.reply_with(message, record, context.node_id)

    initial = ArrayRecord(list(model().values()))
    strategy = ComPEFTAverage(fraction_evaluate=0)
    result = strategy.start(LocalGrid(app, 3), initial, num_rounds=2)
    found = dict(zip(model(), result.arrays.to_numpy_ndarrays(), strict=True))
    assert found["bn.num_batches_tracked"] == 20
    np.testing.assert_allclose(found["bn.running_var"], 64.0**-2, rtol=1e-6)


def test_only_what_changed_crosses_and_the_ledger_counts_it():
    big = model() | {"index": np.arange(10_000), "mask": np.ones(10_000, bool)}
    ledger = Ledger()
    run(ComPEFTAverage(observer=ledger), state=big)
    assert not ledger.failed
    size = big["index"].nbytes + big["mask"].nbytes
    trained = sum(big[name].size for name in ("conv.weight", "head.weight", "head.bias"))
    carried = sum(v.nbytes for v in big.values()) - 4 * trained
    for transfer in ledger.transfers:
        first = transfer.direction == "down" and transfer.round == 1 and transfer.kind == "train"
        assert (transfer.payload_bytes > size) == first, transfer
        if transfer.parameters:
            assert transfer.raw_bytes == 4 * trained + carried
        if transfer.direction == "up" and transfer.kind == "train":
            assert transfer.payload_bytes > big["double"].nbytes + 4 * 8 + 8
        if transfer.direction == "down":
            assert transfer.message_bytes > transfer.payload_bytes
    # What an evaluation has brought is not sent once more for the training after it.
    down = {(t.round, t.kind): t.payload_bytes for t in ledger.transfers if t.direction == "down"}
    assert down[1, "evaluate"] > 0 == down[2, "train"]


def test_nothing_crosses_beside_the_update_where_there_is_nothing_but_training():
    seen: list[RecordDict] = []

    def fault(node: int, reply: Message) -> list[Message]:
        seen.append(reply.content)
        return [reply]

    run(ComPEFTAverage(), tiny.train_step, tiny.adapter(), fault=fault)
    run(
        ComPEFTAverage(),
        lambda s, c: s | {"w": s["w"] + 1},
        {"w": np.zeros(3, "f4"), "n": np.array(3)},
        fault=fault,
    )
    assert seen
    assert not any(CARRIED_KEY in content for content in seen)


def check_unmoved(found: np.ndarray, value: np.ndarray, kind: str) -> None:
    if "adam" in kind and value.dtype.kind == "f":
        # It divides by the size of changes, those by rounding included.
        np.testing.assert_allclose(found, value, atol=1e-3)
    else:
        assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize("kind", STRATEGIES)
def test_nodes_that_return_part_of_the_keys_have_personal_layers(kind, caplog):
    def train(state: State, context: Context) -> State:
        new = moved(state, context)
        return {name: value for name, value in new.items() if not name.startswith(("head", "bn"))}

    ledger = Ledger()
    found, _ = run(STRATEGIES[kind](observer=ledger), train)
    assert not ledger.failed
    for name, value in model().items():
        if name in ("conv.weight", "double"):
            assert found[name].tobytes() != value.tobytes()
        else:
            check_unmoved(found[name], value, kind)
    assert "count as unchanged: bn.running_mean, bn.running_var" in caplog.text


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("where", ["server", "node"])
def test_what_a_rule_leaves_stays_what_it_was(kind, where):
    rules = {"head.*": "left", "bytes": "left"}
    strategy = STRATEGIES[kind](tensors=rules if where == "server" else None)
    mod = CompressionMod(density=0.3, tensors=rules if where == "node" else None)

    def train(state: State, context: Context) -> State:
        return moved(state, context) | {"bytes": state["bytes"] + np.uint8(1)}

    found, _ = run(strategy, train, mod=mod)
    for name in ("head.weight", "head.bias", "bytes"):
        check_unmoved(found[name], model()[name], kind)
    assert (found["conv.weight"] != model()["conv.weight"]).any()


def test_a_rule_carries_what_would_be_trained():
    found, _ = run(ComPEFTAverage(tensors={"head.*": "carried"}), rounds=1)
    weights = np.array([tiny.num_examples(node) for node in NODES], np.float64)
    mean = (weights * [1, 2, 3]).sum() / weights.sum()
    np.testing.assert_allclose(found["head.bias"], 0.1 * mean, rtol=1e-6)  # all of it, at once


def test_a_tensor_that_is_the_nodes_own_needs_a_rule():
    def train(state: State, context: Context) -> State:
        return moved(state, context) | {"own": np.ones(2, "f4")}

    ledger = Ledger()
    strategy = ComPEFTAverage(observer=ledger)
    mod = CompressionMod(tensors={"own": "left"})
    run(strategy, train, mod=mod, rounds=1)
    assert not ledger.failed


@pytest.mark.parametrize("kind", ["average", "compressed"])
def test_a_float64_model_learns(kind):
    """scikit-learn's coef_ and intercept_: nothing but float64."""
    target = np.linspace(-1, 1, 40).reshape(4, 10) / 3

    def train(state: State, context: Context) -> State:
        return {
            name: (value + 0.5 * (aim - value)).astype(value.dtype)
            for (name, value), aim in zip(state.items(), (target, 1), strict=True)
        }

    start = {"coef_": np.zeros((4, 10)), "intercept_": np.zeros(4)}
    found, _ = run(STRATEGIES[kind](), train, start, rounds=12)
    assert {value.dtype for value in found.values()} == {np.dtype("f8")}
    assert np.linalg.norm(found["coef_"] - target) < 0.5 * np.linalg.norm(target)
    np.testing.assert_allclose(found["intercept_"], 1, atol=0.3)


def test_a_node_that_lost_its_memory_gets_all_again(monkeypatch, tmp_path):
    ledger, rounds = Ledger(), []

    def train(state: State, context: Context) -> State:
        rounds.append(context.node_id)
        if len(rounds) == 4:  # in the second round, after its first message
            monkeypatch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path / "other"))
        return moved(state, context)

    found, _ = run(ComPEFTAverage(observer=ledger), train, rounds=4)
    assert not ledger.failed
    assert found["bn.num_batches_tracked"] == 40
    assert [t for t in ledger.transfers if t.kind == "resync"]


def test_a_federation_goes_on_from_a_checkpoint(tmp_path):
    kept = CheckpointFolder(tmp_path)
    random.seed(7)  # Flower samples the nodes by it
    whole, _ = run(ComPEFTAverage(), rounds=4)
    random.seed(7)
    app = tiny.client_app(CompressionMod(density=0.3), train=moved)
    grid = LocalGrid(app, 3)
    for rounds in (2, 4):
        ledger = Ledger()
        result = ComPEFTAverage(observer=ledger).start(
            grid, tiny.arrays(model()), num_rounds=rounds,
            checkpointing=Checkpointing(kept, resume=rounds == 4),
        )  # fmt: skip
    assert not ledger.failed
    for name, value in tiny.state_of(result.arrays).items():
        assert value.tobytes() == whole[name].tobytes(), name


def carrying(data: bytes) -> Callable[[int, Message], list[Message]]:
    """A fault: one node's carried tensors are these bytes."""

    def fault(node: int, reply: Message) -> list[Message]:
        if node == NODES[1] and reply.has_content() and "arrays" in reply.content:
            reply.content[CARRIED_KEY] = carried_record(data)
        return [reply]

    return fault


def test_one_hostile_node_of_ten_hardly_moves_a_statistic(caplog):
    """Finite values of the right shape and type, and no more to tell them by."""
    nodes = node_ids(10)

    def train(state: State, context: Context) -> State:
        new = moved(state, context)
        new["bn.running_mean"] = np.full(4, 1 + 0.01 * (context.node_id % 7), "f4")
        if context.node_id == nodes[6]:
            lies = np.array([3e38, -3e38, 3e38, -3e38], "f4")
            new |= {"bn.running_mean": lies, "bn.running_var": np.abs(lies)}
            new["bn.num_batches_tracked"] = np.array(2**62)
            new["mask"] = ~new["mask"]
        return new

    app = tiny.client_app(CompressionMod(density=0.3), train=train)
    strategy = ComPEFTAverage(fraction_evaluate=0)
    result = strategy.start(LocalGrid(app, 10), tiny.arrays(model()), num_rounds=6)
    found = tiny.state_of(result.arrays)
    np.testing.assert_allclose(found["bn.running_mean"], 1, atol=0.5)
    assert (found["bn.running_var"] < 0.5).all()
    assert 50 < found["bn.num_batches_tracked"] < 120
    np.testing.assert_array_equal(found["mask"], model()["mask"])
    assert f"node {nodes[6]} moves 3 carried tensors by over 4 times the median" in caplog.text


@pytest.mark.parametrize("kind", ["average", "compressed"])
@pytest.mark.parametrize("data", [b"", b"\xff" * 64, bytes(1 << 20)])
def test_a_reply_whose_carried_tensors_are_broken_is_set_aside(kind, data):
    ledger = Ledger()
    found, _ = run(STRATEGIES[kind](observer=ledger), fault=carrying(data), rounds=2)
    assert {node for node, _ in ledger.failed} == {NODES[1]}
    assert found["bn.num_batches_tracked"] == 20


def test_a_returned_tensor_of_another_type_or_not_finite_is_the_nodes_error():
    for name, value, said in (
        ("bn.num_batches_tracked", np.array(1.5), "expected int64, found float64"),
        ("bn.running_mean", np.full(4, np.nan, "f4"), "NaN or Inf in tensor 'bn.running_mean'"),
        ("conv.weight", np.ones((4, 9), int), "expected floats, found int64"),
        ("mask", np.ones(4, bool), r"expected shape (3,), found (4,)"),
    ):
        ledger = Ledger()

        def train(state: State, context: Context, name=name, value=value) -> State:
            return moved(state, context) | ({name: value} if context.node_id == NODES[0] else {})

        run(ComPEFTAverage(observer=ledger), train, rounds=1)
        ((node, reason),) = ledger.failed
        assert node == NODES[0]
        assert said in reason


def test_more_than_one_part_goes_up_and_down(monkeypatch):
    """A dense update above 134 million parameters, with a lower limit on a part's bytes."""
    monkeypatch.setattr("compeft_fl.client.mod.MAX_BODY_BYTES", 128)
    parts: list[int] = []

    def fault(node: int, reply: Message) -> list[Message]:
        if reply.has_content() and "arrays" in reply.content:
            parts.append(len(reply.content["arrays"]))
        return [reply]

    mod = CompressionMod(codec="dense")
    for strategy in (ComPEFTAverage(), Compressed(FedAvg())):
        found, _ = run(strategy, tiny.train_step, tiny.adapter(), mod=mod, rounds=1, fault=fault)
        wanted, _ = run(FedAvg(), tiny.train_step, tiny.adapter(), mod=_nothing, rounds=1)
        np.testing.assert_allclose(tiny.flat(found), tiny.flat(wanted), atol=1e-6)
    assert min(parts) > 1


def _nothing(message: Message, context: Context, call_next: Any) -> Message:
    return call_next(message, context)


def digits(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    means = np.random.default_rng(0).standard_normal((5, 20))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, number)
    return means[labels] + 1.5 * rng.standard_normal((number, 20)), labels


@pytest.mark.parametrize("kind", ["average", "compressed"])
def test_logistic_regression_in_float64_learns_as_with_the_stock_strategy(kind):
    """After quickstart-sklearn: coef_ and intercept_ alone, each node's own data."""

    def scores(state: State, inputs: np.ndarray) -> np.ndarray:
        return inputs @ state["coef_"].T + state["intercept_"]

    def train(state: State, context: Context) -> State:
        inputs, labels = digits(context.node_id, 100)
        state = dict(state)
        for _ in range(5):
            each = np.exp(scores(state, inputs))
            error = each / each.sum(1, keepdims=True) - np.eye(5)[labels]
            state["coef_"] = state["coef_"] - 0.2 * error.T @ inputs / len(inputs)
            state["intercept_"] = state["intercept_"] - 0.2 * error.mean(0)
        return state

    def accuracy(strategy: Any, mod: Any) -> float:
        start = {"coef_": np.zeros((5, 20)), "intercept_": np.zeros(5)}
        found, _ = run(strategy, train, start, rounds=8, mod=mod)
        assert {value.dtype for value in found.values()} == {np.dtype("f8")}
        inputs, labels = digits(1, 500)
        return float((scores(found, inputs).argmax(1) == labels).mean())

    stock = accuracy(FedAvg(), _nothing)
    assert stock > 0.8
    assert accuracy(STRATEGIES[kind](), CompressionMod()) > stock - 0.02
