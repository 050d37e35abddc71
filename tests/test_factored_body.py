"""codecs/factored.py: what is written is read again, merging, rejections, bounded work."""

from __future__ import annotations

import numpy as np
import pytest
import reference_factored
from hostile import TENSORS, D, rejected, seal, valid
from low_rank import SHAPES, drawn

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.codecs.context import matrices
from compeft_fl.factored import FactoredVector, Terms
from compeft_fl.reduction.factorize import factorize
from compeft_fl.wire import messages

# --- the codec --------------------------------------------------------------------------------


def random_update(rng, shapes, most=4, bits=5, rest=True):
    """Any terms, flat and not, and ternary values beside them."""
    layout = cf.Layout([cf.TensorSpec(name, shape) for name, shape in shapes.items()])
    terms = []
    for rows, columns in matrices(layout, 0, layout.num_parameters).tolist():
        flat, count = rng.random() < 0.3, int(rng.integers(0, most + 1))
        s, lines = reference_factored.sides(rows, columns, flat)
        high = 1 << (bits - 1)
        terms.append(
            Terms(
                rng.integers(-high, high, (count, s)).astype(np.int16),
                rng.integers(-149, 97, count).astype(np.int32),
                rng.random((count, lines)) < 0.5,
                flat,
            )
            if count
            else None
        )
    beside = None
    if rest:
        tau = cf.TaskVector(layout, rng.standard_normal(layout.num_parameters).astype("f4"))
        beside = cf.compress(tau, 0.2).with_scales(
            rng.random(len(layout.tensors) if rng.random() < 0.5 else 1) * 2
        )
    return FactoredVector(layout, terms, beside)


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_what_is_written_is_read_again_whole_and_in_parts(bits):
    rng = np.random.default_rng(bits)
    for rest in (False, True):
        update = random_update(rng, SHAPES, bits=bits, rest=rest)
        read = cf.decode(cf.encode(update, "factored"))
        assert isinstance(read, FactoredVector)
        assert read.values.tobytes() == update.values.tobytes()
        at_tensors = [720, 1440, 1480, 1600]
        parts = messages.encode_parts(update, "factored", cuts=at_tensors)
        assert len(parts) == 5
        with pytest.raises(errors.CoverageError):
            cf.decode(parts[1])
        assert messages.decode_parts(parts[::-1]).values.tobytes() == update.values.tobytes()


@pytest.mark.parametrize("cut", [3, 1439])
def test_a_tensor_with_terms_is_not_cut(cut):
    update = factorize(drawn(), 0.3)
    with pytest.raises(errors.ParameterError, match="whole tensors"):
        messages.encode_parts(update, "factored", cuts=[cut])


def test_pieces_are_the_values():
    update = random_update(np.random.default_rng(3), SHAPES)
    joined = np.zeros_like(update.values)
    for where, values in update.pieces():
        joined[where] = values
    assert joined.tobytes() == update.values.tobytes()


def test_a_dense_vector_is_to_be_factorized_first():
    with pytest.raises(errors.ParameterError, match=r"factorize\(\) first"):
        cf.encode(drawn(), "factored")
    with pytest.raises(errors.ParameterError, match=r"compress\(\) first"):
        cf.encode(factorize(drawn()), "golomb")
    assert np.array_equal(
        cf.decode(cf.encode(factorize(drawn()), "dense")).values, factorize(drawn()).values
    )


def test_terms_that_take_more_than_dense_values_are_refused():
    many = random_update(np.random.default_rng(0), {"w": (2, 30)}, most=0)
    terms = Terms(
        np.ones((255, 2), np.int16), np.zeros(255, np.int32), np.zeros((255, 30), np.bool_)
    )
    update = FactoredVector(many.layout, [terms])
    cf.encode(update, "factored")  # 255 terms of a small matrix are within the allowance
    wide = cf.Layout([cf.TensorSpec("w", (1, 3000))])
    terms = Terms(
        np.ones((255, 1), np.int16), np.zeros(255, np.int32), np.zeros((255, 3000), np.bool_)
    )
    with pytest.raises(errors.ParameterError, match="dense"):
        cf.encode(FactoredVector(wide, [terms]), "factored")


def test_a_vector_checks_its_terms():
    layout = cf.Layout([cf.TensorSpec("w", (4, 6))])
    good = Terms(np.ones((1, 4), np.int16), np.zeros(1, np.int32), np.zeros((1, 6), np.bool_))
    FactoredVector(layout, [good])
    with pytest.raises(errors.LayoutError):
        FactoredVector(layout, [good, good])
    with pytest.raises(errors.LayoutError):
        FactoredVector(layout, [Terms(good.factors, good.exponents, good.negative, flat=True)])
    for exponent in (-150, 97):
        with pytest.raises(errors.ParameterError, match="exponents"):
            FactoredVector(layout, [Terms(good.factors, good.exponents + exponent, good.negative)])
    other = cf.compress(drawn(), 0.1)
    with pytest.raises(errors.LayoutError):
        FactoredVector(layout, [good], other)


# --- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [cf.Average, cf.TaskArithmetic, cf.Ties])
def test_merging_is_that_of_the_dense_values(method):
    taus = [drawn(seed) for seed in range(4)]
    updates = [factorize(tau, 0.2) for tau in taus]
    mixed = [*updates, cf.compress(taus[0], 0.1)]
    dense = [*(cf.TaskVector(u.layout, u.values) for u in updates), mixed[-1]]
    weights = [3, 1, 2, 5, 1]
    blobs = [cf.encode(u, "factored") for u in mixed]
    found = cf.merge(blobs, method(), weights)
    assert found.values.tobytes() == cf.merge(dense, method(), weights).values.tobytes()


def test_merging_takes_memory_for_one_tensor():
    import tracemalloc

    layout = cf.Layout([cf.TensorSpec(f"w{i}", (8, 4096)) for i in range(32)])
    tau = cf.TaskVector(layout, np.random.default_rng(0).standard_normal(1 << 20).astype("f4"))
    update, accumulator = factorize(tau, 0.05), cf.Average(layout=layout)
    accumulator.add(update)
    tracemalloc.start()
    accumulator.add(update)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20)  # a dense vector would be four times that


# --- rejections -------------------------------------------------------------------------------


def broken(**changes):
    """A valid update with some of its body's fields replaced."""
    message = valid("factored")
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(message.factored, name)[:] = value
        else:
            setattr(message.factored, name, value)
    return message


def test_the_valid_one_is_read():
    assert cf.decode(seal(valid("factored"))).num_terms == 3


@pytest.mark.parametrize(
    "terms", [[4], [4, 3, 0], [4, 2 * 256 + 1], [2**32 - 1, 3], [0, 0], [6, 3]]
)
def test_numbers_of_terms_that_do_not_fit(terms):
    rejected(broken(terms=terms), errors.TermCountError)


def test_numbers_of_exponents_that_do_not_fit():
    rejected(broken(exponents=[-3, -5]), errors.TermCountError, 3, 2)
    rejected(broken(exponents=[-3, -5, 2, 2]), errors.TermCountError, 3, 4)
    rejected(broken(terms=[], exponents=[]), errors.FactorBitsError)
    rejected(broken(terms=[]), errors.TermCountError)


@pytest.mark.parametrize("exponent", [-150, 97, -(2**31), 2**31 - 1])
def test_exponents_out_of_range(exponent):
    rejected(broken(exponents=[-3, exponent, 2]), errors.StepRangeError, exponent)


@pytest.mark.parametrize("bits", [0, 1, 17, 2**32 - 1])
def test_bits_out_of_range(bits):
    rejected(broken(bits=bits), errors.FactorBitsError, bits)


@pytest.mark.parametrize("name", ["factors", "signs"])
def test_streams_of_other_lengths_and_padding(name):
    stream = getattr(valid("factored").factored, name)
    rejected(broken(**{name: stream[:-1]}), errors.StreamLengthError, name)
    rejected(broken(**{name: stream + b"\0"}), errors.StreamLengthError, name)
    last = bytes([stream[-1] | 0x80])
    rejected(broken(**{name: stream[:-1] + last}), errors.PaddingError, name)


def test_what_is_beside_the_terms_is_checked_as_a_body_of_its_own():
    message = valid("factored")
    message.factored.rest.scales[:] = [2.0**126 * 1.01]
    rejected(message, errors.ScaleError)
    message.factored.rest.scales[:] = [2.0**126]
    assert np.isfinite(cf.decode(seal(message)).values).all()
    message.factored.rest.scales[:] = [1.0, 2.0, 3.0]
    rejected(message, errors.ScaleCountError)
    message = valid("factored")
    message.factored.rest.block_size = 255
    rejected(message, errors.BlockSizeError)


def test_the_largest_values_stay_finite():
    shapes = [shape for _, shape, _ in TENSORS]
    message = valid("factored")
    message.factored.Clear()
    s = min(shapes[0])
    message.factored.terms[:] = [2 * 255, 0]
    message.factored.exponents[:] = [96] * 255
    message.factored.bits = 16
    message.factored.factors = b"\0\x80" * (255 * s)
    message.factored.signs = bytes((255 * max(shapes[0]) + 7) // 8)
    message.factored.rest.CopyFrom(valid("factored").factored.rest)
    message.factored.rest.scales[:] = [2.0**126]
    values = cf.decode(seal(message)).values
    assert np.isfinite(values).all()
    assert values.size == D


def test_work_is_bounded_by_bytes_and_by_255_additions():
    """A full matrix of 2^24 parameters in a few kB: no memory before its values are asked for."""
    import tracemalloc

    message = messages.update_pb2.Update(num_parameters=1 << 24)
    message.layout.tensors.add(name="w", shape=[4096, 4096], dtype=1)
    message.factored.terms[:] = [2]
    message.factored.exponents[:] = [0]
    message.factored.bits = 2
    message.factored.factors, message.factored.signs = bytes(1024), bytes(512)
    blob = seal(message)
    tracemalloc.start()
    cf.decode(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    message.layout.tensors[0].shape[:] = [8192, 8192]
    message.num_parameters = 1 << 26
    message.factored.factors, message.factored.signs = bytes(2048), bytes(1024)
    with pytest.raises(errors.ImplausibleSizeError):
        cf.decode(seal(message))
