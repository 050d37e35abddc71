"""A server's memory of a federation, written each round: one file, whole or not there.

A file holds the global adapter, theta_shared and the log of deltas, what is known of each node, the
strategy's own state (momentum, say) and the history, as safetensors with a checksum. The last few
are kept; a damaged one is passed over for the one before it, with a line in the log.

A folder belongs to one federation, which ``federation.json`` in it names, and to one server at a
time, which holds the lock beside it for as long as it lives. Folder and files are for their owner
only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from compeft_fl.disk.atomic import PRIVATE_FOLDER, locked, replacing
from compeft_fl.errors import CompeftError, LayoutError, StateError
from compeft_fl.exchange.carried import check_like
from compeft_fl.exchange.records import LOGGER, to_arrays, to_state

__all__ = ["Checkpoint", "CheckpointFolder", "alone_in"]

_FORMAT = "compeft-fl checkpoint 1"
_FOLDER_FORMAT = "compeft-fl checkpoints 1"
_KEPT = 3
_NAME = re.compile(r"round-(\d{6,})\.safetensors")
_FEDERATION_FILE = "federation.json"
_LOCK_FILE = ".lock"
_LONGEST = 4096


@dataclass
class Checkpoint:
    """All that a server needs to go on after a round.

    Attributes
    ----------
    server_round : int
        The round whose replies have been merged.
    arrays : flwr.app.ArrayRecord
        The global adapter, one Array per tensor.
    exchange : dict
        See `compeft_fl.server.broadcast.Broadcaster.state`.
    strategy : dict
        Names to arrays, dicts of arrays, and plain values.
    history : dict
        Metrics by name and round.
    random_state : tuple
        Of Python's `random`, by which Flower samples nodes.
    extra : any plain value
    path : Path or None
        Where it was read from.
    """

    server_round: int
    arrays: ArrayRecord
    exchange: dict[str, Any]
    strategy: dict[str, Any]
    history: dict[str, dict[str, Any]]
    random_state: Any
    extra: Any = None
    path: Path | None = None

    @property
    def federation(self) -> str:
        """The name of the federation."""
        return str(self.exchange.get("federation", ""))

    def check_like(self, arrays: ArrayRecord) -> None:
        """Raise StateError where the adapter is another than the one that was checkpointed."""
        try:
            check_like(to_state(arrays), to_state(self.arrays))
        except LayoutError as error:
            raise StateError(f"the checkpoint is for another adapter: {error}") from None


class CheckpointFolder:
    """Checkpoints of one federation.

    Parameters
    ----------
    folder : path
        Made when the first one is written.
    kept : int
        How many to keep.
    """

    def __init__(self, folder: str | Path, kept: int = _KEPT) -> None:
        self.folder, self.kept = Path(folder), kept

    def files(self) -> list[Path]:
        """The checkpoints, newest first."""
        rounds = {file: _NAME.fullmatch(file.name) for file in self.folder.glob("round-*")}
        found = {file: int(match[1]) for file, match in rounds.items() if match}
        return sorted(found, key=found.__getitem__, reverse=True)

    @contextlib.contextmanager
    def held(self, *, resume: bool) -> Iterator[None]:
        """Be the folder's only server until the end of the block.

        Raises
        ------
        StateError
            Another server works in it; or a federation that begins finds checkpoints there.
        """
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        with alone_in(self.folder):
            files = self.files()
            if files and not resume:
                whose = self._federation() or "a federation"
                raise StateError(
                    f"expected no checkpoints in {self.folder}, found those of {whose} up to "
                    f"{files[0].stem}: go on from them (resume), or give another folder"
                )
            yield

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one; a failure (a full disk) is logged, and the run goes on without.

        The older ones than the last few are removed.
        """
        path = self.folder / f"round-{checkpoint.server_round:06d}.safetensors"
        try:
            self.folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            self._belong_to(checkpoint.federation)
            with replacing(path, private=True) as temporary:
                temporary.write_bytes(_to_bytes(checkpoint))
        except OSError as error:
            LOGGER.error("round %d: no checkpoint: %s", checkpoint.server_round, error)
            return
        for old in self.files()[self.kept :]:
            with contextlib.suppress(OSError):
                old.unlink()

    def load(self) -> Checkpoint | None:
        """The newest one that is whole; None where there are none.

        Raises
        ------
        StateError
            There are some, and none is whole; or it is of another federation than the folder.
        """
        files, owner = self.files(), self._federation()
        for path in files:
            try:
                found = _from_file(path)
            except StateError as error:
                LOGGER.warning("the checkpoint is passed over: %s", error)
                continue
            if owner is not None and found.federation != owner:
                raise StateError(
                    f"expected checkpoints of federation {owner} alone in {self.folder}, found "
                    f"{path.name} of federation {found.federation}: which is to go on?"
                )
            return found
        if files:
            raise StateError(f"expected a checkpoint in {self.folder}, found none that is whole")
        return None

    def _federation(self) -> str | None:
        """Whose folder it is; None where it does not say."""
        try:
            with (self.folder / _FEDERATION_FILE).open("rb") as file:
                told = json.loads(file.read(_LONGEST))
            return str(told["federation"]) if told["format"] == _FOLDER_FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _belong_to(self, federation: str) -> None:
        if self._federation() == federation:
            return
        told = {"format": _FOLDER_FORMAT, "federation": federation}
        with replacing(self.folder / _FEDERATION_FILE, private=True) as temporary:
            temporary.write_text(json.dumps(told) + "\n", encoding="utf-8")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other servers out of a folder, which exists, until the end of the block.

    Raises
    ------
    StateError
        One works in it; the message says which.
    """
    lock = folder / _LOCK_FILE
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            whose = "another server"
            with contextlib.suppress(OSError):
                whose += f", {lock.read_text(encoding='utf-8', errors='replace')[:200].strip()},"
            raise StateError(f"{whose} works in {folder}: one at a time") from None
        except OSError as error:
            LOGGER.warning("%s cannot be locked; the run goes on: %s", folder, error)
        else:
            # Its name goes while it is held, so that nobody else holds what is no lock any more.
            stack.callback(lock.unlink, missing_ok=True)
            with contextlib.suppress(OSError):
                lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {}
    told = {
        "round": checkpoint.server_round,
        "arrays": _outline(to_state(checkpoint.arrays), "arrays", tensors),
        "exchange": _outline(checkpoint.exchange, "exchange", tensors),
        "strategy": _outline(checkpoint.strategy, "strategy", tensors),
        "history": checkpoint.history,
        "random": checkpoint.random_state,
        "extra": checkpoint.extra,
    }
    text = json.dumps(told)
    return save(tensors, {"format": _FORMAT, "told": text, "checksum": _checksum(text, tensors)})


def _from_file(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise StateError(f"{path} is damaged: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise StateError(f"expected {_FORMAT!r} in {path}, found {metadata.get('format')!r}")
    if metadata.get("checksum") != _checksum(metadata.get("told", ""), tensors):
        raise StateError(f"{path} is damaged: its checksum differs")
    try:
        return _checkpoint_of(json.loads(metadata["told"]), tensors, path)
    except (
        CompeftError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
        RecursionError,
    ) as error:  # fmt: skip
        raise StateError(f"{path} is none of this program's: {error!r}") from None


def _checkpoint_of(
    told: dict[str, Any], tensors: dict[str, NDArray[Any]], path: Path
) -> Checkpoint:
    """The checkpoint that a file says; any error where it makes no sense under its checksum."""
    exchange = _filled(told["exchange"], tensors)
    exchange["log"] = {int(version): blob.tobytes() for version, blob in exchange["log"].items()}
    version, internal, gauss = told["random"]
    random_state = version, tuple(internal), gauss
    random.Random().setstate(random_state)
    server_round, history = told["round"], told["history"]
    if type(server_round) is not int or server_round < 0:
        raise ValueError(f"expected a round, found {server_round!r}")
    if not all(isinstance(each, dict) for each in (history, *history.values())):
        raise ValueError("expected metrics by name and round")
    return Checkpoint(
        server_round=server_round,
        arrays=to_arrays(_filled(told["arrays"], tensors)),
        exchange=exchange,
        strategy=_filled(told["strategy"], tensors),
        history=history,
        random_state=random_state,
        extra=told["extra"],
        path=path,
    )


def _outline(value: Any, name: str, tensors: dict[str, NDArray[Any]]) -> Any:
    """A value with its arrays taken out into ``tensors``: what JSON can hold."""
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    if isinstance(value, np.ndarray):
        tensors[name] = np.asarray(value, order="C")
        return {"": name}
    if isinstance(value, dict):
        return {"items": [[str(k), _outline(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    return value


def _filled(outline: Any, tensors: dict[str, NDArray[Any]]) -> Any:
    """The value that `_outline` was given, with text for the keys of its dicts."""
    if isinstance(outline, dict):
        if "" in outline:
            return tensors[outline[""]]
        return {key: _filled(value, tensors) for key, value in outline["items"]}
    return outline


def _checksum(text: str, tensors: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16)
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name}:{array.dtype}:{array.shape}\n".encode(errors="replace"))
        digest.update(array.tobytes())
    return digest.hexdigest()
