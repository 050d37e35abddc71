"""The paper's own figures, for the eye, beside ours (arXiv 2311.13171v1).

Scores are percents on test rows, sizes those that the paper says, in its units.
"""

from __future__ import annotations

from typing import Final

__all__ = ["TABLE_1", "TABLE_2", "TABLE_3", "TABLE_4"]

TABLE_1: Final = (
    ("LLaMA-7B", "+0.54 / 16x"),
    ("LLaMA-13B", "+1.06 / 20x"),
    ("LLaMA-33B", "+3.44 / 16x"),
    ("LLaMA-65B", "+4.16 / 26x"),
)
"""Eight QLoRA experts on instructions, scored on MMLU: gain and compression (section 4.1)."""

TABLE_2: Final = {
    "ia3": (
        ("T5-Base", "81.3 (0.25 MB)", "80.0 (0.01 MB)", "-1.3 / 25x"),
        ("T5-Large", "86.2 (0.66 MB)", "85.9 (0.04 MB)", "-0.3 / 16x"),
        ("T0-3B", "89.3 (1.03 MB)", "88.4 (0.06 MB)", "-0.9 / 17x"),
    ),
    "lora": (
        ("T5-Base", "79.2 (6.19 MB)", "78.1 (0.35 MB)", "-1.1 / 17x"),
        ("T5-Large", "84.5 (16.50 MB)", "84.6 (1.37 MB)", "+0.1 / 12x"),
        ("T0-3B", "89.5 (33.75 MB)", "89.5 (2.60 MB)", "0.0 / 13x"),
    ),
}
"""Seven GLUE tasks: model, dense, ComPEFT, gain and compression, by method."""

TABLE_3: Final = {
    "ia3": {
        ("dense", "average"): (53.7, 55.4, 74.5),
        ("dense", "task arithmetic"): (60.0, 62.7, 77.8),
        ("compressed", "task arithmetic"): (59.7, 61.9, 80.0),
        ("dense", "ties"): (55.5, 61.3, 71.7),
        ("compressed", "ties"): (55.6, 60.4, 76.2),
    },
    "lora": {
        ("dense", "average"): (49.3, 50.2, 73.1),
        ("dense", "task arithmetic"): (52.8, 61.6, 75.0),
        ("compressed", "task arithmetic"): (53.9, 64.9, 75.6),
        ("dense", "ties"): (49.2, 57.3, 73.4),
        ("compressed", "ties"): (49.2, 61.4, 75.8),
    },
}
"""Merged models of T5-Base, T5-Large and T0-3B, by method, then by form and rule."""

TABLE_4: Final = (
    ("BERT-Base", "87.2 (0.21 GB)", "86.8 (0.011 GB)", "-0.4 / 19x"),
    ("BERT-Large", "86.3 (0.64 GB)", "86.1 (0.036 GB)", "-0.2 / 18x"),
    ("RoBERTa-Base", "85.5 (0.24 GB)", "83.3 (0.013 GB)", "-2.2 / 18x"),
    ("RoBERTa-Large", "88.6 (0.68 GB)", "89.2 (0.052 GB)", "+0.6 / 13x"),
    ("T5v1.1-Base", "74.1 (0.47 GB)", "75.8 (0.032 GB)", "+1.7 / 15x"),
    ("T5v1.1-Large", "84.0 (1.5 GB)", "82.2 (0.11 GB)", "-1.8 / 14x"),
    ("T5-Base", "82.8 (0.43 GB)", "78.1 (0.032 GB)", "-4.7 / 13x"),
    ("T5-Large", "85.2 (1.41 GB)", "84.7 (0.12 GB)", "-0.5 / 12x"),
)
"""Full fine-tuning, seven GLUE tasks: model, dense, ComPEFT, gain and compression."""
