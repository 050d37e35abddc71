"""What a decoder rejects in a message and its layout (proto/FORMAT.md), each with its own test.

The sender is hostile: unless the checksum is what a test is about, it is right. Each rejection is
checked on the package's decoder, on the CPU and by torch operations, on an accumulator, on
`inspect` where the header is to blame, and on the reference decoder, which must name the same
error.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import reference_decoder
import reference_encoder
from hostile import (
    LAYOUT,
    SIGNS,
    TENSORS,
    D,
    accepted_or_rejected,
    error_of,
    rejected,
    seal,
    signs_of,
    valid,
)
from reference_encoder import bytes_field, number_field, varint

import compeft_fl as cf
from compeft_fl import codecs, errors
from compeft_fl.wire import messages
from compeft_fl.wire.v1 import update_pb2


@pytest.mark.parametrize("body", ["golomb", "bitmask", "dense", "context"])
def test_what_the_tests_break_is_valid(body):
    expected = np.array([0.5 * sign for sign in SIGNS], np.float32)
    for options in ({}, {"layout": LAYOUT}, {"device": "cpu"}):
        values = cf.decode(seal(valid(body)), **options).to_task_vector().values
        assert np.array_equal(values, expected)
    assert reference_decoder.decode(seal(valid(body))).dense() == expected.tolist()


# --- checksum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(5))
def test_fewer_bytes_than_a_checksum_has(size):
    rejected(b"\x7d\0\0\0\0"[:size], errors.ChecksumError, size, in_header=True)


def test_no_checksum():
    blob = valid().SerializeToString()
    rejected(blob, errors.ChecksumError, "checksum", len(blob), in_header=True)


def test_a_checksum_of_other_bytes():
    blob = bytearray(seal(valid()))
    blob[-1] ^= 1
    right, wrong = (int.from_bytes(data[-4:], "little") for data in (seal(valid()), blob))
    rejected(bytes(blob), errors.ChecksumError, f"{right:08x}", f"{wrong:08x}", in_header=True)


def test_a_checksum_that_is_not_the_last_field():
    rejected(seal(valid()) + number_field(4, 1), errors.ChecksumError, in_header=True)


def test_a_checksum_in_another_byte_order():
    blob = seal(valid())
    rejected(blob[:-4] + blob[:-5:-1], errors.ChecksumError, in_header=True)


@pytest.mark.parametrize("codec", codecs.names())
def test_every_truncation(codec):
    blob = cf.encode(cf.decode(seal(valid("bitmask"))), codec, metadata={"key": "value"})
    for size in range(len(blob)):
        assert type(error_of(cf.decode, blob[:size])) is errors.ChecksumError
        assert type(error_of(messages.inspect, blob[:size])) is errors.ChecksumError


@pytest.mark.parametrize("codec", codecs.names())
def test_every_flipped_bit(codec):
    blob = cf.encode(cf.decode(seal(valid("bitmask"))), codec)
    for index in range(len(blob)):
        for bit in range(8):
            flipped = blob[:index] + bytes([blob[index] ^ 1 << bit]) + blob[index + 1 :]
            assert type(error_of(cf.decode, flipped)) is errors.ChecksumError


# --- protobuf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", codecs.names())
def test_every_truncation_under_a_right_checksum(codec):
    update = cf.decode(seal(valid("bitmask")))
    serialised = cf.encode(update, codec, metadata={"key": "value"})[:-5]
    for size in range(len(serialised)):
        error_of(cf.decode, seal(serialised[:size]))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x0a", id="no length"),
        pytest.param(b"\x0a\x05\x0a\x01w", id="a length past the end"),
        pytest.param(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", id="a length of 2^63 - 1"),
        pytest.param(b"\x18\xff", id="half a varint"),
        pytest.param(b"\x18" + b"\x80" * 10 + b"\x01", id="a varint of 11 bytes"),
        pytest.param(b"\x02\x00", id="field number 0"),
        pytest.param(b"\x1e", id="wire type 6"),
        pytest.param(b"\x1f", id="wire type 7"),
        pytest.param(b"\x61\0\0\0\0\0\0\0", id="7 of 8 bytes"),
        pytest.param(b"\x65\0\0\0", id="3 of 4 bytes"),
    ],
)
def test_bytes_that_are_no_message(data):
    head = valid().SerializeToString()
    rejected(seal(data), errors.MalformedError, "protobuf", in_header=True)
    rejected(seal(head + data), errors.MalformedError, "protobuf", in_header=True)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x5b", id="an open group"),
        pytest.param(b"\x5c", id="the end of a group that has no start"),
        pytest.param(b"\x5b\x64", id="the end of another group"),
        pytest.param(b"\x5b" * 10_000, id="10,000 open groups"),
        pytest.param(b"\x5b" * 10_000 + b"\x5c" * 10_000, id="10,000 groups in each other"),
    ],
)
def test_groups(data):
    blob = seal(valid().SerializeToString() + data)
    assert type(error_of(cf.decode, blob)) is errors.MalformedError
    assert type(error_of(messages.inspect, blob)) is errors.MalformedError


def test_a_closed_group_is_skipped_or_rejected():
    blob = seal(b"\x5b\x08\x01\x5c" + valid().SerializeToString())
    assert accepted_or_rejected(blob) in (None, SIGNS)


def test_a_body_twice_is_the_last_or_rejected():
    other = [-sign for sign in SIGNS]
    for first, second in ((8, 9), (9, 8), (9, 9)):
        write = {
            8: lambda signs: reference_encoder.golomb_with(signs, [0.5], 256),
            9: lambda signs: reference_encoder.bitmask(signs, [0.5])[1],
        }
        blob = seal(
            bytes_field(1, reference_encoder.layout_bytes(TENSORS))
            + number_field(3, D)
            + bytes_field(first, write[first](SIGNS))
            + bytes_field(second, write[second](other))
        )
        assert accepted_or_rejected(blob) in (None, other)


def test_a_layout_twice_is_one_of_both_or_rejected():
    body = bytes_field(8, reference_encoder.golomb_with(SIGNS, [0.5], 256))
    inline = bytes_field(1, reference_encoder.layout_bytes(TENSORS))
    by_id = bytes_field(2, reference_encoder.layout_id(TENSORS))
    for both in (inline + by_id, by_id + inline, inline + inline):
        blob = seal(both + number_field(3, D) + body)
        assert accepted_or_rejected(blob, layout=LAYOUT) in (None, SIGNS)
        assert accepted_or_rejected(blob) in (None, SIGNS)


@pytest.mark.parametrize("field", [1, 2, 3, 4, 5, 6, 8, 9, 10, 11])
@pytest.mark.parametrize("wire", [0, 1, 2, 5])
def test_a_field_of_another_wire_type(field, wire):
    """Skipped as unknown or rejected, but never taken for what it is not."""
    value = {0: varint(1), 1: bytes(8), 2: varint(1) + b"\x01", 5: bytes(4)}[wire]
    blob = seal(valid().SerializeToString() + varint(field << 3 | wire) + value)
    assert accepted_or_rejected(blob, layout=LAYOUT) in (None, SIGNS)


def test_a_field_of_another_wire_type_alone():
    message = valid()
    message.ClearField("golomb")
    blob = seal(message.SerializeToString() + number_field(8, 1))
    assert type(error_of(cf.decode, blob)) in (errors.MissingBodyError, errors.MalformedError)


@pytest.mark.parametrize("tensor", [b"\xff", b"lora\xc3", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_a_name_that_is_not_utf8(tensor):
    layout = bytes_field(1, bytes_field(1, tensor) + number_field(3, 1))
    body = bytes_field(10, number_field(1, 1) + bytes_field(2, bytes(4)))
    blob = seal(bytes_field(1, layout) + number_field(3, 1) + body)
    rejected(blob, errors.MalformedError, "protobuf", in_header=True)


@pytest.mark.parametrize("entry", [bytes_field(1, b"\xff"), bytes_field(2, b"\xff")])
def test_metadata_that_is_not_utf8(entry):
    blob = seal(valid().SerializeToString() + bytes_field(6, entry))
    rejected(blob, errors.MalformedError, "protobuf", in_header=True)


@pytest.mark.parametrize("crc", [1, 2**32 - 1])
def test_a_checksum_before_the_last_field(crc):
    early = b"\x7d" + struct.pack("<I", crc)
    for serialised in (early + valid().SerializeToString(), valid().SerializeToString() + early):
        rejected(seal(serialised), errors.MalformedError, "15", in_header=True)
    rejected(seal(seal(valid())), errors.MalformedError, "15", in_header=True)


def test_a_body_that_ends_as_if_it_were_a_checksum():
    """The last five bytes are right but belong to field 10; a field 15 of their own is missing."""
    message = valid("dense")
    start = message.SerializeToString(deterministic=True)
    values = bytearray(message.dense.values)
    values[-5] = 0x7D  # the top byte of the last value but one: finite
    start = start[: -len(values)] + values[:-4]
    blob = bytes(start) + struct.pack("<I", zlib.crc32(start[:-1]))
    assert update_pb2.Update.FromString(blob).crc32 == 0
    rejected(blob, errors.MalformedError, "protobuf", in_header=True)


# --- layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 15, 17])
def test_a_layout_id_of_another_length(size):
    message = valid()
    message.layout_id = bytes(size)
    rejected(message, errors.MalformedError, 16, size, in_header=True)
    rejected(message, errors.MalformedError, 16, size, layout=LAYOUT, in_header=True)


def test_two_tensors_of_one_name():
    message = valid()
    message.layout.tensors[1].name = "lora_A"
    rejected(message, errors.MalformedError, "'lora_A'", in_header=True)


def test_a_layout_that_cannot_be_counted():
    for shape in ([2**62 + 1], [2**63], [2**32, 2**32], [2**64 - 1] * 4, [2**31, 2**31, 2**31]):
        message = valid()
        message.layout.tensors[1].shape[:] = shape
        rejected(message, errors.MalformedError, in_header=True)
    message.layout.tensors[0].shape[:] = message.layout.tensors[1].shape[:] = [2**62 - 1]
    rejected(message, errors.MalformedError, in_header=True)


def test_a_shape_of_many_large_numbers_is_rejected_at_once():
    """The product of these would be a number of 12 million bits."""
    message = valid()
    message.layout.tensors[1].shape[:] = [2**63] * 200_000
    rejected(message, errors.MalformedError, in_header=True)
    message.layout.tensors[1].shape[:] = [2**63] * 200_000 + [0]
    rejected(message, errors.MalformedError, in_header=True)


def test_more_dimensions_than_an_array_has():
    message = valid()
    message.layout.tensors[0].shape[:] = [20, 15] + [1] * 30
    assert cf.decode(seal(message)).layout.tensors[0].size == 300
    message.layout.tensors[0].shape[:] = [20, 15] + [1] * 31
    rejected(message, errors.MalformedError, 32, 33, "lora_A", in_header=True)


def test_lengths_beside_a_zero_that_no_array_can_have():
    message = valid()
    message.layout.tensors.add(name="empty", shape=[0, 2**56], dtype=1)
    update = cf.decode(seal(message))
    assert np.zeros(update.layout.tensors[2].shape, np.float32).size == 0
    message.layout.tensors[2].shape[:] = [2, 0, 2**56]
    rejected(message, errors.MalformedError, "beside a 0", in_header=True)


def test_no_layout():
    message = valid()
    message.ClearField("layout")
    rejected(message, errors.UnknownLayoutError, "neither", in_header=True)
    rejected(message, errors.UnknownLayoutError, "neither", layout=LAYOUT, in_header=True)


def test_a_layout_id_without_a_layout():
    message = valid()
    message.layout_id = messages.layout_id(LAYOUT)
    rejected(message, errors.UnknownLayoutError, message.layout_id.hex())
    assert messages.inspect(seal(message)).layout is None


def test_an_unknown_layout_id():
    message = valid()
    message.layout_id = bytes(range(16))
    words = bytes(range(16)).hex(), messages.layout_id(LAYOUT).hex()
    rejected(message, errors.UnknownLayoutError, *words, layout=LAYOUT, in_header=True)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([TENSORS[1], TENSORS[0]], ["lora_A", "lora_B", "tensor 0"]),
        ([TENSORS[0], ("lora_C", (10, 10), "bf16")], ["lora_B", "lora_C", "tensor 1"]),
        ([TENSORS[0], ("lora_B", (100,), "bf16")], ["(10, 10)", "(100,)"]),
        ([TENSORS[0], ("lora_B", (10, 10), "f32")], ["bf16", "f32"]),
        ([("both", (400,), "f32")], ["both"]),
        ([*TENSORS, ("empty", (0,), "f32")], ["2", "3"]),
        ([], ["2", "0"]),
    ],
)
def test_another_layout_than_expected(other, words):
    layout = cf.Layout(cf.TensorSpec(*tensor) for tensor in other)
    rejected(valid(), errors.LayoutMismatchError, *words, layout=layout, in_header=True)


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        (0, D + 1),
        (1, D),
        (D, 1),
        (D + 1, 0),
        (2**64 - 1, D),
        (2**64 - D, D),
        (0, 2**64 - 1),
        (2**63, 2**63),
    ],
)
def test_more_parameters_than_the_layout_has(offset, count):
    message = valid()
    message.offset, message.num_parameters = offset, count
    words = (D, offset, count)
    rejected(message, errors.LayoutMismatchError, *words, in_header=True)
    rejected(message, errors.LayoutMismatchError, *words, layout=LAYOUT, in_header=True)
    message.layout_id = messages.layout_id(LAYOUT)
    rejected(message, errors.LayoutMismatchError, *words, layout=LAYOUT, in_header=True)


@pytest.mark.parametrize("dtype", [0, 4, 99, -1, -(2**31)])
def test_a_tensor_of_an_unknown_data_type(dtype):
    message = valid()
    message.layout.tensors[1].dtype = dtype
    blob = seal(message)
    error = error_of(cf.decode, blob)
    assert type(error) is type(error_of(messages.inspect, blob)) is errors.DTypeError
    assert "lora_B" in str(error)
    assert str(dtype) in str(error)
    with pytest.raises(reference_decoder.FaultError) as caught:
        reference_decoder.decode(blob)
    assert caught.value.kind == ("DTypeError" if dtype >= 0 else "MalformedError")


# --- body, coverage, version ------------------------------------------------------------------


def test_no_body():
    message = valid()
    message.ClearField("golomb")
    rejected(message, errors.MissingBodyError, "body", in_header=True)
    rejected(message, errors.MissingBodyError, "body", layout=LAYOUT, in_header=True)


def test_a_body_of_a_later_version():
    message = valid()
    message.ClearField("golomb")
    later = message.SerializeToString() + bytes_field(14, b"coded otherwise")
    rejected(seal(later), errors.MissingBodyError, "body", in_header=True)


def part_of(start, stop, body="bitmask", scales=(0.5,), tensors=None, version=0):
    """A valid part of the update."""
    message = valid()
    message.num_parameters, message.offset, message.base_version = stop - start, start, version
    if tensors is not None:
        message.layout.ParseFromString(reference_encoder.layout_bytes(tensors))
    content = SIGNS if codecs.get(body).ternary else [0.5 * sign for sign in SIGNS]
    field, data = reference_encoder.body_of(
        body, content[start:stop], list(scales), tensors or TENSORS, start
    )
    message.ClearField("golomb")
    return seal(message.SerializeToString() + bytes_field(field, data, always=True))


# A factored part has whole tensors only: tests/test_factored_body.py.
@pytest.mark.parametrize("codec", [name for name in codecs.names() if name != "factored"])
@pytest.mark.parametrize(("start", "stop"), [(0, 399), (1, 400), (0, 0), (400, 400), (100, 300)])
def test_a_part_where_the_whole_is_due(codec, start, stop):
    blob = part_of(start, stop, codec)
    reference_decoder.decode(blob, part=True)
    rejected(blob, errors.CoverageError)
    rejected(blob, errors.CoverageError, layout=LAYOUT)


@pytest.mark.parametrize(
    ("blobs", "error", "words"),
    [
        pytest.param([(0, 100), (101, 400)], errors.CoverageError, [100, 101], id="a gap"),
        pytest.param([(0, 100), (99, 400)], errors.CoverageError, ["twice"], id="an overlap"),
        pytest.param([(0, 400), (0, 400)], errors.CoverageError, [400], id="twice"),
        pytest.param([(0, 100), (100, 399)], errors.CoverageError, [400, 399], id="no end"),
        pytest.param([(1, 100), (100, 400)], errors.CoverageError, [0, 1], id="no start"),
        pytest.param([], errors.CoverageError, [], id="nothing"),
        pytest.param(
            [(0, 100), (100, 400, "dense")], errors.CoverageError, ["dense"], id="two kinds"
        ),
        pytest.param(
            [(0, 100, "golomb"), (100, 400, "bitmask", (0.25,))],
            errors.ScaleCountError, ["scales"], id="two scales",
        ),
        pytest.param(
            [(0, 100, "golomb"), (100, 400, "golomb", (0.5, 0.5))],
            errors.ScaleCountError, ["scales"], id="two counts of scales",
        ),
        pytest.param(
            [(0, 100), (100, 400, "bitmask", (0.5,), TENSORS[::-1])],
            errors.LayoutMismatchError, ["lora_A", "lora_B"], id="two layouts",
        ),
        pytest.param(
            [(0, 100), (100, 400, "bitmask", (0.5,), None, 3)],
            errors.VersionError, [0, 3], id="two versions",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_make_a_whole(blobs, error, words):
    parts = [part_of(*part) for part in blobs]
    for layout in (None, LAYOUT):
        for order in (parts, parts[::-1]):
            found = error_of(messages.decode_parts, order, layout=layout)
            assert type(found) is error, repr(found)
            for word in words:
                assert str(word) in str(found), str(found)


def test_parts_that_make_a_whole_in_any_order():
    parts = [part_of(0, 1), part_of(1, 257, "golomb"), part_of(257, 257)]
    parts += [part_of(257, 333, "context"), part_of(333, 400)]
    for order in (parts, parts[::-1]):
        assert signs_of(messages.decode_parts(order)) == SIGNS


def test_another_version():
    message = valid()
    message.base_version = 2**64 - 1
    blob = seal(message)
    assert signs_of(cf.decode(blob, base_version=2**64 - 1)) == SIGNS
    rejected(message, errors.VersionError, 2**64 - 1, 7, base_version=7)
