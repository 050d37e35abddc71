"""Files to checkpoint folders: the base plus one task vector, or plus the merge of several.

Base, files and the new folder are walked once, tensor by tensor and piece by piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from compeft_fl.adapters.carried import merge_carried
from compeft_fl.adapters.weights import PIECE, StoredTensor
from compeft_fl.codecs.dense import narrowed
from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import AdapterError, LayoutError, NonFiniteError, ParameterError
from compeft_fl.full import companions
from compeft_fl.full.files import StoredCheckpoint
from compeft_fl.full.folders import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_SHARD_BYTES,
    Checkpoint,
    ShardWriter,
)
from compeft_fl.full.matching import check_layout, rows_name
from compeft_fl.merging.accumulators import Accumulator
from compeft_fl.printable import quoted
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec, is_torch

__all__ = ["merge_checkpoints", "restore_checkpoint"]

_MERGED: Final = 1 << 17  # parameters that are merged at once
_STORED: Final = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

Changes = Iterator[TaskVector]


def restore_checkpoint(
    stored: StoredCheckpoint,
    base: Checkpoint,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint of a file: the base plus its task vector, each tensor in its own type.

    Parameters
    ----------
    stored : StoredCheckpoint
    base : Checkpoint
        The one with which the file was made.
    folder : Path
        See `compeft_fl.adapters.check_output`.
    max_shard_bytes : int
        A file of weights has no more, unless one tensor has.

    Raises
    ------
    AdapterError
        Another base; what was written is gone.
    NonFiniteError
        A value that the tensor's data type does not hold.
    WireError
        Bytes that a decoder rejects.
    """
    _write(stored, stored.carried, stored.pieces(PIECE), base, folder, max_shard_bytes)


def merge_checkpoints(
    stored: Sequence[StoredCheckpoint],
    rule: Callable[[], Accumulator],
    base: Checkpoint,
    folder: Path,
    *,
    weights: Sequence[float] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the merge of several files over one base.

    Parameters
    ----------
    stored : sequence of StoredCheckpoint
        Not empty; the first gives the configuration.
    rule : callable
        Makes an empty accumulator: ``functools.partial(compeft_fl.Ties, 0.4)``.
    weights : sequence of float, optional
        One for each file, over 0; default 1.
    base, folder, max_shard_bytes
        As `restore_checkpoint`.

    Raises
    ------
    LayoutError, AdapterError
        Files whose tensors differ, or over different bases; the message says which.
    ParameterError
        A weight that is not over 0, or another number of them.
    """
    weights = [1.0] * len(stored) if weights is None else list(weights)
    if len(weights) != len(stored) or not stored:
        raise ParameterError(f"expected {len(stored)} weights, found {len(weights)}")
    first = stored[0]
    for other in stored[1:]:
        _check_same(first, other)
    tensors = [_without_files(each.carried) for each in stored]
    carried = {**_files(first.carried), **merge_carried(tensors, weights)}

    def merged() -> Changes:
        for pieces in zip(*(each.pieces(PIECE) for each in stored), strict=True):
            layout = pieces[0].layout
            values = np.empty(layout.num_parameters, np.float32)
            for start in range(0, values.size, _MERGED):  # sums take 32 bytes a parameter
                part = Layout([TensorSpec("part", (min(_MERGED, values.size - start),))])
                accumulator = rule()
                for piece, weight in zip(pieces, weights, strict=True):
                    dense: Any = piece.values
                    accumulator.add(TaskVector(part, dense[start : start + _MERGED]), weight)
                values[start : start + _MERGED] = accumulator.result().values
            yield TaskVector(layout, values)

    _write(first, carried, merged(), base, folder, max_shard_bytes)


def _check_same(one: StoredCheckpoint, other: StoredCheckpoint) -> None:
    where = f"{one.path} and {other.path}"
    if one.layout != other.layout or one.grown != other.grown or one.names != other.names:
        a = {tensor.name: tensor for tensor in one.layout.tensors}
        b = {tensor.name: tensor for tensor in other.layout.tensors}
        names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
        names += sorted(set(one.grown.items()) ^ set(other.grown.items()))[:1]  # type: ignore[arg-type]
        raise LayoutError(f"{where} differ in their tensors: {quoted(names[:1])}")
    if one.start != other.start:
        raise AdapterError(f"{where} are over different bases: {one.start}, {other.start}")


def _without_files(carried: Mapping[str, Any]) -> dict[str, Any]:
    return {n: tensor for n, tensor in carried.items() if not n.startswith(companions.PREFIX)}


def _files(carried: Mapping[str, Any]) -> dict[str, Any]:
    return {n: tensor for n, tensor in carried.items() if n.startswith(companions.PREFIX)}


def _write(
    stored: StoredCheckpoint,
    carried: Mapping[str, Any],
    changes: Changes,
    base: Checkpoint,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write a folder: base plus changes, and what is carried."""
    base_names = check_layout(stored.layout, base.state, stored.names)
    tensors = _tensors(stored, carried, base)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=16)
    try:
        with contextlib.ExitStack() as stack:
            if stored.config:
                config = stack.enter_context(replacing(folder / CONFIG_FILE))
                text = json.dumps(stored.config, indent=2, ensure_ascii=False) + "\n"
                config.write_text(text, encoding="utf-8")
            writer = stack.enter_context(
                ShardWriter(folder, list(tensors.values()), max_shard_bytes)
            )
            trained = {tensor.name: tensor for tensor in stored.layout.tensors}
            for name, tensor in tensors.items():
                if name in trained:
                    more = carried.get(rows_name(name, trained[name].shape[0]))
                    there = base_names[name]
                    chunks = _sums(base, there, tensor, trained[name].size, changes, digest)
                    writer.write(name, _followed(chunks, more))
                elif name in stored.tied:
                    writer.write(name, writer.written(stored.tied[name]))
                elif name in carried:
                    writer.write(name, [_raw(carried[name])])
                else:
                    writer.write(name, base.state.raw(stored.names.of(name, base.state)))
            for _ in changes:
                pass
            found = f"blake2b:{digest.hexdigest()}"
            if found != stored.start:
                raise AdapterError(
                    f"expected the base {stored.start} with which the file was made, found {found}"
                )
        _forget_others(folder, tensors, max_shard_bytes)
        companions.restore(folder, base.folder, _files(carried))
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _tensors(
    stored: StoredCheckpoint, carried: Mapping[str, Any], base: Checkpoint
) -> dict[str, StoredTensor]:
    """All tensors of the new folder, by name and in their order."""
    found: dict[str, StoredTensor] = {}
    rows = {}
    for tensor in stored.layout.tensors:
        shape = stored.grown.get(tensor.name, tensor.shape)
        found[tensor.name] = StoredTensor(tensor.name, _STORED[tensor.dtype], shape, 0)
        if tensor.name in stored.grown:
            name = rows_name(tensor.name, tensor.shape[0])
            expected = (shape[0] - tensor.shape[0], *shape[1:])
            if name not in carried or tuple(carried[name].shape) != expected:
                raise AdapterError(
                    f"expected the further rows of {quoted(tensor.name)}, found none"
                )
            rows[name] = tensor.name
    for name, value in _without_files(carried).items():
        if name not in rows:
            found[name] = StoredTensor(name, _stored_dtype(value), tuple(value.shape), 0)
    for name in stored.as_base:
        there = stored.names.of(name, base.state)
        if there not in base.state:
            raise AdapterError(f"expected {quoted(there)} in the base, found none of that name")
        known = base.state.tensors[there]
        found[name] = StoredTensor(name, known.stored_dtype, known.shape, 0)
    for name, of in stored.tied.items():
        found[name] = StoredTensor(name, found[of].stored_dtype, found[of].shape, 0)
    return {name: found[name] for name in sorted(found)}


def _sums(
    base: Checkpoint,
    there: str,
    tensor: StoredTensor,
    size: int,
    changes: Changes,
    digest: Any,
) -> Iterator[bytes]:
    """A tensor's bytes: the base's values and the change, rounded to the tensor's own type."""
    for (_, values), change in zip(base.state.pieces(there, size), changes, strict=False):
        digest.update(values.astype("<f4", copy=False).tobytes())
        if change.num_parameters != values.size:
            raise AdapterError(f"expected {values.size} values for {quoted(tensor.name)}")
        with np.errstate(over="ignore"):
            total = values + change.values
        try:
            yield narrowed(tensor.stored_dtype, total)
        except ParameterError:
            raise NonFiniteError(
                f"expected values that {tensor.stored_dtype} holds in {quoted(tensor.name)}"
            ) from None


def _followed(chunks: Iterator[bytes], more: Any) -> Iterator[bytes]:
    yield from chunks
    if more is not None:
        yield _raw(more)


def _raw(value: Any) -> bytes:
    """A tensor's bytes, little-endian."""
    if is_torch(value):
        import torch

        return bytes(value.contiguous().view(torch.uint8).numpy().tobytes())
    array: Any = np.ascontiguousarray(value)
    return bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _stored_dtype(value: Any) -> str:
    if is_torch(value):
        return {"bfloat16": "BF16"}.get(str(value.dtype).rpartition(".")[2]) or _stored_dtype(
            value.numpy()
        )
    kind = np.dtype(value.dtype)
    if kind.kind == "b":
        return "BOOL"
    return {"f": "F", "i": "I", "u": "U"}[kind.kind] + str(8 * kind.itemsize)


def _forget_others(folder: Path, tensors: Mapping[str, StoredTensor], most: int) -> None:
    """Remove weights that an earlier writing into this folder has left beside those of now."""
    names = ShardWriter(folder, list(tensors.values()), most).names
    for file in folder.glob("model*.safetensors"):
        if file.name not in names:
            file.unlink()
    if len(names) == 1:
        (folder / INDEX_FILE).unlink(missing_ok=True)
