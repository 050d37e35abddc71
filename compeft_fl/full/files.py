r"""Files of whole checkpoints: one update in parts, and what restores its folder.

As the files of adapters (`compeft_fl.adapters.files`), always in parts: the first has the layout
and the metadata, the others name the layout by its id. The metadata ``checkpoint`` stands in the
place of ``adapter_config``: a JSON object with ``config``, the content of ``config.json``;
``strip`` and ``add``, prefixes of names; ``grown``, whole shapes of tensors with more rows than
the base has, whose further rows are carried; ``as_base``, tensors that are the base's; and
``tied``, names of copies. The small files of a folder are carried as bytes, each deflated.

Parts are read one at a time, so that a file takes no memory but for what it carries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from compeft_fl.adapters.carried import digest, from_bytes
from compeft_fl.adapters.files import CARRIED_MAGIC, PARTS_MAGIC
from compeft_fl.adapters.folders import check_names
from compeft_fl.codecs.base import Part, Update
from compeft_fl.errors import AdapterError, CoverageError, MalformedError
from compeft_fl.full.matching import Names
from compeft_fl.printable import one_line, quoted
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import inspect, part_message
from compeft_fl.wire.opening import MAX_PARTS, open_part

__all__ = [
    "CARRIED_MAGIC",
    "PARTS_MAGIC",
    "StoredCheckpoint",
    "is_checkpoint_file",
    "read_checkpoint",
    "write_part",
]

METADATA: Final = "checkpoint"


def write_part(
    out: BinaryIO,
    update: Update,
    codec: str,
    layout: Layout,
    start: int,
    metadata: Mapping[str, str],
) -> None:
    """Append the parameters from ``start`` on of an update over a larger layout."""
    message = part_message(update, codec, layout, start, metadata)
    out.write(len(message).to_bytes(8, "little"))
    out.write(message)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A file of a whole checkpoint, of which all but the parts has been read and checked.

    Attributes
    ----------
    path : Path
    layout : Layout
        Of the task vector.
    config : dict
        The content of ``config.json``.
    start : str
        ``"blake2b:"`` and the digest of the base's values.
    codec : str
    num_bytes : int
        Of the file.
    carried : dict of str to array
        Kept as they are.
    names : Names
        How the tensors' names become those of the base.
    grown : dict of str to tuple of int
    as_base : list of str
    tied : dict of str to str
        As in `compeft_fl.full.matching.Plan`.
    metadata : dict of str to str
    """

    path: Path
    layout: Layout
    config: dict[str, Any]
    start: str
    codec: str
    num_bytes: int
    carried: dict[str, Any]
    names: Names
    grown: dict[str, tuple[int, ...]]
    as_base: list[str]
    tied: dict[str, str]
    metadata: dict[str, str] = field(repr=False)
    _first: int = 0  # where the parts begin
    _max_parameters: int | None = None

    def parts(self) -> Iterator[tuple[int, int, TernaryVector | TaskVector]]:
        """Each part: its body's size in bytes, where it starts, and its values.

        Raises
        ------
        WireError
            Bytes that a decoder rejects, or parts that leave a gap.
        """
        at = 0
        with self.path.open("rb") as file:
            file.seek(self._first)
            for count, blob in enumerate(_blobs(file)):
                if count == MAX_PARTS:
                    raise CoverageError(f"expected at most {MAX_PARTS} parts, found more")
                part, num_bytes = open_part(blob, self.layout, self._max_parameters)
                if part.start != at:
                    raise CoverageError(
                        f"expected a part from parameter {at}, found one from {part.start}"
                    )
                at = part.stop
                yield num_bytes, part.start, _vector(part)
        if at != self.layout.num_parameters:
            raise CoverageError(f"expected {self.layout.num_parameters} parameters, found {at}")

    def pieces(self, size: int) -> Iterator[TaskVector]:
        """The values as dense pieces, each within one tensor and of at most ``size`` parameters."""
        borders = self.layout.offsets.tolist()
        tensor, at, held = 0, 0, np.empty(0, np.float32)
        parts = self.parts()
        while at < borders[-1]:
            while borders[tensor + 1] <= at:
                tensor += 1
            wanted = min(size, borders[tensor + 1] - at)
            while held.size < wanted:
                values: Any = next(parts)[2].to_task_vector().values
                held = np.concatenate([held, values]) if held.size else values
            name = self.layout.tensors[tensor].name
            yield TaskVector(Layout([TensorSpec(name, (wanted,))]), held[:wanted])
            held, at = held[wanted:], at + wanted
        for _ in parts:  # what is checked when all has been read
            pass


def is_checkpoint_file(path: Path) -> bool:
    """Is this the file of a whole checkpoint, rather than of an adapter?"""
    try:
        with path.open("rb") as file:
            _skip_carried(file)
            if file.read(8) != PARTS_MAGIC:
                return False
            return METADATA in inspect(next(_blobs(file), b"")).metadata
    except (OSError, ValueError, AdapterError):  # what it is instead, its reader says
        return False


def read_checkpoint(path: Path, *, max_parameters: int | None = None) -> StoredCheckpoint:
    """Read a file but for its parts, and check what they are said to belong to.

    Parameters
    ----------
    path : Path
    max_parameters : int, optional
        The most parameters that one part may say it has, see `compeft_fl.decode`.

    Raises
    ------
    WireError
        Bytes that a decoder rejects.
    AdapterError
        No such file, or one of an adapter.
    """
    if not path.is_file():
        raise AdapterError("expected a file, found nothing of that name")
    with path.open("rb") as file:
        front = _carried_bytes(file, path.stat().st_size)
        if file.read(8) != PARTS_MAGIC:
            raise AdapterError("expected the file of a whole model, found another")
        first = file.tell()
        head = inspect(next(_blobs(file), b""))
    if METADATA not in head.metadata or head.layout is None:
        raise AdapterError("expected the file of a whole model, found an adapter's")
    expected, found = head.metadata.get("carried", ""), digest(front) if front else ""
    if expected != found:
        raise MalformedError(
            f"expected carried tensors with the digest {expected[:40] or '(none)'}, found "
            f"{found or 'none'}"
        )
    carried = from_bytes(front) if front else {}
    check_names([*carried, *(tensor.name for tensor in head.layout.tensors)])
    told = _Described(head.metadata[METADATA], head.layout, carried)
    return StoredCheckpoint(
        path=path,
        layout=head.layout,
        config=told.config,
        start=head.metadata.get("start", ""),
        codec=head.codec,
        num_bytes=path.stat().st_size,
        carried=carried,
        names=told.names,
        grown=told.grown,
        as_base=told.as_base,
        tied=told.tied,
        metadata=head.metadata,
        _first=first,
        _max_parameters=max_parameters,
    )


class _Described:
    """What the metadata ``checkpoint`` says, checked."""

    def __init__(self, text: str, layout: Layout, carried: Mapping[str, Any]) -> None:
        try:
            told = json.loads(text)
            self.config: dict[str, Any] = {**told["config"]}
            self.names = Names(_text(told["strip"]), _text(told["add"]))
            self.as_base = [_text(name) for name in told["as_base"]]
            self.tied = {_text(name): _text(of) for name, of in told["tied"].items()}
            self.grown = {
                _text(name): tuple(_length(length) for length in shape)
                for name, shape in told["grown"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MalformedError(
                f"expected what a checkpoint is in the metadata, found other text: "
                f"{one_line(error, 200)}"
            ) from None
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        for name, shape in self.grown.items():
            if name not in shapes or shape[1:] != shapes[name][1:] or shape[0] <= shapes[name][0]:
                raise MalformedError(f"expected a tensor that has grown, found {quoted(name)}")
        known = {*shapes, *carried, *self.as_base}
        for name, of in self.tied.items():
            if name in known or of not in known or of >= name:
                raise MalformedError(f"expected a copy of a tensor, found {quoted(name)}")
        if len(known) != len(shapes) + len(carried) + len(self.as_base):
            raise MalformedError("expected each tensor once, found one twice")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"expected a name that prints, found {quoted(value)}")
    return value


def _length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise ValueError(f"expected a length, found {quoted(value)}")
    return value


def _vector(part: Part) -> TernaryVector | TaskVector:
    layout = Layout([TensorSpec("part", (part.stop - part.start,))])
    if part.values is not None:
        return TaskVector(layout, part.values)
    if part.masks is None:
        raise MalformedError("expected signs or values, found an update of another kind")
    assert part.scales is not None
    if part.scales.size != 1:
        raise MalformedError(f"expected one scale, found {part.scales.size}")
    return TernaryVector(layout, *part.masks, part.scales)


def _skip_carried(file: BinaryIO) -> None:
    if file.read(8) != CARRIED_MAGIC:
        file.seek(0)
        return
    file.seek(int.from_bytes(file.read(8), "little"), 1)


def _carried_bytes(file: BinaryIO, size: int) -> bytes:
    if file.read(8) != CARRIED_MAGIC:
        file.seek(0)
        return b""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - file.tell():
        raise MalformedError(
            f"expected carried tensors of {length} bytes, found {size - file.tell()}"
        )
    return file.read(length)


def _blobs(file: BinaryIO) -> Iterator[bytes]:
    """The messages from here to the file's end."""
    while head := file.read(8):
        length = int.from_bytes(head, "little")
        at = file.tell()
        left = file.seek(0, 2) - at
        file.seek(at)
        if length > left:
            raise MalformedError(f"expected a part of {length} bytes, found {left}")
        yield file.read(length)
