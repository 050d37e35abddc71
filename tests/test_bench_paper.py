"""bench paper: pieces are stored once, scores are right, and the page has what was measured."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
from counted_pieces import count

from compeft_fl.bench import paper, paper_report
from compeft_fl.bench.paper_experts import Expert, Plan, scorer_of, train
from compeft_fl.bench.paper_pieces import Piece, chosen, measure
from compeft_fl.cli.main import main
from compeft_fl.errors import CompeftError, ParameterError


def pieces_of(folder: Path, number: int = 3, depends: str = "") -> list[Piece]:
    return [
        Piece("part", f"task-{n}", partial(count, folder / f"count-{n}", {"n": n}), depends)
        for n in range(number)
    ]


def counted(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("count-*"))]


# --- pieces -----------------------------------------------------------------------------------


def test_what_is_measured_is_not_measured_again(tmp_path):
    measure(pieces_of(tmp_path), tmp_path)
    (tmp_path / "part-task-1.json").write_text("{")
    measure(pieces_of(tmp_path), tmp_path)
    assert counted(tmp_path) == ["x", "xx", "x"]
    assert [piece.result(tmp_path)["n"] for piece in pieces_of(tmp_path)] == [0, 1, 2]
    measure(pieces_of(tmp_path, depends="other keys"), tmp_path)
    assert counted(tmp_path) == ["xx", "xxx", "xx"]


def test_processes_at_one_folder_measure_each_piece_once(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=measure, args=(pieces_of(tmp_path, 6), tmp_path)) for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert counted(tmp_path) == ["x"] * 6


def test_a_piece_that_cannot_be_measured_is_said_and_left_out(tmp_path, capsys):
    pieces = pieces_of(tmp_path)
    pieces.insert(1, Piece("part", "odd", partial(count, tmp_path / "odd", None), ""))
    measure(pieces, tmp_path, workers=2)
    told = capsys.readouterr().err
    assert "part-odd: this method does not fit" in told
    assert "1 pieces could not be measured" in told
    assert [piece.result(tmp_path) is None for piece in pieces] == [False, True, False, False]


def test_pieces_are_chosen_by_patterns(tmp_path):
    pieces = pieces_of(tmp_path)
    assert chosen(pieces, None) == pieces
    assert chosen(pieces, "*-2,part-task-0") == [pieces[0], pieces[2]]
    with pytest.raises(ParameterError, match=r"expected a pattern of pieces, as part-task-0"):
        chosen(pieces, "merged-*")


def test_seeds_come_one_after_the_other_and_other_data_leave_the_language_model_out(tmp_path):
    plan = Plan(tmp_path, ("debian-role", "debian-lang"), {})
    keys = [piece.key for piece in paper._pieces(plan, 2)]
    assert len(set(keys)) == len(keys)
    assert [key[-1] for key in keys] == sorted(key[-1] for key in keys)
    assert "merged-ia3-1" in keys
    for odd in (["bench", "paper", "--pieces", "nothing"], ["bench", "paper", "--only", "x"]):
        assert main([*odd, "--out", str(tmp_path)]) == 2
    own = ["bench", "paper", "data=debian-role", "--pieces", "language-*"]
    assert main([*own, "--out", str(tmp_path)]) == 2


# --- scores -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    keys = {**paper._LANGUAGE, "limit-rows": 40}
    task = "debian-instructions:role"
    plan = Plan(folder, (task,), keys, steps=2, rows=4, tested=5)
    return plan, Expert(task, "lora", 0)


def test_answers_are_ranked_by_their_likelihood(language):
    plan, expert = language
    scorer = scorer_of(plan, expert)
    scorer.network.eval()
    prompts = [prompt for prompt, _ in scorer._asked]
    assert len(prompts) == 5
    with torch.inference_mode():
        found = scorer._likelihoods(prompts)
        for prompt, likelihoods in zip(prompts, found, strict=True):
            for choice, likelihood in zip(scorer._choices, likelihoods.tolist(), strict=True):
                ids = torch.tensor([[*prompt, *choice]])
                logits = scorer.network(input_ids=ids).logits[0, len(prompt) - 1 : -1]
                told = logits.log_softmax(1)[range(len(choice)), choice].sum()
                assert likelihood == pytest.approx(float(told), abs=1e-3)
    chosen = scorer._ranked(prompts)
    right = [best == answer for best, (_, answer) in zip(chosen, scorer._asked, strict=True)]
    assert scorer.measure("test") == pytest.approx(100 * sum(right) / 5)


def test_an_expert_is_trained_once_and_is_its_scorers_change(language):
    plan, expert = language
    tau = train(plan, expert)
    assert expert.file(plan).name == "debian-instructions-role-lora-0.safetensors"
    before = expert.file(plan).stat().st_mtime_ns
    scorer = scorer_of(plan, expert)
    assert scorer.score("val", tau) > scorer.score("val", None)
    again = train(plan, expert)
    assert (again.values == tau.values).all()
    assert expert.file(plan).stat().st_mtime_ns == before


# --- the page ---------------------------------------------------------------------------------


def expert_of(task: str, method: str, seed: int, score: float, size: int) -> dict:
    bytes_of = {"dense": 2 * size, "dense-bf16": size}
    scored = {"val": score, "test": score}
    return {
        "task": task, "method": method, "seed": seed, "parameters": size, "seconds": 1.0,
        "base": scored, "dense": scored, "bytes": bytes_of,
        "compeft": {**scored, "density": 0.05, "alpha": 2.0, "bytes": size // 10},
        "untuned": {**scored, "bytes": size // 20},
        "trials": [[d, a, score - d - a] for d in (0.05, 0.1) for a in (1.0, 2.0)],
    }  # fmt: skip


def test_the_page_has_the_means_and_names_the_frontier(tmp_path):
    found = [
        ("experts", expert_of("debian-role", method, seed, score + seed, size))
        for seed in (0, 1)
        for method, score, size in (("lora", 60.0, 1000), ("ia3", 50.0, 100))
    ]
    dense = expert_of("debian-role", "bitfit", 0, 40.0, 200)
    del dense["compeft"], dense["untuned"]
    paper_report.write(tmp_path, "compeft-fl bench paper", [*found, ("pareto", dense)])
    page = (tmp_path / "paper.md").read_text()
    assert "| lora | 60.5 ± 0.7 | 60.5 ± 0.7 (1 kB) | 60.5 ± 0.7 (100 B)" in page
    frontier = next(line for line in page.splitlines() if line.startswith("On the frontier"))
    assert frontier.endswith("ia3, compressed at 5 %, lora, compressed at 5 %.")
    assert (tmp_path / "paper_pareto.png").stat().st_size > 1000
    assert (tmp_path / "paper.csv").read_text().count("\n") == 6


def test_no_measured_piece_is_one_line(tmp_path):
    options = argparse.Namespace(
        keys=[], out=tmp_path, quick=True, seeds=None, only=None, pieces=None, report=True,
        workers=None,
    )  # fmt: skip
    with pytest.raises(CompeftError, match="no measured piece"):
        paper.run(options)
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["paper-quick"]'
