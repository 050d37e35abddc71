"""Checkpoint folders as ``save_pretrained`` writes them: read by pieces, written shard by shard.

A folder has ``model.safetensors``, or shards that ``model.safetensors.index.json`` lists, and
``config.json``. A tensor is read when it is asked for, and a shard is never in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters.weights import STORED_SIZES, StoredTensor, StoredTensors
from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import AdapterError
from compeft_fl.printable import one_line, quoted

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "MAX_SHARD_BYTES",
    "Checkpoint",
    "ShardWriter",
    "ShardedTensors",
    "header",
    "is_checkpoint_folder",
    "open_checkpoint",
]

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_FILES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_SHARD_BYTES: Final = 5_000_000_000  # as transformers had it for years

_MAX_TEXT: Final = 64 << 20  # bytes of a configuration or an index
_COPIED: Final = 8 << 20  # bytes that are copied at once


class ShardedTensors(Mapping[str, Any]):
    """The tensors of several safetensors files, by name and in the order of names.

    Parameters
    ----------
    files : iterable of Path

    Raises
    ------
    AdapterError
        A file that is none, or one name in two files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._of: dict[str, StoredTensors] = {}
        for file in files:
            stored = StoredTensors(file)
            for name in stored:
                if name in self._of:
                    raise AdapterError(
                        f"{file}: expected each tensor once, found {quoted(name)} twice"
                    )
                self._of[name] = stored
        self.tensors: dict[str, StoredTensor] = {
            name: self._of[name].tensors[name] for name in sorted(self._of)
        }

    def __getitem__(self, name: str) -> Any:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def pieces(
        self, name: str, size: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """A tensor's first ``size`` values (default: all) as float32, each with where it starts."""
        left = self.tensors[name].size if size is None else size
        for start, piece in self._of[name].pieces(name):
            if left <= 0:
                return
            yield start, piece[:left]
            left -= piece.size

    def raw(self, name: str, start: int = 0) -> Iterator[bytes]:
        """A tensor's bytes as they are stored, from value ``start`` on."""
        yield from self._of[name].raw(name, start, _COPIED)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a whole model.

    Attributes
    ----------
    folder : Path
    config : dict
        The content of ``config.json``; empty where there is none.
    state : ShardedTensors
    """

    folder: Path
    config: dict[str, Any]
    state: ShardedTensors


def is_checkpoint_folder(path: str | os.PathLike[str]) -> bool:
    """Does a folder hold a whole model's weights?"""
    return any((Path(path) / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder with a whole model; its tensors are read when they are asked for.

    Raises
    ------
    AdapterError
        No such folder, files that are missing or broken, or pickles only.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing of that name"
        raise AdapterError(f"{folder}: expected a folder with a model, found {found}")
    if (folder / INDEX_FILE).is_file():
        files = _listed(folder / INDEX_FILE)
    elif (folder / WEIGHTS_FILE).is_file():
        files = [folder / WEIGHTS_FILE]
    else:
        found = "none"
        pickles = [name for name in PICKLE_FILES if (folder / name).is_file()]
        if pickles:
            found = f"{pickles[0]}, which is not safe to load: save with safe_serialization=True"
        raise AdapterError(f"{folder}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found {found}")
    config: dict[str, Any] = {}
    if (folder / CONFIG_FILE).is_file():
        config = json_file(folder / CONFIG_FILE)
    state = ShardedTensors(files)
    for name, tensor in state.tensors.items():
        if not name.isprintable():
            raise AdapterError(f"expected tensors' names that print, found {quoted(name)}")
        if tensor.shape == (0,):
            raise AdapterError(
                f"{folder}: expected all values of {quoted(name)}, found none: gather the "
                "parameters that ZeRO-3 or FSDP has spread before save_pretrained"
            )
    if not any(tensor.size for tensor in state.tensors.values()):
        raise AdapterError(f"{folder}: expected a model's tensors, found no parameters")
    return Checkpoint(folder, config, state)


def json_file(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    AdapterError
        Other content.
    """
    try:
        if file.stat().st_size > _MAX_TEXT:
            raise ValueError(f"more than {_MAX_TEXT} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: expected JSON: {one_line(error, 200)}") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{file}: expected an object, found {type(found).__name__}")
    return found


def _listed(index: Path) -> list[Path]:
    """The files that an index lists: names beside it, and nowhere else."""
    table = json_file(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise AdapterError(f"{index}: expected a weight_map, found none")
    files = []
    for name in sorted(set(map(str, table.values()))):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise AdapterError(f"{index}: expected the file {quoted(name)} beside it, found none")
        files.append(index.parent / name)
    return files


# --- writing ----------------------------------------------------------------------------------


class ShardWriter:
    """Writes the weights of a checkpoint folder, tensor by tensor: whole, or not at all.

    Used as a context; the files take their names when it ends without an error.

    Parameters
    ----------
    folder : Path
        It exists.
    tensors : sequence of StoredTensor
        In the order in which they will be written; their offsets are not looked at.
    max_shard_bytes : int
        A shard has no more, unless one tensor alone has.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[StoredTensor], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = _shards(tensors, max_shard_bytes)
        count = len(self._shards)
        self.names = (
            [WEIGHTS_FILE]
            if count == 1
            else [f"model-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)]
        )
        self._stack = contextlib.ExitStack()
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[int, int, int]] = {}

    def __enter__(self) -> ShardWriter:
        try:
            for at, (name, shard) in enumerate(zip(self.names, self._shards, strict=True)):
                temporary = self._stack.enter_context(replacing(self._folder / name))
                file = self._stack.enter_context(temporary.open("w+b"))
                self._files.append(file)
                start = file.write(header(shard))
                for tensor in shard:
                    self._places[tensor.name] = (at, start, start + _bytes_of(tensor))
                    start += _bytes_of(tensor)
            if len(self.names) > 1:
                index = self._stack.enter_context(replacing(self._folder / INDEX_FILE))
                index.write_text(self._index(), encoding="utf-8")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write one tensor's bytes.

        Raises
        ------
        AdapterError
            Fewer or more bytes than the tensor has.
        """
        at, start, stop = self._places[name]
        file = self._files[at]
        for chunk in chunks:
            file.seek(start)  # chunks may come from this file
            start += file.write(chunk)
        if start != stop:
            raise AdapterError(f"expected {quoted(name)} in full, found {start - stop} bytes more")

    def written(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor that has been written."""
        at, start, stop = self._places[name]
        file = self._files[at]
        while start < stop:
            file.seek(start)
            chunk = file.read(min(_COPIED, stop - start))
            start += len(chunk)
            yield chunk

    def _index(self) -> str:
        table = {n: self.names[at] for n, (at, _, _) in sorted(self._places.items())}
        total = sum(stop - start for _, start, stop in self._places.values())
        content = {"metadata": {"total_size": total}, "weight_map": table}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _bytes_of(tensor: StoredTensor) -> int:
    return tensor.size * STORED_SIZES[tensor.stored_dtype]


def _shards(tensors: Sequence[StoredTensor], most: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _bytes_of(tensor) > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes_of(tensor)
    return shards


def header(tensors: Sequence[StoredTensor]) -> bytes:
    """A safetensors header, padded with blanks to whole words as safetensors does."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for tensor in tensors:
        entry = {"dtype": tensor.stored_dtype, "shape": list(tensor.shape)}
        content[tensor.name] = {**entry, "data_offsets": [at, at + _bytes_of(tensor)]}
        at += _bytes_of(tensor)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
