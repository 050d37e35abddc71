"""What ``compeft-fl compress``, ``decompress``, ``inspect``, ``merge`` and ``similarity`` do.

Each function takes the parsed arguments of `compeft_fl.cli` and returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl import adapters
from compeft_fl.adapters import files
from compeft_fl.adapters.compression import CompressedAdapter, compress_adapter, keep_adapter
from compeft_fl.adapters.meaning import base_model, check_known
from compeft_fl.adapters.merge import AdapterMerge, check_comparable
from compeft_fl.cli import whole_models
from compeft_fl.cli.tables import Table, say
from compeft_fl.codecs.base import Update
from compeft_fl.compeft import check_density, check_scale
from compeft_fl.compeft import compress as compress_vector
from compeft_fl.errors import AdapterError, CompeftError, ParameterError
from compeft_fl.full import is_checkpoint_file
from compeft_fl.task_vector import TensorSpec
from compeft_fl.ternary import TernaryVector

__all__ = ["compress", "decompress", "inspect", "merge", "similarity"]

# A cosine below which what was learned is as good as lost where there is no start.
_LOST: Final = 0.9


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
    factored = options.codec == "factored"
    if factored and any(x is not None for x in (options.scale, options.support)):
        raise ParameterError("codec factored has scales of its own: no --scale, no --support")
    if len(options.folders) != 1:
        return whole_models.compress(options, density, scale, support)
    adapter = adapters.open_folder(options.folders[0])
    init = adapters.open_folder(options.init) if options.init else None
    if dense:
        made = keep_adapter(adapter, init, options.codec)
    else:
        made = compress_adapter(
            adapter, init, density=density, scale=scale, support=support, factored=factored
        )
    num_bytes = files.write_update(
        options.output,
        made.update,
        adapter.config,
        made.start,
        options.codec,
        carried=made.carried,
        quality=made.quality,
        effect=made.effect,
    )
    stored = files.StoredUpdate(
        made.update,
        adapter.config,
        made.start,
        options.codec,
        num_bytes,
        files.body_bytes(options.output),
        made.carried,
        made.quality.cosine,
        made.quality.relative_error,
        made.effect,
    )
    _print_summary([options.output], [stored])
    _warn_of_loss(made)
    return 0


def _warn_of_loss(made: CompressedAdapter) -> None:
    """Say it where little is left of the change that factors without a start make."""
    if made.effect is not None and made.effect < _LOST:
        print(
            "compeft-fl compress: warning: of what the adapter does to the weights little is left: "
            f"the cosine of the change, before and after, is {made.effect:.2f}, because its "
            "factors are compressed with their random start; give the adapter as it was before "
            "training with --init DIR, or a higher --density",
            file=sys.stderr,
        )


def decompress(options: argparse.Namespace) -> int:
    """Restore an adapter folder."""
    adapters.check_output(options.output, force=options.force)
    if is_checkpoint_file(options.file):
        return whole_models.decompress(options)
    stored = _read(options.file, options)
    init = adapters.load_folder(options.init) if options.init else None
    adapter = files.restore(stored, init)
    adapters.save_folder(adapter, options.output, force=options.force)
    say(f"{options.output}: {len(adapter.state)} tensors, {adapter.method}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Show what is in files."""
    if any(is_checkpoint_file(file) for file in options.files):
        return whole_models.inspect(options)
    tensors: list[Table] = []

    def each() -> Iterator[files.StoredUpdate]:  # one in memory at a time
        for file in options.files:
            stored = _read(file, options)
            if options.tensors:
                tensors.append(_tensors_of(file, stored))
            yield stored

    _print_summary(options.files, each())
    for table in tensors:
        table.print()
    return 0


def merge(options: argparse.Namespace) -> int:
    """Merge files into one adapter folder, one file in memory at a time."""
    adapters.check_output(options.output, force=options.force)
    if any(is_checkpoint_file(file) for file in options.files):
        return whole_models.merge(options)
    merged = AdapterMerge(
        options.method, scaling=options.scaling, tie=options.tie, any_base=options.any_base
    )
    weights = options.weights or [1.0] * len(options.files)
    if len(weights) != len(options.files):
        raise ParameterError(f"expected {len(options.files)} weights, found {len(weights)}")
    for file, weight in zip(options.files, weights, strict=True):
        stored = _read(file, options)
        _named(file, merged.check, stored)
        _named(f"{options.files[0]} and {file}", merged.check_with_first, stored, colon=False)
        _named(file, merged.add, stored, weight)
    init = adapters.load_folder(options.init) if options.init else None
    adapter = files.restore(merged.result(), init)
    adapters.save_folder(adapter, options.output, force=options.force)
    say(f"{options.output}: {merged.count} adapters merged by {options.method}")
    return 0


def _named(
    what: Path | str, function: Callable[..., None], *arguments: Any, colon: bool = True
) -> None:
    """Call a function; an error names what it is about."""
    try:
        function(*arguments)
    except CompeftError as error:
        raise type(error)(f"{what}{':' if colon else ''} {error}") from None


def similarity(options: argparse.Namespace) -> int:
    """Show a matrix of how much files agree."""
    stored = [_read(file, options) for file in options.files]
    for file, one in zip(options.files, stored, strict=True):
        _named(file, check_known, one.config)
    for file, one in zip(options.files[1:], stored[1:], strict=True):
        pair = f"{options.files[0]} and {file}"
        check = partial(check_comparable, any_base=options.any_base)
        _named(pair, check, stored[0], one, colon=False)
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


# --- tables -----------------------------------------------------------------------------------


def _print_summary(names: Sequence[Path], stored: Iterable[files.StoredUpdate]) -> None:
    """Two tables, a row a file: what it takes and keeps, and what it belongs to."""
    columns = ["file", "tensors", "parameters", "density", "scale", "codec", "bits/param"]
    columns += ["bytes", "fp16/file", "fp32/file", "cosine", "error"]
    table = Table(None, columns, left=("file",))
    columns = ["file", "method", "base model", "r", "start", "--init", "carried", "change's cosine"]
    origins = Table(None, columns, left=("file", "method", "base model", "start", "--init"))
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
            _figure(one.cosine),
            _figure(one.relative_error),
        )
        origins.add_row(
            str(name),
            str(one.config["peft_type"]),
            base_model(one.config) or "-",
            str(one.config.get("r", "-")),
            one.start or "-",
            "needed" if one.needs_init else "not needed",
            str(len(one.carried)),
            _figure(one.effect_cosine),
        )
    table.print()
    origins.print()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tensors_of(name: Path, stored: files.StoredUpdate) -> Table:
    update = stored.update
    columns = ["tensor", "shape", "type", "parameters", "kept", "density"]
    title = f"{name} ({stored.config['peft_type']})"
    table = Table(title, columns, left=("tensor", "shape", "type"))
    for tensor, count in _nonzeros(update):
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        density = f"{count / max(1, tensor.size):.4g}"
        table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.size:,}", f"{count:,}", density)
    return table


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
