"""Updates of a hostile sender, and what all readers must say of them."""

from __future__ import annotations

import functools
import struct
import zlib

import numpy as np
import pytest
import reference_decoder
import reference_encoder
from reference_factored import Matrix

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.wire import messages
from compeft_fl.wire.v1 import update_pb2

TENSORS = [("lora_A", (20, 15), "f32"), ("lora_B", (10, 10), "bf16")]
LAYOUT = cf.Layout(cf.TensorSpec(*tensor) for tensor in TENSORS)
D = 400  # two blocks of 256, the second of 144
SIGNS = [(0, 0, 1, 0, 0, 0, -1)[index % 7] if index % 100 < 80 else 0 for index in range(D)]
TERMS = [
    Matrix([(-3, [1, -2, 3] * 5, [0, 1, 1, 0] * 5), (-5, [2] * 15, [1] * 20)]),
    Matrix([(2, [-4], [0, 1] * 50)], flat=True),
]
REST = [0] * 320 + [1, -1] * 40, [0.5]


@functools.cache
def bodies():
    """A valid body of each field of the format, as its protobuf message."""
    golomb, bitmask, dense = update_pb2.GolombTernary, update_pb2.BitmaskTernary, update_pb2.Dense
    context = update_pb2.ContextTernary
    return {
        "golomb": golomb.FromString(reference_encoder.golomb_with(SIGNS, [0.5], 256)),
        "bitmask": bitmask.FromString(reference_encoder.bitmask(SIGNS, [0.5])[1]),
        "dense": dense.FromString(reference_encoder.dense([0.5 * s for s in SIGNS], "f32")[1]),
        "steps": update_pb2.Steps.FromString(
            reference_encoder.steps([0.5 * s for s in SIGNS], TENSORS)[1]
        ),
        "factored": update_pb2.Factored.FromString(reference_encoder.factored(TERMS, REST)[1]),
        "context": context.FromString(reference_encoder.context(SIGNS, [0.5], TENSORS)[1]),
    }


def valid(body="golomb"):
    """A valid update as a protobuf message, without its checksum, to break one thing in."""
    message = update_pb2.Update(num_parameters=D)
    message.layout.ParseFromString(reference_encoder.layout_bytes(TENSORS))
    getattr(message, body).CopyFrom(bodies()[body])
    return message


def seal(message):
    """The bytes of a message, or bytes, with a correct checksum."""
    if not isinstance(message, bytes):
        message = message.SerializeToString(deterministic=True)
    return message + b"\x7d" + struct.pack("<I", zlib.crc32(message))


def error_of(function, *arguments, **options):
    """The error that a call raises, which must be a WireError that tells what and where."""
    with pytest.raises(errors.WireError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "expected" in text, text
    assert "found" in text, text
    assert len(text) < 1000
    return caught.value


def rejected(message, error, *words, layout=None, in_header=False, **options):
    """Assert that all readers reject a message with this class, and that its text has the words."""
    blob = seal(message) if not isinstance(message, bytes) else message
    found = error_of(cf.decode, blob, layout=layout, **options)
    assert type(found) is error, repr(found)
    for word in words:
        assert str(word) in str(found), (word, str(found))
    assert type(error_of(cf.decode, blob, layout=layout, device="cpu", **options)) is error
    if in_header:
        assert type(error_of(messages.inspect, blob, layout=layout)) is error
    if not options:
        accumulator = cf.Ties(layout=layout)
        assert type(error_of(accumulator.add, blob)) is error
        assert (accumulator.count, accumulator.layout) == (0, layout)
        known = None if layout is None else [(t.name, t.shape, t.dtype) for t in layout.tensors]
        with pytest.raises(reference_decoder.FaultError) as caught:
            reference_decoder.decode(blob, known)
        assert caught.value.kind == error.__name__


def signs_of(update):
    count = update.num_parameters
    positive, negative = (
        np.unpackbits(np.asarray(mask).view(np.uint8), count=count, bitorder="little").astype(int)
        for mask in (update.positive, update.negative)
    )
    return (positive - negative).tolist()


def accepted_or_rejected(blob, **options):
    """What a blob decodes to, None where it is rejected: never another exception."""
    try:
        return signs_of(cf.decode(blob, **options))
    except errors.WireError:
        return None


def golomb_of(gaps, rice=(0, 0), counts=None, more_quotients=(), more_remainders=()):
    """An update whose blocks have these gaps, whether they fit or not; all nonzeros positive."""
    quotients, remainders, total = [], [], 0
    for block, b in zip(gaps, rice, strict=True):
        for gap in block:
            quotients += [0] * (gap >> b) + [1]
            remainders += [gap >> i & 1 for i in range(b)]
            total += 1
    message = valid()
    message.golomb.block_nonzeros[:] = counts or [len(block) for block in gaps]
    message.golomb.rice_parameters = bytes(rice)
    message.golomb.quotients = reference_encoder.pack_bits(quotients + list(more_quotients))
    message.golomb.remainders = reference_encoder.pack_bits(remainders + list(more_remainders))
    message.golomb.signs = bytes((total + 7) // 8)
    return message
