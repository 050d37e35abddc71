"""A fine-tuned checkpoint to a small file, in passes over both checkpoints, piece by piece.

The first pass counts magnitudes, the second finds the k-th of them (one more: the best support),
the last writes. What is kept is what `compeft_fl.compress` keeps of the whole task vector, in a few
megabytes of memory whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from compeft_fl import codecs
from compeft_fl.compeft import check_density, check_scale, check_support
from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import NonFiniteError, ParameterError
from compeft_fl.full import companions
from compeft_fl.full.files import CARRIED_MAGIC, PARTS_MAGIC, write_part
from compeft_fl.full.folders import Checkpoint, header
from compeft_fl.full.matching import Plan, rows_name
from compeft_fl.reduction.quality import Quality
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.layouts import part_layout

if TYPE_CHECKING:
    from compeft_fl.adapters.weights import StoredTensor
    from compeft_fl.kernels import cpu_pieces
    from compeft_fl.kernels.cpu import Floats

__all__ = ["CODECS", "Compressed", "compress_checkpoint"]

CODECS: Final = ("golomb", "bitmask", "context", "dense", "dense-fp16", "dense-bf16")
PART_PARAMETERS: Final = 1 << 21
_MOST_PARTS: Final = (
    2000  # of full ones; with those that end at a tensor, at most the 4096 of the format
)


@dataclass(frozen=True)
class Compressed:
    """What became of a checkpoint.

    Attributes
    ----------
    num_bytes : int
        Of the file.
    quality : Quality or None
        Of the update, against the task vector; None for a dense codec, which keeps all.
    plan : Plan
        What became of each tensor.
    """

    num_bytes: int
    quality: Quality | None
    plan: Plan


def compress_checkpoint(
    base: Checkpoint,
    finetuned: Checkpoint,
    path: Path,
    *,
    density: float = 0.05,
    scale: str | float = "norm",
    support: str = "fixed",
    codec: str = "golomb",
) -> Compressed:
    """Compress what fine-tuning changed in a whole model.

    Parameters
    ----------
    base, finetuned : Checkpoint
        See `compeft_fl.full.open_checkpoint`.
    path : Path
        The file to write, whole or not at all.
    density, scale, support
        As for `compeft_fl.compress`; the dense codecs keep all parameters.
    codec : str
        One of `CODECS`: those whose parts stand each for itself.

    Raises
    ------
    AdapterError
        Checkpoints that don't belong together; the message names a tensor.
    ParameterError
        As `compeft_fl.compress`, or a codec that does not write such an update.
    NonFiniteError
        NaN or Inf; the message names the tensor.
    """
    from compeft_fl.kernels import cpu_pieces

    check_density(density)
    check_scale(scale)
    check_support(support)
    if codec not in CODECS:
        raise ParameterError(f"expected a codec among {', '.join(CODECS)}; found {codec!r}")
    writer = codecs.get(codec)
    difference = _Difference(base, finetuned)
    plan = difference.plan
    seen = cpu_pieces.Choosing()
    for tensor, piece in difference.first_pieces():
        if not seen.add(piece):
            raise NonFiniteError(f"expected finite values, found others in tensor {tensor!r}")
    d = plan.layout.num_parameters
    if writer.ternary:
        k = max(1, int(density * d))
        choice = cpu_pieces.choose(seen, difference.pieces, k, support == "best")
        size = _scale_of(seen, choice, scale)
        quality = Quality(size * choice.sum_magnitudes, seen.sum_squares, size**2 * choice.count)
    else:
        choice, size, quality = None, 0.0, None
    described: dict[str, Any] = {
        "config": finetuned.config,
        "strip": plan.names.strip,
        "add": plan.names.add,
        "grown": {name: list(shape) for name, shape in plan.grown.items()},
        "as_base": plan.as_base,
        "tied": plan.tied,
    }
    metadata = {
        "checkpoint": json.dumps(described, sort_keys=True, separators=(",", ":")),
        "start": f"blake2b:{difference.digest}",
    }
    if quality is not None:
        metadata["cosine"] = f"{quality.cosine:.6g}"
        metadata["relative_error"] = f"{quality.relative_error:.6g}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as out:
        digest = _write_carried(out, finetuned, plan, companions.differing(base, finetuned))
        if digest:
            metadata["carried"] = digest
        out.write(PARTS_MAGIC)
        ties = 0 if choice is None else choice.ties
        values = _Joined(difference.pieces())
        for start, stop in spans(plan.layout, max(PART_PARAMETERS, -(-d // _MOST_PARTS))):
            part, layout = values.take(stop - start), part_layout(plan.layout, start, stop)
            update: Any = TaskVector(layout, part)
            if choice is not None:
                positive, negative, ties = cpu_pieces.masks(part, choice, ties)
                update = TernaryVector(layout, positive, negative, size)
            write_part(out, update, codec, plan.layout, start, {} if start else metadata)
        num_bytes = out.tell()
    return Compressed(num_bytes, quality, plan)


class _Difference:
    """The task vector of two checkpoints, read anew for each pass."""

    def __init__(self, base: Checkpoint, finetuned: Checkpoint) -> None:
        self._base, self._finetuned = base.state, finetuned.state
        self.plan = Plan.of(base, finetuned)
        self.digest = ""

    def first_pieces(self) -> Iterator[tuple[str, Floats]]:
        """The pieces with the tensors' names; they also make the digest of the base's values."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.plan.layout.tensors:
            for _, piece in self._base.pieces(self.plan.base_names[tensor.name]):
                digest.update(piece.astype("<f4", copy=False).tobytes())
            yield from ((tensor.name, piece) for piece in self._of(tensor))
        self.digest = digest.hexdigest()

    def pieces(self) -> Iterator[Floats]:
        """The pieces, in order."""
        for tensor in self.plan.layout.tensors:
            yield from self._of(tensor)

    def _of(self, tensor: TensorSpec) -> Iterator[Floats]:
        there = self._base.pieces(self.plan.base_names[tensor.name])
        here = self._finetuned.pieces(tensor.name, tensor.size)
        with np.errstate(invalid="ignore", over="ignore"):  # Inf - Inf: told by who takes it
            for (_, new), (_, old) in zip(here, there, strict=True):
                yield new - old


def _scale_of(seen: cpu_pieces.Choosing, choice: cpu_pieces.Choice, scale: str | float) -> float:
    """Step 3 of Algorithm 1, as `compeft_fl.compeft.scale_of` has it."""
    if not choice.count:
        return 0.0
    if scale == "norm":
        size = math.sqrt(seen.sum_squares / choice.count)
    elif scale == "mean":
        size = choice.sum_magnitudes / choice.count
    else:
        d = seen.num_parameters
        squares = seen.sum_squares - seen.sum_values**2 / d
        size = float(scale) * math.sqrt(max(0.0, squares / max(1, d - 1)))
    if size > float(np.finfo(np.float32).max):
        raise ParameterError(f"expected a scale that float32 holds, found {size}")
    return float(np.float32(size))


def spans(layout: Layout, size: int) -> Iterator[tuple[int, int]]:
    """Where the parts begin and end: whole tensors where ``size`` parameters hold them."""
    start = at = 0
    for length in layout.sizes:
        if at > start and at + length - start > size:
            yield start, at
            start = at
        at += length
        while at - start > size:
            yield start, start + size
            start += size
    if at > start:
        yield start, at


class _Joined:
    """Pieces, put together again to other lengths."""

    def __init__(self, pieces: Iterator[Floats]) -> None:
        self._pieces = pieces
        self._held: list[Floats] = []

    def take(self, size: int) -> Floats:
        """The next values."""
        held = sum(piece.size for piece in self._held)
        while held < size:
            self._held.append(next(self._pieces))
            held += self._held[-1].size
        whole = np.concatenate(self._held)
        self._held = [whole[size:].copy()] if held > size else []
        return whole[:size]


def _write_carried(
    out: BinaryIO, finetuned: Checkpoint, plan: Plan, texts: dict[str, bytes]
) -> str:
    """Write what is kept as it is before the update; its digest, empty where there is none."""
    from compeft_fl.adapters.weights import StoredTensor

    stored: list[StoredTensor] = []
    sources: list[tuple[str, int]] = []
    for name in plan.carried:
        stored.append(finetuned.state.tensors[name])
        sources.append((name, 0))
    for tensor in plan.layout.tensors:
        if tensor.name in plan.grown:
            whole = finetuned.state.tensors[tensor.name]
            rows = whole.shape[0] - tensor.shape[0]
            name = rows_name(tensor.name, tensor.shape[0])
            stored.append(StoredTensor(name, whole.stored_dtype, (rows, *whole.shape[1:]), 0))
            sources.append((tensor.name, tensor.size))
    for name, content in texts.items():
        stored.append(StoredTensor(name, "U8", (len(content),), 0))
    if not stored:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    head = header(stored)
    length_at = out.write(CARRIED_MAGIC)
    out.write(bytes(8))
    out.write(head)
    digest.update(head)
    for name, first in sources:
        for chunk in finetuned.state.raw(name, first):
            out.write(chunk)
            digest.update(chunk)
    for content in texts.values():
        out.write(content)
        digest.update(content)
    end = out.tell()
    out.seek(length_at)
    out.write((end - length_at - 8).to_bytes(8, "little"))
    out.seek(end)
    return digest.hexdigest()
