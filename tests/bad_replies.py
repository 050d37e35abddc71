"""Replies that a server must survive: what broken and hostile clients can send through Flower."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from local_grid import answered, gone
from tiny import adapter, arrays

from compeft_fl.exchange.records import update_record
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import encode, inspect, seal
from compeft_fl.wire.v1 import update_pb2

# What each makes of an honest reply, and what the log must say of it.
BAD_REPLIES: dict[str, tuple[Callable[[Message], list[Message]], str]] = {}

D = Layout.of(adapter()).num_parameters


def bad(said: str, name: str | None = None):
    def register(make):
        key = name or make.__name__.replace("_", " ")
        BAD_REPLIES[key] = (lambda reply: [make(reply)], said)
        return make

    return register


def blob_of(reply: Message) -> bytes:
    (array,) = reply.content["arrays"].values()
    return array.data


def with_records(reply: Message, **records) -> Message:
    kept = {key: record for key, record in reply.content.items() if key not in records}
    more = {key: record for key, record in records.items() if record is not None}
    return Message(RecordDict(kept | more), reply_to=answered(reply))


def with_blob(reply: Message, blob: bytes) -> Message:
    return with_records(reply, arrays=update_record(blob, 1))


def with_fields(reply: Message, **fields) -> Message:
    """The Update with other fields, under a right checksum."""
    message = update_pb2.Update.FromString(blob_of(reply)[:-5])
    for name, value in fields.items():
        if isinstance(value, int):
            setattr(message, name, value)
        else:
            getattr(message, name).CopyFrom(value)
    return with_blob(reply, seal(message.SerializeToString()))


def dense(reply: Message, values: np.ndarray, layout: Layout) -> bytes:
    version = inspect(blob_of(reply)).base_version
    return encode(TaskVector(layout, values), "dense", base_version=version, layout_by_id=True)


def golomb(size: int):
    """A valid body of all ones."""
    tau = TaskVector(Layout([TensorSpec("w", (size,))]), np.ones(size, np.float32))
    blob = encode(TernaryVector.from_task_vector(tau))
    return update_pb2.Update.FromString(blob[:-5]).golomb


# --- bytes -------------------------------------------------------------------------------------


@bad("ChecksumError")
def cut_off(reply):
    return with_blob(reply, blob_of(reply)[:-1])


@bad("ChecksumError")
def no_bytes(reply):
    return with_blob(reply, b"")


@bad("ChecksumError")
def a_flipped_bit(reply):
    blob = bytearray(blob_of(reply))
    blob[len(blob) // 2] ^= 4
    return with_blob(reply, bytes(blob))


@bad("MalformedError")
def garbage_under_a_checksum(reply):
    return with_blob(reply, seal(b"\xff" * 40))


@bad("MissingBodyError")
def no_body(reply):
    return with_blob(reply, seal(update_pb2.Update(num_parameters=5).SerializeToString()))


@bad("UnknownLayoutError")
def another_layout_by_id(reply):
    return with_blob(reply, dense(reply, np.ones(4, np.float32), Layout([TensorSpec("w", (4,))])))


@bad("LayoutMismatchError")
def another_layout_inline(reply):
    tau = TaskVector.from_dict(dict(reversed(adapter().items())))
    return with_blob(reply, encode(tau, "dense", base_version=1))


@bad("LayoutMismatchError")
def a_billion_declared_parameters(reply):
    return with_fields(reply, num_parameters=10**9)


@bad("CoverageError")
def a_part_of_an_update(reply):
    return with_fields(reply, num_parameters=8, golomb=golomb(8))


@bad("VersionError")
def another_base_version(reply):
    return with_fields(reply, base_version=99)


@bad("NonFiniteBodyError")
def nan_values(reply):
    one, nan = np.float32(1).tobytes(), np.float32("nan").tobytes()
    values = np.zeros(D, np.float32)
    values[7] = 1.0
    blob = dense(reply, values, Layout.of(adapter()))[:-5]
    return with_blob(reply, seal(blob.replace(one, nan)))


@bad("ScaleError")
def a_nan_scale(reply):
    body = golomb(D)
    body.scales[0] = float("nan")
    return with_fields(reply, golomb=body)


def steps(**fields):
    """A steps body of all ones, with other fields."""
    values = np.ones(D, np.float32)
    blob = encode(TaskVector(Layout.of(adapter()), values), "steps")
    body = update_pb2.Update.FromString(blob[:-5]).steps
    for field, value in fields.items():
        setattr(body, field, value)
    return body


@bad("StepRangeError")
def steps_beyond_float32(reply):
    return with_fields(reply, steps=steps(exponent=2**31 - 1))


@bad("NonzeroCountError")
def more_steps_than_parameters(reply):
    return with_fields(reply, steps=steps(num_nonzeros=2**64 - 1))


@bad("StreamLengthError")
def steps_with_a_code_that_goes_on(reply):
    return with_fields(reply, steps=steps(code=b"\xff" * 4000))


# --- records -----------------------------------------------------------------------------------


@bad("expected an Update in the reply, found plain arrays")
def no_mod(reply):
    return with_records(reply, arrays=arrays())


@bad("expected an Update in the reply, found none")
def no_arrays(reply):
    return with_records(reply, arrays=None)


@bad("expected an Update in the reply, found none")
def a_foreign_array(reply):
    array = Array("float32", (3,), "somebody.elses", b"\x00")
    return with_records(reply, arrays=ArrayRecord({"update": array}))


@bad("expected one Update in a message, found 2")
def two_updates(reply):
    return with_records(reply, more=reply.content["arrays"])


@bad("expected one MetricRecord in the reply, found 0")
def no_metrics(reply):
    return with_records(reply, metrics=None)


@bad("expected one MetricRecord in the reply, found 0")
def strings_for_metrics(reply):
    return with_records(reply, metrics=ConfigRecord({"num-examples": "many"}))


@bad("expected one MetricRecord in the reply, found 2")
def two_metric_records(reply):
    return with_records(reply, more=MetricRecord({"num-examples": 1}))


WEIGHTS = {
    "no weight": None,
    "a zero weight": 0,
    "a negative weight": -3.0,
    "a weight that sums lose": 5e-324,
    "a NaN weight": float("nan"),
    "an infinite weight": float("inf"),
    "an absurd weight": 10**15,
    "a list for a weight": [1.0, 2.0],
    "a long list for a weight": [1.0] * 9_000,
}
for _name, _value in WEIGHTS.items():

    @bad("expected a weight in [1e-30, 1e+12] under 'num-examples'", _name)
    def weight(reply, value=_value):
        metrics = {"loss": 0.5} | ({} if value is None else {"num-examples": value})
        return with_records(reply, metrics=MetricRecord(metrics))


# --- errors ------------------------------------------------------------------------------------


@bad("error reply, code 2: mine, with line breaks")
def an_error_reply(reply):
    reason = "mine,\nwith\r\n line breaks\x1b[31m" + "!" * 9999
    return Message(Error(2, reason), reply_to=answered(reply))


@bad("error reply, code 0: None")
def an_error_without_a_reason(reply):
    return Message(Error(0), reply_to=answered(reply))


@bad("error reply, code 5: Node is unavailable")
def a_node_that_is_gone(reply):
    return gone(reply, 5)


@bad("error reply, code 3: Node is unavailable")
def a_message_that_is_gone(reply):
    return gone(reply, 3)
