"""lm-eval's tasks, put to a tiny model; what they say is computed again here."""

from __future__ import annotations

import importlib.util
import json
import random
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch

from compeft_fl.app import evaluation
from compeft_fl.app.evaluation import Harness
from compeft_fl.errors import ConfigError

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.xdist_group("lm-eval")  # to read its thousands of tasks takes seconds

CHOICES = ["a tool", "a game", "a library", "is it"]


@pytest.fixture(scope="module")
def answering() -> tuple[Any, Any]:
    return tiny_llama.make()


def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """The log-probability of an answer behind a prompt, one token after the other."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    rest = tokenizer(answer, add_special_tokens=False)["input_ids"]
    total = 0.0
    for number, token in enumerate(rest):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([start + rest[:number]])).logits[0, -1]
        total += float(torch.log_softmax(logits.float(), 0)[token])
    return total


def chat_prompt(tokenizer, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def write_task(folder, rows: list[dict[str, Any]], **settings: Any) -> str:
    """Write a task as a YAML file over a file of rows; return its path."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": folder.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        **settings,
    }
    file = folder / "task.yaml"
    file.write_text(json.dumps(task), encoding="utf-8")  # YAML takes JSON
    return str(file)


def questions(count: int) -> list[str]:
    rng = np.random.default_rng(1)
    words = tiny_llama.TEXT.replace(".", "").split()
    return [f"What is {' '.join(rng.choice(words, 4))}?" for _ in range(count)]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("which", ["best", "worst"])
def test_rank_classification_takes_the_choice_of_the_largest_log_likelihood(
    answering, tmp_path, chat, which
):
    """The right answer is said to be the best of the direct computation, or its worst."""
    model, tokenizer = answering
    rows, normed = [], []
    for question in questions(25):
        prompt = chat_prompt(tokenizer, question) if chat else question
        found = np.array([log_likelihood(model, tokenizer, prompt, c) for c in CHOICES])
        per_byte = found / [len(choice) for choice in CHOICES]
        rows.append(
            {
                "question": question,
                "choices": CHOICES,
                "gold": int(found.argmax() if which == "best" else found.argmin()),
            }
        )
        normed.append(per_byte.argmax() == rows[-1]["gold"])
    assert len({row["gold"] for row in rows}) > 1
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    task = write_task(
        tmp_path, rows, output_type="multiple_choice",
        doc_to_choice="choices", doc_to_target="gold", metric_list=metrics,
    )  # fmt: skip
    scores = Harness(task, batch_size=8).score(model, tokenizer, chat=chat)[tmp_path.name]
    assert scores["acc"].value == (1.0 if which == "best" else 0.0)
    assert scores["acc_norm"].value == pytest.approx(np.mean(normed))
    assert scores["acc_norm"].error is not None


def test_what_is_generated_is_compared_too(answering, tmp_path):
    model, tokenizer = answering
    rows = []
    for question in questions(6):
        ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=5, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append({"question": question, "answer": answer})
    task = write_task(
        tmp_path, rows, output_type="generate_until", doc_to_target="answer",
        generation_kwargs={"until": ["<|end|>"], "max_gen_toks": 5, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    scores = Harness(task).score(model, tokenizer, chat=False)
    assert scores[tmp_path.name]["exact_match"].value == 1.0


def test_a_task_of_the_hub_by_its_name(answering, tmp_path, monkeypatch):
    """Its data lie where the hub's library looks first: in a folder of the data set's name."""
    folder = tmp_path / "allenai" / "sciq"
    folder.mkdir(parents=True)
    row = {
        "support": "", "question": "which?", "correct_answer": "alpha",
        "distractor1": "beta", "distractor2": "gamma", "distractor3": "delta",
    }  # fmt: skip
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps({**row, "question": f"which {i}?"}) + "\n" for i in range(5))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness = Harness("sciq", limit=4)
    assert harness.names == ["sciq"]
    model, tokenizer = answering
    prompts = [f"\nQuestion: which {i}?\nAnswer:" for i in range(4)]
    answers = [" beta", " gamma", " delta", " alpha"]
    best = [
        int(np.argmax([log_likelihood(model, tokenizer, prompt, answer) for answer in answers]))
        for prompt in prompts
    ]
    scores = harness.score(model, tokenizer, chat=False)
    assert scores["sciq"]["acc"].value == pytest.approx(np.mean(np.array(best) == 3))


def test_the_package_has_tasks_of_its_own(answering, capfd):
    harness = Harness("debian", limit=2)
    assert harness.names == ["debian_language", "debian_role", "debian_section", "debian_synopsis"]
    scores = harness.score(*answering)
    assert set(scores) == set(harness.names)
    assert set(scores["debian_role"]) == {"acc", "acc_norm"}
    assert set(scores["debian_synopsis"]) == {"rouge_l"}
    shown = capfd.readouterr().err
    assert "loglikelihood requests" in shown  # the bar over the questions, and none over rows
    assert not any(word in shown for word in ("Map:", "Filter:", "Generating"))


def test_twice_is_the_same_and_leaves_chance_alone(answering, tmp_path):
    rows = [{"question": text, "choices": CHOICES, "gold": 1} for text in questions(12)]
    task = write_task(
        tmp_path, rows, output_type="multiple_choice", doc_to_choice="choices",
        doc_to_target="gold", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    harness = Harness(task)
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), float(torch.rand(1))
    random.seed(5)
    torch.manual_seed(5)
    first = harness.score(*answering)
    second = harness.score(*answering)
    assert (random.random(), float(torch.rand(1))) == expected
    assert first == second


def test_a_task_that_nobody_knows():
    with pytest.raises(ConfigError, match=r'no task "debian_sektion".*did you mean "debian_sect'):
        Harness("debian_role,debian_sektion")
    with pytest.raises(ConfigError, match="expected names by comma"):
        Harness(" , ")


def test_a_task_whose_data_are_not_there(tmp_path):
    task = write_task(tmp_path, [{"question": "which?"}], doc_to_target="question")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*rows\.jsonl") as caught:
        Harness(task)
    assert "\n" not in str(caught.value)


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        evaluation, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(ConfigError, match=r"^lm-eval is not installed: pip install 'compeft-fl"):
        Harness("mmlu")


def test_a_chat_format_that_is_not_there(answering):
    _, tokenizer = answering
    assert evaluation.uses_chat(tokenizer, None)
    assert not evaluation.uses_chat(tokenizer, False)
    bare = type("Tokenizer", (), {"chat_template": None})()
    assert not evaluation.uses_chat(bare, None)
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluation.uses_chat(bare, True)
