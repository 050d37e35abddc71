"""server/server_step.py: the server's learning rate and momentum, in every strategy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
from test_strategies import EVERY, NODES, every_strategy, grid_of, merged, start

import compeft_fl as cf
from compeft_fl.app import server_app
from compeft_fl.app.config import AppConfig
from compeft_fl.errors import ConfigError, ParameterError
from compeft_fl.mod import CompressionMod
from compeft_fl.server.server_step import ServerStep
from compeft_fl.strategies import CheckpointFolder, Checkpointing, ComPEFTAverage, RoundCounts


def vector(*values: float) -> cf.TaskVector:
    return cf.TaskVector.from_dict({"w": np.array(values, np.float32)})


def test_by_default_the_adapter_becomes_what_was_merged():
    merge = vector(1, -2)
    assert ServerStep().next(merge) is merge
    assert ServerStep().state() == {}


def test_a_step_that_was_not_taken_leaves_the_velocity():
    step = ServerStep(2.0, 0.5)
    assert step.next(vector(1, 0)).values.tolist() == [2, 0]
    step.accept()
    assert step.next(vector(0, 1)).values.tolist() == [1, 2]
    assert step.next(vector(0, 1)).values.tolist() == [1, 2]
    step.accept()
    assert step.next(vector(0, 0)).values.tolist() == [0.5, 1]


def test_state_goes_on_and_nothing_begins_anew():
    one, two = ServerStep(1.0, 0.9), ServerStep(1.0, 0.9)
    one.next(vector(1, 2))
    one.accept()
    two.restore(one.state())
    assert two.next(vector(0, 0)).values.tolist() == one.next(vector(0, 0)).values.tolist()
    two.restore({})
    assert two.next(vector(3, 4)).values.tolist() == [3, 4]
    assert one.next(vector(1, 2, 3)).values.tolist() == [1, 2, 3]  # another adapter


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_learning_rate_out_of_range(rate):
    with pytest.raises(ParameterError, match="expected a server learning rate above 0, found"):
        ComPEFTAverage(server_learning_rate=rate)


@pytest.mark.parametrize("momentum", [-0.1, 1, float("nan")])
def test_a_momentum_out_of_range(momentum):
    with pytest.raises(ParameterError, match=r"expected a server momentum in \[0, 1\), found"):
        ComPEFTAverage(server_momentum=momentum)


@every_strategy
def test_every_strategy_goes_so_far_along_its_merge(name):
    state = tiny.adapter()
    result = start(
        EVERY[name][0](server_learning_rate=0.25), grid_of(CompressionMod(density=0.1)), 1, state
    )
    whole = tiny.flat(merged(name, state, NODES)) - tiny.flat(state)
    moved = tiny.flat(tiny.state_of(result.arrays)) - tiny.flat(state)
    np.testing.assert_allclose(moved, 0.25 * whole, atol=1e-6)
    assert np.abs(whole).max() > 0.01


def test_momentum_is_flower_s():
    """Against FedAvgM inside of Compressed: the same links, the same sums."""
    from flwr.serverapp.strategy import FedAvgM

    from compeft_fl.strategies import Compressed

    results = []
    for strategy in (
        Compressed(FedAvgM(server_learning_rate=0.3, server_momentum=0.8)),
        ComPEFTAverage(server_learning_rate=0.3, server_momentum=0.8),
    ):
        random.seed(5)
        results.append(start(strategy, grid_of(CompressionMod(codec="dense")), 4).arrays)
    first, second = (tiny.flat(tiny.state_of(arrays)) for arrays in results)
    np.testing.assert_allclose(first, second, atol=2e-5)


def test_a_second_start_begins_at_rest():
    strategy = ComPEFTAverage(server_momentum=0.9, server_learning_rate=0.5)
    results = []
    for _ in range(2):
        random.seed(5)
        results.append(
            tiny.flat(tiny.state_of(start(strategy, grid_of(CompressionMod()), 3).arrays))
        )
    np.testing.assert_array_equal(*results)


def test_a_resumed_server_goes_on_with_its_velocity(tmp_path, monkeypatch):
    def make():
        return ComPEFTAverage(server_momentum=0.9, server_learning_rate=0.2)

    random.seed(5)
    whole = start(make(), grid_of(CompressionMod()), 4)
    monkeypatch.setenv("COMPEFT_FL_STATE_DIR", str(tmp_path / "state"))
    folder = CheckpointFolder(tmp_path / "checkpoints")
    random.seed(5)
    start(make(), grid_of(CompressionMod()), 2, checkpointing=Checkpointing(folder))
    resumed = Checkpointing(folder, resume=True)
    result = start(make(), grid_of(CompressionMod()), 4, checkpointing=resumed)
    found, expected = (tiny.flat(tiny.state_of(each.arrays)) for each in (result, whole))
    np.testing.assert_array_equal(found, expected)


def density_down(strategy):
    return strategy._broadcaster.options.density


def test_the_way_down_is_sparser_where_few_nodes_take_part():
    from flwr.serverapp.strategy import FedAdam

    from compeft_fl.strategies import Compressed, DownlinkOptions

    usual = (ComPEFTAverage(), ComPEFTAverage(fraction_train=0.5), Compressed(FedAdam()))
    assert [density_down(each) for each in usual] == ["auto"] * 3
    assert density_down(ComPEFTAverage(fraction_train=0.1)) == 0.07
    assert density_down(Compressed(FedAdam(fraction_train=0.1))) == 0.07
    given = DownlinkOptions(density=0.3, first_contact="seed")
    assert density_down(ComPEFTAverage(fraction_train=0.1, downlink=given)) == 0.3
    for keys, density in (
        ({}, 0.08),
        ({"preset": "compeft"}, 0.2),
        ({"fraction-train": 0.1}, 0.07),
        ({"downlink-density": 1}, 1),
    ):
        config = AppConfig.from_run_config(keys)
        assert density_down(server_app.build_strategy(config, RoundCounts())) == density


def test_the_app_hands_the_settings_on():
    values = {"server-learning-rate": 0.2, "server-momentum": 0.8}
    for name in EVERY:
        config = AppConfig.from_run_config({**values, "strategy": name.replace(" ", "-")})
        step = server_app.build_strategy(config, RoundCounts())._step
        assert (step.learning_rate, step.momentum) == (0.2, 0.8)


@pytest.mark.parametrize("strategy", ["fedavg", "compressed:FedAdam"])
@pytest.mark.parametrize("key", ["server-learning-rate", "server-momentum"])
def test_strategies_of_flower_s_have_settings_of_their_own(strategy, key):
    with pytest.raises(ConfigError, match=r"settings of average, .*compressed:FedAvgM"):
        AppConfig.from_run_config({"strategy": strategy, key: 0.5})
