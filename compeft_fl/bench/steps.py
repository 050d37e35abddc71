"""What a catch-up on the grid costs: steps.csv and steps.md, a part of ``compeft-fl bench codecs``.

A server's versions (`compeft_fl.exchange.downlink`) towards real task vectors in turn, and towards
synthetic ones over a large adapter; what some versions have moved is then encoded as steps. Beside
the bits stands the order-0 entropy: that of each tensor's integers, were they independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.bench import layouts, results
from compeft_fl.bench.measure import best_seconds
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.task_vector import TaskVector
from compeft_fl.wire.messages import decode_parts, encode_parts

__all__ = ["entropy_bits", "rows_of", "run"]

MISSED: Final = (2, 5, 10, 20)
DENSITIES: Final = (0.05, 0.2)
HEADLINE: Final = "mistral-7b-r32"
_PULL: Final = 0.95  # of theta each round: training with some weight decay
_STEP: Final = 0.3  # of a task vector each round


def run(out: Path, command: str, real: Mapping[str, TaskVector], quick: bool) -> None:
    """Measure, show and write."""
    rows: list[dict[str, Any]] = []
    layout = layouts.get("t5-base-r16" if quick else HEADLINE).layout
    walks = [("real, MiniLM", _real(real))] if real else []
    walks.append((layouts.get("t5-base-r16" if quick else HEADLINE).text, _synthetic(layout)))
    with results.Progress("steps", len(walks) * len(DENSITIES)) as progress:
        for name, taus in walks:
            for density in DENSITIES:
                progress.step(f"{name}, density {density:g}", 1)
                rows += rows_of(name, taus, density)
    results.write_csv(out / "steps.csv", rows)
    heads = ["adapter", "density", "versions missed", "not 0", "bits", "entropy", "of entropy"]
    heads += ["each delta, bits", "encode M/s", "decode M/s"]
    table = [
        [
            row["adapter"],
            f"{row['density']:g}",
            "all" if row["missed"] == MISSED[-1] else str(row["missed"]),
            f"{100 * row['nonzero']:.0f} %",
            f"{row['bits']:.3f}",
            f"{row['entropy_bits']:.3f}",
            f"{row['of_entropy']:.3f}",
            f"{row['chain_bits']:.3f}",
            f"{row['encode_m_s']:.0f}",
            f"{row['decode_m_s']:.0f}",
        ]
        for row in rows
    ]
    notes = (
        f"Of {MISSED[-1]} versions of a way down at that density, those that a node has missed; "
        "bits a parameter of whole messages. The entropy is that of each tensor's integers. M/s: "
        "millions of parameters a second on one core, the fastest of some runs."
    )
    results.write_markdown(out / "steps.md", command, heads, table, notes)
    results.show_table("catch-ups", heads, table)


def _real(vectors: Mapping[str, TaskVector]) -> list[TaskVector]:
    """The LoRA tensors that all real task vectors have."""
    states = [vector.to_dict() for vector in vectors.values()]
    names = [n for n in states[0] if "lora" in n and all(n in state for state in states)]
    return [TaskVector.from_dict({name: state[name] for name in names}) for state in states]


def _synthetic(layout: Any) -> list[TaskVector]:
    return [layouts.synthetic(layout, seed=1 + seed) for seed in range(4)]


def _walked(taus: Sequence[TaskVector], density: float) -> Iterator[Downlink]:
    """A way down after each version towards one of the task vectors, drawn anew."""
    rng, layout = np.random.default_rng(0), taus[0].layout
    theta: Any = np.zeros(layout.num_parameters, np.float32)
    downlink = Downlink(TaskVector(layout, theta), density=density)
    for _ in range(MISSED[-1]):
        tau = np.asarray(taus[int(rng.integers(len(taus)))].values)
        theta = np.float32(_PULL) * theta + np.float32(_STEP) * tau
        downlink.advance(TaskVector(layout, theta))
        yield downlink


def rows_of(name: str, taus: Sequence[TaskVector], density: float) -> list[dict[str, Any]]:
    """A row of steps.csv for each number of missed versions."""
    shared, deltas, downlink = [np.zeros(taus[0].num_parameters, np.float32)], [0], None
    for downlink in _walked(taus, density):
        deltas.append(downlink.lacking(downlink.version - 1).num_bytes)
        kept = downlink.version in {MISSED[-1] - missed for missed in MISSED}
        shared.append(downlink.shared if kept else np.zeros(0, np.float32))
    if downlink is None or downlink.version != MISSED[-1]:
        raise RuntimeError("a version was not made")
    d = taus[0].num_parameters
    rows = []
    for missed in MISSED:
        moved = TaskVector(taus[0].layout, downlink.shared - shared[MISSED[-1] - missed])
        blobs, encoding = best_seconds(partial(encode_parts, moved, "steps", layout_by_id=True))
        back, decoding = best_seconds(partial(decode_parts, blobs, layout=moved.layout))
        if not np.array_equal(back.to_task_vector().values, moved.values):
            raise RuntimeError("steps are not lossless")
        size, entropy = sum(map(len, blobs)), entropy_bits(moved)
        rows.append(
            {
                "adapter": name,
                "density": density,
                "missed": missed,
                "num_parameters": d,
                "nonzero": round(float(np.count_nonzero(moved.values)) / d, 5),
                "bytes": size,
                "bits": round(8 * size / d, 5),
                "entropy_bits": round(entropy, 5),
                "of_entropy": round(8 * size / d / entropy, 4),
                "chain_bits": round(8 * sum(deltas[-missed:]) / d, 5),
                "encode_m_s": round(d / encoding / 1e6, 1),
                "decode_m_s": round(d / decoding / 1e6, 1),
            }
        )
    return rows


def entropy_bits(vector: TaskVector) -> float:
    """The order-0 entropy of a vector's values, tensor by tensor; bits a parameter."""
    total, values = 0.0, np.asarray(vector.values)
    for _, where in vector.layout.slices():
        _, counts = np.unique(values[where], return_counts=True)
        total -= float((counts * np.log2(counts / counts.sum())).sum())
    return total / max(1, values.size)
