"""codecs/: the registry, and what every codec promises."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl import codecs
from compeft_fl.codecs import Codec
from compeft_fl.errors import NonFiniteError, ParameterError
from compeft_fl.wire.v1 import update_pb2

LAYOUT = cf.Layout(
    [cf.TensorSpec("a", (30, 7)), cf.TensorSpec("b", (0,)), cf.TensorSpec("c", (501,))]
)
TERNARY = ["golomb", "bitmask", "context"]


def task_vector(seed=0):
    values = np.random.default_rng(seed).standard_normal(LAYOUT.num_parameters)
    return cf.TaskVector(LAYOUT, values.astype(np.float32))


@pytest.mark.parametrize("name", codecs.names())
@pytest.mark.parametrize("density", [0.002, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("scales", [None, [0.5, 1.0, 0.25]])
def test_every_codec_returns_what_it_was_given(name, density, scales):
    update = cf.compress(task_vector(), density)
    update = update.with_scales([0.5] if scales is None else scales)
    back = cf.decode(cf.encode(update, name))
    assert back.layout == LAYOUT
    assert np.array_equal(back.to_task_vector().values, update.to_task_vector().values)
    if name in TERNARY:
        assert np.array_equal(back.positive, update.positive)
        assert np.array_equal(back.negative, update.negative)
        assert np.array_equal(back.scales, update.scales)


@pytest.mark.parametrize("name", codecs.names())
def test_every_codec_writes_the_same_bytes_twice(name):
    update = cf.compress(task_vector(), 0.1)
    assert cf.encode(update, name) == cf.encode(update, name)


@pytest.mark.parametrize("name", codecs.names())
def test_every_codec_bounds_its_body(name):
    for density in (0.01, 0.3, 0.5, 0.7, 1.0):
        update = cf.compress(task_vector(), density)
        size = cf.wire.messages.inspect(cf.encode(update, name)).body_bytes
        assert size <= codecs.get(name).max_body_bytes(update.num_parameters)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_codecs_refuse_dense_vectors(name):
    with pytest.raises(ParameterError, match=r"compress\(\) first"):
        cf.encode(task_vector(), name)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("dense", 0), ("dense-fp16", 2**-11), ("dense-bf16", 2**-8)]
)
def test_dense_codecs_round_to_their_type(name, tolerance):
    tau = task_vector()
    back = cf.decode(cf.encode(tau, name)).values
    assert np.all(np.abs(back - tau.values) <= tolerance * np.abs(tau.values))
    assert np.array_equal(cf.decode(cf.encode(cf.TaskVector(LAYOUT, back), name)).values, back)


@pytest.mark.parametrize("name", ["dense", "dense-fp16", "dense-bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_dense_codecs_refuse_what_is_not_finite(name, value):
    tau = task_vector()
    tau.values[3] = value
    with pytest.raises(NonFiniteError, match="'a'"):
        cf.encode(tau, name)


@pytest.mark.parametrize(("name", "value"), [("dense-fp16", 65520), ("dense-bf16", 3.4e38)])
def test_dense_codecs_refuse_what_their_type_cannot_hold(name, value):
    tau = task_vector()
    tau.values[3] = value
    with pytest.raises(ParameterError, match="holds"):
        cf.encode(tau, name)
    cf.encode(tau, "dense")


def test_bfloat16_is_rounded_to_nearest_even_as_torch_does():
    import torch

    values = task_vector().values
    blob = cf.encode(cf.TaskVector(LAYOUT, values), "dense-bf16")
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(cf.decode(blob).values, expected)


def test_every_body_of_the_format_has_a_reader():
    bodies = update_pb2.Update.DESCRIPTOR.oneofs_by_name["body"].fields
    for field in bodies:
        assert codecs.reader_of(field.name).field == field.name


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ParameterError, match=r"golomb, bitmask, dense, .* found 'zip'"):
        cf.encode(task_vector(), "zip")


def test_the_registry_refuses_what_the_format_does_not_have():
    class Twice(type(codecs.get("golomb"))):
        pass

    class Nowhere(type(codecs.get("golomb"))):
        name, field = "nowhere", "nowhere"

    assert issubclass(Twice, Codec)
    with pytest.raises(ParameterError, match="twice"):
        codecs.register(Twice())
    with pytest.raises(ParameterError, match="nowhere"):
        codecs.register(Nowhere())
    assert "nowhere" not in codecs.names()


def test_golomb_is_close_to_the_entropy():
    """The figures of `make bench-core`, at a size that a test affords."""
    d = 1 << 20
    values = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    tau = cf.TaskVector(cf.Layout([cf.TensorSpec("w", (d,))]), values)
    for density, bound in ((0.05, 1.011), (0.2, 1.020), (0.5, 1.002)):
        entropy = -(1 - density) * np.log2(1 - density) - density * np.log2(density / 2)
        bits = 8 * len(cf.encode(cf.compress(tau, density))) / d
        assert 1 <= bits / entropy <= bound
