"""codecs/steps.py: the model against its specification, what is lossless, rejections, sizes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import reference_context
import reference_decoder
import reference_steps
from hostile import D, rejected, valid
from safetensors.numpy import load_file
from test_format import EXAMPLE, FORMAT, hex_of, layout_of

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.codecs.context import matrices
from compeft_fl.kernels import cpu_steps
from compeft_fl.wire import messages

ROOT = Path(__file__).parents[1]
TAUS = sorted((ROOT / "simulations" / "data" / "taus").glob("*.safetensors"))


def drawn(rng, size, density, spread):
    """Integers: 0, or a magnitude of which each further step is ``spread`` as likely."""
    found = []
    for _ in range(size):
        magnitude = int(rng.random() < density)
        while magnitude and rng.random() < spread and magnitude < 60:
            magnitude += 1
        found.append(rng.choice((-1, 1)) * magnitude)
    return found


# --- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 70), (70, 8), (1, 40), (40,), (), (3, 90, 2), (75, 80)])
@pytest.mark.parametrize(("density", "spread"), [(0.05, 0.1), (0.5, 0.5), (1.0, 0.95)])
def test_kernel_and_reference_write_and_read_the_same(shape, density, spread):
    size = int(np.prod(shape))
    integers = drawn(random.Random(size), size, density, spread)
    self_layout = cf.Layout([cf.TensorSpec("w", shape)])
    tensors, count = matrices(self_layout, 0, size), int(np.count_nonzero(integers))
    code = reference_steps.write(integers, [shape], 0)
    values = np.array(integers, np.float32) / 4
    assert cpu_steps.write_code(values, -2, tensors, count).hex() == code.hex()
    read, most, found, largest, value = cpu_steps.read_code(code, -2, tensors, count)
    assert (read * 4).tolist() == integers
    assert largest == max(map(abs, integers))
    assert (found, value < 1 << 24, len(code) <= most) == (count, True, True)
    known, reference_most, reference_value = reference_steps.read(code, [shape], 0, size, count)
    assert known == {i: q for i, q in enumerate(integers) if q}
    assert (reference_most, reference_value) == (most, value)


@pytest.mark.parametrize("largest", [14, 15, 16, 17, 255, 2**23, 2**24 - 1])
def test_large_magnitudes(largest):
    integers = [0, largest, -largest, largest - 1, 1, 0, -1]
    update = cf.TaskVector.from_dict({"w": np.array(integers, "f4") * np.float32(0.25)})
    assert np.array_equal(cf.decode(cf.encode(update, "steps")).values, update.values)
    code = reference_steps.write(integers, [(7,)], 0)
    assert reference_steps.read(code, [(7,)], 0, 7, 5)[0] == {
        i: q for i, q in enumerate(integers) if q
    }


# --- FORMAT.md's example ----------------------------------------------------------------------


EXAMPLE_STEPS = {3: 1, 9: -1, 10: 2, 17: -3, 30: 1}  # in units of 2^-4


def test_the_worked_example_of_steps_is_what_encode_writes_and_both_decoders_read():
    values = np.array([EXAMPLE_STEPS.get(index, 0) / 16 for index in range(32)], np.float32)
    update = cf.TaskVector(layout_of(EXAMPLE), values)
    blob = cf.encode(update, "steps", layout_by_id=True, base_version=7)
    assert blob.hex(" ") == hex_of("steps").hex(" ")
    assert cf.decode(blob, layout=update.layout).values.tolist() == values.tolist()
    read = reference_decoder.decode(blob, EXAMPLE)
    assert (read.values, read.base_version) == (values.tolist(), 7)
    shapes = [shape for _, shape, _ in EXAMPLE]
    code = b"\x71\x8e\xfa\xc5\xa7"
    assert reference_steps.read(code, shapes, 0, 32, 5)[1] == len(code)  # 3 zeros after it


def test_the_decisions_of_the_worked_example_of_steps():
    """Each probability and result that FORMAT.md lists, from the second writer."""
    told = FORMAT[FORMAT.index("with those of magnitudes in parentheses:") :].split("```")[1]
    told = told.replace("\N{MINUS SIGN}", "-")
    listed = re.findall(r"(\d+) +\(?([01+-])\)?", told)
    decisions = []

    class Recorder(reference_context.Writer):
        def decide(self, p, bit):
            decisions.append((p, super().decide(p, bit)))
            return decisions[-1][1]

    walk = reference_steps.Steps(len(EXAMPLE_STEPS), 32, Recorder().decide).walk
    walk([shape for _, shape, _ in EXAMPLE], 0, 32, len(EXAMPLE_STEPS), EXAMPLE_STEPS)
    assert [int(p) for p, _ in listed] == [p for p, _ in decisions]
    for (_, told_bit), (_, bit) in zip(listed, decisions, strict=True):
        assert told_bit in "+-" or int(told_bit) == bit
    signs = [each for _, each in listed if each in "+-"]
    walked = [EXAMPLE_STEPS[index] for index in (9, 10, 3, 17, 30)]  # lora_A by its columns
    assert signs == ["+" if q > 0 else "-" for q in walked]


# --- what it writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-149, -126, -30, 0, 100])
def test_values_on_a_grid_are_lossless(exponent):
    rng = np.random.default_rng(5)
    integers = rng.integers(-200, 201, (9, 40)) * (rng.random((9, 40)) < 0.4)
    values = np.ldexp(integers.astype("f4"), exponent)
    update = cf.TaskVector.from_dict({"a": values, "b": np.zeros(3, "f4")})
    read = cf.decode(cf.encode(update, "steps"))
    assert read.values.tobytes() == (update.values + np.float32(0)).tobytes()
    halves = messages.encode_parts(update, "steps", max_body_bytes=4 * 200 + 64)
    assert len(halves) > 1
    assert np.array_equal(messages.decode_parts(halves).values, update.values)


def test_a_ternary_vector_is_on_a_grid():
    tau = cf.TaskVector.from_dict({"w": np.random.default_rng(1).normal(size=300).astype("f4")})
    update = cf.compress(tau, 0.1)
    read = cf.decode(cf.encode(update, "steps"))
    assert np.array_equal(read.values, update.to_task_vector().values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0**-24], "expected multiples below 2\\^24 of one power of two"),
        ([1.0, 1 + 2.0**-23, 2.0], "expected multiples below"),
        ([1.0, np.nan], "NaN"),
        ([1.0, np.inf], "Inf"),
    ],
)
def test_other_values_are_refused(values, message):
    update = cf.TaskVector.from_dict({"w": np.array(values, "f4")})
    with pytest.raises((errors.ParameterError, errors.NonFiniteError), match=f"(?i){message}"):
        cf.encode(update, "steps")


def test_what_a_walk_on_a_grid_has_moved_costs_less_than_its_entropy():
    """Sums of ternary steps towards real task vectors, as a server's versions make them."""
    taus = [load_file(path) for path in TAUS]
    names = [n for n in taus[0] if "lora" in n and all(n in tau for tau in taus)]
    vectors = [cf.TaskVector.from_dict({name: tau[name] for name in names}) for tau in taus]
    rng, layout = np.random.default_rng(0), vectors[0].layout
    theta = shared = np.zeros(layout.num_parameters, "f4")
    versions = [shared]
    for _ in range(20):
        theta = (0.95 * theta + 0.3 * vectors[rng.integers(len(vectors))].values).astype("f4")
        delta = cf.compress(cf.TaskVector(layout, theta - shared), 0.1, "mean")
        step = np.array([2.0 ** np.round(np.log2(delta.scales[0]))], "f4")
        shared = shared + delta.with_scales(step).to_task_vector().values
        versions.append(shared)
    for first, last in ((0, 5), (5, 15), (10, 20), (0, 20)):
        moved = cf.TaskVector(layout, versions[last] - versions[first])
        bits = 8 * len(cf.encode(moved, "steps", layout_by_id=True))
        entropy = 0.0
        for _, where in layout.slices():
            _, counts = np.unique(moved.values[where], return_counts=True)
            entropy -= float((counts * np.log2(counts / counts.sum())).sum())
        assert bits <= 1.02 * entropy, (first, last, bits / entropy)


# --- rejections -------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-150, 105, -(2**31), 2**31 - 1])
def test_an_exponent_out_of_range(exponent):
    message = valid("steps")
    message.steps.exponent = exponent
    rejected(message, errors.StepRangeError, exponent)


def test_a_magnitude_out_of_range():
    message = valid("steps")
    integers = [0] * D
    integers[3] = 2**24
    shapes = [tuple(tensor.shape) for tensor in message.layout.tensors]
    message.steps.code, message.steps.num_nonzeros = reference_steps.write(integers, shapes, 0), 1
    rejected(message, errors.StepRangeError, 2**24)


def test_counts_that_do_not_fit():
    message = valid("steps")
    message.steps.num_nonzeros = D + 1
    rejected(message, errors.NonzeroCountError, D + 1)
    message.steps.num_nonzeros, message.steps.code = 5, b""
    with pytest.raises(errors.WireError):
        cf.decode(messages.seal(message.SerializeToString()))


def test_a_code_that_does_not_end_as_a_writer_ends_it():
    message = valid("steps")
    code = message.steps.code
    message.steps.code = code + b"\0"
    rejected(message, errors.CodeEndError, "last byte")
    message.steps.code = code + b"\1" * 40
    rejected(message, errors.StreamLengthError, len(code) + 40)
    message.steps.code = code[:-1] + bytes([code[-1] + 1])
    rejected(message, errors.CodeEndError)
