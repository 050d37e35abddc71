"""The script behind instruct.md: its variants, its answers, its figures, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "simulations"))

import bench_instruct

from compeft_fl.app.tasks import language_model


def test_every_variant_is_one():
    for name in bench_instruct.VARIANTS:
        config = bench_instruct.configured(name, 43, "cpu", quick=False)
        assert (config.seed, config.task, config.min_nodes) == (43, "instruction", 6)
        assert config.compressed is not name.startswith("dense")


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("GNU Go compiler", "the Go compiler, for GNU"),
        ("a b c d", "d c b a"),
        ("x", ""),
        ("library for 2-D plots", "Library for 2-D plots"),
        ("a a b", "b a a b a"),
    ],
)
def test_rouge_is_that_of_rouge_score(expected, found):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    right = scorer.score(expected, found)["rougeL"].fmeasure
    assert bench_instruct.rouge_l(expected, found) == pytest.approx(right)


def test_prompts_of_other_lengths_leave_an_answer_as_it_is(instruct_config):
    model = language_model.load_base(instruct_config)
    prompts = [[40, 41, 42], [50] * 17, [60, 61, 62, 63, 64, 65]]
    together = list(bench_instruct.written(model, prompts))
    assert together == [next(bench_instruct.written(model, [each])) for each in prompts]
    assert all(together)


def test_the_page_is_of_what_is_in_the_folder(tmp_path):
    figures = {"accuracy": 0.5, "loss": 2.0, "rows": 3, "exact": 0.25, "rouge_l": 0.125}
    scores = {"validation": {"all": figures}, "test": {"all": figures, "role": figures}}
    (tmp_path / "base.json").write_text(json.dumps(scores))
    found = scores | {
        "config": {"device": "cpu"},
        "loss": [3.0, 2.0],
        "uplink_payload_bytes": 10,
        "uplink_dense_bytes": 400,
        "downlink_payload_bytes": 30,
        "downlink_dense_bytes": 600,
    }
    for name in ("dense-42", "decay-0.3-42", "decay-0.3-43", "unknown-42"):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "dense-43.json").write_text(json.dumps(found).replace("0.5,", "0.6,"))
    page = bench_instruct.page(tmp_path)
    cells = "cpu | 50.0 % | 2.000 | 50.0 % | 2.000 | 1/40.0 | 1/20.0 | 1/25.0 |"
    assert f"| decay-0.3 | residual-decay=0.3 | 43 | {cells}" in page
    assert page.count(cells) == 3
    assert (
        "| decay-0.3 | 2 | 50.0 ± 0.0 % | 50.0 ± 0.0 % | 2.000 ± 0.000 "
        "| -5.0 (+0.0, -10.0) | -5.0 (+0.0, -10.0) | +0.000 (+0.000, +0.000) |"
    ) in page
    assert "| dense | 42 | role | 50.0 % | 2.000 | 25.0 % | 0.125 |" in page
    assert "| decay-0.3 | 42 | 3.00, 2.00 |" in page
    assert "unknown" not in page
