r"""``.compeft`` files: one adapter's update, and what restores its folder.

A file is one ``Update`` (proto/FORMAT.md) with its layout inline. Its metadata are
``adapter_config``, the content of PEFT's file of that name, and ``start``, what the update is
relative to: ``0``, ``1``, or ``blake2b:`` and the digest of the start's values (see
`compeft_fl.adapters`). An update that is too large for one message is stored as its parts: the 8
bytes ``COMPEFT\n``, then for each part its length (8 bytes, little-endian) and the part. No message
begins with the first of these bytes.

Tensors that are carried as they are (`compeft_fl.adapters.carried`) stand before all that: the 8
bytes ``COMPEFT+``, the length of their bytes (8 bytes, little-endian), and those of a safetensors
file; the metadata ``carried`` is their digest. ``cosine`` and ``relative_error`` say how much of
the task vector the update keeps, and ``effect_cosine``, for factors without a start, how much of
the change that they make.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.adapters.carried import digest, from_bytes, to_bytes
from compeft_fl.adapters.folders import Adapter, check_names, parse_config, require_torch
from compeft_fl.adapters.starts import start_of
from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import AdapterError, MalformedError, NonFiniteError
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.wire.messages import inspect, iter_parts
from compeft_fl.wire.opening import open_update

if TYPE_CHECKING:
    from compeft_fl.codecs.base import Update
    from compeft_fl.reduction.quality import Quality

__all__ = [
    "StoredUpdate",
    "parse_update",
    "parts_of",
    "read_update",
    "restore",
    "tensors_of",
    "write_update",
]

PARTS_MAGIC: Final = b"COMPEFT\n"
CARRIED_MAGIC: Final = b"COMPEFT+"
_DENSE_PART_BYTES: Final = 4 << 20  # of dense values, so that a large update is written in pieces


@dataclass(frozen=True)
class StoredUpdate:
    """A ``.compeft`` file, read and checked.

    Attributes
    ----------
    update : TernaryVector or TaskVector
    config : dict
        The adapter's configuration.
    start : str
        The tag of `Start`; empty where the file does not say it, and the method's own is meant.
    codec : str
        The codec of the body.
    num_bytes, body_bytes : int
        The size of the file, and of the encoded body in it.
    carried : dict of str to array
        Tensors that are not in the update, as they are.
    cosine, relative_error : float or None
        Of the update, against what was compressed; None where the file does not say it.
    effect_cosine : float or None
        Of the change that factors make, where they are compressed without a start.
    """

    update: Update
    config: dict[str, Any]
    start: str
    codec: str
    num_bytes: int
    body_bytes: int
    carried: dict[str, Any] = field(default_factory=dict)
    cosine: float | None = None
    relative_error: float | None = None
    effect_cosine: float | None = None

    @property
    def needs_init(self) -> bool:
        """Is a folder with the adapter before training needed to restore it?"""
        return self.start.startswith("blake2b:")


def write_update(
    path: str | os.PathLike[str],
    update: Update,
    config: Mapping[str, Any],
    start: str,
    codec: str = "golomb",
    *,
    carried: Mapping[str, Any] | None = None,
    quality: Quality | None = None,
    effect: float | None = None,
    **options: Any,
) -> int:
    """Write a ``.compeft`` file, whole or not at all.

    Parameters
    ----------
    path : path
    update : TernaryVector or TaskVector
    config : mapping
        The adapter's configuration.
    start : str
        The tag of `Start`.
    codec : str
        A name of `compeft_fl.codecs.names`.
    carried : mapping of str to array, optional
        Tensors that are kept as they are.
    quality : Quality, optional
        Of the update, against what was compressed.
    effect : float, optional
        The cosine between the changes that factors make, before and after.
    **options
        As for `compeft_fl.wire.messages.encode_parts`.

    Returns
    -------
    int
        The size of the file in bytes.

    Raises
    ------
    ParameterError
        A codec that does not write such an update.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    metadata = {"adapter_config": text, "start": start}
    if quality is not None:
        metadata["cosine"] = f"{quality.cosine:.6g}"
        metadata["relative_error"] = f"{quality.relative_error:.6g}"
    if effect is not None:
        metadata["effect_cosine"] = f"{effect:.6g}"
    front = to_bytes(carried) if carried else b""
    if front:
        metadata["carried"] = digest(front)
    if codec.startswith("dense"):
        options = {"max_body_bytes": _DENSE_PART_BYTES} | options
    parts = iter_parts(update, codec, metadata=metadata, **options)
    file = Path(path)
    first, second = next(parts), next(parts, None)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, temporary.open("wb") as out:
        if front:
            out.write(CARRIED_MAGIC + len(front).to_bytes(8, "little"))
            out.write(front)
        if second is None:
            out.write(first)
            return out.tell()
        out.write(PARTS_MAGIC)
        for part in chain((first, second), parts):
            out.write(len(part).to_bytes(8, "little"))
            out.write(part)
        return out.tell()


def read_update(path: str | os.PathLike[str], *, max_parameters: int | None = None) -> StoredUpdate:
    """Read a ``.compeft`` file and check every field of it.

    Parameters
    ----------
    path : path
    max_parameters : int, optional
        The most parameters that the file may say it has, see `compeft_fl.decode`.

    Raises
    ------
    WireError
        Bytes that a decoder rejects.
    AdapterError
        No file of that name, or an update without what restores a folder.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder: compress it first" if file.is_dir() else "nothing of that name"
        raise AdapterError(f"expected a .compeft file, found {found}")
    return parse_update(file.read_bytes(), max_parameters=max_parameters)


def parse_update(content: bytes, *, max_parameters: int | None = None) -> StoredUpdate:
    """`read_update` of a file's bytes."""
    size = len(content)
    front, content = _front(content)
    opened = open_update(parts_of(content), max_parameters=max_parameters)
    metadata, codec, num_body_bytes = opened.metadata, opened.codec, opened.body_bytes
    if "adapter_config" not in metadata:
        raise AdapterError("expected an adapter_config in the update's metadata, found none")
    check_names(tensor.name for tensor in opened.layout.tensors)
    if not opened.layout.num_parameters:
        raise AdapterError("expected an adapter's tensors, found no parameters")
    return StoredUpdate(
        config=parse_config(metadata["adapter_config"]),  # before there is any value
        carried=_carried(front, metadata, opened.layout),
        update=opened.decode(),
        start=metadata.get("start", ""),
        codec=codec,
        num_bytes=size,
        body_bytes=num_body_bytes,
        cosine=_number(metadata, "cosine"),
        relative_error=_number(metadata, "relative_error"),
        effect_cosine=_number(metadata, "effect_cosine"),
    )


def body_bytes(path: str | os.PathLike[str]) -> int:
    """The size of the encoded body of a file that `write_update` has written, a part at a time."""
    with Path(path).open("rb") as file:
        start = file.read(8)
        if start == CARRIED_MAGIC:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
            start = file.read(8)
        if start != PARTS_MAGIC:
            return inspect(start + file.read()).body_bytes
        total = 0
        while length := file.read(8):
            total += inspect(file.read(int.from_bytes(length, "little"))).body_bytes
        return total


def _front(content: bytes) -> tuple[bytes, bytes]:
    """The carried tensors' bytes, empty where there are none, and the rest of a file."""
    if not content.startswith(CARRIED_MAGIC):
        return b"", content
    start = len(CARRIED_MAGIC) + 8
    length = int.from_bytes(content[len(CARRIED_MAGIC) : start], "little")
    if not 0 < length <= len(content) - start:
        raise MalformedError(
            f"expected carried tensors of {length} bytes, found {max(0, len(content) - start)}"
        )
    return content[start : start + length], content[start + length :]


def _carried(front: bytes, metadata: Mapping[str, str], layout: Layout) -> dict[str, Any]:
    expected = metadata.get("carried", "")
    found = digest(front) if front else ""
    if found != expected:
        raise MalformedError(
            f"expected carried tensors with the digest {expected[:40] or '(none)'}, found "
            f"{found or 'none'}"
        )
    tensors = from_bytes(front) if front else {}
    check_names(tensors)
    for tensor in layout.tensors:
        if tensor.name in tensors:
            raise MalformedError(f"expected each tensor once, found {tensor.name!r} twice")
    return tensors


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    """A figure of the metadata; None where it is missing or no finite number."""
    text = metadata.get(key, "")
    try:
        value = float(text) if len(text) <= 32 else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parts_of(content: bytes) -> Iterator[bytes]:
    """The messages of a file without carried tensors, or of what stands behind those."""
    if not content.startswith(PARTS_MAGIC):
        yield content
        return
    position, index = len(PARTS_MAGIC), 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        position += 8
        if length > len(content) - position:
            found = max(0, len(content) - position)
            raise MalformedError(f"expected part {index} of {length} bytes, found {found}")
        yield content[position : position + length]
        position, index = position + length, index + 1


def restore(stored: StoredUpdate, init: Adapter | None = None) -> Adapter:
    """The adapter of a file: start + task vector, each tensor in its own data type.

    Parameters
    ----------
    stored : StoredUpdate
    init : Adapter, optional
        The start, where the file was made with one.

    Raises
    ------
    AdapterError
        No start where the file was made with one, or another one.
    LayoutError
        A start with other tensors.
    NonFiniteError
        A value that the tensor's data type does not hold.
    """
    if stored.needs_init and init is None:
        raise AdapterError(
            "the update is relative to an adapter before training: give it with --init DIR"
        )
    if not stored.needs_init and init is not None:
        raise AdapterError(f"the update is relative to {stored.start}, not to a folder: no --init")
    layout = stored.update.layout
    start = start_of(stored.config, layout, init, stored.carried)
    if stored.start and start.tag != stored.start:
        raise AdapterError(
            f"expected the start {stored.start} with which the file was made, found {start.tag}"
        )
    change: Any = stored.update.to_task_vector().values
    if stored.update.to_task_vector() is stored.update:
        change = change.copy()  # dense values are the update's own
    with np.errstate(over="ignore"):
        change += start.values
        state = tensors_of(TaskVector(layout, change))
    state |= stored.carried
    return Adapter(stored.config, {name: state[name] for name in sorted(state)})


def tensors_of(vector: TaskVector) -> dict[str, Any]:
    """A vector's tensors, each in its own data type.

    Raises
    ------
    NonFiniteError
        A value that the tensor's data type does not hold.
    """
    values = vector.to_dict()
    with np.errstate(over="ignore"):
        state = {
            tensor.name: _cast(values[tensor.name], tensor.dtype)
            for tensor in vector.layout.tensors
        }
    for name, tensor in state.items():
        if not bool((tensor.isfinite() if is_torch(tensor) else np.isfinite(tensor)).all()):
            raise NonFiniteError(f"expected values that {tensor.dtype} holds in tensor {name!r}")
    return state


def _cast(values: Any, dtype: str) -> Any:
    if dtype == "bf16":
        require_torch("bfloat16 tensors")
        import torch

        return torch.from_numpy(values).to(torch.bfloat16)
    return values.astype({"f32": np.float32, "f16": np.float16}[dtype])
