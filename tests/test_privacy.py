"""client/privacy.py and server/privacy.py: Flower's differential privacy over compressed links.

Each combination of its wrappers and mods, in every order, keeps the bound that its noise is for,
or ends in the first round with an error that says which order works.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import tiny
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage, Compressed, DownlinkOptions

CLIP, N, ROUNDS = 0.05, 3, 6
MODS = {
    "fixed": lambda: fixedclipping_mod,
    "adaptive": lambda: adaptiveclipping_mod,
    "local": lambda: LocalDpMod(CLIP, sensitivity=0.0, epsilon=1.0, delta=1e-5),
}


class Measures(FedAvg):
    """Keeps the norms of the updates that arrive to be averaged, and the bound of their round."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.norms: list[tuple[float, float]] = []

    def configure_train(self, server_round, arrays, config, grid):
        self.before, self.bound = tiny.state_of(arrays), float(config.get("clipping_norm", CLIP))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            if reply.has_content():
                after = tiny.flat(tiny.state_of(reply.content["arrays"]))
                norm = float(np.linalg.norm(after - tiny.flat(self.before)))
                self.norms.append((norm, self.bound))
        return super().aggregate_train(server_round, replies)


def server_fixed(inner):
    return flower.DifferentialPrivacyServerSideFixedClipping(inner, 1e-3, CLIP, N)


def server_adaptive(inner):
    return flower.DifferentialPrivacyServerSideAdaptiveClipping(
        inner, 0.0, N, initial_clipping_norm=CLIP, clip_norm_lr=1e-9
    )


def client_fixed(inner):
    return flower.DifferentialPrivacyClientSideFixedClipping(inner, 1e-3, CLIP, N)


def client_adaptive(inner):
    return flower.DifferentialPrivacyClientSideAdaptiveClipping(
        inner, 0.0, N, initial_clipping_norm=CLIP
    )


WRAPPERS = {
    "none": lambda inner: inner,
    "server fixed": server_fixed,
    "server adaptive": server_adaptive,
    "client fixed": client_fixed,
    "client adaptive": client_adaptive,
}
WORK = {  # with CompressionMod first, these come after it
    ("none", ()), ("none", ("local",)),
    ("server fixed", ()), ("server fixed", ("local",)),
    ("server adaptive", ()), ("server adaptive", ("local",)),
    ("client fixed", ()), ("client fixed", ("fixed",)), ("client fixed", ("local",)),
    ("client fixed", ("fixed", "local")), ("client fixed", ("local", "fixed")),
    ("client adaptive", ("adaptive",)), ("client adaptive", ("adaptive", "local")),
    ("client adaptive", ("local", "adaptive")),
    # Flower's two clipping mods ask for the same key: each goes with either wrapper.
    ("client fixed", ("adaptive",)), ("client fixed", ("adaptive", "local")),
    ("client fixed", ("local", "adaptive")),
}  # fmt: skip
SETS = [(), ("fixed",), ("adaptive",), ("local",), ("fixed", "local"), ("adaptive", "local")]
ORDERS = [
    (mods[:at], mods[at:])
    for chosen in SETS
    for mods in itertools.permutations(chosen)
    for at in range(len(mods) + 1)
]


def train(state, context):
    """A step well above the bound, always in the same direction: residuals pile up.

    Tensors of no dimension are left: Flower's clipping does not change them.
    """
    rng = np.random.default_rng(context.node_id)
    return {
        name: np.asarray(value + rng.standard_cauchy(value.shape) * (value.ndim > 0), np.float32)
        for name, value in state.items()
    }


def grid(before, after, mod=None):
    mods = [MODS[name]() for name in before]
    mods += [mod or CompressionMod(density=0.1), *(MODS[name]() for name in after)]
    return LocalGrid(tiny.client_app(*mods, train=train), N)


def start(strategy, at, rounds=ROUNDS):
    random.seed(1)
    return strategy.start(at, tiny.arrays(), num_rounds=rounds, timeout=30)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0]}C{order[1]}")
def test_every_combination_keeps_the_bound_or_says_which_order_works(wrapper, order):
    before, after = order
    inner = Measures()
    strategy = Compressed(WRAPPERS[wrapper](inner))
    if not before and (wrapper, after) in WORK:
        start(strategy, grid(before, after))
        assert len(inner.norms) == N * ROUNDS
        if (wrapper, after) != ("none", ()):
            assert all(norm <= bound * (1 + 1e-4) for norm, bound in inner.norms)
            assert max(norm for norm, _ in inner.norms) > 0.5 * CLIP
        return
    with pytest.raises(Exception) as raised:  # noqa: PT011 (Flower's own among them)
        start(strategy, grid(before, after))
    if wrapper == "client adaptive" and not before:  # Flower's own check
        assert "KEY_NORM_BIT" in str(raised.value)
        return
    assert isinstance(raised.value, ParameterError)
    assert not inner.norms
    if before:
        names = [getattr(MODS[name](), "__name__", "LocalDpMod") for name in before]
        hints = [f"ClientApp(mods=[CompressionMod(...), {name}" for name in names]
        assert any(hint in str(raised.value) for hint in hints)
    else:
        assert "Compressed(DifferentialPrivacyClientSide" in str(raised.value)


@pytest.mark.parametrize("codec", ["dense", "dense-fp16", "dense-bf16", "golomb", "auto"])
@pytest.mark.parametrize("scale", ["mean", "norm", 30.0])
@pytest.mark.parametrize("feedback", [True, False])
def test_every_codec_and_scale_keeps_the_bound(codec, scale, feedback):
    inner = Measures()
    mod = CompressionMod(
        density=0.1,
        scale=scale,
        codec=codec,
        error_feedback=feedback,
        link_mbps=1.0 if codec == "auto" else None,
    )
    start(Compressed(client_fixed(inner)), grid((), ("fixed",), mod), rounds=4)
    assert len(inner.norms) == 4 * N
    assert all(norm <= bound * (1 + 1e-4) for norm, bound in inner.norms)


@pytest.mark.long
def test_the_residual_still_arrives_in_the_end():
    """Clipping after the residual is added loses nothing of it: it waits."""
    inner, plain = Measures(), Measures()
    start(Compressed(client_fixed(inner)), grid((), ("fixed",)), rounds=12)
    mod = CompressionMod(density=0.1, error_feedback=False)
    start(Compressed(client_fixed(plain)), grid((), ("fixed",), mod), rounds=12)
    assert np.mean([n for n, _ in inner.norms]) > np.mean([n for n, _ in plain.norms])


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "none"])
@pytest.mark.parametrize("ours", [ComPEFTAverage, lambda: Compressed(FedAvg())])
def test_a_wrapper_around_ours_is_refused_before_the_first_round(wrapper, ours):
    strategy, at = WRAPPERS[wrapper](ours()), grid((), ())
    with pytest.raises(ParameterError, match=r"this order works: Compressed\(DifferentialPrivacy"):
        start(strategy, at)
    assert not at.sent
    with pytest.raises(CompeftError, match=r"this order works: Compressed\(DifferentialPrivacy"):
        Compressed(strategy)


def test_a_strategy_s_own_loop_is_no_wrapper():
    class Own(ComPEFTAverage):
        def start(self, *args, **kwargs):
            self.summary()
            return super().start(*args, **kwargs)

    result = start(Own(fraction_evaluate=0.0), grid((), ()), rounds=1)
    assert not np.array_equal(tiny.flat(tiny.state_of(result.arrays)), tiny.flat(tiny.adapter()))


def test_a_clipping_norm_without_a_clipping_mod_is_said_and_kept(caplog):
    inner = Measures()
    start(Compressed(client_fixed(inner)), grid((), ()), rounds=1)
    assert "no clipping mod comes after this one" in caplog.text
    assert all(norm <= bound * (1 + 1e-4) for norm, bound in inner.norms)


def test_one_node_with_mods_in_the_wrong_order_does_not_stop_the_others(caplog):
    apps = grid((), ("fixed",)).apps
    wrong = tiny.client_app(fixedclipping_mod, CompressionMod(), train=train)
    nodes = list(apps)
    inner = Measures()
    at = LocalGrid({**apps, nodes[0]: wrong}, N)
    start(Compressed(inner, downlink=DownlinkOptions()), at, rounds=0)
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    mixed = {nodes[0]: wrong} | dict.fromkeys(nodes[1:], tiny.client_app(CompressionMod()))
    start(strategy, LocalGrid(mixed, N), rounds=2)
    assert [count.replies for count in strategy.observer.train.values()] == [N - 1, N - 1]
    assert "put CompressionMod first" in caplog.text


@pytest.mark.parametrize("wrapper", ["server fixed", "server adaptive"])
def test_an_update_of_nothing_does_not_stop_a_server_that_clips(wrapper, caplog):
    """Flower divides by its norm."""
    idle = tiny.client_app(CompressionMod(), train=lambda state, context: state)
    apps = grid((), ()).apps
    start(Compressed(WRAPPERS[wrapper](Measures())), LocalGrid({**apps, min(apps): idle}, N))
    assert "can clip, found one of norm 0" in caplog.text


def test_carried_tensors_count_in_the_bound():
    """BatchNorm's statistics go beside the Update: what both come to together is bounded."""
    state = {"w": np.zeros((20, 20), np.float32), "bn.running_mean": np.zeros(9, np.float32)}

    def both(state, context):
        rng = np.random.default_rng(context.node_id)
        return {
            name: np.asarray(value + rng.standard_normal(value.shape), np.float32)
            for name, value in state.items()
        }

    inner = Measures()
    app = tiny.client_app(CompressionMod(density=0.1), fixedclipping_mod, train=both)
    random.seed(1)
    Compressed(client_fixed(inner)).start(LocalGrid(app, N), tiny.arrays(state), num_rounds=6)
    assert len(inner.norms) == 6 * N
    assert all(norm <= bound * (1 + 1e-4) for norm, bound in inner.norms)


def test_carried_tensors_over_the_bound_are_refused():
    state = {"w": np.zeros((20, 20), np.float32), "steps": np.zeros((), np.int64)}

    def count(state, context):
        return {"w": state["w"] + np.float32(1e-4), "steps": state["steps"] + 7}

    app = tiny.client_app(CompressionMod(density=0.1), train=count)
    with pytest.raises(CompeftError, match="carried tensors alone change by 7"):
        Compressed(client_fixed(Measures())).start(
            LocalGrid(app, N), tiny.arrays(state), num_rounds=1
        )
