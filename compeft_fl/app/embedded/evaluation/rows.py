"""What lm-eval's tasks beside this file ask of the embedded instructions."""

from __future__ import annotations

from typing import Any

__all__ = ["language", "load", "role", "scored", "section", "synopsis"]


def load(**_: Any) -> Any:
    """Return the embedded instructions as a `datasets.DatasetDict` of train and test."""
    from datasets import Dataset, DatasetDict

    from compeft_fl.app import embedded

    file = str(embedded.path("debian-instructions.parquet"))
    rows = Dataset.from_parquet(file, keep_in_memory=True)
    return DatasetDict(
        {
            split: rows.filter(lambda row, split=split: row["split"] == split)
            for split in ("train", "test")
        }
    )


def language(rows: Any) -> Any:
    """Keep the questions on languages, with all languages as choices."""
    return _choice(rows, "language")


def role(rows: Any) -> Any:
    """Keep the questions on roles, with all roles as choices."""
    return _choice(rows, "role")


def section(rows: Any) -> Any:
    """Keep the questions on sections, with all sections as choices."""
    return _choice(rows, "section")


def synopsis(rows: Any) -> Any:
    """Keep the questions for a synopsis."""
    return rows.filter(lambda row: row["kind"] == "synopsis")


def scored(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return how much of the longest common subsequence of words an answer has (ROUGE-L's F)."""
    from rouge_score.rouge_scorer import RougeScorer

    found = RougeScorer(["rougeL"], use_stemmer=False).score(row["response"], results[0])
    return {"rouge_l": float(found["rougeL"].fmeasure)}


def _choice(rows: Any, kind: str) -> Any:
    kept = rows.filter(lambda row: row["kind"] == kind)
    choices = sorted(set(kept["response"]))
    return kept.map(lambda row: {"choices": choices, "gold": choices.index(row["response"])})
