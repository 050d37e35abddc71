r"""``.compeft`` files: one adapter's update, and what restores its folder.

A file is one ``Update`` (proto/FORMAT.md) with its layout inline. Its metadata are
``adapter_config``, the content of PEFT's file of that name, and ``start``, what the update is
relative to: ``0``, ``1``, or ``blake2b:`` and the digest of the start's values (see
`compeft_fl.adapters`). An update that is too large for one message is stored as its parts: the 8
bytes ``COMPEFT\n``, then for each part its length (8 bytes, little-endian) and the part. No message
begins with the first of these bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.adapters.folders import Adapter, check_names, parse_config, require_torch, start_of
from compeft_fl.atomic import replacing
from compeft_fl.errors import AdapterError, MalformedError, NonFiniteError
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.wire.messages import encode_parts
from compeft_fl.wire.opening import open_update

if TYPE_CHECKING:
    from compeft_fl.codecs.base import Update

__all__ = ["StoredUpdate", "read_update", "restore", "write_update"]

PARTS_MAGIC: Final = b"COMPEFT\n"


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
    """

    update: Update
    config: dict[str, Any]
    start: str
    codec: str
    num_bytes: int
    body_bytes: int


def write_update(
    path: str | os.PathLike[str],
    update: Update,
    config: Mapping[str, Any],
    start: str,
    codec: str = "golomb",
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
    parts = encode_parts(update, codec, metadata=metadata, **options)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, temporary.open("wb") as out:
        if len(parts) > 1:
            out.write(PARTS_MAGIC)
        for part in parts:
            if len(parts) > 1:
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
    content = file.read_bytes()
    opened = open_update(_parts(content), max_parameters=max_parameters)
    metadata, codec, body_bytes = opened.metadata, opened.codec, opened.body_bytes
    if "adapter_config" not in metadata:
        raise AdapterError("expected an adapter_config in the update's metadata, found none")
    check_names(tensor.name for tensor in opened.layout.tensors)
    if not opened.layout.num_parameters:
        raise AdapterError("expected an adapter's tensors, found no parameters")
    return StoredUpdate(
        config=parse_config(metadata["adapter_config"]),  # before there is any value
        update=opened.decode(),
        start=metadata.get("start", ""),
        codec=codec,
        num_bytes=len(content),
        body_bytes=body_bytes,
    )


def _parts(content: bytes) -> Iterator[bytes]:
    """The messages of a file."""
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
    made_with_init = stored.start.startswith("blake2b:")
    if made_with_init and init is None:
        raise AdapterError(
            "the update is relative to an adapter before training: give it with --init DIR"
        )
    if not made_with_init and init is not None:
        raise AdapterError(f"the update is relative to {stored.start}, not to a folder: no --init")
    layout = stored.update.layout
    start = start_of(stored.config, layout, init)
    if stored.start and start.tag != stored.start:
        raise AdapterError(
            f"expected the start {stored.start} with which the file was made, found {start.tag}"
        )
    change: Any = stored.update.to_task_vector().values
    with np.errstate(over="ignore"):
        values = TaskVector(layout, start.values + change).to_dict()
        state = {tensor.name: _cast(values[tensor.name], tensor.dtype) for tensor in layout.tensors}
    for name, tensor in state.items():
        if not bool((tensor.isfinite() if is_torch(tensor) else np.isfinite(tensor)).all()):
            raise NonFiniteError(f"expected values that {tensor.dtype} holds in tensor {name!r}")
    return Adapter(stored.config, state)


def _cast(values: Any, dtype: str) -> Any:
    if dtype == "bf16":
        require_torch("bfloat16 tensors")
        import torch

        return torch.from_numpy(values).to(torch.bfloat16)
    return values.astype({"f32": np.float32, "f16": np.float16}[dtype])
