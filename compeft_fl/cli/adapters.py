"""What ``compeft-fl compress``, ``decompress``, ``inspect``, ``merge`` and ``similarity`` do.

Each function takes the parsed arguments of `compeft_fl.cli` and returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl import adapters
from compeft_fl.adapters import files
from compeft_fl.cli.tables import Table, say
from compeft_fl.codecs.base import Update
from compeft_fl.compeft import check_density, check_scale
from compeft_fl.compeft import compress as compress_vector
from compeft_fl.errors import AdapterError, CompeftError, LayoutError, ParameterError
from compeft_fl.merging.accumulators import Accumulator, Average, TaskArithmetic, Ties
from compeft_fl.task_vector import TensorSpec
from compeft_fl.ternary import TernaryVector

__all__ = ["compress", "decompress", "inspect", "merge", "similarity"]

# Settings of an adapter that change what its tensors mean: adapters that differ in one don't merge.
_MEANING: Final = ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern")


def compress(options: argparse.Namespace) -> int:
    """Compress an adapter folder to a file, and show what became of it."""
    dense = options.codec.startswith("dense")
    density = 0.05 if options.density is None else options.density
    scale = "norm" if options.scale is None else options.scale
    support = options.support or "fixed"
    check_density(density)
    check_scale(scale)
    if dense and any(x is not None for x in (options.density, options.scale, options.support)):
        raise ParameterError(
            f"codec {options.codec} keeps all parameters: no --density, no --scale, no --support"
        )
    if options.output.is_dir():
        raise AdapterError(f"{options.output}: expected a file to write to, found a folder")
    adapter = adapters.load_folder(options.folder)
    init = adapters.load_folder(options.init) if options.init else None
    tau, start = adapters.task_vector(adapter, init)
    tau.check_finite()
    update = tau if dense else compress_vector(tau, density, scale, support)
    files.write_update(options.output, update, adapter.config, start.tag, options.codec)
    written = files.read_update(options.output, max_parameters=update.num_parameters)
    _print_summary([options.output], [written])
    if isinstance(update, TernaryVector) and init is None:
        _warn_of_lost_parts(update)
    return 0


def _warn_of_lost_parts(update: TernaryVector) -> None:
    """Say it where next to nothing is left of one of LoRA's two matrices: their product is lost."""
    kept, size = Counter[str](), Counter[str]()
    for tensor, count in _nonzeros(update):
        for part in tensor.name.split("."):
            if part in {"lora_A", "lora_B"}:
                kept[part] += count
                size[part] += tensor.size
    for part in size:
        density = kept[part] / max(1, size[part])
        if density < update.density / 10:
            print(
                f"compeft-fl compress: warning: of {part} only {density:.2%} is kept, so that the "
                "adapter does next to nothing: give the adapter as it was before training with "
                "--init DIR",
                file=sys.stderr,
            )


def decompress(options: argparse.Namespace) -> int:
    """Restore an adapter folder."""
    adapters.check_output(options.output, force=options.force)
    stored = _read(options.file, options)
    init = adapters.load_folder(options.init) if options.init else None
    adapter = files.restore(stored, init)
    adapters.save_folder(adapter, options.output, force=options.force)
    say(f"{options.output}: {len(adapter.state)} tensors, {adapter.method}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Show what is in files."""
    stored = [_read(file, options) for file in options.files]
    _print_summary(options.files, stored)
    if options.tensors:
        for file, one in zip(options.files, stored, strict=True):
            _print_tensors(file, one)
    return 0


def merge(options: argparse.Namespace) -> int:
    """Merge files into one adapter folder, one file in memory at a time."""
    adapters.check_output(options.output, force=options.force)
    method = _method(options)
    weights = options.weights or [1.0] * len(options.files)
    if len(weights) != len(options.files):
        raise ParameterError(f"expected {len(options.files)} weights, found {len(weights)}")
    first: files.StoredUpdate | None = None
    for file, weight in zip(options.files, weights, strict=True):
        stored = _read(file, options)
        if first is None:
            first = stored
        _check_same_kind(options.files[0], first, file, stored)
        try:
            method.add(stored.update, weight)
        except CompeftError as error:
            raise type(error)(f"{file}: {error}") from None
    assert first is not None
    merged = files.StoredUpdate(method.result(), first.config, first.start, "dense", 0, 0)
    init = adapters.load_folder(options.init) if options.init else None
    adapter = files.restore(merged, init)
    adapters.save_folder(adapter, options.output, force=options.force)
    say(f"{options.output}: {method.count} adapters merged by {options.method}")
    return 0


def _method(options: argparse.Namespace) -> Accumulator:
    if options.tie is not None and options.method != "ties":
        raise ParameterError(f"--tie belongs to ties, not to {options.method}")
    if options.method == "average":
        if options.scaling is not None:
            raise ParameterError("--scaling belongs to ties and task-arithmetic, not to average")
        return Average()
    scaling = 1.0 if options.scaling is None else options.scaling
    if options.method == "task-arithmetic":
        return TaskArithmetic(scaling)
    return Ties(scaling, options.tie or "zero")


def similarity(options: argparse.Namespace) -> int:
    """Show a matrix of how much files agree."""
    stored = [_read(file, options) for file in options.files]
    for file, other in zip(options.files[1:], stored[1:], strict=True):
        _check_same_kind(options.files[0], stored[0], file, other)
    measure = _cosine if options.measure == "cosine" else _sign_agreement
    updates = [one.update for one in stored]
    size = len(updates)
    matrix = np.ones((size, size))
    for i in range(size):
        for j in range(i, size):
            matrix[i, j] = matrix[j, i] = measure(updates[i], updates[j])
    table = Table(options.measure, ["", "file", *map(str, range(1, size + 1))], left=("file",))
    for i, file in enumerate(options.files):
        cells = ["-" if np.isnan(value) else f"{value:.4f}" for value in matrix[i]]
        table.add_row(str(i + 1), str(file), *cells)
    table.print()
    return 0


def _cosine(a: Update, b: Update) -> float:
    if isinstance(a, TernaryVector) and isinstance(b, TernaryVector):
        return a.cosine(b)
    x, y = (np.asarray(v.to_task_vector().values, np.float64) for v in (a, b))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else 0.0


def _sign_agreement(a: Update, b: Update) -> float:
    signs = [v if isinstance(v, TernaryVector) else compress_vector(v, density=1.0) for v in (a, b)]
    return signs[0].sign_agreement(signs[1])


def _read(file: Path, options: argparse.Namespace) -> files.StoredUpdate:
    """A file's update; an error names the file."""
    try:
        return files.read_update(file, max_parameters=options.max_parameters)
    except CompeftError as error:
        raise type(error)(f"{file}: {error}") from None


def _check_same_kind(
    file: Path, expected: files.StoredUpdate, other: Path, found: files.StoredUpdate
) -> None:
    """Raise where the tensors of two files don't mean the same."""
    if found.update.layout != expected.update.layout:
        a, b = expected.update.layout.tensors, found.update.layout.tensors
        text = f"{len(a)} and {len(b)} tensors"
        for ours, theirs in zip(a, b, strict=False):
            if ours != theirs:
                text = f"{ours.name} {ours.shape} {ours.dtype}"
                text += f" and {theirs.name} {theirs.shape} {theirs.dtype}"
                break
        raise LayoutError(f"{file} and {other} are for different layouts: {text}")
    if found.start != expected.start:
        raise AdapterError(
            f"{file} and {other} are relative to different starts: {expected.start}, {found.start}"
        )
    for key in ("peft_type", *_MEANING):
        values = expected.config.get(key), found.config.get(key)
        if values[0] != values[1]:
            raise AdapterError(f"{file} and {other} differ in {key}: {values[0]} and {values[1]}")


# --- tables -----------------------------------------------------------------------------------


def _print_summary(names: Sequence[Path], stored: Sequence[files.StoredUpdate]) -> None:
    columns = ["file", "tensors", "parameters", "density", "scale", "codec", "bits/param"]
    table = Table(None, [*columns, "bytes", "fp16/file", "fp32/file"], left=("file",))
    for name, one in zip(names, stored, strict=True):
        update, d = one.update, one.update.num_parameters
        kept = sum(count for _, count in _nonzeros(update))
        table.add_row(
            str(name),
            str(len(update.layout.tensors)),
            f"{d:,}",
            f"{kept / max(1, d):.4g}",
            _scale(update),
            one.codec,
            f"{8 * one.body_bytes / max(1, d):.3f}",
            f"{one.num_bytes:,}",
            f"{2 * d / one.num_bytes:.1f}x",
            f"{4 * d / one.num_bytes:.1f}x",
        )
    table.print()


def _print_tensors(name: Path, stored: files.StoredUpdate) -> None:
    update = stored.update
    columns = ["tensor", "shape", "type", "parameters", "kept", "density"]
    title = f"{name} ({stored.config['peft_type']})"
    table = Table(title, columns, left=("tensor", "shape", "type"))
    for tensor, count in _nonzeros(update):
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        density = f"{count / max(1, tensor.size):.4g}"
        table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.size:,}", f"{count:,}", density)
    table.print()


def _nonzeros(update: Update) -> Iterator[tuple[TensorSpec, int]]:
    """Each tensor with how many of its parameters are kept."""
    if isinstance(update, TernaryVector):
        counts = update.nonzeros_by_tensor().tolist()
        yield from zip(update.layout.tensors, counts, strict=True)
        return
    values: Any = update.to_task_vector().values
    for tensor, where in update.layout.slices():
        yield tensor, int(np.count_nonzero(values[where]))


def _scale(update: Update) -> str:
    if not isinstance(update, TernaryVector):
        return "-"
    if not update.scales.size:  # a layout without tensors may have no scale
        return "-"
    low, high = float(update.scales.min()), float(update.scales.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
