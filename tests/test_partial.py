"""partial.py: trees of servers against one flat server, and bytes that are no accumulator's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

import compeft_fl as cf
from compeft_fl.errors import (
    ChecksumError,
    LayoutError,
    LayoutMismatchError,
    MalformedError,
    NonFiniteBodyError,
    ParameterError,
    UpdateSizeError,
    VersionError,
)
from compeft_fl.merging.partial import (
    _checksum,
    _lines,
    decode_partial,
    encode_partial,
    max_partial_bytes,
)

LAYOUT = cf.Layout([cf.TensorSpec("a", (20, 11)), cf.TensorSpec("b", (130,))])
METHODS = [
    cf.Average(layout=LAYOUT),
    cf.TaskArithmetic(0.3, layout=LAYOUT),
    cf.TaskArithmetic(None, layout=LAYOUT),
    cf.Ties(0.4, layout=LAYOUT),
    cf.Ties(1.0, "positive", layout=LAYOUT),
    cf.Ties(0.7, "majority", layout=LAYOUT),
]
methods = pytest.mark.parametrize("method", METHODS, ids=repr)


def clients(count, seed=0):
    """Encoded updates, some with scales per tensor and one dense; whole numbers of examples."""
    rng = np.random.default_rng(seed)
    blobs = []
    for i in range(count):
        tau = cf.TaskVector(LAYOUT, rng.standard_normal(LAYOUT.num_parameters).astype(np.float32))
        update = cf.compress(tau, 0.3)
        if i % 3 == 1:
            update = update.with_scales([0.5 + i, 1.0 / (i + 1)])
        last = i == count - 1
        blobs.append(cf.encode(tau if last else update, "dense" if last else "golomb"))
    return list(zip(blobs, rng.integers(1, 500, count).tolist(), strict=True))


def server(method, given):
    """Merge updates, or other servers' bytes, as a tree does: a nested list of clients."""
    accumulator = method.fresh(LAYOUT)
    for each in given:
        if isinstance(each, tuple):
            accumulator.add(*each)
        else:
            blob = encode_partial(server(method, each), base_version=3)
            accumulator.combine(decode_partial(blob, accumulator, base_version=3))
    return accumulator


def trees(given):
    """One to three levels of servers, groups even, uneven, of one and of none."""
    yield given
    yield [given]
    yield [given[:3], given[3:9], given[9:]]
    yield [[each] for each in reversed(given)]
    yield [given[:1], [], given[1:]]
    yield [[given[5:8], given[:2]], [given[2:5]], [given[8:]], []]
    yield [*given[:4], [given[4:6], *given[6:8]], given[8:]]  # clients of inner servers


@methods
def test_any_tree_gives_what_one_server_gives(method):
    given = clients(14)
    flat = server(method, given)
    for tree in trees(given):
        root = server(method, tree)
        assert (root.count, root.total_weight) == (flat.count, flat.total_weight)
        # Sums of float32 scales times whole numbers: exact in float64, whatever the order.
        np.testing.assert_array_equal(root.result().values, flat.result().values)


@methods
def test_with_weights_that_float64_rounds_it_does_so_up_to_the_order(method):
    given = [(blob, weight / 7.3) for blob, weight in clients(14)]
    flat = server(method, given)
    for tree in trees(given):
        root = server(method, tree)
        np.testing.assert_allclose(root.sums(), flat.sums(), rtol=1e-14, atol=1e-13)
        assert root.total_weight == pytest.approx(flat.total_weight, rel=1e-14)
        np.testing.assert_allclose(root.result().values, flat.result().values, rtol=3e-7, atol=1e-9)


@methods
def test_more_updates_than_wait_as_masks(method):
    given = clients(75)
    flat = server(method, given)
    root = server(method, [given[:40], given[40:]])
    np.testing.assert_array_equal(root.result().values, flat.result().values)


@methods
def test_the_bytes_come_back_and_can_be_added_to(method):
    given = clients(6)
    edge = server(method, given[:3])
    blob = encode_partial(edge)
    assert len(blob) <= max_partial_bytes(method)
    back = decode_partial(blob, method)
    assert encode_partial(back) == blob
    for accumulator in (edge, back):  # writing has changed nothing
        for each in given[3:]:
            accumulator.add(*each)
        np.testing.assert_array_equal(
            accumulator.result().values, server(method, given).result().values
        )
    assert method.count == 0


@methods
def test_an_edge_without_clients_adds_nothing(method):
    blob = encode_partial(method.fresh(LAYOUT))
    assert len(blob) < 1000
    root = server(method, clients(3))
    before = root.result().values
    root.combine(decode_partial(blob, root))
    np.testing.assert_array_equal(root.result().values, before)
    assert root.count == 3


# --- bytes that are not trusted ----------------------------------------------------------------

METHOD = cf.Ties(0.4, layout=LAYOUT)


def changed(blob, sums=None, extra=None, **told):
    """The bytes with other content, under a right checksum."""
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    lines = header["__metadata__"]["partial"].splitlines()
    told = {**dict(line.split("=", 1) for line in lines), **told}
    arrays = load(blob)
    if sums is not None:
        arrays["sums"] = sums
    told = {key: value for key, value in told.items() if value is not None}
    told["checksum"] = _checksum(told, arrays.get("sums"))
    return save({**arrays, **(extra or {})}, metadata={"partial": _lines(told)})


@pytest.fixture(scope="module")
def blob():
    return encode_partial(server(METHOD, clients(6)), base_version=7)


def test_another_version(blob):
    assert decode_partial(blob, METHOD, base_version=7).count == 6
    with pytest.raises(VersionError, match="version 8, found 7"):
        decode_partial(blob, METHOD, base_version=8)


@pytest.mark.parametrize(
    "other",
    [
        cf.Average(layout=LAYOUT),
        cf.Ties(0.5, layout=LAYOUT),
        cf.Ties(0.4, "positive", layout=LAYOUT),
    ],
    ids=repr,
)
def test_another_method_or_setting(blob, other):
    with pytest.raises((MalformedError, UpdateSizeError)):
        decode_partial(blob, other)


def test_another_layout(blob):
    size = LAYOUT.num_parameters
    other = cf.Ties(0.4, layout=cf.Layout([cf.TensorSpec("w", (size,))]))
    with pytest.raises(LayoutMismatchError, match="expected layout"):
        decode_partial(blob, other)


def test_no_layout():
    with pytest.raises(ParameterError, match="layout"):
        decode_partial(b"", cf.Average())
    with pytest.raises(ParameterError, match="layout"):
        encode_partial(cf.Average())
    with pytest.raises(ParameterError, match="layout"):
        cf.Average().sums()


def test_damaged_bytes(blob):
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(blob), 200):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises((ChecksumError, MalformedError)):
            decode_partial(bytes(damaged), METHOD)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 40, 400, 5000, -1])
def test_cut_off(blob, cut):
    with pytest.raises(MalformedError):
        decode_partial(blob[:cut], METHOD)


def test_more_bytes_than_there_can_be(blob):
    with pytest.raises(UpdateSizeError):
        decode_partial(blob + bytes(max_partial_bytes(METHOD)), METHOD)
    with pytest.raises(UpdateSizeError):
        decode_partial(bytes(1 << 17), cf.Ties(0.4, layout=cf.Layout([])))


def test_a_header_that_claims_much():
    for length in (0, 1 << 20, (1 << 64) - 1):
        with pytest.raises(MalformedError):
            decode_partial(length.to_bytes(8, "little") + b"{}", METHOD)


@pytest.mark.parametrize(
    "told",
    [
        {"format": "another"},
        {"format": None},
        {"count": "-1"},
        {"count": "0"},
        {"count": "six"},
        {"count": "9" * 400},
        {"count": "9" * 5000},
        {"count": None},
        {"more": "than there is"},
        {"base_version": "1e3"},
        {"total_weight": "nan"},
        {"total_weight": "inf"},
        {"total_weight": "-0x1p3"},
        {"total_weight": "0x0p0"},
        {"total_weight": "0x1p9999"},
        {"total_weight": "0x1p-3"},  # less than the weight behind a parameter
    ],
    ids=str,
)
def test_hostile_metadata(blob, told):
    with pytest.raises(MalformedError):
        decode_partial(changed(blob, **told), METHOD)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"partial": ""}, {"partial": "a\nb"}, {"partial": "format=\u20ac"}]
)
def test_other_metadata(blob, metadata):
    with pytest.raises(MalformedError):
        decode_partial(save(load(blob), metadata=metadata), METHOD)


def test_hostile_sums(blob):
    sums = load(blob)["sums"]
    assert decode_partial(changed(blob, sums), METHOD).count == 6  # the helper changes nothing else
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteBodyError):
            decode_partial(changed(blob, _with(sums, 3, 0, value)), METHOD)
    with pytest.raises(MalformedError, match=">= 0"):
        decode_partial(changed(blob, _with(sums, 3, 2, -1.0)), METHOD)
    for mass, weight in ((0, 1), (2, 3)):
        hostile = _with(_with(sums, 3, mass, 1e300), 3, weight, 0.0)
        with pytest.raises(MalformedError, match="behind each mass"):
            decode_partial(changed(blob, hostile), METHOD)


@pytest.mark.parametrize(
    "shape", [(0, 4), (350,), (350, 1), (1, 350, 4), (349, 4), (350, 5), (4, 350)], ids=str
)
def test_sums_of_another_shape(blob, shape):
    with pytest.raises(MalformedError):
        decode_partial(changed(blob, np.zeros(shape)), METHOD)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.float16, np.bool_])
def test_sums_of_another_type(blob, dtype):
    with pytest.raises(MalformedError):
        decode_partial(changed(blob, load(blob)["sums"].astype(dtype)), METHOD)


def test_more_tensors_than_the_sums(blob):
    with pytest.raises(MalformedError, match="the sums alone"):
        decode_partial(changed(blob, extra={"more": np.zeros(3)}), METHOD)
    empty = encode_partial(METHOD.fresh(LAYOUT))
    with pytest.raises(MalformedError, match="exactly with a count"):
        decode_partial(changed(empty, sums=load(blob)["sums"]), METHOD)


def test_sums_that_do_not_fit_an_accumulator():
    for sums in (np.zeros((350, 1)), np.zeros((350, 4), np.float32)):
        with pytest.raises(LayoutError, match="float64 sums"):
            METHOD.with_sums(sums, 1, 1.0, LAYOUT)


def _with(sums, row, column, value):
    sums = sums.copy()
    sums[row, column] = value
    return sums
