"""bench/peers/: each codec is tested for what it claims."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl import codecs, errors
from compeft_fl.bench import packages, peers
from compeft_fl.bench.peers import bits, int8, qsgd, stc
from compeft_fl.wire import messages

LAYOUT = cf.Layout(
    [
        cf.TensorSpec("a", (30, 70)),
        cf.TensorSpec("empty", (0,)),
        cf.TensorSpec("b", (4097,)),
        cf.TensorSpec("c", (3, 5, 7)),
    ]
)
D = LAYOUT.num_parameters
DENSE_FP16 = ("fp16", "zstd-fp16", "blosc-fp16")


def values_of(seed=0, layout=LAYOUT):
    """Heavy-tailed values, each tensor on a scale of its own."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, layout.num_parameters).astype(np.float32)
    for scale, (_, where) in zip((0.01, 1, 0.3, 0.002), layout.slices(), strict=False):
        values[where] *= scale
    return values


def runnable(name):
    """The codec; the test is skipped where its package is not at hand."""
    if why := peers.reason(name):
        pytest.skip(why)
    return peers.get(name)


@pytest.fixture(params=peers.names())
def codec(request):
    return runnable(request.param)


# --- what all promise ---------------------------------------------------------------------------


def test_values_come_back_in_the_layouts_shape(codec):
    values = values_of()
    blob = codec.encode(values, LAYOUT, seed=3)
    back = codec.decode(blob, LAYOUT)
    assert isinstance(blob, bytes)
    assert (back.shape, back.dtype) == ((D,), np.float32)
    assert codec.encode(values, LAYOUT, seed=3) == blob
    assert np.array_equal(values, values_of())
    assert back @ values > 0
    if codec.lossless:
        assert np.array_equal(back.view(np.uint32), values.view(np.uint32))


def test_what_is_zero_stays_zero(codec):
    zeros = np.zeros(D, np.float32)
    assert np.array_equal(np.abs(codec.decode(codec.encode(zeros, LAYOUT), LAYOUT)), zeros)


def test_one_parameter_is_a_vector(codec):
    layout = cf.Layout([cf.TensorSpec("w", (1,))])
    value = np.array([-0.5], np.float32)
    assert codec.decode(codec.encode(value, layout), layout) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("name", [name for name in peers.names() if peers.get(name).lossless])
def test_what_is_lossless_loses_no_bit(name):
    codec = runnable(name)
    values = np.array([-0.0, 1e-45, -3e38, 0.1], np.float32)
    layout = cf.Layout([cf.TensorSpec("w", (4,))])
    assert codec.decode(codec.encode(values, layout), layout).tobytes() == values.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(codec, value):
    values = values_of()
    values[2101] = value
    with pytest.raises(errors.NonFiniteError, match="'b'"):
        codec.encode(values, LAYOUT)


def test_values_of_another_length_are_refused(codec):
    with pytest.raises(errors.LayoutError):
        codec.encode(np.zeros(D - 1, np.float32), LAYOUT)
    with pytest.raises(errors.ParameterError):
        codec.encode(np.zeros(0, np.float32), cf.Layout([]))


def test_broken_bytes_are_an_error_of_ours(codec):
    blob = codec.encode(values_of(), LAYOUT)
    broken = [b"", blob[:-1], blob[:-7], blob[: len(blob) // 2], blob + b"\0", blob + b"\xff" * 9]
    for bad in broken:
        with pytest.raises(errors.WireError):
            codec.decode(bad, LAYOUT)


def test_any_bytes_are_values_or_an_error_of_ours(codec):
    rng = np.random.default_rng(0)
    blob = np.frombuffer(codec.encode(values_of(), LAYOUT), np.uint8)
    for _ in range(60):
        bad = blob.copy()
        at = rng.integers(0, min(bad.size, rng.choice([64, bad.size])), size=3)
        bad[at] = rng.integers(0, 256, size=3)
        try:
            back = codec.decode(bad.tobytes(), LAYOUT)
        except errors.WireError:
            continue
        assert back.shape == (D,)
        assert np.isfinite(back).all()


def test_every_codec_says_whose_it_is(codec):
    assert codec.source.startswith("https://")
    assert codec.name.partition("@")[0] == codec.family


# --- what each claims ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("int8-blockwise", 4 * 25 + D),
        ("int8-dynamic", 4 * 4 + D),
        ("nf4", 4 * (33 + 65 + 2) + 1050 + 2049 + 53),
        ("fp4", 4 * (33 + 65 + 2) + 1050 + 2049 + 53),
        ("signsgd", 4 * 4 + (D + 7) // 8),
        ("topk-fp16@0.05", 4 + 6 * (D // 20)),
    ],
)
def test_sizes_are_those_of_the_formula(name, size):
    assert len(runnable(name).encode(values_of(), LAYOUT)) == size


@pytest.mark.parametrize(("name", "bytes_each"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_dense_values_are_the_projects_own_messages(name, bytes_each):
    size = len(peers.get(name).encode(values_of(), LAYOUT))
    assert bytes_each * D < size < bytes_each * D + 64


@pytest.mark.parametrize("name", DENSE_FP16)
def test_half_precision_rounds_to_nearest(name):
    values = values_of()
    back = runnable(name).decode(runnable(name).encode(values, LAYOUT), LAYOUT)
    assert np.array_equal(back, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("name", [*DENSE_FP16, "topk-fp16"])
def test_half_precision_refuses_what_it_cannot_hold(name):
    values = values_of()
    values[7] = 70000
    with pytest.raises(errors.ParameterError, match="float16"):
        runnable(name).encode(values, LAYOUT)


def absmax_error(name, block, per_tensor=True):
    """The largest error as a share of its block's absmax."""
    codec, values = runnable(name), values_of()
    gap = np.abs(codec.decode(codec.encode(values, LAYOUT), LAYOUT) - values)
    worst = 0.0
    ranges = [where for _, where in LAYOUT.slices()] if per_tensor else [slice(0, D)]
    for where in ranges:
        for start in range(where.start, where.stop, block):
            part = slice(start, min(start + block, where.stop))
            worst = max(worst, gap[part].max() / np.abs(values[part]).max())
    return worst


def test_int8_errs_by_half_a_step_at_most():
    assert 0.4 / 127 < absmax_error("int8-blockwise", int8.BLOCK, per_tensor=False) <= 0.501 / 127


@pytest.mark.parametrize(
    # Half of the widest gap between neighbours of each code book.
    ("name", "block", "bound"),
    [("int8-dynamic", 4096, 0.9 / 128), ("nf4", 64, 0.152), ("fp4", 64, 0.167)],
)
def test_bitsandbytes_errs_by_half_a_gap_at_most(name, block, bound):
    assert 0.5 * bound < absmax_error(name, block) <= 1.01 * bound


def test_nf4_uses_the_code_book_of_qlora():
    codec = runnable("nf4")
    layout = cf.Layout([cf.TensorSpec("w", (64,))])
    grid = np.linspace(-1, 1, 64, dtype=np.float32)
    found = np.unique(codec.decode(codec.encode(grid, layout), layout))
    expected = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    expected += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    assert found == pytest.approx(np.array(expected), abs=1e-4)


def test_topk_sends_the_largest_in_float16():
    codec, values = peers.get("topk-fp16@0.05"), values_of()
    back = codec.decode(codec.encode(values, LAYOUT), LAYOUT)
    kept = np.flatnonzero(back)
    assert kept.size == int(0.05 * D)
    assert np.abs(values[kept]).min() >= np.sort(np.abs(values))[-kept.size]
    assert np.array_equal(back[kept], values[kept].astype(np.float16))


def test_coo_sends_the_largest_as_they_are_and_twenty_bytes_for_each():
    codec, values = peers.get("topk-coo@0.05"), values_of()
    blob = codec.encode(values, LAYOUT)
    back = codec.decode(blob, LAYOUT)
    kept = np.flatnonzero(back)
    assert kept.size == int(0.05 * D)
    assert np.array_equal(back[kept], values[kept])
    heads = (3 * len(LAYOUT.tensors) + 1) * 128
    indices = 8 * sum(
        len(tensor.shape) * np.count_nonzero(back[where]) for tensor, where in LAYOUT.slices()
    )
    names = 4 * 5 * len(LAYOUT.tensors)  # NumPy's text: 4 bytes a character
    shapes = 8 * sum(len(tensor.shape) for tensor in LAYOUT.tensors)
    assert len(blob) == 4 * kept.size + indices + shapes + names + heads


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3, 1.0])
def test_stc_has_the_values_of_golomb_at_scale_mean(density):
    values = values_of()
    ours = cf.compress(cf.TaskVector(LAYOUT, values), density, "mean").to_task_vector().values
    codec = peers.get(f"stc@{density}")
    assert np.array_equal(codec.decode(codec.encode(values, LAYOUT), LAYOUT), ours)


def test_stc_takes_the_bits_of_its_paper():
    """Eq. (16) of arXiv 1903.02891: b* + 1 / (1 - (1 - p)^(2^b*)) bits of position."""
    layout = cf.Layout([cf.TensorSpec("w", (1 << 20,))])
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    for p, width in ((0.01, 6), (0.05, 4)):
        size = len(peers.get(f"stc@{p}").encode(values, layout))
        position = width + 1 / (1 - (1 - p) ** (1 << width))
        assert 8 * (size - 8) / int(p * (1 << 20)) == pytest.approx(position + 1, rel=0.005)
    assert [stc.golomb_parameter(p) for p in (0.01, 0.05, 0.2, 0.5, 0.9, 1)] == [6, 4, 2, 0, 0, 0]


def test_signsgd_sends_the_mean_magnitude_of_each_tensor():
    values = values_of()
    codec = peers.get("signsgd")
    back = codec.decode(codec.encode(values, LAYOUT), LAYOUT)
    for tensor, where in LAYOUT.slices():
        if tensor.size:
            assert np.unique(np.abs(back[where])) == pytest.approx(np.abs(values[where]).mean())
    assert np.array_equal(back < 0, values < 0)


@pytest.mark.parametrize(("name", "levels"), [("qsgd-s1", 1), ("qsgd-s16", 16)])
def test_qsgd_is_unbiased(name, levels):
    """The mean of many seeds against the value, in standard errors: theirs, not the sample's."""
    codec, repeats = peers.get(name), 3000
    layout = cf.Layout([cf.TensorSpec("w", (qsgd.BUCKET,))])
    values = values_of(layout=layout)
    seeds = range(repeats)
    backs = (codec.decode(codec.encode(values, layout, seed), layout) for seed in seeds)
    mean = sum(back.astype(np.float64) for back in backs) / repeats
    step = np.linalg.norm(values.astype(np.float64)) / levels
    share = np.abs(values) / step % 1
    errors_of_mean = (mean - values) / (step * np.sqrt(share * (1 - share) / repeats))
    assert np.abs(errors_of_mean).max() < 6
    assert (errors_of_mean**2).mean() == pytest.approx(1, abs=0.3)


def test_qsgd_rounds_to_neighbouring_levels():
    codec, values = peers.get("qsgd-s16"), values_of()
    back = codec.decode(codec.encode(values, LAYOUT, seed=1), LAYOUT)
    for start in range(0, D, qsgd.BUCKET):
        part = slice(start, start + qsgd.BUCKET)
        step = np.linalg.norm(values[part].astype(np.float64)) / 16
        levels = back[part] / step
        assert levels == pytest.approx(np.rint(levels), abs=1e-4)
        assert np.abs(back[part] - values[part]).max() <= step * 1.001
    assert codec.encode(values, LAYOUT, seed=2) != codec.encode(values, LAYOUT, seed=1)


def test_qsgd_keeps_few_values_in_its_sparse_regime():
    layout = cf.Layout([cf.TensorSpec("w", (1 << 18,))])
    values = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    codec = peers.get("qsgd-s1")
    back = codec.decode(codec.encode(values, layout), layout)
    # E|N(0, 1)| / sqrt(512) = 0.798 / 22.6 of the values.
    assert np.count_nonzero(back) / back.size == pytest.approx(0.0353, rel=0.03)


def test_elias_gamma_codes_are_the_books():
    stream = np.zeros(8, np.uint8)
    at = 0
    for value in (1, 2, 5, 16):
        at = bits.put_gamma(stream, at, value)
    assert at == sum(bits.gamma_bits(value) for value in (1, 2, 5, 16)) == 1 + 3 + 5 + 9
    text = "".join(f"{byte:08b}" for byte in stream)[:at]
    assert text == "1" + "010" + "00101" + "000010000"
    at = 0
    for value in (1, 2, 5, 16):
        found, at = bits.get_gamma(stream, at, 64)
        assert found == value


# --- the registry -------------------------------------------------------------------------------


def test_every_registered_codec_is_a_peer():
    families = {name.partition("@")[0] for name in peers.names()}
    dense = {"dense": "fp32", "dense-fp16": "fp16", "dense-bf16": "bf16"}
    assert {dense.get(name, f"compeft-{name}") for name in codecs.names()} <= families


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_ours_are_whole_messages(density):
    values = values_of()
    for codec in ("golomb", "bitmask"):
        blob = peers.get(f"compeft-{codec}@{density}").encode(values, LAYOUT)
        update = cf.compress(cf.TaskVector(LAYOUT, values), density, "mean")
        assert blob == messages.encode(update, codec, layout_by_id=True)


def test_names_take_any_density():
    assert peers.get("stc@0.5").density == 0.5
    assert peers.get("compeft-golomb").name == "compeft-golomb@0.05"
    for bad in ("zip", "fp32@0.5", "stc@", "stc@0", "stc@2", "stc@x"):
        if bad != "stc@":
            with pytest.raises(errors.ParameterError, match="expected"):
                peers.get(bad)


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(packages, "_find", lambda package: package != "bitsandbytes")
    assert peers.available("fp32")
    assert not peers.available("nf4")
    assert "make peers" in peers.reason("nf4")
    with pytest.raises(errors.MissingPackageError, match="bitsandbytes"):
        peers.get("nf4").encode(values_of(), LAYOUT)
