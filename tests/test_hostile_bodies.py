"""What a decoder rejects in a body (proto/FORMAT.md), each with its own test.

The sender is hostile: the checksums are right. Each rejection is checked on the package's decoder,
on the CPU and by torch operations, on an accumulator, and on the reference decoder, which must name
the same error.
"""

from __future__ import annotations

import numpy as np
import pytest
import reference_decoder
import reference_encoder
from hostile import LAYOUT, SIGNS, D, error_of, golomb_of, rejected, seal, signs_of, valid
from reference_encoder import varint

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.wire.v1 import update_pb2

FLOAT_MAX = float(np.finfo(np.float32).max)


# --- scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["golomb", "bitmask", "context"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), -1.0, -1e-45])
def test_a_scale_that_is_none(body, scale):
    message = valid(body)
    getattr(message, body).scales[:] = [scale]
    rejected(message, errors.ScaleError, "index 0")
    getattr(message, body).scales[:] = [1.0, scale]
    rejected(message, errors.ScaleError, "index 1")
    rejected(message, errors.ScaleError, "index 1", layout=LAYOUT)


@pytest.mark.parametrize("body", ["golomb", "bitmask", "context"])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, FLOAT_MAX])
def test_a_scale_at_the_border_is_one(body, scale):
    message = valid(body)
    getattr(message, body).scales[:] = [scale, 1.0]
    assert signs_of(cf.decode(seal(message))) == SIGNS
    reference_decoder.decode(seal(message))


@pytest.mark.parametrize("body", ["golomb", "bitmask", "context"])
@pytest.mark.parametrize("count", [0, 3, 100_000])
def test_neither_one_scale_nor_one_per_tensor(body, count):
    message = valid(body)
    getattr(message, body).scales[:] = [1.0] * count
    rejected(message, errors.ScaleCountError, 2, count)


def test_scales_that_are_cut_off():
    message = valid().SerializeToString().replace(b"\x0a\x04\0\0\0\x3f", b"\x0a\x03\0\0\0")
    fewer = message.replace(
        b"\x42" + varint(len(message) - message.index(b"\x0a\x03\0\0\0") + 1),
        b"\x42" + varint(len(message) - message.index(b"\x0a\x03\0\0\0")),
    )
    assert len(fewer) == len(message) != len(valid().SerializeToString())
    rejected(seal(fewer), errors.MalformedError, in_header=True)


# --- Golomb-Rice body -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 64, 128, 255, 257, 384, 2**25, 2**31, 2**32 - 1])
def test_a_block_size_that_is_none(size):
    message = valid()
    message.golomb.block_size = size
    rejected(message, errors.BlockSizeError, size)


@pytest.mark.parametrize("count", [0, 1, 3, 100_000])
def test_another_number_of_block_nonzeros(count):
    message = valid()
    message.golomb.block_nonzeros[:] = [0] * count
    rejected(message, errors.BlockCountError, "block_nonzeros", 2, count)


@pytest.mark.parametrize("count", [0, 1, 3, 100_000])
def test_another_number_of_rice_parameters(count):
    message = valid()
    message.golomb.rice_parameters = bytes(count)
    rejected(message, errors.BlockCountError, "rice_parameters", 2, count)


@pytest.mark.parametrize("size", [512, 2**24])
def test_tables_for_another_block_size(size):
    message = valid()
    message.golomb.block_size = size
    rejected(message, errors.BlockCountError, 1, 2, size)


@pytest.mark.parametrize("b", [25, 64, 255])
@pytest.mark.parametrize("block", [0, 1])
def test_a_rice_parameter_over_24(b, block):
    message = valid()
    rice = bytearray(message.golomb.rice_parameters)
    rice[block] = b
    message.golomb.rice_parameters = bytes(rice)
    rejected(message, errors.RiceParameterError, 24, b, f"block {block}")


def test_a_rice_parameter_over_24_in_a_block_without_nonzeros():
    message = golomb_of([[], []])
    message.golomb.rice_parameters = b"\x00\x19"
    rejected(message, errors.RiceParameterError, 24, 25, "block 1")


@pytest.mark.parametrize(
    ("block", "count"), [(0, 257), (1, 145), (1, 256), (0, 2**31), (1, 2**32 - 1)]
)
def test_more_nonzeros_than_the_block_has_parameters(block, count):
    message = valid()
    message.golomb.block_nonzeros[block] = count
    rejected(message, errors.BlockNonzerosError, (256, 144)[block], count, f"block {block}")


@pytest.mark.parametrize(
    ("gaps", "rice", "block"),
    [
        pytest.param([[256], []], (0, 0), 0, id="the next block's first"),
        pytest.param([[255, 0], []], (0, 0), 0, id="after the last"),
        pytest.param([[], [144]], (0, 0), 1, id="in the short block"),
        pytest.param([[], [143, 0]], (3, 3), 1, id="after the short block's last"),
        pytest.param([[], [255]], (3, 5), 1, id="where a block of full size would have it"),
        pytest.param([[2**24 - 1], []], (24, 24), 0, id="a large remainder"),
        pytest.param([[], [(1000 << 24) + 5]], (0, 24), 1, id="over 2^32"),
        pytest.param([[255], [2**24]], (8, 12), 1, id="a large quotient"),
        pytest.param([[0] * 256, [0] * 143 + [1]], (0, 0), 1, id="a full block and one zero"),
    ],
)
def test_a_position_past_the_end_of_its_block(gaps, rice, block):
    message = golomb_of(gaps, rice)
    rejected(message, errors.PositionError, f"block {block}", (256, 144)[block])
    rejected(message, errors.PositionError, f"block {block}", layout=LAYOUT)


def test_positions_at_the_end_of_their_blocks_are_taken():
    signs = signs_of(cf.decode(seal(golomb_of([[255], [0] * 143 + [0]], (24, 0)))))
    assert signs == [0] * 255 + [1] * 145


def test_positions_whose_sum_overflows():
    """2^26 zeros before a one, with b = 24: a gap of 2^50; 32-bit and some 64-bit sums wrap."""
    message = golomb_of([[0, 0], []], (24, 0))
    message.golomb.quotients = bytes(1 << 23) + b"\x03"
    blob = seal(message)
    assert type(error_of(cf.decode, blob)) is errors.PositionError
    assert type(error_of(cf.decode, blob, device="cpu")) is errors.PositionError


@pytest.mark.parametrize("stream", ["quotients", "remainders", "signs"])
def test_a_stream_that_is_too_short(stream):
    message = valid()
    whole = getattr(message.golomb, stream)
    for cut in (whole[:-1], whole[: len(whole) // 2], b""):
        setattr(message.golomb, stream, cut)
        # Of quotients the codes are counted, of the other streams the bytes.
        expected = sum(message.golomb.block_nonzeros) if stream == "quotients" else len(whole)
        rejected(message, errors.StreamLengthError, stream, expected)


@pytest.mark.parametrize("stream", ["quotients", "remainders", "signs"])
@pytest.mark.parametrize("more", [b"\0", b"\xff", bytes(9), b"\x01" * 1000])
def test_a_stream_that_is_too_long(stream, more):
    message = valid()
    expected = len(getattr(message.golomb, stream))
    setattr(message.golomb, stream, getattr(message.golomb, stream) + more)
    found = expected + len(more)
    rejected(message, errors.StreamLengthError, stream, expected, found)


@pytest.mark.parametrize("stream", ["quotients", "remainders", "signs"])
def test_a_stream_where_none_is_due(stream):
    message = golomb_of([[], []], (5, 5))
    setattr(message.golomb, stream, b"\0")
    rejected(message, errors.StreamLengthError, stream, 0, 1)
    setattr(message.golomb, stream, b"\xff")
    rejected(message, errors.StreamLengthError, stream, 0, 1)


def test_fewer_quotients_than_nonzeros():
    message = golomb_of([[3, 3], [3]])
    message.golomb.quotients = b"\x88\x00"  # the last one is missing, its zeros are there
    rejected(message, errors.StreamLengthError, "quotients", 3, 2)
    message.golomb.quotients = bytes(100_000)
    rejected(message, errors.StreamLengthError, "quotients", 3, 0)


@pytest.mark.parametrize("bit", [4, 7])
@pytest.mark.parametrize("stream", ["quotients", "remainders", "signs"])
def test_set_bits_after_the_end_of_a_stream(stream, bit):
    message = golomb_of([[1, 1], []], (1, 0))  # 2 bits of each stream
    data = getattr(message.golomb, stream)
    assert len(data) == 1
    setattr(message.golomb, stream, bytes([data[0] | 1 << bit]))
    rejected(message, errors.PaddingError, stream, "bit 2")


# --- bit masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 63, 64, 299, 399])
def test_a_parameter_in_both_masks(index):
    message = valid("bitmask")
    for mask in ("positive", "negative"):
        data = bytearray(getattr(message.bitmask, mask))
        data[index >> 3] |= 1 << (index & 7)
        setattr(message.bitmask, mask, bytes(data))
    rejected(message, errors.MaskOverlapError, f"parameter {index} ")


@pytest.mark.parametrize("mask", ["positive", "negative"])
@pytest.mark.parametrize("size", [0, 49, 51, 52, 100_000])
def test_a_mask_of_another_length(mask, size):
    message = valid("bitmask")
    setattr(message.bitmask, mask, bytes(size))
    rejected(message, errors.StreamLengthError, mask, 50, size)


@pytest.mark.parametrize("mask", ["positive", "negative"])
@pytest.mark.parametrize("d", [1, 7, 9, 63, 65])
def test_set_bits_after_the_end_of_a_mask(mask, d):
    tensors, size = [("w", (d,), "f32")], (d + 7) // 8
    message = update_pb2.Update(num_parameters=d)
    message.layout.ParseFromString(reference_encoder.layout_bytes(tensors))
    message.bitmask.scales[:] = [1.0]
    for each in ("positive", "negative"):
        last = 1 << (d & 7) if each == mask else 0
        setattr(message.bitmask, each, bytes(size - 1) + bytes([last]))
    rejected(message, errors.PaddingError, mask, f"bit {d}")


# --- dense body -------------------------------------------------------------------------------

NOT_FINITE = {
    1: [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\xc0\x7f", b"\x01\0\x80\xff"],
    2: [b"\0\x7c", b"\0\xfc", b"\x01\x7c", b"\xff\xff"],
    3: [b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\x81\xff"],
}


@pytest.mark.parametrize(
    ("dtype", "value"), [(dtype, value) for dtype, values in NOT_FINITE.items() for value in values]
)
@pytest.mark.parametrize(("index", "tensor"), [(0, "lora_A"), (300, "lora_B"), (399, "lora_B")])
def test_a_dense_value_that_is_not_finite(dtype, value, index, tensor):
    message = valid("dense")
    data = bytearray(D * len(value))
    data[index * len(value) : (index + 1) * len(value)] = value
    message.dense.dtype, message.dense.values = dtype, bytes(data)
    rejected(message, errors.NonFiniteBodyError, tensor, f"parameter {index}")


@pytest.mark.parametrize(("dtype", "width"), [(1, 4), (2, 2), (3, 2)])
@pytest.mark.parametrize("difference", [-D, -1, 1, 2, D, 100_000])
def test_a_dense_body_of_another_length(dtype, width, difference):
    message = valid("dense")
    size = D * width + difference if difference > -D else 0
    message.dense.dtype, message.dense.values = dtype, bytes(size)
    rejected(message, errors.StreamLengthError, D * width, size)


@pytest.mark.parametrize("dtype", [0, 4, 77])
def test_a_dense_body_of_an_unknown_data_type(dtype):
    message = valid("dense")
    message.dense.dtype = dtype
    rejected(message, errors.DTypeError, dtype)


def test_a_dense_body_of_a_negative_data_type():
    message = valid("dense")
    message.dense.dtype = -1
    assert type(error_of(cf.decode, seal(message))) is errors.DTypeError
