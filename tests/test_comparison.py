"""lm-eval's tasks inside a run, and ``compeft-fl evaluate`` on what it left."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import language_models
import pytest
from test_app_federation import run
from test_evaluation import write_task

from compeft_fl.app import evaluation
from compeft_fl.app.comparison import Settings
from compeft_fl.cli.main import main
from compeft_fl.errors import ConfigError
from compeft_fl.results import report

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.xdist_group("lm-eval")  # to read its thousands of tasks takes seconds


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> str:
    """A task over what the run teaches: how likely are the right answers?"""
    rows = [
        {"question": f"what does a {animal} say?", "answer": sound}
        for animal, sound in language_models.SOUNDS.items()
    ]
    return write_task(
        tmp_path_factory.mktemp("sounds"), rows,
        output_type="loglikelihood", doc_to_target="answer",
        metric_list=[{"metric": "perplexity"}],
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(instruct_config, sounds, tmp_path_factory):
    """A run that asks after the start, round 2 and the last one, and its summary."""
    folder = tmp_path_factory.mktemp("runs") / "asked"
    config = dataclasses.replace(
        instruct_config,
        rounds=3,
        local_steps=10,
        evaluate_tasks=sounds,
        evaluate_every=2,
    )
    return folder, run(config, folder)


def asked(summary) -> dict[int, float]:
    """What the task gave, by round."""
    return {
        number: value
        for number, scores in enumerate(summary["more"])
        for name, value in scores.items()
        if name.endswith("/perplexity")
    }


def test_a_run_asks_every_few_rounds_and_at_its_end(finished):
    folder, summary = finished
    assert list(asked(summary)) == [0, 2, 3]
    assert asked(summary)[3] < 0.8 * asked(summary)[0]
    assert "perplexity" in summary["more"][1]
    table = report.tasks_table(summary)
    assert [column.header for column in table.columns] == ["task", "metric", "0", "2", "3"]
    assert "/perplexity" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert report.tasks_table({**summary, "more": None}) is None


def test_evaluate_compares_base_and_adapter(finished, sounds, capsys, tmp_path):
    folder, summary = finished
    output = tmp_path / "scores.json"
    assert main(["evaluate", str(folder), f"tasks={sounds}", "-o", str(output)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    ((task, metrics),) = found["results"].items()
    scores = asked(summary)
    base, adapter = metrics["perplexity"]["base"], metrics["perplexity"]["adapter"]
    assert base == pytest.approx(scores[0], rel=1e-4)  # the start of an adapter changes nothing
    assert adapter == pytest.approx(scores[3], rel=1e-4)
    assert found["chat"] is True
    assert task in shown
    assert f"{adapter - base:+.4f}" in shown


def test_evaluate_takes_limits_and_plain_text(finished, sounds, capsys):
    folder, _ = finished
    arguments = [f"tasks={sounds}", "limit=3", "chat=false", "shots=0", "device=cpu"]
    assert main(["evaluate", str(folder / "adapter"), *arguments]) == 0
    assert "the first 3 questions of each task, as plain text" in capsys.readouterr().out
    found = json.loads((folder / "adapter" / "evaluation.json").read_text())
    assert found["chat"] is False
    assert found["settings"]["limit"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER", "tasks=no_such.yaml"], 'lm-eval has no task "no_such.yaml"'),
        (["FOLDER", "tasks="], "tasks: expected names by comma"),
        (["FOLDER", "limit=3"], "tasks: expected names by comma"),
        (["FOLDER", "tasks=SOUNDS", "limit=-1"], "limit: expected at least 0, found -1"),
        (["FOLDER", "task=x"], 'unknown key "task": did you mean "tasks"?'),
        (["FOLDER", "tasks=SOUNDS", "model=OTHER"], "expected the base model that the adapter was"),
        (["nowhere", "tasks=SOUNDS"], "expected a folder to write to, found none"),
        (["CLASSIFIER", "tasks=SOUNDS"], "found one of task=classification"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    finished, sounds, capsys, tmp_path, arguments, message
):
    folder, _ = finished
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "head.json").write_text("{}")
    places = {
        "FOLDER": str(folder),
        "SOUNDS": sounds,
        "CLASSIFIER": str(tmp_path / "classifier"),
    }
    if any("OTHER" in argument for argument in arguments):
        places["OTHER"] = str(language_models.save_llama(tmp_path / "other", seed=5))
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_run_with_what_cannot_be_asked_ends_before_it_begins(
    instruct_config, tiny_config, sounds, tmp_path
):
    missing = dataclasses.replace(instruct_config, evaluate_tasks=str(tmp_path / "x.yaml"))
    with pytest.raises(ConfigError, match="lm-eval has no task"):
        run(missing, tmp_path / "missing")
    classifier = dataclasses.replace(tiny_config, evaluate_tasks=sounds)
    with pytest.raises(ConfigError, match=r"expected a language model .* task=classification"):
        run(classifier, tmp_path / "classifier")
    for name in ("missing", "classifier"):
        events = (tmp_path / name / "progress.jsonl").read_text()
        assert '"event": "sent"' not in events


def test_the_command_run_says_at_once_that_lm_eval_is_missing(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        evaluation, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", "task=instruction", "evaluate-tasks=mmlu"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "compeft-fl run: error: lm-eval is not installed: pip install 'compeft-fl[llm]'\n"
    )
    assert not (tmp_path / "runs").exists()


def test_settings_are_checked():
    settings = Settings.of(["tasks=a,b", "chat=true", "shots=5", "batch-size=2"])
    assert (settings.tasks, settings.chat, settings.shots) == ("a,b", "true", 5)
    with pytest.raises(ConfigError, match="batch-size: expected at least 1"):
        Settings.of(["batch-size=0"])
    with pytest.raises(ConfigError, match=r"quantization: .* is none of none, 4bit, 8bit"):
        Settings.of(["quantization=2bit"])
