"""Few of many nodes a round: the federation is that of the strategies, and its table is right."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
from flwr.app import Context, RecordDict
from local_grid import LocalGrid, node_ids

from compeft_fl.app import client_app, server_app
from compeft_fl.bench import few, few_report
from compeft_fl.bench.federation import LONG_ABSENCE, Federation, Setting
from compeft_fl.bench.sweep import Job
from compeft_fl.cli.main import main
from compeft_fl.errors import CompeftError
from compeft_fl.results import report

NODES = 4


def test_few_nodes_a_round_learn_and_are_sent_what_the_strategies_send(tiny_config, tmp_path):
    config = dataclasses.replace(
        tiny_config, rounds=6, learning_rate=0.02, run_dir=str(tmp_path), min_nodes=NODES,
        fraction_train=0.25, server_learning_rate=0.5, server_momentum=0.6, downlink_density=0.1,
        density="auto",
    )  # fmt: skip
    flat = config.to_run_config()
    grid = LocalGrid(client_app.app, NODES, run_config=flat)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    server_app.app(grid, context)
    summary = json.loads((tmp_path / report.SUMMARY_FILE).read_text(encoding="utf-8"))
    drawn = [node - node_ids(1)[0] for _, node in grid.sent]
    assert len(drawn) == 6
    assert len(set(drawn)) > 1

    setting = Setting(
        "few", "golomb", "golomb", "auto", 0.1, nodes_a_round=1, server_learning_rate=0.5,
        server_momentum=0.6, score_every=2,
    )  # fmt: skip
    federation = Federation(setting, config, NODES)
    federation._drawn = lambda server_round: [drawn[server_round - 1]]
    rounds = list(federation.run())
    assert [r.up for r in rounds[1:]] == summary["uplink_payload_bytes"]
    assert [r.down for r in rounds[1:]] == summary["downlink_payload_bytes"]
    assert [r.accuracy is None for r in rounds] == [n % 2 == 1 for n in range(7)]
    scored = [n for n in range(7) if n % 2 == 0]
    losses = [summary["loss"][n] for n in scored]
    of_nodes = [rounds[0].loss, *(rounds[n].shared_loss for n in scored[1:])]  # what a run gives
    assert of_nodes == pytest.approx(losses, rel=1e-5)
    assert rounds[6].loss != pytest.approx(losses[-1], rel=1e-3)


def test_what_is_drawn_depends_on_seed_and_round_alone(tiny_config):
    federations = [
        Federation(Setting(name, "dense", "dense", nodes_a_round=2), tiny_config, NODES)
        for name in ("a", "b")
    ]
    drawn = [[each._drawn(n) for n in range(1, 9)] for each in federations]
    assert drawn[0] == drawn[1]
    assert len({tuple(nodes) for nodes in drawn[0]}) > 2
    assert all(len(set(nodes)) == 2 for nodes in drawn[0])


def test_a_coarse_start_goes_down_once_and_the_chain_is_never_less(tiny_config):
    config = dataclasses.replace(tiny_config, rounds=LONG_ABSENCE + 3, local_steps=1)
    setting = Setting("few", "golomb", "golomb", 0.1, 0.1, nodes_a_round=1, coarse_start=True)
    federation = Federation(dataclasses.replace(setting, score_every=99), config, NODES)
    rounds = list(federation.run())[1:]
    size = 4 * federation.adapter.num_parameters
    assert rounds[0].down == rounds[0].joiner
    assert rounds[0].down < 0.5 * size
    assert rounds[0].chain == size  # before, first contact was in float32
    assert sum(r.down for r in rounds) < sum(r.chain for r in rounds)
    assert [r.long_absence > 0 for r in rounds] == [n >= LONG_ABSENCE for n in range(len(rounds))]
    assert rounds[-1].long_absence < LONG_ABSENCE * rounds[-1].up


def test_what_lies_below_the_adapter_is_computed_once_and_is_the_same(tiny_config):
    from compeft_fl.app.tasks import data, model, training
    from compeft_fl.bench.frozen import keep_below_adapter

    config = dataclasses.replace(tiny_config, peft_options='{"layers_to_transform": [1]}')
    rows = data.load(config)
    found = []
    for keep in (False, True):
        classifier = model.build(config, rows)
        for module in classifier.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.0
        assert not keep or keep_below_adapter(classifier.network) == 1
        before = training.evaluate(classifier, rows.test, config)
        training.train(classifier, rows.train, config, 3)
        found.append((before, training.evaluate(classifier, rows.test, config)))
        found[-1] += (classifier.adapter_state(),)
    (before, after, state), (kept_before, kept_after, kept_state) = found
    assert kept_before.loss == pytest.approx(before.loss, rel=1e-5)
    assert kept_after.loss == pytest.approx(after.loss, rel=1e-4)
    assert after.loss != before.loss
    assert list(kept_state) == list(state)
    whole = model.build(tiny_config, rows)
    assert keep_below_adapter(whole.network) == 0
    assert keep_below_adapter(whole) == 0


def test_an_adapter_on_top_starts_where_the_app_s_does_and_keeps_embeddings(tiny_config, tmp_path):
    file = tmp_path / "embeddings.npz"
    config = dataclasses.replace(tiny_config, rounds=3, local_steps=10)
    setting = Setting("top", "golomb", "golomb", 0.2, 0.2, on_top=4)
    app = Federation(dataclasses.replace(setting, on_top=0), config, NODES)
    federation = Federation(setting, config, NODES, file)
    hidden = federation._classifier.head.prototypes.shape[1]
    assert federation.adapter.num_parameters == 2 * 4 * hidden
    assert file.exists()
    first, *rounds = federation.run()
    assert first.loss == pytest.approx(next(app.run()).loss, rel=1e-5)
    assert rounds[-1].loss < first.loss
    written = file.read_bytes()
    again = Federation(setting, config, NODES, file)
    assert [r.numbers() for r in again.run()] == [first.numbers(), *(r.numbers() for r in rounds)]
    assert file.read_bytes() == written


# --- the table --------------------------------------------------------------------------------


def stored(folder, setting, seed, losses, up, down, chain):
    """A run's file, as a sweep leaves it; scored in every other round."""
    job = Job(setting, seed, 20)
    rounds = [
        {
            "accuracy": None if n % 2 else 1 - loss, "loss": None if n % 2 else loss,
            "shared_accuracy": None if n % 2 or not n else 1.1 - loss,
            "shared_loss": None if n % 2 or not n else loss - 0.1,
            "up": up if n else 0, "down": down if n else 0, "chain": chain if n else 0,
            "long_absence": 250 if n > 4 and chain else 0, "joiner": 500 if n and chain else 0,
        }
        for n, loss in enumerate(losses)
    ]  # fmt: skip
    result = {"job": job.plain(), "num_parameters": 1000, "cpu_seconds": 60.0, "rounds": rounds}
    job.file(folder).write_text(json.dumps(result), encoding="utf-8")
    return job.finished(folder)


@pytest.fixture
def runs(tmp_path):
    dense, grid = (
        Setting(f"2-of-20-{name}", *codec, nodes_a_round=2)
        for name, codec in (
            ("dense", ("dense", "dense")),
            ("grid-0.05", ("golomb", "golomb", 0.1, 0.05)),
        )
    )
    found = []
    for seed, more in ((1, 0.0), (2, 0.1)):
        found.append(stored(tmp_path, dense, seed, [0.9, 9, 0.8, 9, 0.7, 9, 0.6], 8000, 8000, 0))
        losses = [0.9, 9, 0.8, 9, 0.6 + more, 9, 0.4 + more]
        found.append(stored(tmp_path, grid, seed, losses, 200, 300, 1300))
    return found


def test_the_table_and_the_files(runs, tmp_path, capsys):
    rows = few_report.write(tmp_path, "the command", runs)
    cells = {row[0]: dict(zip(few_report.HEADS, row, strict=True)) for row in rows}
    assert list(cells) == ["2-of-20-dense", "2-of-20-grid-0.05", "2-of-20-grid-0.05, each delta"]
    ours = cells["2-of-20-grid-0.05"]
    # Means of the scores after the start: 0.6, 0.6667.
    assert (ours["seeds"], ours["server's loss"], ours["nodes' loss"]) == (
        "2",
        "0.633 ± 0.047",
        "0.533 ± 0.047",
    )
    assert (ours["up"], ours["down"]) == ("1.2 kB", "1.8 kB")
    assert ours["both, of dense"] == f"1/{2 * 4000 * 12 / 3000:.1f}"
    assert ours["bits a visit"] == f"{8 * 1800 / 1000 / 12:.2f}"
    assert (ours["missed 10"], ours["joins"], ours["joins at 50"]) == ("2.00", "4.00", "4.00")
    assert ours["down, of dense"] == f"1/{4000 * 12 / 1800:.1f}"
    chain = cells["2-of-20-grid-0.05, each delta"]
    assert (chain["down"], chain["server's loss"], chain["joins"]) == ("7.8 kB", "-", "-")
    said = capsys.readouterr().out
    told = "-0.067 of loss (-0.100, -0.033), +6.7 points"
    assert f"2-of-20-grid-0.05 against 2-of-20-dense: {told}; the nodes' copies {told}." in said
    with (tmp_path / "few.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    last = [
        r for r in found if (r["setting"], r["seed"], r["round"]) == ("2-of-20-grid-0.05", "1", "6")
    ]
    assert [(r["down_bytes"], r["chain_bytes"], r["loss"]) for r in last] == [
        ("1800", "7800", "0.4")
    ]
    assert (tmp_path / "few.png").stat().st_size > 10_000
    assert (
        (tmp_path / "few.md").read_text(encoding="utf-8").startswith("`the command`: compeft-fl ")
    )


def test_methods_are_compared_each_at_its_best_step(tmp_path, capsys):
    shorter = {"server_learning_rate": 0.5, "nodes_a_round": 2}
    one = Setting("2-of-20-dense", "dense", "dense", nodes_a_round=2)
    half = Setting("2-of-20-dense-step-0.5", "dense", "dense", **shorter)
    grid = Setting("2-of-20-grid-0.1", "golomb", "golomb", 0.1, 0.1, nodes_a_round=2)
    other = Setting("2-of-20-grid-0.1-step-0.5", "golomb", "golomb", 0.1, 0.1, **shorter)
    ends = ((one, 0.9), (half, 0.7), (grid, 0.6), (other, 0.8))
    runs = [
        stored(tmp_path, setting, 1, [1, 9, end], *([8000] * 2 if end > 0.8 else [200, 300]), 900)
        for setting, end in ends
    ]
    few_report.write(tmp_path, "the command", runs)
    said = capsys.readouterr().out
    assert "2-of-20-grid-0.1 against 2-of-20-dense: -0.300 of loss" in said
    assert "2-of-20-grid-0.1-step-0.5 against 2-of-20-dense-step-0.5: +0.100 of loss" in said
    best = "2-of-20-grid-0.1 against 2-of-20-dense-step-0.5: -0.100 of loss"
    assert f"Each at the best of its steps of the server by the nodes' loss, {best}" in said


def test_the_runs_of_a_sweep():
    names = [setting.name for case in few.CASES for setting in few.settings(case)]
    assert len(set(names)) == len(names)
    assert set(few.CLAIMS) <= set(names)
    keys = [job.key for job in few.jobs_of(quick=False)]
    assert len(set(keys)) == len(keys)
    assert {f"{name}-{seed}" for name in few.CLAIMS for seed in few.SEEDS} <= set(keys)
    assert set(keys) == {f"{name}-{seed}" for name in names for seed in few.SEEDS}
    assert keys[: len(few.SEEDS)] == [f"{few.CLAIMS[0]}-{seed}" for seed in few.SEEDS]
    assert all(job.setting.on_top and job.seed == few.SEEDS[0] for job in few.jobs_of(quick=True))
    assert [job.key for job in few.jobs_of(False, [names[0]], [7, 8])] == [
        f"{names[0]}-7", f"{names[0]}-8",
    ]  # fmt: skip
    with pytest.raises(
        CompeftError, match=r"expected a setting among 2-of-20-dense, .*; found 'x'"
    ):
        few.jobs_of(False, ["x"])


def test_nothing_to_report_is_said(tmp_path, capsys):
    assert main(["bench", "few", "--report", "--out", str(tmp_path)]) == 2
    assert "no finished run in" in capsys.readouterr().err
