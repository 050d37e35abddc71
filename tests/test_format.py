"""proto/FORMAT.md against the package: its example, golden files, a second reader and writer.

The reader (tests/reference_decoder.py) and the writer (tests/reference_encoder.py) share no code
with the package. What the package writes must be what the brute-force writer writes, byte for byte,
so the choice of block size and Rice parameters is checked to be the best there is.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_decoder
import reference_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

import compeft_fl as cf
from compeft_fl import codecs, errors
from compeft_fl.factored import FactoredVector, Terms
from compeft_fl.kernels import cpu
from compeft_fl.wire import messages
from compeft_fl.wire.v1 import update_pb2

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "tests" / "vectors"
FORMAT = (ROOT / "proto" / "FORMAT.md").read_text(encoding="utf-8")
PROTO = (ROOT / "proto" / "compeft_fl" / "wire" / "v1" / "update.proto").read_text(encoding="utf-8")
MANIFEST = json.loads((VECTORS / "manifest.json").read_text(encoding="utf-8"))

sys.path.insert(0, str(VECTORS))
from make_vectors import digest_of, factored_of, make_input, reference_parts  # noqa: E402

sys.path.remove(str(VECTORS))

TERNARY = [name for name in codecs.names() if codecs.get(name).ternary]
DENSE = [name for name in codecs.names() if name.startswith("dense")]


def layout_of(tensors):
    return cf.Layout(cf.TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in tensors)


def words_of(bits):
    """Booleans as the 64-bit words of a mask."""
    padded = np.zeros(64 * ((len(bits) + 63) // 64), np.uint8)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.uint64)


def ternary(tensors, signs, scales):
    signs = np.array(signs, np.int8)
    masks = words_of(signs > 0), words_of(signs < 0)
    return cf.TernaryVector(layout_of(tensors), *masks, np.array(scales, np.float32))


def signs_of(update):
    """A TernaryVector as a list of -1, 0 and 1."""
    count = update.num_parameters
    positive, negative = (
        np.unpackbits(np.asarray(mask).view(np.uint8), count=count, bitorder="little").astype(int)
        for mask in (update.positive, update.negative)
    )
    return (positive - negative).tolist()


def content_of(update):
    """What an update says, as the golden files' digests take it: signs, or float32 values."""
    if isinstance(update, cf.TernaryVector):
        return signs_of(update)
    return [float(value) for value in update.values]


def reference_content(parts):
    """The same of what the reference decoder made of all parts of an update."""
    content = []
    for part in sorted(parts, key=lambda part: part.offset):
        if part.signs is None:
            content += part.values
        else:
            span = range(part.offset, part.offset + part.num_parameters)
            content += [part.signs.get(index, 0) for index in span]
    return content


def same_bits(a, b):
    """Are two lists of floats the same, -0 and 0 told apart?"""
    return np.array(a, np.float32).tobytes() == np.array(b, np.float32).tobytes()


# --- the documents ----------------------------------------------------------------------------


def hex_of(name):
    """The bytes of a block of FORMAT.md: hexadecimal up to the bar, on each line."""
    block = re.search(rf"^```hex {name}\n(.*?)^```", FORMAT, re.MULTILINE | re.DOTALL)
    assert block is not None, f"FORMAT.md has no block {name!r}"
    return bytes.fromhex("".join(line.partition("|")[0] for line in block[1].splitlines()))


EXAMPLE = [("lora_A", (2, 8), "f32"), ("lora_B", (8, 2), "bf16")]
EXAMPLE_SIGNS = {3: 1, 9: -1, 10: 1, 17: -1, 30: 1}


def example_update():
    return ternary(EXAMPLE, [EXAMPLE_SIGNS.get(index, 0) for index in range(32)], [0.5])


def test_the_worked_example_is_what_encode_writes():
    blob = cf.encode(example_update(), base_version=7, metadata={"note": "hi"})
    assert blob.hex(" ") == hex_of("example").hex(" ")
    by_id = cf.encode(example_update(), "bitmask", layout_by_id=True)
    assert by_id.hex(" ") == hex_of("bitmask").hex(" ")
    by_id = cf.encode(example_update(), "context", layout_by_id=True)
    assert by_id.hex(" ") == hex_of("context").hex(" ")


@pytest.mark.parametrize("name", ["example", "bitmask", "context"])
def test_the_worked_example_is_read_by_both_decoders(name):
    blob, layout = hex_of(name), layout_of(EXAMPLE)
    assert content_of(cf.decode(blob, layout=layout)) == signs_of(example_update())
    read = reference_decoder.decode(blob, EXAMPLE)
    assert read.signs == EXAMPLE_SIGNS
    assert read.scales == [0.5]
    assert (read.metadata, read.base_version) == (
        ({"note": "hi"}, 7) if name == "example" else ({}, 0)
    )


def test_the_worked_example_of_a_factored_body():
    terms = Terms(
        np.array([[3, -1]], np.int16),
        np.array([-2], np.int32),
        np.array([[0, 1, 0, 0, 1, 1, 0, 1]], np.bool_),
    )
    beside = ternary(EXAMPLE, [int(index == 30) for index in range(32)], [0.5])
    update = FactoredVector(layout_of(EXAMPLE), [terms, None], beside)
    blob = cf.encode(update, "factored", layout_by_id=True)
    assert blob.hex(" ") == hex_of("factored").hex(" ")
    read = cf.decode(blob, layout=layout_of(EXAMPLE))
    assert read.values[[0, 1, 8, 9, 16, 30]].tolist() == [0.75, -0.75, -0.25, 0.25, 0.0, 0.5]
    assert same_bits(reference_decoder.decode(blob, EXAMPLE).values, read.values)


def test_the_layout_id_of_the_worked_example():
    assert hex_of("layout-id") == messages.layout_id(layout_of(EXAMPLE))
    assert hex_of("layout-id") == reference_decoder.id_of(EXAMPLE)
    assert hex_of("layout-id") in hex_of("bitmask")


def test_the_sizes_that_the_worked_example_tells():
    for name, size in (
        ("83", "example"), ("45", "bitmask"), ("41", "context"), ("68", "factored"),
        ("40", "steps"),
    ):  # fmt: skip
        assert len(hex_of(size)) == int(name)
        assert f"{name} bytes" in FORMAT


def test_every_wire_error_is_a_rejection_of_the_format():
    table = FORMAT[FORMAT.index("## What a decoder rejects") : FORMAT.index("## Limits")]
    listed = set(re.findall(r"\| `(\w+Error)` \|$", table, re.MULTILINE))
    defined = {error.__name__ for error in errors.WireError.__subclasses__()}
    assert listed == defined


def test_every_body_of_the_format_has_a_codec():
    bodies = [field.name for field in update_pb2.Update.DESCRIPTOR.oneofs_by_name["body"].fields]
    assert {codecs.get(name).field for name in codecs.names()} == set(bodies)
    assert [codecs.reader_of(body).field for body in bodies] == bodies


def test_the_generated_code_has_the_fields_of_the_proto_file():
    without_comments = re.sub(r"//.*", "", PROTO)
    declared = set(re.findall(r"([\w<>, ]+?)\s+(\w+)\s*=\s*(\d+);", without_comments))
    field_numbers = {(name, int(number)) for _, name, number in declared}
    generated = {
        (field.name, field.number)
        for message in update_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    } | {
        (value.name, value.number)
        for enum in update_pb2.DESCRIPTOR.enum_types_by_name.values()
        for value in enum.values
    }
    assert field_numbers == generated
    assert update_pb2.DESCRIPTOR.package + ".Update" == messages.STYPE


# --- the golden files -------------------------------------------------------------------------

CASES = {case["name"]: case for case in MANIFEST["cases"]}
WHOLE = [name for name, case in CASES.items() if "parts" not in case]


def blobs_of(case):
    return [(VECTORS / name).read_bytes() for name in case["files"]]


def tensors_of(case):
    return [(name, tuple(shape), dtype) for name, shape, dtype, _ in case["tensors"]]


def test_the_manifest_names_the_golden_files():
    listed = [name for case in MANIFEST["cases"] for name in case["files"]]
    assert sorted(listed) == sorted(path.name for path in VECTORS.glob("*.compeft"))
    assert len(CASES) == len(MANIFEST["cases"])
    written = {name for case in MANIFEST["cases"] for name in np.atleast_1d(case["codec"])}
    assert written == set(codecs.names())


@pytest.mark.parametrize("name", CASES)
def test_golden_files_decode_to_what_the_manifest_says(name):
    case = CASES[name]
    layout = layout_of(tensors_of(case))
    update = messages.decode_parts(blobs_of(case), layout=layout)
    assert update.layout == layout
    assert update.num_parameters == case["num_parameters"]
    content = content_of(update)
    assert sum(value != 0 for value in content) == case["num_nonzeros"]
    assert digest_of(content, case.get("scales")) == case["digest"]
    if "scales" in case:
        assert same_bits(update.scales, case["scales"])
    headers = [messages.inspect(blob, layout=layout) for blob in blobs_of(case)]
    assert {header.layout_id.hex() for header in headers} == {case["layout_id"]}
    assert {header.base_version for header in headers} == {case.get("base_version", 0)}
    assert headers[0].metadata == case.get("metadata", {})
    if not case.get("layout_by_id"):
        again = messages.decode_parts(blobs_of(case))
        assert again.layout == layout
        assert digest_of(content_of(again), case.get("scales")) == case["digest"]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_decoder_reads_golden_files_alike(name):
    case = CASES[name]
    known = tensors_of(case) if case.get("layout_by_id") else None
    parts = [reference_decoder.decode(blob, known, part=True) for blob in blobs_of(case)]
    assert digest_of(reference_content(parts), case.get("scales")) == case["digest"]
    for part in parts:
        assert part.tensors == tensors_of(case)
        assert part.layout_id.hex() == case["layout_id"]
        assert part.base_version == case.get("base_version", 0)
        if "scales" in case:
            assert same_bits(part.scales, case["scales"])
    assert parts[0].metadata == case.get("metadata", {})


@pytest.mark.parametrize("name", WHOLE)
def test_encode_reproduces_the_golden_files(name):
    case = CASES[name]
    content = make_input(case)
    if "scales" in case:
        update = ternary(tensors_of(case), content, case["scales"])
    elif "terms" in case:
        tensors = tensors_of(case)
        update = factored_of(
            case, layout_of(tensors), lambda signs: ternary(tensors, signs, case["rest"])
        )
        assert same_bits(update.values, content)
    else:
        update = cf.TaskVector(layout_of(tensors_of(case)), np.array(content, np.float32))
    blob = cf.encode(
        update,
        case["codec"],
        layout_by_id=case.get("layout_by_id", False),
        base_version=case.get("base_version", 0),
        metadata=case.get("metadata"),
    )
    assert blob.hex() == blobs_of(case)[0].hex()


@pytest.mark.parametrize("cores", [2, 3, 7])
@pytest.mark.parametrize("name", [name for name in WHOLE if CASES[name]["codec"] == "golomb"])
def test_many_threads_write_and_read_the_same(name, cores, monkeypatch):
    """Small updates are coded by one thread; here several share them, and their streams' words."""
    monkeypatch.setattr(cpu, "_PARALLEL_FROM", 1)
    monkeypatch.setattr(cpu, "num_cores", lambda: cores)
    test_encode_reproduces_the_golden_files(name)
    test_golden_files_decode_to_what_the_manifest_says(name)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_encoder_reproduces_the_golden_files(name):
    assert reference_parts(CASES[name]) == blobs_of(CASES[name])


def test_the_golden_files_have_several_block_sizes_and_empty_blocks():
    bodies = [
        update_pb2.Update.FromString(blob).golomb
        for case in MANIFEST["cases"]
        for blob in blobs_of(case)
    ]
    assert len({body.block_size for body in bodies} - {0}) >= 5
    assert any(0 in body.block_nonzeros and sum(body.block_nonzeros) for body in bodies)
    assert len({b for body in bodies for b in body.rice_parameters}) >= 7


def test_the_golden_files_have_codes_with_and_without_learning():
    bodies = [
        update_pb2.Update.FromString(blob).context
        for case in MANIFEST["cases"]
        for blob in blobs_of(case)
        if "context" in case["codec"]
    ]
    assert {body.flat for body in bodies if body.code} == {False, True}


# --- any update -------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
METADATA = st.dictionaries(NAMES, NAMES, max_size=3)
SCALES = st.floats(0, float(np.finfo(np.float32).max), width=32)


@st.composite
def layouts(draw):
    """A few tensors of few parameters, some of them empty or scalar."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    shape = st.lists(st.integers(0, 9), max_size=3) | st.tuples(st.integers(0, 900))
    dtype = st.sampled_from(["f32", "f16", "bf16"])
    return [(name, tuple(draw(shape)), draw(dtype)) for name in names]


@st.composite
def ternary_inputs(draw):
    """A layout, signs of a density that changes from stretch to stretch, and scales."""
    tensors = draw(layouts())
    sizes = [math.prod(shape) for _, shape, _ in tensors]
    rng = random.Random(draw(st.integers(0, 2**32)))
    densities = draw(st.lists(st.sampled_from([0, 0.003, 0.05, 0.3, 0.9, 1]), min_size=1))
    signs, d = [], sum(sizes)
    stretch = max(1, -(-d // len(densities)))
    for index in range(d):
        kept = rng.random() < densities[index // stretch]
        signs.append(rng.choice((-1, 1)) if kept else 0)
    count = draw(st.sampled_from([1, len(tensors)]))
    return tensors, signs, draw(st.lists(SCALES, min_size=count, max_size=count))


@pytest.mark.parametrize("codec", TERNARY)
@settings(max_examples=40, deadline=None)
@given(ternary_inputs(), st.booleans(), st.integers(0, 2**64 - 1), METADATA)
def test_any_ternary_update(codec, given_input, by_id, version, metadata):
    tensors, signs, scales = given_input
    options = {"layout_by_id": by_id, "base_version": version, "metadata": metadata}
    blob = cf.encode(ternary(tensors, signs, scales), codec, **options)
    body = reference_encoder.body_of(codec, signs, scales, tensors)
    assert blob.hex() == reference_encoder.message(tensors, len(signs), body, **options).hex()

    read = reference_decoder.decode(blob, tensors)
    assert reference_content([read]) == signs
    assert same_bits(read.scales, scales)
    assert (read.tensors, read.metadata, read.base_version) == (tensors, metadata, version)

    update = cf.decode(blob, layout=layout_of(tensors), base_version=version)
    assert content_of(update) == signs
    assert same_bits(update.scales, scales)
    assert np.array_equal(update.to_task_vector().values, np.array(read.dense(), np.float32))


@pytest.mark.parametrize("codec", DENSE)
@settings(max_examples=25, deadline=None)
@given(layouts(), st.data())
def test_any_dense_update(codec, tensors, data):
    d = sum(math.prod(shape) for _, shape, _ in tensors)
    limit = 65504 if codec == "dense-fp16" else 2.0**127
    few = data.draw(st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=40))
    values = [few[index % len(few)] for index in range(d)]
    update = cf.TaskVector(layout_of(tensors), np.array(values, np.float32))
    blob = cf.encode(update, codec)
    body = reference_encoder.BODIES[codec](values, None)
    assert blob.hex() == reference_encoder.message(tensors, d, body).hex()
    read = reference_decoder.decode(blob)
    assert same_bits(cf.decode(blob).values, read.dense())
    if codec == "dense":
        assert same_bits(values, read.dense())


@pytest.mark.parametrize("d", [0, 1, 255, 256, 257, 511, 513, 4096, 65_537])
def test_the_choice_of_blocks_at_their_borders(d):
    """Nonzeros next to all borders of blocks, where a wrong gap would show."""
    borders = [border for level in range(8, 17) for border in range(0, d + 1, 1 << level)]
    near = {border + step for border in borders[:60] for step in (-1, 0, 1)}
    signs = [(-1) ** index if index in near else 0 for index in range(d)]
    tensors = [("w", (d,), "f32")]
    blob = cf.encode(ternary(tensors, signs, [1.0]))
    body = reference_encoder.golomb(signs, [1.0])
    assert blob == reference_encoder.message(tensors, d, body)
    assert content_of(cf.decode(blob)) == signs


@pytest.mark.parametrize("block_size", reference_encoder.BLOCK_SIZES)
def test_a_decoder_takes_any_block_size(block_size):
    signs = make_input({**CASES["golomb-uneven"], "seed": 5})
    tensors = tensors_of(CASES["golomb-uneven"])
    body = reference_encoder.golomb_with(signs, [0.5], block_size)
    blob = reference_encoder.message(tensors, len(signs), (8, body))
    assert content_of(cf.decode(blob)) == signs
    assert reference_content([reference_decoder.decode(blob)]) == signs


@pytest.mark.parametrize("b", range(25))
def test_a_decoder_takes_any_rice_parameter(b, monkeypatch):
    monkeypatch.setattr(reference_encoder, "best_rice", lambda gaps: b)
    signs = [0, 1, 0, 0, -1, 1] * 60 + [0] * 300 + [-1]
    body = reference_encoder.golomb_with(signs, [0.5], 256)
    blob = reference_encoder.message([("w", (len(signs),), "f32")], len(signs), (8, body))
    assert content_of(cf.decode(blob)) == signs
    assert reference_content([reference_decoder.decode(blob)]) == signs


def test_a_decoder_takes_fields_in_any_order_and_skips_those_it_does_not_know():
    number, data = reference_encoder.number_field, reference_encoder.bytes_field
    unknown = number(14, 5) + data(2000, b"x" * 9) + b"\x71" + bytes(8) + b"\x75" + bytes(4)
    body = unknown + data(7, b"\x02") + data(5, b"\x03") + data(4, b"\0") + number(3, 2)
    body += number(2, 256) + b"\x0d" + b"\0\0\x80\x3f"  # unpacked: one count, one scale
    tensor = number(3, 2) + unknown + number(2, 1) + number(2, 2)
    tensor += data(1, b"w")
    layout = data(1, tensor) + unknown
    blob = reference_encoder.seal(data(8, body) + unknown + number(3, 2) + data(1, layout))
    expected = [("w", (1, 2), "f16")]
    for update in (cf.decode(blob), cf.decode(blob, layout=layout_of(expected))):
        assert content_of(update) == [1, -1]
        assert update.layout == layout_of(expected)
    assert reference_content([reference_decoder.decode(blob, expected)]) == [1, -1]
    identifier = reference_encoder.layout_id(expected)
    assert messages.inspect(blob).layout_id == identifier
    assert reference_decoder.decode(blob).layout_id == identifier
