"""Hostile sizes, and anything: what is rejected takes no memory, and both decoders agree."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
import reference_decoder
from hostile import LAYOUT, TENSORS, error_of, rejected, seal, valid
from hypothesis import example, given, settings
from hypothesis import strategies as st

import compeft_fl as cf
from compeft_fl import codecs, errors
from compeft_fl.wire import messages
from compeft_fl.wire.v1 import update_pb2

# --- sizes ------------------------------------------------------------------------------------


def claiming(d, body, layout_size=None):
    """An update of a few bytes that claims d parameters."""
    message = valid(body)
    del message.layout.tensors[1:]
    message.layout.tensors[0].shape[:] = [d if layout_size is None else layout_size]
    message.num_parameters = d
    if body == "golomb":
        message.golomb.block_size = 1 << 24
    return message


HUGE = [10**9, 2**40, 2**62]


@pytest.mark.parametrize("body", ["golomb", "bitmask", "dense", "context"])
@pytest.mark.parametrize("d", [2**63, 2**64 - 1])
def test_more_parameters_than_can_be(d, body):
    rejected(claiming(d, body), errors.MalformedError, in_header=True)
    rejected(claiming(d, body, 1), errors.LayoutMismatchError, 1, d, in_header=True)


@pytest.mark.parametrize("body", ["golomb", "bitmask", "dense", "context"])
@pytest.mark.parametrize("d", HUGE)
def test_far_more_parameters_than_bytes(d, body):
    rejected(claiming(d, body), errors.ImplausibleSizeError, d)


def test_an_update_without_nonzeros_is_plausible_where_the_layout_is_given():
    d = 10**9
    layout = cf.Layout([cf.TensorSpec("lora_A", (d,))])
    blocks = -(-d // 2**24)
    message = claiming(d, "golomb")
    message.golomb.CopyFrom(
        update_pb2.GolombTernary(
            scales=[1.0],
            block_size=2**24,
            block_nonzeros=[0] * blocks,
            rice_parameters=bytes(blocks),
        )
    )
    rejected(message, errors.ImplausibleSizeError, d)
    assert messages.inspect(seal(message), layout=layout).num_parameters == d
    assert reference_decoder.decode(seal(message), [("lora_A", (d,), "f32")]).signs == {}


def hostile_sizes():
    """Small messages with large numbers in them; a layout that is expected or none; the error."""
    for body in ("golomb", "bitmask", "dense"):
        for d in HUGE:
            layout = cf.Layout([cf.TensorSpec("lora_A", (d,))])
            yield claiming(d, body), None
            yield claiming(d, body), layout
        for d in (2**63, 2**64 - 1):
            yield claiming(d, body), None
            yield claiming(d, body), LAYOUT
            yield claiming(d, body, 400), LAYOUT
    for value in (10**9, 2**31, 2**32 - 1):
        for field in ("block_size", "block_nonzeros"):
            message = valid()
            if field == "block_size":
                message.golomb.block_size = value
            else:
                message.golomb.block_nonzeros[:] = [value, value]
            yield message, None
    for d in HUGE:  # where a layout is expected, its parameters may take memory
        for count in (0, 1, d, d + 1, 2**64 - 1):
            message = claiming(d, "context")
            message.context.num_nonzeros = count
            yield message, None
            message.context.num_nonzeros = max(count, d + 1)
            yield message, cf.Layout([cf.TensorSpec("lora_A", (d,))])
    for d in HUGE:  # all tables are as they must be for one block; there are more
        message = claiming(d, "golomb")
        message.golomb.block_nonzeros[:] = [2**24]
        message.golomb.rice_parameters = b"\x18"
        yield message, cf.Layout([cf.TensorSpec("lora_A", (d,))])


def test_large_numbers_in_small_messages_take_no_memory():
    cf.decode(seal(valid()))  # what a first call imports and compiles is not counted
    cf.decode(seal(valid("bitmask")))
    cf.decode(seal(valid("dense")))
    cf.decode(seal(valid("context")))
    for message, layout in hostile_sizes():
        blob = seal(message)
        tracemalloc.start()
        try:
            error_of(cf.decode, blob, layout=layout)
            error_of(cf.Ties(layout=layout).add, blob)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1 << 20, f"{peak} bytes for {len(blob)} bytes that arrived"


def test_memory_follows_what_arrived():
    """A megabyte of each list is rejected within a few megabytes."""
    context = valid("context")
    context.context.code = b"\x55" * 1_000_000
    tracemalloc.start()
    try:
        error_of(cf.decode, seal(context))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    for field, value in (
        ("scales", [1.0] * 250_000),
        ("block_nonzeros", [1] * 1_000_000),
        ("rice_parameters", bytes(1_000_000)),
        ("quotients", b"\xff" * 1_000_000),
        ("remainders", bytes(1_000_000)),
        ("signs", bytes(1_000_000)),
    ):
        message = valid()
        if isinstance(value, bytes):
            setattr(message.golomb, field, value)
        else:
            getattr(message.golomb, field)[:] = value
        blob = seal(message)
        tracemalloc.start()
        try:
            error_of(cf.decode, blob)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 10 * len(blob), field


class Long(bytes):
    """Bytes that say they are 2^31."""

    def __len__(self):
        return 1 << 31


def test_more_bytes_than_protobuf_takes():
    for function in (cf.decode, messages.inspect, reference_decoder.decode):
        with pytest.raises((errors.UpdateSizeError, reference_decoder.FaultError)) as caught:
            function(Long(seal(valid())))
        assert "2147483648" in str(caught.value)
        assert getattr(caught.value, "kind", "UpdateSizeError") == "UpdateSizeError"


# --- anything ---------------------------------------------------------------------------------


def check_alike(blob, layout):
    """Both decoders read the same, or both reject; where the format leaves the choice, either."""
    known = None if layout is None else TENSORS
    try:
        reference = reference_decoder.decode(blob, known)
    except reference_decoder.FaultError as error:
        reference = error
    try:
        update = cf.decode(blob, layout=layout)
    except errors.WireError as error:
        update = error
    if isinstance(update, errors.WireError):
        assert isinstance(reference, reference_decoder.FaultError), repr(update)
        return
    if isinstance(reference, reference_decoder.FaultError):
        assert reference.choice, str(reference)
        return
    values = np.array(reference.dense(), np.float32)
    assert np.array_equal(update.to_task_vector().values, values)
    assert messages.inspect(blob, layout=layout).metadata == reference.metadata


def serialised(codec, **options):
    """An encoded update without its checksum, to break and to seal again."""
    return cf.encode(cf.decode(seal(valid("bitmask"))), codec, **options)[:-5]


@pytest.mark.parametrize("codec", codecs.names())
@pytest.mark.long
def test_every_flipped_bit_under_a_right_checksum(codec):
    data = serialised(codec, metadata={"k": "v"})
    rng = random.Random(0)
    for index in range(len(data)):
        # All bits of what says how to read; of the many equal bytes of a dense body one each.
        for bit in range(8) if index < 300 else [rng.randrange(8)]:
            check_alike(
                seal(data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]), None
            )


@pytest.mark.parametrize("codec", codecs.names())
@pytest.mark.parametrize("layout", [None, LAYOUT])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_broken_bytes_are_read_alike_or_rejected(codec, layout, data):
    options = {"layout_by_id": layout is not None, "metadata": {"k": "v"}, "base_version": 300}
    broken = bytearray(serialised(codec, **options))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(broken)))
        end = min(len(broken), start + data.draw(st.integers(0, 4)))
        broken[start:end] = data.draw(st.binary(max_size=4))
    check_alike(seal(bytes(broken)), layout)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
@example(b"")
def test_any_bytes_under_a_right_checksum(data):
    error_of(cf.decode, seal(data))
    error_of(cf.decode, seal(data), layout=LAYOUT)
    error_of(messages.inspect, seal(data))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=4),
    st.binary(max_size=3),
    st.sampled_from([256, 512, 1024]),
    st.binary(max_size=6),
    st.binary(max_size=4),
    st.binary(max_size=2),
)
def test_any_golomb_body_is_read_alike_or_rejected(
    counts, rice, size, quotients, remainders, signs
):
    """Small tables and streams, most of them wrong in one thing only."""
    message = valid()
    message.golomb.CopyFrom(
        update_pb2.GolombTernary(
            scales=[1.0],
            block_size=size,
            block_nonzeros=[count % 9 for count in counts],
            rice_parameters=bytes(b % 26 for b in rice),
            quotients=quotients,
            remainders=remainders,
            signs=signs,
        )
    )
    check_alike(seal(message), None)
