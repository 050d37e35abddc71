from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from compeft_fl.app.config import AppConfig, keys, parse_assignment
from compeft_fl.errors import ConfigError
from compeft_fl.runs.scenario import SIMULATION_DEFAULTS, Scenario

ROOT = Path(__file__).parent.parent
SCENARIOS = sorted((ROOT / "simulations").glob("*.toml"))


def flat(table: dict, prefix: str = "") -> dict:
    values = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def test_pyproject_repeats_the_defaults():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    written = flat(pyproject["tool"]["flwr"]["app"]["config"])
    assert written == {key.name: key.default for key in keys()}
    assert AppConfig.from_run_config(written) == AppConfig()


def test_the_run_config_comes_back_as_it_was():
    config = AppConfig(rounds=3, scale=2.5, peft={"r": 4, "use_rslora": True}, strategy="ties")
    assert AppConfig.from_run_config(config.to_run_config()) == config


def test_every_key_has_a_line_of_help_and_a_default_that_fits():
    listed = {key.name: key for key in keys()}
    assert set(listed) == set(AppConfig().to_run_config())
    assert all(key.help for key in listed.values())
    assert AppConfig.from_run_config({k.name: k.default for k in listed.values()}) == AppConfig()


def test_an_integer_serves_as_a_number():
    config = AppConfig.from_run_config({"alpha": 1, "scale": 3, "density": 1})
    assert (config.alpha, config.scale, config.density) == (1.0, 3.0, 1.0)
    assert isinstance(config.alpha, float)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("round", '"rounds"'),
        ("batch_size", '"batch-size"'),
        ("num-rounds", '"rounds"'),
        ("lora_alpha", '"peft.lora_alpha"'),
        ("peft.", '"peft.r"'),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key, near):
    with pytest.raises(ConfigError, match=f'unknown key "{key}": did you mean {near}'):
        AppConfig.from_run_config({key: 1})


def test_an_unknown_key_like_no_other_shows_all():
    with pytest.raises(
        ConfigError, match=r'unknown key "xyzzy"; choices: scenario, .*partition.*peft\.r'
    ):
        AppConfig.from_run_config({"xyzzy": 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds", "3", 'rounds: expected integer, found "3"'),
        ("rounds", 2.5, "rounds: expected integer, found 2.5"),
        ("rounds", True, "rounds: expected integer, found True"),
        ("rounds", -1, "rounds: expected at least 0, found -1"),
        ("error-feedback", 1, "error-feedback: expected true or false, found 1"),
        ("model", 3, "model: expected text, found 3"),
        ("alpha", 0, "alpha: expected over 0, found 0"),
        ("alpha", float("nan"), "alpha: expected over 0, found nan"),
        ("learning-rate", float("inf"), "learning-rate: expected over 0, found inf"),
        ("density", 1.5, "density: expected at least 0 and at most 1, found 1.5"),
        ("fraction-train", 1.5, "fraction-train: expected at least 0 and at most 1, found 1.5"),
        ("partition", "iidd", 'partition: "iidd" is none of iid, dirichlet, column'),
        ("head", "", 'head: "" is none of prototype, linear'),
        ("scale", "median", 'scale: expected "mean", "norm" or a number over 0, found "median"'),
        ("scale", 0, "scale: expected a finite number over 0, found 0"),
        ("scale", True, 'scale: expected "mean", "norm" or a number over 0, found True'),
        ("strategy", "tie", 'strategy: "tie" is none of average, task-arithmetic, ties'),
        ("strategy", "compressed:", 'strategy: "compressed:" is none of'),
        ("codec", "golumb", 'codec: "golumb" is none of .*golomb'),
        (
            "downlink-codec",
            "dense",
            'downlink-codec: "dense" is none of golomb, .*context, factored, auto',
        ),
        ("link-mbps", 0, "link-mbps: expected over 0, found 0"),
        ("peft-options", "{", "peft-options: no JSON"),
        ("peft-options", "[1]", r"peft-options: expected a JSON object, found \[1\]"),
        ("strategy-options", "eta=1", "strategy-options: no JSON"),
    ],
)
def test_a_wrong_value_is_named_with_what_fits(key, value, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.from_run_config({key: value})


def test_a_peft_option_must_be_a_plain_value():
    with pytest.raises(ConfigError, match=r"peft\.r: expected text, a number"):
        AppConfig(peft={"r": [8]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds=3", ("rounds", 3)),
        ("alpha = 0.5", ("alpha", 0.5)),
        ("error-feedback=false", ("error-feedback", False)),
        ("error-feedback=no", ("error-feedback", "no")),  # AppConfig says what is wrong with it
        ("model=org/name", ("model", "org/name")),
        ("scenario=42", ("scenario", "42")),
        ('scenario="a b"', ("scenario", "a b")),
        ("out=", ("out", "")),
        ("scale=mean", ("scale", "mean")),
        ("scale=2", ("scale", 2)),
        ("peft.target_modules=query,value", ("peft.target_modules", "query,value")),
        ("peft.use_dora=true", ("peft.use_dora", True)),
        ('strategy-options={"eta": 0.1}', ("strategy-options", '{"eta": 0.1}')),
        ("data=a=b.csv", ("data", "a=b.csv")),
    ],
)
def test_assignments_are_read_by_the_kind_of_their_key(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["rounds", "=3", ""])
def test_an_assignment_needs_key_and_value(text):
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_assignment(text)


# --- scenarios --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_the_scenarios_load(file):
    scenario = Scenario.load(file)
    assert scenario.config.scenario == file.stem
    assert scenario.config.min_nodes == scenario.simulation["num-supernodes"]


def test_the_default_scenario_is_what_holds_without_one():
    assert {"default", "ties", "task_arithmetic"} <= {file.stem for file in SCENARIOS}
    assert Scenario.load(ROOT / "simulations" / "default.toml") == Scenario.load()
    assert Scenario.load().config == dataclasses.replace(AppConfig(), min_nodes=10)


def test_what_is_typed_comes_before_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[run]\nrounds = 2\nseed = 7\n[run.peft]\nr = 4\n", encoding="utf-8")
    scenario = Scenario.load(file, ["rounds=5", "num-supernodes=3"])
    assert (scenario.config.rounds, scenario.config.seed, scenario.config.peft["r"]) == (5, 7, 4)
    assert scenario.config.scenario == "mine"
    assert scenario.simulation == {**SIMULATION_DEFAULTS, "num-supernodes": 3}
    assert scenario.config.min_nodes == 3
    assert Scenario.load(file, ["min-nodes=2"]).config.min_nodes == 2


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert Scenario.load(None, ["data=rows.csv"]).config.data == str(tmp_path / "rows.csv")
    assert Scenario.load(None, ["model=org/name"]).config.model == "org/name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nround = 1", 'unknown key "round": did you mean "rounds"'),
        ("rounds = 1", r"has \[rounds\]; choices: \[run\], \[simulation\]"),
        ("[simulations]\n", r"has \[simulations\]"),
        ("[run\n", "is no TOML"),
        ("[simulation]\nnodes = 3", 'unknown key "nodes"'),
        ("[simulation]\nnum-supernodes = 0", "num-supernodes: expected a whole number over 0"),
        ("[simulation]\nnum-supernodes = 2.5", "num-supernodes: expected a whole number"),
        (
            "[simulation]\nclient-resources-num-gpus = -1",
            "client-resources-num-gpus: expected a number of at least 0",
        ),
    ],
)
def test_a_wrong_scenario_is_named(tmp_path, text, message):
    file = tmp_path / "wrong.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Scenario.load(file)


def test_a_missing_scenario_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml cannot be read: No such file"):
        Scenario.load(tmp_path / "no.toml")


SENT = ("codec", "density", "downlink_codec", "server_learning_rate", "schedule")
LEAN = ("factored", 0.08, "factored", 1.5, "cosine")
COMPEFT = ("golomb", 0.1, "golomb", 1.0, "constant")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, LEAN),
        ({"rounds": 5, "peft.r": 16, "learning-rate": 0.01, "fraction-train": 0.5}, LEAN),
        ({"rounds": 4}, (*LEAN[:3], 1.0, "constant")),
        ({"peft.r": 8, "peft.target_modules": "query,key"}, LEAN),
        ({"peft.r": 7}, COMPEFT),
        ({"peft.target_modules": "word_embeddings"}, COMPEFT),
        ({"peft-options": '{"use_dora": true}'}, COMPEFT),
        ({"preset": "compeft"}, COMPEFT),
        ({"fraction-train": 0.4}, COMPEFT),
        ({"peft-method": "ia3"}, COMPEFT),
        ({"task": "instruction"}, COMPEFT),
        ({"strategy": "ties"}, COMPEFT),
        ({"strategy": "fedavg"}, COMPEFT),
        ({"ranks": "2,8"}, COMPEFT),
        ({"scale": "norm"}, COMPEFT),
        ({"density": 0.05}, ("golomb", 0.05, "golomb", 1.0, "constant")),
        ({"codec": "context"}, ("context", 0.1, "golomb", 1.0, "constant")),
        ({"downlink-codec": "factored"}, ("golomb", 0.1, "factored", 1.0, "constant")),
        ({"schedule": "constant"}, (*LEAN[:4], "constant")),
        ({"server-learning-rate": 1}, (*LEAN[:3], 1.0, "cosine")),
        ({"preset": "lean", "density": 0.05}, ("factored", 0.05, *LEAN[2:])),
        ({"preset": "lean", "strategy": "compressed:FedAdam"}, (*LEAN[:3], 1.0, "cosine")),
        ({"preset": "lean", "strategy": "ties"}, LEAN),
    ],
)
def test_what_is_not_given_is_the_presets(told, expected):
    config = AppConfig.from_run_config(told)
    assert tuple(getattr(config, name) for name in SENT) == expected
    assert AppConfig.from_run_config(config.to_run_config()) == config  # as a run hands it on


def test_a_preset_has_the_learning_rate_fall_to_a_tenth():
    assert AppConfig(learning_rate=0.02).min_learning_rate == pytest.approx(0.002)
    assert AppConfig(learning_rate=0.02, min_learning_rate=0.01).min_learning_rate == 0.01
    assert AppConfig(schedule="cosine").min_learning_rate == 0.0  # as the key says
    assert AppConfig(preset="compeft").min_learning_rate == 0.0


def test_the_learning_rate_does_not_rise():
    with pytest.raises(ConfigError, match=r"min-learning-rate: expected at most .*0\.005.*0\.02"):
        AppConfig(min_learning_rate=0.02)
    assert AppConfig(min_learning_rate=0.02, schedule="constant").min_learning_rate == 0.02


def test_what_a_scenario_keeps_is_what_was_given():
    """So that a run which goes on with other keys has what they and its preset say."""
    scenario = Scenario.of({"learning-rate": 0.01}, {}, []).with_run(run_dir="/x")
    assert scenario.config.codec == "factored"
    told = scenario.to_plain()
    assert "codec" not in told["run"]
    assert Scenario.of(told["run"], told["simulation"], []) == scenario
    for changes, expected in ((["preset=compeft"], COMPEFT), (["strategy=fedavg"], COMPEFT)):
        config = Scenario.of(told["run"], told["simulation"], changes).config
        assert tuple(getattr(config, name) for name in SENT) == expected
        assert (config.learning_rate, config.run_dir) == (0.01, "/x")
    slower = Scenario.of(told["run"], told["simulation"], ["learning-rate=0.001"]).config
    assert slower.min_learning_rate == pytest.approx(0.0001)
