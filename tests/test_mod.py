from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from local_grid import identify, over_the_wire, set_metadata

from compeft_fl import codecs
from compeft_fl.client.node_memory import NodeMemory
from compeft_fl.compeft import compress
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.node_state import NodeState
from compeft_fl.exchange.records import update_record
from compeft_fl.mod import CompressionMod
from compeft_fl.reduction.factorize import factorize
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.wire.messages import STYPE, decode, encode, inspect, layout_id

NODE = 1001


def context() -> Context:
    return Context(run_id=1, node_id=NODE, node_config={}, state=RecordDict(), run_config={})


def message(content: RecordDict, kind: str = "train") -> Message:
    identify()
    return set_metadata(Message(content, NODE, kind), message_id="m")


def broadcast(state: dict, version: int = 3, kind: str = "train", **more) -> Message:
    tau = TaskVector.from_dict(state)
    record = update_record(encode(tau, "dense", base_version=version), tau.num_parameters)
    return message(
        RecordDict({"arrays": record, "config": ConfigRecord({"lr": 0.1}), **more}), kind
    )


def update_in(reply: Message, state: dict, key: str = "arrays"):
    assert not reply.has_error(), reply.error.reason
    (array,) = reply.content[key].values()
    assert array.stype == STYPE
    return decode(array.data, layout=TaskVector.from_dict(state).layout)


def tau_of(state: dict) -> TaskVector:
    return TaskVector.between(state, tiny.train_step(state, context()))


def test_the_client_sees_ordinary_arrays():
    state = tiny.adapter() | {"half": np.array([1, 2], np.float16)}
    seen = {}

    def train(arrays, context):
        seen.update(arrays)
        return tiny.train_step(arrays, context)

    tiny.client_app(CompressionMod(), train=train)(broadcast(state), context())
    assert list(seen) == list(state)
    for name, value in state.items():
        assert (seen[name].dtype, seen[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(seen[name], value)


def test_the_reply_is_one_small_update_relative_to_the_broadcast():
    state = tiny.adapter()
    reply, _ = over_the_wire(
        tiny.client_app(CompressionMod(density=0.1))(broadcast(state), context())
    )
    update = update_in(reply, state)
    wanted = compress(tau_of(state), 0.1, "mean")
    np.testing.assert_array_equal(update.positive, wanted.positive)
    np.testing.assert_array_equal(update.negative, wanted.negative)
    np.testing.assert_array_equal(update.scales, wanted.scales)
    (array,) = reply.content["arrays"].values()
    header = inspect(array.data, layout=update.layout)
    assert (header.base_version, header.codec) == (3, "golomb")
    assert header.layout_id == layout_id(update.layout)
    assert array.data == encode(wanted, layout_by_id=True, base_version=3)
    assert dict(reply.content["metrics"]) == {"num-examples": 10, "loss": 0.1}


def remembered(ctx: Context | None = None) -> NodeState:
    with NodeMemory.of(ctx or context(), "run-1") as memory:
        return memory.state


def test_what_was_sent_and_the_residual_add_up():
    app, ctx, state = (
        tiny.client_app(CompressionMod(density=0.1, residual_decay=1.0)),
        context(),
        tiny.adapter(),
    )
    wanted, sent = np.zeros(tiny.layout().num_parameters), 0
    for version in range(1, 6):
        wanted += tau_of(state).values
        update = update_in(app(broadcast(state, version), ctx), state).to_task_vector()
        sent = sent + update.values.astype(np.float64)
        state = update.apply(state)
    residual = remembered().residual
    assert not ctx.state
    assert residual.dtype == np.float32
    assert np.abs(residual).max() > 0.01
    np.testing.assert_allclose(sent + residual, wanted, atol=1e-6)


def test_without_error_feedback_nothing_is_kept():
    state, ctx = tiny.adapter(), context()
    app = tiny.client_app(CompressionMod(error_feedback=False, scale="norm", density=0.3))
    for _ in range(2):
        update = update_in(app(broadcast(state), ctx), state)
        wanted = compress(tau_of(state), 0.3, "norm")
        np.testing.assert_array_equal(
            update.to_task_vector().values, wanted.to_task_vector().values
        )
    assert remembered() == NodeState()


@pytest.mark.parametrize(("link", "codec"), [(0.001, "context"), (1e6, "golomb")])
def test_auto_takes_what_arrives_first(link, codec):
    state, sent = tiny.adapter(), {}
    for name in ("auto", codec):
        mod = CompressionMod(codec=name, link_mbps=link, density=0.05, error_feedback=False)
        reply = tiny.client_app(mod)(broadcast(state), context())
        (array,) = reply.content["arrays"].values()
        sent[name] = array.data
    assert sent["auto"] == sent[codec]
    assert inspect(sent["auto"], layout=tiny.layout()).codec == codec


@pytest.mark.parametrize("codec", codecs.names())
def test_every_codec(codec):
    state, ctx = tiny.adapter(), context()
    app = tiny.client_app(CompressionMod(codec=codec, density=0.2))
    update = update_in(app(broadcast(state), ctx), state).to_task_vector().values
    tau = tau_of(state)
    if codec.startswith("dense"):
        rounding = {"dense": 0, "dense-fp16": 2**-11, "dense-bf16": 2**-8}[codec]
        np.testing.assert_allclose(update, tau.values, rtol=rounding, atol=1e-7 * bool(rounding))
        assert remembered() == NodeState()
    else:
        wanted = factorize(tau, 0.2) if codec == "factored" else compress(tau, 0.2, "mean")
        np.testing.assert_array_equal(update, wanted.to_task_vector().values)


def test_a_residual_for_another_adapter_is_dropped_and_said(caplog):
    state = tiny.adapter()
    other = NodeState(Layout([TensorSpec("w", (2,))]), residual=np.ones(2, np.float32))
    with NodeMemory.of(context(), "run-1") as memory:
        assert memory.save(other)
    update = update_in(
        tiny.client_app(CompressionMod(density=0.1))(broadcast(state), context()), state
    )
    wanted = compress(tau_of(state), 0.1, "mean")
    np.testing.assert_array_equal(update.positive, wanted.positive)
    assert "residual is for another layout" in caplog.text
    assert remembered().residual.shape == (tiny.layout().num_parameters,)


def test_a_damaged_state_is_lost_and_said(caplog):
    app, state = tiny.client_app(CompressionMod(density=0.1)), tiny.adapter()
    app(broadcast(state), context())
    (file,) = Path(os.environ["COMPEFT_FL_STATE_DIR"]).glob("*/*/state.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    update = update_in(app(broadcast(state), context()), state)
    wanted = compress(tau_of(state), 0.1, "mean")
    np.testing.assert_array_equal(update.positive, wanted.positive)
    assert "state is lost" in caplog.text


def test_nan_weights_become_an_error_reply_that_names_the_tensor(caplog):
    def train(arrays, context):
        trained = tiny.train_step(arrays, context)
        trained["q.lora_B"][2, 1] = np.nan
        return trained

    state, ctx = tiny.adapter(), context()
    for codec in ("golomb", "dense"):
        reply = tiny.client_app(CompressionMod(codec=codec), train=train)(broadcast(state), ctx)
        assert reply.has_error()
        assert reply.error.code == 6  # Flower's MOD_FAILED_PRECONDITION
        assert "NonFiniteError" in reply.error.reason
        assert "nan in tensor 'q.lora_B'" in reply.error.reason
        assert reply.error.reason in caplog.text
        assert remembered() == NodeState()
    arrived, _ = over_the_wire(reply)
    assert arrived.error.reason == reply.error.reason
    assert arrived.metadata.src_node_id == NODE


def with_other_shape(state):
    return state | {"scalar": np.zeros(2, np.float32)}


def without_any(state):
    return {}


def with_more(state):
    return state | {"more": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_other_shape, r"expected shape \(\), found \(2,\) in tensor 'scalar'"),
        (without_any, "expected tensor 'q.lora_A' or another that is trained, found none"),
        (with_more, "found also 'more'"),
    ],
)
def test_another_layout_becomes_an_error_reply(change, said):
    app = tiny.client_app(CompressionMod(density=0.1), train=lambda state, context: change(state))
    reply = app(broadcast(tiny.adapter()), context())
    assert reply.error.reason.startswith("CompressionMod: LayoutError: expected")
    assert re.search(said, reply.error.reason)


def test_a_list_of_arrays_in_the_reply_is_taken_by_position():
    app = ClientApp(mods=[CompressionMod(codec="dense")])

    @app.train()
    def train(msg, ctx):
        trained = tiny.train_step(tiny.state_of(msg.content["arrays"]), ctx)
        msg.content["arrays"].to_numpy_ndarrays(keep_input=False)  # empties the record
        return tiny.reply_with(msg, ArrayRecord(list(trained.values())), ctx.node_id)

    state = tiny.adapter()
    update = update_in(app(broadcast(state), context()), state)
    np.testing.assert_array_equal(update.values, tau_of(state).values)


def test_the_reply_may_use_another_key_and_have_more_records():
    app = ClientApp(mods=[CompressionMod(codec="dense")])

    @app.train()
    def train(msg, ctx):
        trained = tiny.train_step(tiny.state_of(msg.content["arrays"]), ctx)
        return Message(RecordDict({"model": tiny.arrays(trained)}), reply_to=msg)

    @app.train("two")
    def two(msg, ctx):
        trained = tiny.train_step(tiny.state_of(msg.content["arrays"]), ctx)
        extra = ArrayRecord([np.zeros(3)])
        return Message(RecordDict({"extra": extra, "arrays": tiny.arrays(trained)}), reply_to=msg)

    @app.train("unclear")
    def unclear(msg, ctx):
        return Message(RecordDict({"a": tiny.arrays(), "b": tiny.arrays()}), reply_to=msg)

    state = tiny.adapter()
    np.testing.assert_array_equal(
        update_in(app(broadcast(state), context()), state, "model").values, tau_of(state).values
    )
    reply = app(broadcast(state, kind="train.two"), context())
    np.testing.assert_array_equal(update_in(reply, state).values, tau_of(state).values)
    np.testing.assert_array_equal(reply.content["extra"].to_numpy_ndarrays()[0], np.zeros(3))
    reply = app(broadcast(state, kind="train.unclear"), context())
    assert "one under the key that it came with (arrays); found a, b" in reply.error.reason


def test_several_records_in_a_stock_message():
    app = ClientApp(mods=[CompressionMod(codec="dense")])

    @app.train()
    def train(msg, ctx):
        trained = tiny.train_step(tiny.state_of(msg.content["two"]), ctx)
        return Message(RecordDict({"two": tiny.arrays(trained)}), reply_to=msg)

    @app.train("lost")
    def lost(msg, ctx):
        return Message(RecordDict({"three": tiny.arrays()}), reply_to=msg)

    state = tiny.adapter()
    content = {"one": tiny.arrays({"w": np.zeros(2, np.float32)}), "two": tiny.arrays(state)}
    reply = app(message(RecordDict(dict(content))), context())
    np.testing.assert_array_equal(update_in(reply, state, "two").values, tau_of(state).values)
    reply = app(message(RecordDict(dict(content)), "train.lost"), context())
    assert "under one of one, two in the reply, found three" in reply.error.reason


def test_replies_that_are_not_trained_weights_pass_untouched():
    app = ClientApp(mods=[CompressionMod()])
    replies = {}

    def answer(name, content):
        def handle(msg, ctx):
            assert list(msg.content["arrays"]) == list(tiny.SHAPES)  # expanded on the way in
            replies[name] = Message(content, reply_to=msg)
            return replies[name]

        return handle

    app.train("failed")(answer("train.failed", Error(7, "of the app's own")))
    app.train("empty")(answer("train.empty", RecordDict({"c": ConfigRecord({"x": 1})})))
    app.evaluate()(answer("evaluate", RecordDict({"arrays": tiny.arrays()})))
    app.query()(answer("query", RecordDict({"arrays": tiny.arrays()})))
    for kind in ("train.failed", "train.empty", "evaluate", "query"):
        ctx = context()
        reply = app(broadcast(tiny.adapter(), kind=kind), ctx)
        assert reply is replies[kind]
        assert not ctx.state
        if kind in ("evaluate", "query"):
            assert {array.stype for array in reply.content["arrays"].values()} == {"numpy.ndarray"}


def test_messages_without_arrays_pass_untouched():
    app = ClientApp(mods=[CompressionMod()])

    @app.train()
    def train(msg, ctx):
        return Message(RecordDict({"arrays": tiny.arrays()}), reply_to=msg)

    reply = app(message(RecordDict({"config": ConfigRecord({"x": 1})})), context())
    assert list(tiny.state_of(reply.content["arrays"])) == list(tiny.SHAPES)


def test_a_client_that_raises_raises():
    def train(arrays, context):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tiny.client_app(CompressionMod(), train=train)(broadcast(tiny.adapter()), context())


def test_a_stock_broadcast_is_compressed_with_version_0():
    state = tiny.adapter(np.float16)
    reply = tiny.client_app(CompressionMod(density=0.5))(
        message(RecordDict({"arrays": tiny.arrays(state)})), context()
    )
    update = update_in(reply, state)
    (array,) = reply.content["arrays"].values()
    assert inspect(array.data, layout=update.layout).base_version == 0
    wanted = compress(tau_of(state), 0.5, "mean", "best").to_task_vector().values
    np.testing.assert_array_equal(update.to_task_vector().values, wanted)


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_a_broken_update_becomes_an_error_reply(cut):
    msg = broadcast(tiny.adapter())
    (array,) = msg.content["arrays"].values()
    msg.content["arrays"] = update_record(array.data[:cut], 1)
    reply = tiny.client_app(CompressionMod())(msg, context())
    assert "CompressionMod: ChecksumError" in reply.error.reason


def test_the_mod_twice_is_said():
    reply = tiny.client_app(CompressionMod(), CompressionMod())(
        broadcast(tiny.adapter()), context()
    )
    assert "is CompressionMod there twice?" in reply.error.reason


def test_content_that_nodes_share_is_not_changed():
    first = broadcast(tiny.adapter())
    shared = first.content
    tiny.client_app(CompressionMod())(first, context())
    (array,) = shared["arrays"].values()
    assert array.stype == STYPE


def test_other_mods_after_it_see_ordinary_weights():
    reply = tiny.client_app(CompressionMod(), arrays_size_mod)(broadcast(tiny.adapter()), context())
    update_in(reply, tiny.adapter())


@pytest.mark.parametrize(
    "arguments",
    [
        {"density": 0},
        {"density": 1.5},
        {"density": "much"},
        {"scale": "validated"},
        {"scale": "median"},
        {"scale": -1.0},
        {"error_feedback": "yes"},
        {"codec": "zip"},
        {"codec": "auto"},
        {"codec": "auto", "link_mbps": 0},
    ],
)
def test_arguments_out_of_range_are_rejected_at_once(arguments):
    with pytest.raises(ParameterError):
        CompressionMod(**arguments)


def test_the_import_path_is_light():
    """A deployed message gets a fresh process: what the mod imports is paid each time."""
    code = (
        "import sys, compeft_fl.mod, compeft_fl.strategies\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'ray', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
