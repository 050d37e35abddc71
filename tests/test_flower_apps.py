"""Apps after Flower's examples, as they are and with their two lines changed."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from flower_apps import (
    advanced_pytorch,
    custom_mods,
    flowertune_llm,
    flowertune_vit,
    opacus,
    quickstart_huggingface,
    quickstart_pytorch,
    quickstart_sklearn,
)
from local_grid import LocalGrid

from compeft_fl.client import mod as mod_module
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage, Compressed, DownlinkOptions

NODES = 4
APPS = {
    "quickstart-pytorch": quickstart_pytorch,
    "custom-mods": custom_mods,
    "advanced-pytorch": advanced_pytorch,
    "flowertune-llm": flowertune_llm,
    "quickstart-huggingface": quickstart_huggingface,
    "quickstart-sklearn": quickstart_sklearn,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(app, strategy, *mods, **more):
    """The app over an in-process grid: its result, and the grid with its bytes."""
    random.seed(1)
    grid = LocalGrid(app.client_app(*mods), NODES)
    return app.main(grid, strategy, **more), grid


def accuracies(result) -> list[float]:
    return [scores["accuracy"] for scores in result.evaluate_metrics_serverapp.values()]


@pytest.mark.parametrize("name", APPS)
def test_an_app_learns_with_its_two_lines_changed(name, tmp_path, caplog):
    app = APPS[name]
    plain, wrapped = app.strategy(), Compressed(app.strategy())
    for number, strategy in enumerate((plain, wrapped)):
        if hasattr(strategy, "set_save_path"):
            (tmp_path / str(number)).mkdir()
            strategy.set_save_path(tmp_path / str(number))
    stock, dense = run(app, plain)
    with caplog.at_level(logging.INFO, logger="flwr"):
        ours, small = run(app, wrapped, CompressionMod(density=0.1))
    assert accuracies(stock)[-1] > 0.8
    assert accuracies(ours)[-1] > accuracies(stock)[-1] - 0.04
    assert [len(h) for h in histories(ours)] == [len(h) for h in histories(stock)]
    assert len(small.sent) == len(dense.sent) > 0
    assert small.bytes_up < dense.bytes_up / 4
    assert small.bytes_down < dense.bytes_down / 1.5  # the first message down is whole
    assert [a.dtype for a in ours.arrays.values()] == [a.dtype for a in stock.arrays.values()]


def test_few_rounds_of_few_nodes_with_density_auto():
    """After flowertune-vit: two of four nodes a round, four rounds, Adam's steps."""
    stock, dense = run(flowertune_vit, flowertune_vit.strategy())
    downlink = DownlinkOptions(density="auto")
    strategy = flowertune_vit.strategy(ComPEFTAverage, downlink=downlink)
    ours, small = run(flowertune_vit, strategy, CompressionMod(density="auto"))
    assert 0.6 < accuracies(stock)[-1] < 0.8  # it has not learned all there is
    assert accuracies(ours)[-1] >= 0.85 * accuracies(stock)[-1]  # 0.41 of it with density 0.1
    assert small.bytes_up + small.bytes_down <= (dense.bytes_up + dense.bytes_down) / 8


def test_private_training_learns_some_rounds_later():
    """The noise of DP-SGD is in every entry of an update, so that there is little to leave out."""
    stock, _ = run(opacus, opacus.strategy(), num_rounds=8)
    ours, grid = run(opacus, Compressed(opacus.strategy()), CompressionMod(), num_rounds=12)
    assert accuracies(stock)[-1] > 0.8
    assert accuracies(ours)[-1] > accuracies(stock)[-1] - 0.04
    assert grid.bytes_up < 12 * NODES * 4 * 4810 / 6  # parameters


def histories(result):
    return (
        result.train_metrics_clientapp,
        result.evaluate_metrics_clientapp,
        result.evaluate_metrics_serverapp,
    )


def test_flowers_closing_lines_are_there(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        run(quickstart_pytorch, Compressed(quickstart_pytorch.strategy()), CompressionMod())
    lines = [record.getMessage() for record in caplog.records]
    end = lines.index("Final results:")
    assert lines[end - 2].startswith("Strategy execution finished in ")
    assert any("ServerApp-side Evaluate Metrics:" in line for line in lines[end:])
    assert any("'accuracy'" in line for line in lines[end:])


def test_mods_of_the_app_see_ordinary_weights():
    custom_mods.norms.clear()
    _, grid = run(custom_mods, Compressed(custom_mods.strategy()), CompressionMod(), num_rounds=2)
    assert len(custom_mods.norms) == 2 * NODES
    assert all(np.isfinite(custom_mods.norms))
    seen = [context.state["time_mod"]["messages"] for context in grid.contexts.values()]
    assert sum(seen) == len(grid.sent)


def test_an_own_start_saves_checkpoints_and_tracks(tmp_path):
    strategy = Compressed(advanced_pytorch.strategy())
    strategy.set_save_path(tmp_path)  # a method of the inner strategy
    result, _ = run(advanced_pytorch, strategy, CompressionMod())
    tracked = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(tracked) == 2 * 8
    assert tracked == strategy.tracked
    assert list(tmp_path.glob("model_round_*.pth"))
    assert strategy.best_acc_so_far == max(accuracies(result)) > 0.8
    strategy.best_acc_so_far = 0.5  # set where it has an effect
    assert strategy.inner.best_acc_so_far == 0.5


@pytest.mark.parametrize("kind", ["wrapped", "rebased"])
def test_the_budget_that_a_strategy_counts_is_that_of_the_wire(kind):
    plain = flowertune_llm.strategy()
    run(flowertune_llm, plain)
    if kind == "wrapped":
        strategy = Compressed(flowertune_llm.strategy())
    else:
        strategy = flowertune_llm.flowertune(ComPEFTAverage)(fraction_evaluate=0.0)
    result, _ = run(flowertune_llm, strategy, CompressionMod())
    counted, before = strategy.comm_tracker.curr_comm_cost, plain.comm_tracker.curr_comm_cost
    counts = strategy.observer.train.values()
    sent = sum(count.down_bytes + count.up_bytes for count in counts) / 1024**2
    assert counted == pytest.approx(sent, rel=0.02)
    assert counted < before / 3
    assert accuracies(result)[-1] > 0.8


@pytest.mark.parametrize("kind", ["wrapped", "rebased"])
def test_replies_are_counted_and_walked_over_before_and_after(kind):
    if kind == "wrapped":
        strategy = Compressed(flowertune_llm.whisper()(fraction_evaluate=0.0))
    else:
        strategy = flowertune_llm.whisper(ComPEFTAverage)(fraction_evaluate=0.0)
    result, _ = run(flowertune_llm, strategy, CompressionMod())
    assert strategy.counted == [NODES] * 8
    assert len(strategy.losses) == NODES * 8
    assert accuracies(result)[-1] > 0.8


def test_models_in_evaluate_replies_are_left_out_and_that_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(mod_module, "_said", set())
    _, without = run(
        quickstart_pytorch, Compressed(quickstart_pytorch.strategy()), CompressionMod()
    )
    caplog.clear()
    app = quickstart_huggingface
    result, grid = run(app, Compressed(app.strategy()), CompressionMod())
    assert grid.bytes_up < 1.05 * without.bytes_up
    assert result.evaluate_metrics_clientapp[8]["val_accuracy"] > 0.75
    assert (
        caplog.text.count("the arrays in replies to evaluate messages (arrays) are left out") == 1
    )
