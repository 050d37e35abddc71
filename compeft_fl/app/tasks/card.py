"""The card of an adapter folder: which base model it is for, what it learned, what that cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from compeft_fl.results.units import percent, size

if TYPE_CHECKING:
    from compeft_fl.results.journal import RunRecord

__all__ = ["CARD", "write"]

CARD: Final = "README.md"
_KEYS: Final = (
    "task", "model", "quantization", "data", "peft-method", "strategy", "density", "codec",
    "learning-rate", "schedule", "batch-size", "local-steps", "local-epochs", "max-length", "seed",
)  # fmt: skip


def write(folder: Path, base_model: str, record: RunRecord, *, adapter: bool = True) -> None:
    """Write ``README.md``: the model card that Hugging Face reads, with the run's table.

    ``adapter``: the folder is PEFT's; otherwise it is a model of its own.
    """
    config = record.config
    name = "peft" if adapter else "transformers"
    library = f"---\nlibrary_name: {name}\n" + f"base_model: {json.dumps(base_model)}\n"
    what = "An adapter for" if adapter else "A fine-tuning of"
    lines = [
        f"{library}tags: [federated-learning, compeft-fl]\n---\n",
        f"# {what} {_plain(base_model)}\n",
        f"Trained by compeft-fl, federated: run {_plain(record.scenario)}, {record.nodes} nodes, "
        f"{record.num_parameters:,} parameters.\n",
        "| key | value |",
        "|---|---|",
        *(f"| {key} | {_plain(str(config[key]))} |" for key in _KEYS if key in config),
        "",
        *_table(record),
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _table(record: RunRecord) -> list[str]:
    """The run by rounds."""
    further = sorted({name for each in record.rounds for name in each.more})
    heads = ["round", "accuracy", "loss", *further, "sent up", "sent down"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for index, each in enumerate(record.rounds):
        cells = [str(index), percent(each.accuracy), _figure(each.loss)]
        cells += [_figure(each.more.get(name)) for name in further]
        cells += [size(each.uplink_payload_bytes), size(each.downlink_payload_bytes)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _plain(text: str) -> str:
    """A name that breaks neither the table nor the head of the card."""
    return " ".join(text.replace("|", "/").split())
