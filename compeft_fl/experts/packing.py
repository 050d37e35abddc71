"""From an adapter folder to the file that a store keeps, and back.

Without a start, and where nothing else is asked for, all of an adapter is kept, on a grid of 11
bits a parameter or fewer (`compeft_fl.experts.catch_up`): an update against 0 that leaves most of
it out would lose most of what a LoRA does. With the adapter before training, what training changed
is compressed, and that start is a file of its own, which all adapters that began there share.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from compeft_fl.adapters import (
    Adapter,
    StoredUpdate,
    open_folder,
    read_update,
    restore,
    save_folder,
    start_of,
    write_update,
)
from compeft_fl.adapters.base_digest import noted_base
from compeft_fl.adapters.carried import carried_names
from compeft_fl.adapters.compression import compress_adapter, keep_adapter
from compeft_fl.adapters.files import parse_update, tensors_of
from compeft_fl.compeft import check_density
from compeft_fl.errors import AdapterError, ParameterError
from compeft_fl.experts.catch_up import grid_options, on_grid
from compeft_fl.reduction.quality import Quality
from compeft_fl.task_vector import TaskVector

__all__ = ["GRID", "Packed", "StoredExpert", "packed"]

GRID = "steps"
_EXACT = {"f32": "dense", "f16": "dense-fp16", "bf16": "dense-bf16"}


@dataclass(frozen=True)
class Packed:
    """What is pushed.

    Attributes
    ----------
    file : Path
    start : Path or None
        The start's file, named by the digest of its values.
    base_digest : str
        Of the base model, as the folder has it (`compeft_fl.adapters.base_digest`), in hexadecimal
        digits, and ``:4bit`` or ``:8bit`` for a quantised one; empty where it has none.
    """

    file: Path
    start: Path | None = None
    base_digest: str = ""


def packed(
    source: str | os.PathLike[str] | bytes,
    work: Path,
    init: str | os.PathLike[str] | None = None,
    *,
    density: float | None = None,
    scale: str | float = "norm",
    support: str = "fixed",
    codec: str | None = None,
) -> Packed:
    """Make the file of an adapter that a store keeps.

    Parameters
    ----------
    source : path or bytes
        An adapter folder, a ``.compeft`` file, or the bytes of one.
    work : Path
        A folder for what is made.
    init : path, optional
        The adapter before training, a folder.
    density, scale, support
        As for `compeft_fl.compress`. A density of None: 0.05 with ``init``, and all without.
    codec : str, optional
        Default: "steps" where all is kept, "golomb" elsewhere.

    Raises
    ------
    AdapterError, ParameterError, LayoutError, NonFiniteError, WireError
    """
    start = None if init is None else open_folder(init)
    if isinstance(source, bytes):
        file = work / "expert.compeft"
        file.write_bytes(source)
        return Packed(file, _check_start(parse_update(source), start, work))
    path = Path(source)
    if path.is_file():
        return Packed(path, _check_start(read_update(path), start, work))
    adapter = open_folder(path)
    keep = density is None and start is None
    codec = codec or (GRID if keep else "golomb")
    file = work / "expert.compeft"
    if codec == GRID or codec.startswith("dense"):
        if density is not None:
            raise ParameterError(f"codec {codec} keeps all parameters: no density")
        made = keep_adapter(adapter, start)
        update, quality, options = made.update, made.quality, {}
        if codec == GRID:
            whole = made.update.to_task_vector()
            update = on_grid(whole)
            quality = Quality.of(whole, update)
            options = grid_options(update)
        write_update(
            file, update, adapter.config, made.start, codec,
            carried=made.carried, quality=quality, **options,
        )  # fmt: skip
        tag = made.start
    else:
        density = 0.05 if density is None else density
        check_density(density)
        found = compress_adapter(adapter, start, density=density, scale=scale, support=support)
        write_update(
            file, found.update, adapter.config, found.start, codec,
            carried=found.carried, quality=found.quality, effect=found.effect,
        )  # fmt: skip
        tag = found.start
    started = None if start is None else _write_start(start, tag, work)
    noted = noted_base(path)
    base = "" if noted is None else ":".join(filter(None, (noted[0].hex(), noted[1])))
    return Packed(file, started, base)


def _check_start(
    stored: StoredUpdate, start: Adapter | None, work: Path
) -> Path | None:  # fmt: skip
    """The file of a start that goes with an update, if it is that update's."""
    if start is None:
        return None
    found = start_of(stored.config, stored.update.layout, start, stored.carried).tag
    if found != stored.start:
        raise AdapterError(f"expected the start {stored.start} of the file, found {found}")
    return _write_start(start, found, work)


def _write_start(start: Adapter, tag: str, work: Path) -> Path:
    """Write an adapter before training, bit for bit."""
    carried = carried_names(start.state)
    values = TaskVector.from_dict({n: t for n, t in start.state.items() if n not in carried})
    types = {tensor.dtype for tensor in values.layout.tensors}
    codec = _EXACT[types.pop()] if len(types) == 1 else "dense"
    file = work / f"{tag.partition(':')[2]}.compeft"
    kept = {name: start.state[name] for name in sorted(carried)}
    write_update(file, values, start.config, "0", codec, carried=kept)
    return file


class StoredExpert:
    """An expert's file, and what can be made of it.

    Parameters
    ----------
    path : Path
    start : StoredExpert, optional
        The adapter before training, where the update is relative to one.
    """

    def __init__(self, path: Path, start: StoredExpert | None = None) -> None:
        self.path = path
        self._start = start

    def read_bytes(self) -> bytes:
        """The file."""
        return self.path.read_bytes()

    def read(self) -> StoredUpdate:
        """The update, decoded and checked.

        Raises
        ------
        WireError, AdapterError
        """
        return read_update(self.path)

    def as_start(self) -> Adapter:
        """The adapter of a file that holds one before training."""
        stored = self.read()
        state = tensors_of(stored.update.to_task_vector()) | stored.carried
        return Adapter(stored.config, {name: state[name] for name in sorted(state)})

    def adapter(self) -> Adapter:
        """The adapter: its start and what training changed.

        Raises
        ------
        AdapterError
            It is relative to a start that nobody has pushed.
        """
        return restore(self.read(), None if self._start is None else self._start.as_start())

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads.

        Raises
        ------
        AdapterError
            As `adapter`; or a folder that holds something, without ``force``.
        """
        save_folder(self.adapter(), folder, force=force)
