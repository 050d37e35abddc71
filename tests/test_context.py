"""codecs/context.py: the model against its specification where it is hard, rejections, sizes."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import reference_context
import reference_decoder
from hostile import LAYOUT, SIGNS, TENSORS, D, rejected, seal, signs_of, valid
from safetensors.numpy import load_file

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.codecs.context import matrices
from compeft_fl.kernels import cpu_context
from compeft_fl.wire import messages

ROOT = Path(__file__).parents[1]
TAUS = sorted((ROOT / "simulations" / "data" / "taus").glob("*.safetensors"))


# --- the model --------------------------------------------------------------------------------


def words_of(bits):
    padded = np.zeros(64 * ((len(bits) + 63) // 64), np.uint8)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.uint64)


def codes_of(signs, shape):
    """What the kernel and the reference write, with and without learning; both read back."""
    array = np.array(signs)
    masks = words_of(array > 0), words_of(array < 0)
    count = int(np.count_nonzero(array))
    layout = cf.Layout([cf.TensorSpec("w", shape)])
    tensors = matrices(layout, 0, array.size)
    for flat in (False, True):
        _, code = reference_context.write(signs, [shape], 0, flat)
        written = cpu_context.write_code(*masks, tensors, count, flat)
        if written is None:
            assert len(code) > (array.size + count + 7) // 8
        else:
            assert written.hex() == code.hex()
        read = cpu_context.read_code(code, tensors, count, flat)
        assert np.array_equal(read[0], masks[0])
        assert np.array_equal(read[1], masks[1])
        assert read[3] == count
        assert read[4] < 1 << 24
        assert len(code) <= read[2]
        found, most, value = reference_context.read(code, [shape], 0, array.size, count, flat)
        assert found == {i: s for i, s in enumerate(signs) if s}
        assert (most, value) == (read[2], read[4])
        yield code


PATTERNS = {
    "all": lambda i, j: 1,
    "lines of one sign": lambda i, j: (1, 0, -1, 0)[i % 4],
    "opposite columns": lambda i, j: (1 if i % 3 else -1) * (-1) ** j,
    "opposites that change": lambda i, j: (-1) ** (j * (i // 300)),
    "long silence, then all": lambda i, j: int(i > 500),
    "a surprise": lambda i, j: int((i, j) == (599, 1)),
    "chequered": lambda i, j: (i + j) % 2,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("width", [1, 2, 17])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.long
def test_the_extremes_of_what_can_be_learned(pattern, width, wide):
    """Logits at their ends, weights at their bounds, probabilities of 1 and 65535 in 65536."""
    lines = 600
    if wide:
        signs = [PATTERNS[pattern](i, j) for j in range(width) for i in range(lines)]
    else:
        signs = [PATTERNS[pattern](i, j) for i in range(lines) for j in range(width)]
    shape = (width, lines) if wide else (lines, width)
    learned, _ = codes_of(signs, shape)
    assert width < 17 or len(learned) < 0.3 * lines * width / 8


@pytest.mark.long
def test_weights_reach_their_bounds():
    """Two columns that are always alike: the second alone, and beside the first, pull apart."""
    rng = random.Random(0)
    signs = [sign for _ in range(20_000) for sign in [rng.choice((-1, 0, 1))] * 2]
    for _ in codes_of(signs, (20_000, 2)):
        pass
    known = {i: s for i, s in enumerate(signs) if s}
    writer = reference_context.Writer()
    model = reference_context.Model(len(known), len(signs), False, writer.decide)
    model.walk([(20_000, 2)], 0, len(signs), len(known), known)
    weights = [model.pair[1, 0], model.turn[1, 0], *model.column]
    assert max(map(abs, weights)) == 1 << 27, [w / (1 << 24) for w in weights]


@pytest.mark.long
def test_carries_go_through_many_bytes():
    """A writer that keeps all of low, and one that holds back bytes of 255, write the same."""
    rng = random.Random(1)
    longest = 0
    for _ in range(20):
        signs = [rng.choice((-1, 0, 0, 0, 1)) for _ in range(2000)]
        for code in codes_of(signs, (2000,)):
            longest = max(longest, *map(len, re.findall(b"\0+|\xff+", code)), 0)
    assert longest >= 2


def test_the_logistic_function_is_the_specifications_table():
    text = (ROOT / "proto" / "FORMAT.md").read_text(encoding="utf-8")
    listed = re.search(r"96 that is\n\n```\n(.*?)```", text, re.DOTALL)[1].split()
    assert [int(value) for value in listed] == reference_context.S[48:]
    assert cpu_context.SQUASH.tolist() == reference_context.S
    for z in (-(1 << 40), *range(-(13 << 24), 13 << 24, 999_983), 1 << 40):
        assert cpu_context.squash(z) == reference_context.squash(z)


@pytest.mark.parametrize("d", [1, 2, 7, 1000, 1 << 20, 1 << 40])
def test_the_first_logit(d):
    for count in {0, 1, d // 20, d // 2, d - 1, d}:
        model = reference_context.Model(count, d, False, lambda p, told: 0)
        assert cpu_context.start_logit(count, d) == model.z0


def test_a_tensor_in_part_is_one_column():
    layout = cf.Layout(
        [
            cf.TensorSpec("a", (2, 3, 5)),
            cf.TensorSpec("empty", (4, 0)),
            cf.TensorSpec("scalar", ()),
            cf.TensorSpec("b", (7,)),
            cf.TensorSpec("c", (3, 2)),
        ]
    )
    assert matrices(layout, 0, 44).tolist() == [[6, 5], [1, 1], [1, 7], [3, 2]]
    assert matrices(layout, 1, 43).tolist() == [[29, 1], [1, 1], [1, 7], [5, 1]]
    assert matrices(layout, 10, 20).tolist() == [[10, 1]]
    assert matrices(layout, 30, 31).tolist() == [[1, 1]]
    assert matrices(layout, 31, 31).tolist() == []


# --- what it is for ---------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "bound"), [(0.05, 0.90), (0.2, 0.93)])
def test_real_task_vectors_are_far_below_the_entropy(density, bound):
    """Whole bodies against d (H(p) + p), ComPEFT's formula; the target of issue 4."""
    ratios = []
    for file in TAUS:
        tau = cf.TaskVector.from_dict(load_file(file))
        update = cf.compress(tau, density)
        blob = cf.encode(update, "context", layout_by_id=True)
        p = update.density
        bits = -(1 - p) * np.log2(1 - p) - p * np.log2(p / 2)
        size = messages.inspect(blob, layout=tau.layout).body_bytes
        ratios.append(8 * size / (tau.num_parameters * bits))
        assert size < messages.inspect(cf.encode(update)).body_bytes
    assert len(ratios) == 4
    assert np.mean(ratios) <= bound


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("shape", [(1 << 18,), (1024, 64), (16, 4096), (512, 512)])
def test_where_there_is_nothing_to_learn_little_is_lost(shape, density):
    values = np.random.default_rng(0).standard_normal(int(np.prod(shape))).astype(np.float32)
    tau = cf.TaskVector(cf.Layout([cf.TensorSpec("w", shape)]), values)
    update = cf.compress(tau, density)
    p = update.density
    bits = -(1 - p) * np.log2(1 - p) - p * np.log2(p / 2)
    assert 8 * len(cf.encode(update, "context")) <= 1.06 * values.size * bits + 8 * 60


# --- what a decoder rejects -------------------------------------------------------------------


@functools.cache
def written_of(signs):
    return reference_context.write(signs, [shape for _, shape, _ in TENSORS], 0)


def context_of(signs, **changes):
    """A valid context update of these signs, with some fields changed."""
    message = valid("context")
    flat, code = written_of(tuple(signs))
    message.context.num_nonzeros = sum(sign != 0 for sign in signs)
    message.context.flat, message.context.code = flat, code
    for name, value in changes.items():
        setattr(message.context, name, value)
    return message


@pytest.mark.parametrize("count", [D + 1, 2**31, 2**63, 2**64 - 1])
def test_more_nonzeros_than_parameters(count):
    rejected(context_of(SIGNS, num_nonzeros=count), errors.NonzeroCountError, D, count)


@pytest.mark.parametrize("flat", [False, True])
def test_fewer_nonzeros_in_the_code(flat):
    """A writer that says 2 and has 1."""
    writer = reference_context.Writer()
    model = reference_context.Model(2, D, flat, writer.decide)
    model.walk([shape for _, shape, _ in TENSORS], 0, D, 2, {7: -1})
    message = context_of(SIGNS, code=writer.code(), num_nonzeros=2, flat=flat)
    rejected(message, errors.NonzeroCountError, "expected 2", "found 1")


def fault_of(message):
    """The reference decoder's error by name; None where it reads the message."""
    try:
        reference_decoder.decode(seal(message))
    except reference_decoder.FaultError as fault:
        return fault.kind
    return None


@pytest.mark.parametrize("more", [b"\0", bytes(9), b"\x01\0"])
def test_a_code_that_ends_on_a_zero_byte(more):
    message = context_of(SIGNS)
    message.context.code += more
    rejected(message, errors.CodeEndError, "last byte")


@pytest.mark.parametrize("more", [b"\x01" * 5, b"\xff" * 1000, b"\x01"])
@pytest.mark.parametrize("flat", [False, True])
def test_bytes_after_the_code(more, flat):
    shapes = [shape for _, shape, _ in TENSORS]
    _, code = reference_context.write(SIGNS, shapes, 0, flat)
    message = context_of(SIGNS, code=code + more, flat=flat)
    rejected(message, errors.StreamLengthError, "code", len(code) + len(more))


def test_a_code_where_none_is_due():
    message = context_of([0] * D)
    assert (message.context.num_nonzeros, message.context.code) == (0, b"")
    assert signs_of(cf.decode(seal(message))) == [0] * D
    message.context.code = b"\x01"
    rejected(message, errors.CodeEndError, 1 << 24)
    message.context.code = b"\x01\x01"
    rejected(message, errors.StreamLengthError, "at most 1", "found 2")


def test_a_code_that_ends_elsewhere_in_its_range():
    """The last byte is one higher: still the same decisions, but not the writer's code."""
    found = 0
    for seed in range(40):
        rng = random.Random(seed)
        signs = [rng.choice((-1, 0, 0, 0, 1)) for _ in range(D)]
        message = context_of(signs)
        code = bytearray(message.context.code)
        if code[-1] == 255:
            continue
        code[-1] += 1
        message.context.code = bytes(code)
        if fault_of(message) == "CodeEndError":
            rejected(message, errors.CodeEndError, "2^24")
            found += 1
    assert found >= 5


@pytest.mark.long
def test_what_is_accepted_is_what_its_writer_wrote():
    """Each update has one code: any other bytes are rejected, or are another update's code."""
    rng = random.Random(0)
    shapes = [shape for _, shape, _ in TENSORS]
    taken = 0
    for _ in range(300):
        code = bytes(rng.randrange(256) for _ in range(rng.randrange(5)))
        message = context_of(SIGNS, code=code, num_nonzeros=rng.randrange(1, 8))
        fault = fault_of(message)
        if fault is not None:
            rejected(message, getattr(errors, fault))
            continue
        signs = signs_of(cf.decode(seal(message), layout=LAYOUT))
        assert reference_context.write(signs, shapes, 0, False)[1] == code
        taken += 1
    assert taken


def test_a_long_update_of_a_short_code_is_bounded():
    """What is decoded for one byte of code is bounded by what the reader allows."""
    message = context_of([0] * (D - 1) + [1])
    del message.layout.tensors[1:]
    message.layout.tensors[0].shape[:] = [1 << 25]
    message.num_parameters = 1 << 25
    rejected(message, errors.ImplausibleSizeError, 1 << 25)
