"""wire/messages.py: whole updates and parts, layouts in the bytes and by id, versions, metadata."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl import codecs
from compeft_fl.errors import (
    CoverageError,
    ImplausibleSizeError,
    LayoutMismatchError,
    ParameterError,
    UnknownLayoutError,
    UpdateSizeError,
    VersionError,
)
from compeft_fl.wire import messages
from compeft_fl.wire.v1 import update_pb2

SIZES = (300, 1, 0, 5000, 64, 2000)
LAYOUT = cf.Layout([cf.TensorSpec(f"t{i}", (size,)) for i, size in enumerate(SIZES)])
OTHER = cf.Layout([cf.TensorSpec(f"t{i}", (size,), "f16") for i, size in enumerate(SIZES)])


def update(density=0.1, layout=LAYOUT):
    values = np.random.default_rng(0).standard_normal(layout.num_parameters)
    return cf.compress(cf.TaskVector(layout, values.astype(np.float32)), density)


def same(a, b):
    return np.array_equal(a.to_task_vector().values, b.to_task_vector().values)


@pytest.mark.parametrize("codec", codecs.names())
def test_by_id(codec):
    blob = cf.encode(update(), codec, layout_by_id=True)
    assert len(blob) < len(cf.encode(update(), codec)) - 40
    assert same(cf.decode(blob, layout=LAYOUT), cf.decode(cf.encode(update(), codec)))
    with pytest.raises(UnknownLayoutError, match="only its id"):
        cf.decode(blob)
    with pytest.raises(UnknownLayoutError, match=messages.layout_id(OTHER).hex()):
        cf.decode(blob, layout=OTHER)


def test_another_layout_in_the_bytes_is_described():
    with pytest.raises(LayoutMismatchError, match=r"tensor 0 .* f16, found .* f32"):
        cf.decode(cf.encode(update()), layout=OTHER)
    fewer = cf.Layout(LAYOUT.tensors[:-1])
    with pytest.raises(LayoutMismatchError, match="5 tensors, found 6"):
        cf.decode(cf.encode(update()), layout=fewer)


def test_versions():
    blob = cf.encode(update(), base_version=7)
    assert same(cf.decode(blob), update())
    assert same(cf.decode(blob, base_version=7), update())
    with pytest.raises(VersionError, match="version 8, found 7"):
        cf.decode(blob, base_version=8)


@pytest.mark.parametrize("by_id", [False, True])
def test_inspect_tells_all_but_the_body(by_id):
    blob = cf.encode(
        update(), "bitmask", base_version=3, metadata={"b": "2", "a": "1"}, layout_by_id=by_id
    )
    header = messages.inspect(blob)
    assert header.layout == (None if by_id else LAYOUT)
    assert header.layout_id == messages.layout_id(LAYOUT)
    assert (header.num_parameters, header.offset, header.base_version) == (7365, 0, 3)
    assert header.metadata == {"a": "1", "b": "2"}
    assert (header.codec, header.num_bytes) == ("bitmask", len(blob))
    assert 7365 / 4 < header.body_bytes < len(blob)


def test_bytes_do_not_depend_on_the_order_of_the_metadata():
    one, two = {"": "0", "a": "1", "ab": "2", "b": "3"}, {"b": "3", "ab": "2", "a": "1", "": "0"}
    assert cf.encode(update(), metadata=one) == cf.encode(update(), metadata=two)
    assert messages.inspect(cf.encode(update(), metadata=one)).metadata == one


@pytest.mark.parametrize("metadata", [{"k": 1}, {1: "v"}, {"k": "\ud800"}, {"\ud800": "v"}])
def test_metadata_is_text(metadata):
    with pytest.raises(ParameterError, match="metadata"):
        cf.encode(update(), metadata=metadata)


@pytest.mark.parametrize("version", [-1, 1 << 64, 1.5, "1"])
def test_versions_that_the_format_cannot_hold(version):
    with pytest.raises(ParameterError, match="version"):
        cf.encode(update(), base_version=version)


@pytest.mark.parametrize("codec", codecs.names())
@pytest.mark.parametrize("max_body_bytes", [4200, 5000, 12_000, 1 << 20])
def test_parts_cover_the_update_in_any_order(codec, max_body_bytes):
    parts = messages.encode_parts(
        update(), codec, max_body_bytes=max_body_bytes, metadata={"k": "v"}
    )
    headers = [messages.inspect(part) for part in parts]
    at = 0
    for header in headers:
        assert header.offset == at
        assert header.body_bytes <= max_body_bytes
        at += header.num_parameters
    assert at == LAYOUT.num_parameters
    assert [header.metadata for header in headers] == [{"k": "v"}] + [{}] * (len(parts) - 1)
    assert same(messages.decode_parts(reversed(parts)), cf.decode(cf.encode(update(), codec)))


def test_parts_are_cut_at_tensor_borders_where_they_can_be():
    parts = messages.encode_parts(update(), "dense", max_body_bytes=4 * 5100)
    offsets = [messages.inspect(part).offset for part in parts]
    assert len(offsets) > 1
    assert set(offsets) <= set(LAYOUT.offsets.tolist())
    parts = messages.encode_parts(update(), "dense", max_body_bytes=4 * 3000)
    assert {messages.inspect(part).offset for part in parts} - set(LAYOUT.offsets.tolist())


def test_a_missing_a_doubled_and_a_foreign_part():
    parts = messages.encode_parts(update(), max_body_bytes=5000)
    assert len(parts) > 2
    with pytest.raises(CoverageError, match="expected a part from parameter 0"):
        messages.decode_parts(parts[1:])
    with pytest.raises(CoverageError, match="7365 parameters"):
        messages.decode_parts(parts[:-1])
    with pytest.raises(CoverageError, match="twice"):
        messages.decode_parts([*parts, parts[0]])
    foreign = messages.encode_parts(update(layout=OTHER), max_body_bytes=5000)
    with pytest.raises(LayoutMismatchError):
        messages.decode_parts([*parts[:-1], foreign[-1]])
    later = messages.encode_parts(update(), max_body_bytes=5000, base_version=1)
    with pytest.raises(VersionError):
        messages.decode_parts([*parts[:-1], later[-1]])
    with pytest.raises(CoverageError, match="expected 7365 parameters"):
        cf.decode(parts[0])
    with pytest.raises(CoverageError, match="none"):
        messages.decode_parts([])


def test_a_part_too_small_to_cut_is_refused():
    with pytest.raises(ParameterError, match="max_body_bytes"):
        messages.encode_parts(update(), max_body_bytes=10)


def test_updates_that_could_pass_512_mib_ask_for_parts(monkeypatch):
    monkeypatch.setattr(messages, "MAX_BODY_BYTES", 5000)
    with pytest.raises(UpdateSizeError, match="encode_parts"):
        cf.encode(update())


def test_few_bytes_that_claim_many_parameters():
    """10^12 parameters in 120 kB: a body that is valid, but no layout to expect it by."""
    d = 10**12
    layout = cf.Layout([cf.TensorSpec("w", (d,))])
    blocks = -(-d // (1 << 24))
    message = update_pb2.Update(num_parameters=d)
    message.layout.tensors.add(name="w", shape=[d], dtype=update_pb2.DTYPE_F32)
    message.golomb.scales.append(1.0)
    message.golomb.block_size = 1 << 24
    message.golomb.block_nonzeros.extend([0] * blocks)
    message.golomb.rice_parameters = bytes(blocks)
    blob = messages.seal(message.SerializeToString())
    with pytest.raises(ImplausibleSizeError, match=str(d)):
        cf.decode(blob)
    assert messages.inspect(blob).layout == layout


def test_layout_ids_differ_with_names_shapes_types_and_order():
    tensors = [cf.TensorSpec("a", (2, 3)), cf.TensorSpec("b", (6,))]
    layouts = [
        tensors,
        tensors[::-1],
        [cf.TensorSpec("a", (3, 2)), tensors[1]],
        [cf.TensorSpec("a", (2, 3), "bf16"), tensors[1]],
        [cf.TensorSpec("A", (2, 3)), tensors[1]],
    ]
    ids = [messages.layout_id(cf.Layout(each)) for each in layouts]
    assert all(len(each) == 16 for each in ids)
    assert len(set(ids)) == len(ids)
