"""What a node keeps between rounds, in one file that is either the old one or the new one.

``NodeState`` is the replica of the global adapter (theta_shared) and two residuals: the one before
the last training, and the one after it. Which of them holds is known when the server says which
update it took last: a reply that was lost, late or set aside is so undone exactly, and a message
that is delivered twice gets the same answer twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.disk.arrays import pieces, release
from compeft_fl.disk.atomic import PRIVATE_FOLDER, locked, replacing
from compeft_fl.errors import CompeftError, StateError
from compeft_fl.exchange.carried import Apart
from compeft_fl.exchange.replica import Replica
from compeft_fl.parts.ranks import MAX_RANK
from compeft_fl.task_vector import Layout, TensorSpec

__all__ = [
    "LOCK_FILE", "NOTHING", "NO_UPDATE", "STATE_FILE", "NodeState", "StateFile", "safe_name",
    "state_folder",
]  # fmt: skip

NOTHING = -1  # the version of what has never been
NO_UPDATE = b""  # the id of what has never been sent
STATE_FILE = "state.safetensors"
LOCK_FILE = "lock"
_FORMAT = "compeft-fl node state 2"
_APART = "apart"  # where a file has the tensors beside the task vector, and their version
_LARGE = 1 << 20  # values of an array that is read from its file when it is needed
_MAX_ID = 64  # bytes of an update's id
_MAX_VERSION = 2**63 - 1

Residual = NDArray[np.float32] | None


@dataclass(frozen=True)
class NodeState:
    """A node's memory of one federation.

    Attributes
    ----------
    layout : Layout or None
        What all of it is for; None: there is nothing yet.
    replica : Replica or None
        theta_shared at its version; None: nothing has been received yet.
    residual : ndarray of float32, shape (d,), or None
        What is left to send once the update of ``taken`` was taken; None: nothing.
    taken : bytes
        The id of the last update that the server took, as far as is known; `NO_UPDATE`: none.
    next_residual : ndarray of float32, shape (d,), or None
        What is left to send if the update of ``trained`` is taken.
    trained : bytes
        The id of the last update; `NO_UPDATE` if its fate is known.
    apart : Apart or None
        The tensors beside the task vector, at their version; None: there are none.
    rank : int
        Of the adapter, where it is a part of the server's (`compeft_fl.parts.ranks`); 0: all of
        it.
    """

    layout: Layout | None = None
    replica: Replica | None = None
    residual: Residual = None
    taken: bytes = NO_UPDATE
    next_residual: Residual = None
    trained: bytes = NO_UPDATE
    apart: Apart | None = None
    rank: int = 0

    def settled(self, taken: bytes) -> NodeState:
        """The state once the server has said which update it took last; `NO_UPDATE`: none.

        Raises
        ------
        StateError
            It took an update that this state does not know: what is left to send is lost.
        """
        if taken == self.trained != NO_UPDATE:
            return replace(
                self,
                residual=self.next_residual,
                taken=taken,
                next_residual=None,
                trained=NO_UPDATE,
            )
        if taken == self.taken:
            return replace(self, next_residual=None, trained=NO_UPDATE)
        raise StateError(
            f"the server took update {_named(taken)} last, this state knows of "
            f"{_named(self.taken)} and {_named(self.trained)}: does another node use it?"
        )

    def following(self, replica: Replica, apart: Apart | None = None) -> NodeState:
        """The state with a new replica; for another layout, nothing else of it holds."""
        if replica is self.replica and apart is self.apart:
            return self
        if self.layout not in {None, replica.layout}:
            return NodeState(replica.layout, replica, apart=apart, rank=self.rank)
        return replace(self, layout=replica.layout, replica=replica, apart=apart)

    def after_training(self, update: bytes, next_residual: Residual) -> NodeState:
        """The state with the update of this id on its way."""
        return replace(self, next_residual=next_residual, trained=update)

    def without_residual(self, taken: bytes) -> NodeState:
        """The state that has nothing left to send."""
        return NodeState(self.layout, self.replica, taken=taken, apart=self.apart, rank=self.rank)

    def of_rank(self, rank: int) -> NodeState:
        """The state of a node of this rank; what is kept for another one is of no use to it."""
        return self if rank == self.rank else NodeState(rank=rank)


class StateFile:
    """A node's state on disk: safetensors, checked as it is read, replaced as a whole.

    Parameters
    ----------
    folder : Path
        The node's own, see `state_folder`; only its user can enter it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / STATE_FILE

    @contextlib.contextmanager
    def locked(self, *, make: bool = True) -> Iterator[None]:
        """Keep other processes that speak for the same node out, until the end of the block.

        What an earlier one left half-written is removed.

        Parameters
        ----------
        make : bool
            The folder, where it is missing.

        Raises
        ------
        StateError
            The folder cannot be made or written.
        FileNotFoundError
            There is none, and none shall be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                if make:
                    self.folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / LOCK_FILE))
            except FileNotFoundError:
                if not make:
                    raise
                raise StateError(f"expected a folder to keep state in, {self.folder}") from None
            except OSError as error:
                raise StateError(
                    f"expected a folder to keep state in, {self.folder}: {error}"
                ) from None
            for half in self.folder.glob(f".{STATE_FILE}.*.tmp"):
                with contextlib.suppress(OSError):
                    half.unlink()
            yield

    def load(self) -> NodeState | None:
        """The state; None where there is none.

        Raises
        ------
        StateError
            The file is damaged, or of another format.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                told = dict(file.metadata() or {})
                arrays = {name: self._array(file, name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise StateError(f"{self.path} is damaged: {error}") from None
        if told.get("format") != _FORMAT:
            raise StateError(f"expected {_FORMAT!r} in {self.path}, found {told.get('format')!r}")
        if told.get("checksum") != _checksum(told, arrays):
            raise StateError(f"{self.path} is damaged: its checksum differs")
        try:
            return _state_of(told, arrays)
        except (
            CompeftError, KeyError, TypeError, ValueError, OverflowError, RecursionError,
        ) as error:  # fmt: skip
            raise StateError(f"{self.path} is none of this program's: {error!r}") from None

    def _array(self, file: Any, name: str) -> NDArray[Any]:
        """An array of the file, once it was checked that it is one."""
        shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
        if os.name != "posix" or dtype != "F32" or math.prod(shape) < _LARGE:
            array: NDArray[Any] = file.get_tensor(name)
            return array
        with self.path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            start = json.loads(raw.read(size))[name]["data_offsets"][0]
        # Its pages are the file's, which is replaced as a whole and never written to.
        return np.memmap(self.path, "<f4", "r", 8 + size + start, tuple(shape))

    def save(self, state: NodeState) -> None:
        """Replace the file: after a crash at any moment there is the old state or the new one.

        Raises
        ------
        StateError
            It cannot be written (a full disk, say); the old file is as it was.
        """
        arrays = {
            "shared": None if state.replica is None else state.replica.values,
            "residual": state.residual,
            "next_residual": state.next_residual,
        }
        tensors = state.layout.tensors if state.layout else ()
        held: dict[str, NDArray[Any]] = {n: a for n, a in arrays.items() if a is not None}
        if state.apart is not None:
            held[_APART] = np.frombuffer(state.apart.to_bytes(), np.uint8)
        told = {
            "format": _FORMAT,
            "layout": json.dumps([(t.name, t.shape, t.dtype) for t in tensors]),
            "version": str(NOTHING if state.replica is None else state.replica.version),
            "taken": state.taken.hex(),
            "trained": state.trained.hex(),
            **({} if state.apart is None else {_APART: str(state.apart.version)}),
            **({"rank": str(state.rank)} if state.rank else {}),
        }
        told["checksum"] = _checksum(told, held)
        try:
            with replacing(self.path, private=True) as temporary:
                _write(temporary, told, held)
        except OSError as error:
            raise StateError(
                f"the node's state cannot be written to {self.path}: {error}"
            ) from None

    def forget(self) -> None:
        """Remove the file: it is of no use."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _write(path: Path, told: dict[str, str], arrays: dict[str, NDArray[Any]]) -> None:
    """Write safetensors as its `save_file` does, but straight from the arrays' memory."""
    header: dict[str, Any] = {"__metadata__": told}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        kind = "U8" if array.dtype == np.uint8 else "F32"
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            kind = "u1" if array.dtype == np.uint8 else "<f4"
            for piece in pieces(np.ascontiguousarray(array, kind)):
                file.write(piece)
                release(array)


def state_folder(root: Path, run: str, node: str) -> Path:
    """The folder of one node in one run: names become safe for a file system, and stay apart."""
    return root / safe_name(run) / safe_name(node)


def _state_of(told: dict[str, str], arrays: dict[str, NDArray[Any]]) -> NodeState:
    """The state that a file says, whose checksum is right; any error where it makes no sense."""
    tensors = json.loads(told["layout"])
    rank = int(told.get("rank", "0"))
    if not 0 <= rank <= MAX_RANK:
        raise ValueError(f"expected a rank, found {rank}")
    if not tensors:
        return NodeState(rank=rank)
    layout = Layout(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in tensors)
    apart = None
    if _APART in arrays:
        apart = Apart.from_bytes(arrays.pop(_APART).tobytes(), int(told[_APART]))
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.shape != (layout.num_parameters,):
            raise ValueError(
                f"expected {layout.num_parameters} float32 values under {name!r}, "
                f"found {array.dtype} {array.shape}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"expected finite values under {name!r}, found NaN or Inf")
        release(array)
    version = int(told["version"])
    if not NOTHING <= version <= _MAX_VERSION:
        raise ValueError(f"expected a version, found {version}")
    taken, trained = (bytes.fromhex(told[key]) for key in ("taken", "trained"))
    if max(len(taken), len(trained)) > _MAX_ID:
        raise ValueError(f"expected ids of at most {_MAX_ID} bytes")
    shared = arrays.get("shared")
    if shared is not None and version == NOTHING:
        raise ValueError("expected a version with the adapter, found none")
    replica = None if shared is None else Replica(layout, shared, version)
    return NodeState(
        layout, replica, arrays.get("residual"), taken, arrays.get("next_residual"), trained, apart,
        rank,
    )  # fmt: skip


def _named(update: bytes) -> str:
    return update.hex() or "none"


def safe_name(name: str) -> str:
    """A name as a file system takes it; other names stay other ones."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)[:64]
    if plain and plain == name:
        return plain
    return f"{plain}-{hashlib.blake2b(name.encode(errors='replace'), digest_size=6).hexdigest()}"


def _checksum(told: dict[str, str], arrays: dict[str, NDArray[Any]]) -> str:
    """BLAKE2b-128 of all that the file says."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(set(told) - {"checksum"}):
        digest.update(f"{key}={told[key]}\n".encode(errors="replace"))
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype}:{array.shape}\n".encode())
        for piece in pieces(array):
            digest.update(piece)
            release(arrays[name])
    return digest.hexdigest()
