"""codecs/auto.py: the codec with the least time over a link."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.codecs import auto
from compeft_fl.codecs.base import cut
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import DownlinkOptions
from compeft_fl.wire import messages

LINKS = [0.01, 0.1, 1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 1e5, 1e6]


def low_rank(density, layers=2, rank=8, size=384, seed=0):
    """An update whose tensors are nearly of rank one, as LoRA's are."""
    rng = np.random.default_rng(seed)
    state = {}
    for layer in range(layers):
        for name, shape in (("A", (rank, size)), ("B", (size, rank))):
            outer = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
            state[f"{layer}.{name}"] = (outer + 0.5 * rng.standard_normal(shape)).astype("f4")
    return cf.compress(cf.TaskVector.from_dict(state), density)


def seconds(update, name, link_mbps):
    """Encoding, the body over the link, decoding."""
    size = messages.inspect(cf.encode(update, name)).body_bytes
    work = auto.SPEEDS[name].seconds(update.num_parameters, update.num_nonzeros)
    return work + 8 * size / (1e6 * link_mbps)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_the_choice_is_the_least_time(density):
    update = low_rank(density)
    for link in LINKS:
        times = {name: seconds(update, name, link) for name in auto.SPEEDS}
        chosen = auto.choose(update, "auto", link)
        # Headers of a few bytes are not counted.
        assert times[chosen] <= min(times.values()) + 8 * 24 / (1e6 * link)
        blob = cf.encode(update, "auto", link_mbps=link)
        assert blob == cf.encode(update, chosen)
        assert np.array_equal(cf.decode(blob).positive, update.positive)


def test_slow_links_take_the_smallest_and_fast_ones_the_quickest():
    choices = [auto.choose(low_rank(0.05), "auto", link) for link in LINKS]
    assert choices[0] == "context"
    assert choices[-1] == "golomb"
    assert choices == sorted(choices)  # one change, from context to golomb
    assert auto.choose(low_rank(0.9), "auto", 1e6) == "bitmask"


def only(update, index):
    """One tensor of an update."""
    start, stop = (int(each) for each in update.layout.offsets[index : index + 2])
    masks = cut(update.positive, start, stop), cut(update.negative, start, stop)
    return cf.TernaryVector(cf.Layout([update.layout.tensors[index]]), *masks, update.scales)


def sampled_and_exact(update):
    """Bytes of context codes beside those of Golomb codes: of the sample, and of all."""
    part = auto.sample(update)
    assert auto.WINDOW / 2 < part.num_parameters <= auto.WINDOW
    golomb, context = (
        messages.inspect(cf.encode(update, name)).body_bytes for name in ("golomb", "context")
    )
    return part.context_bytes() / part.golomb_bytes(), context / golomb


def test_the_size_of_many_tensors_is_told_from_a_sample():
    sampled, exact = sampled_and_exact(low_rank(0.05, layers=100))
    assert sampled == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(("rank", "size"), [(8, 70_000), (700, 800)])
@pytest.mark.parametrize("index", [0, 1])
def test_the_size_of_one_large_tensor_is_told_from_a_sample(rank, size, index):
    """Wide and tall: lines of it are taken, as long as they are."""
    update = only(low_rank(0.05, 1, rank, size), index)
    sampled, exact = sampled_and_exact(update)
    assert sampled == pytest.approx(exact, rel=0.15)


def test_dense_vectors_stay_dense():
    tau = low_rank(1.0).to_task_vector()
    assert auto.choose(tau, "auto", 1) == "dense"
    assert cf.encode(tau, "auto", link_mbps=1) == cf.encode(tau, "dense")


def test_parts_are_of_one_codec():
    update = low_rank(0.05, layers=8)
    parts = messages.encode_parts(update, "auto", link_mbps=1, max_body_bytes=5000)
    assert len(parts) > 1
    assert {messages.inspect(part).codec for part in parts} == {"context"}
    assert np.array_equal(messages.decode_parts(parts).positive, update.positive)


def test_updates_without_parameters_or_nonzeros():
    empty = cf.TernaryVector(cf.Layout([]), np.zeros(0, np.uint64), np.zeros(0, np.uint64), [1.0])
    zero = cf.TernaryVector(low_rank(0.1).layout, *np.zeros((2, 192), np.uint64), [1.0])
    for update in (empty, zero):
        for link in LINKS:
            back = cf.decode(cf.encode(update, "auto", link_mbps=link))
            assert back.num_nonzeros == 0


def test_a_given_codec_is_kept_whatever_the_link():
    update = low_rank(0.05)
    assert cf.encode(update, "bitmask", link_mbps=1) == cf.encode(update, "bitmask")


@pytest.mark.parametrize("link", [None, 0, -1, float("nan"), float("inf"), True, "10"])
def test_auto_asks_for_the_speed_of_the_link(link):
    for function in (
        lambda: cf.encode(low_rank(0.05), "auto", link_mbps=link),
        lambda: CompressionMod(codec="auto", link_mbps=link),
        lambda: Downlink(low_rank(0.05).to_task_vector(), codec="auto", link_mbps=link),
    ):
        with pytest.raises(ParameterError, match="link_mbps"):
            function()


def test_auto_is_no_name_of_bytes():
    assert "auto" not in cf.codecs.names()
    assert set(auto.SPEEDS) == {name for name in cf.codecs.names() if cf.codecs.get(name).ternary}
    with pytest.raises(ParameterError, match="found 'fast'"):
        auto.choose(low_rank(0.05), "fast", 1)


@pytest.mark.parametrize(("link", "codec"), [(0.01, "context"), (1e6, "golomb")])
def test_the_downlink_writes_what_arrives_first(link, codec):
    target = low_rank(0.5).to_task_vector()
    start = cf.TaskVector.zeros(target.layout)
    downlink = Downlink(start, density=0.05, codec="auto", link_mbps=link)
    downlink.advance(target)
    (blob,) = downlink.lacking(0).blobs
    assert messages.inspect(blob, layout=target.layout).codec == codec
    assert DownlinkOptions(codec="auto", link_mbps=link).link_mbps == link
