"""What ``compress``, ``decompress``, ``inspect`` and ``merge`` do with whole models.

`compeft_fl.cli.adapters` hands over what is not an adapter.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.adapters import check_output
from compeft_fl.cli.tables import Table, say
from compeft_fl.errors import AdapterError, CompeftError, ParameterError
from compeft_fl.full import (
    StoredCheckpoint,
    compress_checkpoint,
    is_checkpoint_file,
    is_checkpoint_folder,
    merge_checkpoints,
    open_checkpoint,
    read_checkpoint,
    restore_checkpoint,
)
from compeft_fl.merging.accumulators import Accumulator, Average, TaskArithmetic, Ties
from compeft_fl.printable import quoted
from compeft_fl.ternary import TernaryVector

__all__ = ["compress", "decompress", "inspect", "merge"]


def compress(options: argparse.Namespace, density: float, scale: str | float, support: str) -> int:
    """Compress a base and its full fine-tuning to a file."""
    if len(options.folders) != 2:
        raise ParameterError(
            f"expected an adapter folder, or a base model's and a fine-tuned one's; found "
            f"{len(options.folders)} folders"
        )
    if options.init:
        raise ParameterError("--init belongs to an adapter: of two folders the first is the start")
    for folder in options.folders:
        if (folder / "adapter_config.json").is_file() and not is_checkpoint_folder(folder):
            raise AdapterError(
                f"{folder}: expected a whole model, found an adapter: compress it alone, with the "
                "one before training as --init DIR"
            )
    base, finetuned = (open_checkpoint(folder) for folder in options.folders)
    made = compress_checkpoint(
        base,
        finetuned,
        options.output,
        density=density,
        scale=scale,
        support=support,
        codec=options.codec,
    )
    for name in made.plan.reshaped:
        ours = finetuned.state.tensors[name].shape
        theirs = base.state.tensors[made.plan.names.of(name, base.state)].shape
        say(f"kept as it is: {name}, {_shape(ours)}, which is {_shape(theirs)} in the base")
    for name, shape in made.plan.grown.items():
        rows = next(each.shape[0] for each in made.plan.layout.tensors if each.name == name)
        say(f"kept as they are: {shape[0] - rows:,} new rows of {name}, {_shape(shape)}")
    if made.plan.missing:
        names = ", ".join(map(quoted, made.plan.missing[:_NAMED]))
        rest = len(made.plan.missing) - _NAMED
        more = f" and {rest:,} more" if rest > 0 else ""
        say(f"left out, because {finetuned.folder} has none of that name: {names}{more}")
    _print_summary([options.output], [read_checkpoint(options.output)], None)
    return 0


_NAMED: Final = 3  # of the tensors that are left out


def decompress(options: argparse.Namespace) -> int:
    """Restore a whole model's folder."""
    stored = _read(options.file, options)
    restore_checkpoint(stored, open_checkpoint(_base(options)), options.output)
    say(f"{options.output}: {len(stored.layout.tensors)} tensors fine-tuned, {_model(stored)}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Show what is in files of whole models."""
    stored = [_read(file, options) for file in options.files]
    tensors: list[Table] = []
    _print_summary(options.files, stored, tensors if options.tensors else None)
    for table in tensors:
        table.print()
    return 0


def merge(options: argparse.Namespace) -> int:
    """Merge files of whole models over one base."""
    if options.tie is not None and options.method != "ties":
        raise ParameterError(f"--tie belongs to ties, not to {options.method}")
    if options.method == "average" and options.scaling is not None:
        raise ParameterError("--scaling belongs to ties and task-arithmetic, not to average")
    stored = [_read(file, options) for file in options.files]
    scaling = 1.0 if options.scaling is None else options.scaling
    rules: dict[str, Any] = {
        "average": Average,
        "task-arithmetic": partial(TaskArithmetic, scaling),
        "ties": partial(Ties, scaling, options.tie or "zero"),
    }
    rule: partial[Accumulator] = partial(rules[options.method])
    base = open_checkpoint(_base(options))
    merge_checkpoints(stored, rule, base, options.output, weights=options.weights)
    say(f"{options.output}: {len(stored)} whole models merged by {options.method}")
    return 0


def _base(options: argparse.Namespace) -> Path:
    check_output(options.output, force=options.force)
    if options.init is None:
        raise AdapterError("the update is relative to a whole model: give it with --base DIR")
    if options.init.resolve() == options.output.resolve():
        raise AdapterError(f"{options.output}: expected another folder than the base's")
    folder: Path = options.init
    return folder


def _read(file: Path, options: argparse.Namespace) -> StoredCheckpoint:
    """A file; an error names it."""
    try:
        if file.is_file() and not is_checkpoint_file(file):
            raise AdapterError("expected whole models only, found an adapter's file, or another")
        return read_checkpoint(file, max_parameters=options.max_parameters)
    except CompeftError as error:
        raise type(error)(f"{file}: {error}") from None


# --- tables -----------------------------------------------------------------------------------


def _print_summary(
    names: list[Path], stored: list[StoredCheckpoint], tensors: list[Table] | None
) -> None:
    """Two tables, a row a file; and with ``tensors``, one more of each file's tensors."""
    columns = ["file", "tensors", "parameters", "density", "scale", "codec", "bits/param"]
    columns += ["bytes", "fp16/file", "fp32/file", "cosine", "error"]
    table = Table(None, columns, left=("file",))
    columns = ["file", "method", "model", "grown", "tied", "as base", "carried", "carried bytes"]
    origins = Table(None, columns, left=("file", "method", "model"))
    for name, one in zip(names, stored, strict=True):
        counts, scale, body_bytes = _counted(one)
        d = one.layout.num_parameters
        table.add_row(
            str(name),
            str(len(one.layout.tensors)),
            f"{d:,}",
            f"{sum(counts) / max(1, d):.4g}",
            scale,
            one.codec,
            f"{8 * body_bytes / max(1, d):.3f}",
            f"{one.num_bytes:,}",
            f"{2 * d / one.num_bytes:.1f}x",
            f"{4 * d / one.num_bytes:.1f}x",
            _figure(one.metadata.get("cosine")),
            _figure(one.metadata.get("relative_error")),
        )
        kept = sum(int(np.prod(tuple(each.shape))) * _size(each) for each in one.carried.values())
        origins.add_row(
            str(name),
            "FULL",
            _model(one),
            str(len(one.grown)),
            str(len(one.tied)),
            str(len(one.as_base)),
            str(len(one.carried)),
            f"{kept:,}",
        )
        if tensors is not None:
            tensors.append(_tensors_of(name, one, counts))
    table.print()
    origins.print()


def _counted(stored: StoredCheckpoint) -> tuple[list[int], str, int]:
    """How many parameters of each tensor are kept, the scale, and the bytes of the bodies."""
    offsets = stored.layout.offsets
    counts = np.zeros(len(stored.layout.tensors), np.int64)
    scale, total = "-", 0
    for num_bytes, start, part in stored.parts():
        total += num_bytes
        if isinstance(part, TernaryVector):
            scale = f"{float(part.scales[0]):.4g}"
        values: Any = part.to_task_vector().values
        at, stop = start, start + part.num_parameters
        tensor = int(np.searchsorted(offsets, start, side="right")) - 1
        while at < stop:
            end = min(stop, int(offsets[tensor + 1]))
            counts[tensor] += np.count_nonzero(values[at - start : end - start])
            at, tensor = end, tensor + 1
    return counts.tolist(), scale, total


def _tensors_of(name: Path, stored: StoredCheckpoint, counts: list[int]) -> Table:
    columns = ["tensor", "shape", "type", "parameters", "kept", "density"]
    table = Table(f"{name} (FULL)", columns, left=("tensor", "shape", "type"))
    for tensor, count in zip(stored.layout.tensors, counts, strict=True):
        density = f"{count / max(1, tensor.size):.4g}"
        row = (tensor.name, _shape(tensor.shape), tensor.dtype, f"{tensor.size:,}")
        table.add_row(*row, f"{count:,}", density)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _figure(text: str | None) -> str:
    try:
        return f"{float(text or ''):.4f}"
    except ValueError:
        return "-"


def _size(tensor: Any) -> int:
    dtype = getattr(tensor, "dtype", None)
    return int(getattr(dtype, "itemsize", 1))


def _model(stored: StoredCheckpoint) -> str:
    """The model's class, as its configuration has it."""
    kinds = stored.config.get("architectures")
    if isinstance(kinds, list) and kinds and isinstance(kinds[0], str):
        return kinds[0]
    return str(stored.config.get("model_type", "-"))
