"""The state folder of a machine: which folders in it are ours, who owns what, and what is removed.

::

    ROOT/                       anybody's folder; what else lies in it is never touched
      FEDERATION/               made here as a whole, with the marker in it
        .compeft-fl             the marker: what this folder is, of which federation and run
        NODE/                   a node's own: owner.json, lock, state.safetensors

A folder is ours where it was made here: it has the marker, the marker names it, and it is this
user's. It is removed only where it is wholly ours: nothing lies in it but the files above, and no
process works in it. All folders are for their owner only (0700), and so are the files (0600).

What is removed, and when. At the end of a run, the state of its federation, where nobody can go on
with it (no checkpoints): by its nodes, with the last evaluation, and by its server, where that is
on the same machine. When a federation is heard of for the first time:

- federations that were not heard of for 30 days;
- of one run, all but the 4 heard of last (a server that invents federations gains nothing);
- of all, the one that was heard of longest ago, while there are more than 32, or more than 4 GiB.

Each is a line in the log. A node whose state is gone is sent the adapter; what it had left to send
is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compeft_fl.disk.atomic import PRIVATE_FOLDER, locked, replacing
from compeft_fl.errors import StateError
from compeft_fl.exchange.node_state import LOCK_FILE, STATE_FILE, safe_name
from compeft_fl.exchange.records import LOGGER

__all__ = [
    "MARKER",
    "FederationState",
    "claim_node",
    "clear",
    "forget",
    "inventory",
    "leave",
    "open_federation",
    "remove",
]

MARKER: Final = ".compeft-fl"
OWNER_FILE: Final = "owner.json"
KEPT_SECONDS: Final = 30 * 24 * 3600.0
KEPT_OF_A_RUN: Final = 4
KEPT_FEDERATIONS: Final = 32
KEPT_BYTES: Final = 4 << 30

_FORMAT: Final = "compeft-fl state folder 1"
_LONGEST_MARKER: Final = 4096
_LONGEST_NAME: Final = 256
_TEMPORARY: Final = re.compile(r"\.compeft-fl-[0-9a-f]{16}\.tmp")
_OURS: Final = re.compile(
    rf"{LOCK_FILE}|{re.escape(STATE_FILE)}|{re.escape(OWNER_FILE)}"
    rf"|\.({re.escape(STATE_FILE)}|{re.escape(OWNER_FILE)})\.\d+\.tmp"
)

_MARKERS: Final = re.compile(rf"{re.escape(MARKER)}|\.{re.escape(MARKER)}\.\d+\.tmp")


@dataclass(frozen=True)
class FederationState:
    """What lies on disk of one federation.

    Attributes
    ----------
    folder : Path
    federation : str
        Its name, as the server gave it.
    run : str
        Flower's id of the run that was the last to make it its own.
    nodes : int
    num_bytes : int
    heard : float
        When a message of it came last, in seconds since 1970.
    foreign : tuple of str
        What lies in it and is not ours; while there is anything, it is not removed.
    """

    folder: Path
    federation: str
    run: str
    nodes: int
    num_bytes: int
    heard: float
    foreign: tuple[str, ...] = ()


def open_federation(root: Path, federation: str, run: str) -> Path:
    """The folder of a federation, made with its marker where there is none.

    Where it is new, older ones go as the module says.

    Raises
    ------
    StateError
        It cannot be made, or a folder of that name lies there that was not made here.
    """
    folder = root / safe_name(federation)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()
            told = _marker_of(folder)
            if told is None:
                raise StateError(
                    f"expected a folder that was made here, or none: {folder} is somebody else's"
                )
            if told["run"] != run:
                with locked(folder / MARKER, make=False):
                    # The last thing under this lock: the new file is a new lock.
                    _write(folder / MARKER, {**told, "run": run})
            os.utime(folder / MARKER)
            return folder
        root.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        _make(root, folder, federation, run)
    except OSError as error:
        raise StateError(f"expected a folder to keep state in, {folder}: {error}") from None
    _bound(root, folder, run)
    return folder


def claim_node(folder: Path, name: str, node_id: int, run: str) -> tuple[Path, str]:
    """The folder of one node in a federation's, and the name that the node bears there.

    A name that another node of the same run has made its own is not shared: that would mix what
    the two have left to send. The node keeps its state under its id then, and the log says so.
    In a later run a node may have another id (that of a simulation, or one without a key): it is
    known by its name, if one node alone had it.

    Raises
    ------
    FileNotFoundError
        The federation's folder is gone.
    OSError
        It cannot be written.
    """
    own_name = f"{name[:_LONGEST_NAME]}#{node_id}"
    mine = {"node": str(node_id), "run": run, "shared": False}
    with locked(folder / MARKER, make=False):
        own, shared = folder / safe_name(own_name), folder / safe_name(name)
        owner = _owner_of(shared) or mine
        if own.is_dir() or (owner["node"] != mine["node"] and owner["run"] == run):
            new = not own.is_dir()
            _own(own, mine)
            if not owner["shared"]:
                _own(shared, {**owner, "shared": True})
        else:
            if owner["node"] == mine["node"]:
                mine["shared"] = owner["shared"]
            elif owner["shared"]:
                LOGGER.warning(
                    "CompressionMod: several nodes of this machine were called %s in an earlier "
                    "run: none of them is known by it, and this one begins anew",
                    name,
                )
                (shared / STATE_FILE).unlink(missing_ok=True)
            _own(shared, mine)
            return shared, name
    if not new:
        return own, own_name
    LOGGER.warning(
        "CompressionMod: node %s is called %s, as node %s of this machine and run: each keeps a "
        "state of its own; give each a node-name in its node config",
        node_id,
        name,
        owner["node"],
    )
    return own, own_name


def inventory(root: Path) -> list[FederationState]:
    """What was made here of the folders in ``root``, the one heard of last first."""
    found = []
    for folder in _folders(root):
        told = _marker_of(folder)
        if told is not None:
            with contextlib.suppress(OSError):
                found.append(_looked_at(folder, told))
    return sorted(found, key=lambda each: each.heard, reverse=True)


def remove(state: FederationState) -> str:
    """Remove the state of a federation, where all of it is ours and nobody works in it.

    Returns
    -------
    str
        Why it was left, or what of it; empty where it is gone.
    """
    folder = state.folder
    try:
        with locked(folder / MARKER, wait=False, make=False):
            foreign = _looked_at(folder, {"federation": state.federation, "run": ""}).foreign
            if foreign:
                return f"{foreign[0]} in it was not made here"
            for node in _folders(folder):
                with locked(node / LOCK_FILE, wait=False):
                    _empty(node, _OURS, last=LOCK_FILE)
            _empty(folder, _MARKERS, last=MARKER)
    except BlockingIOError:
        return "a process works in it"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


def leave(node: Path) -> None:
    """Remove a node's folder, whose lock is held, and the federation's where it was the last."""
    with contextlib.suppress(OSError):
        _empty(node, _OURS, last=LOCK_FILE)
        LOGGER.info("the state in %s is of a run that has ended: it is removed", node)
        with locked(node.parent / MARKER, wait=False, make=False):
            if not _folders(node.parent):
                _empty(node.parent, _MARKERS, last=MARKER)


def clear(root: Path) -> None:
    """Remove all that was made in a state folder, and the folder itself where that was all."""
    for state in inventory(root):
        remove(state)
    with contextlib.suppress(OSError):
        root.rmdir()


def forget(root: Path, federation: str) -> None:
    """Remove the state of a federation that has ended, where there is any; the log says so."""
    folder = root / safe_name(federation)
    told = _marker_of(folder)
    if told is not None and told["federation"] == federation[:_LONGEST_NAME]:
        with contextlib.suppress(OSError):
            _remove(_looked_at(folder, told), "is of a run that has ended")


def _bound(root: Path, new: Path, run: str) -> None:
    """Remove what the module says, but never what was opened just now."""
    others = [state for state in inventory(root) if state.folder != new]
    for state in others:
        if time.time() - state.heard > KEPT_SECONDS:
            _remove(state, "was not heard of for 30 days")
    of_run = [state for state in others if state.run == run and state.folder.exists()]
    for state in of_run[KEPT_OF_A_RUN - 1 :]:
        _remove(state, f"is older than the last {KEPT_OF_A_RUN} federations of run {run}")
    left = [state for state in others if state.folder.exists()]
    total = sum(state.num_bytes for state in left)
    for state in reversed(left):
        if len(left) < KEPT_FEDERATIONS and total <= KEPT_BYTES:
            break
        if _remove(state, "was heard of longest ago, and there is much"):
            left.remove(state)
            total -= state.num_bytes


def _remove(state: FederationState, why: str) -> bool:
    left = remove(state)
    if left:
        LOGGER.info("the state in %s %s; it is left: %s", state.folder, why, left)
    else:
        LOGGER.info("the state in %s %s: it is removed", state.folder, why)
    return not left


def _make(root: Path, folder: Path, federation: str, run: str) -> None:
    """Make a federation's folder with its marker in it: as a whole, or not at all."""
    fresh = root / f".compeft-fl-{secrets.token_hex(8)}.tmp"
    fresh.mkdir(mode=PRIVATE_FOLDER)
    try:
        told = {"format": _FORMAT, "federation": federation[:_LONGEST_NAME], "run": run}
        _write(fresh / MARKER, {**told, "folder": folder.name})
        try:
            fresh.rename(folder)
        except OSError:
            if _marker_of(folder) is None:  # else another node was faster
                raise
    finally:
        with contextlib.suppress(OSError):
            (fresh / MARKER).unlink(missing_ok=True)
            fresh.rmdir()


def _marker_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's marker says; None where it was not made here, or not as what it is."""
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        told = _read(folder / MARKER)
    except OSError:
        return None
    if told is None or told.get("format") != _FORMAT:
        return None
    if told.get("folder") != folder.name and not _TEMPORARY.fullmatch(folder.name):
        return None  # somebody's copy
    if not all(isinstance(told.get(key), str) for key in ("federation", "run")):
        return None
    return told


def _own(folder: Path, owner: dict[str, Any]) -> None:
    """Say in a node's folder whose it is; the folder is made where there is none."""
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    if _owner_of(folder) != owner:
        _write(folder / OWNER_FILE, owner)


def _owner_of(folder: Path) -> dict[str, Any] | None:
    """Whose a node's folder is; None where that cannot be read."""
    told = _read(folder / OWNER_FILE)
    kinds = {"node": str, "run": str, "shared": bool}
    if told is None or not all(isinstance(told.get(key), kind) for key, kind in kinds.items()):
        return None
    return told


def _empty(folder: Path, names: re.Pattern[str], last: str) -> None:
    """Remove the files of these names, and the folder, if nothing else is in it."""
    for entry in sorted(_entries(folder), key=lambda entry: entry.name == last):
        if names.fullmatch(entry.name):
            os.unlink(entry.path)
    folder.rmdir()


def _looked_at(folder: Path, told: dict[str, Any]) -> FederationState:
    nodes = num_bytes = 0
    foreign = []
    for entry in _entries(folder):
        if _MARKERS.fullmatch(entry.name):
            num_bytes += entry.stat(follow_symlinks=False).st_size
            continue
        if not entry.is_dir(follow_symlinks=False):
            foreign.append(entry.name)
            continue
        nodes += 1
        files = list(_entries(Path(entry.path)))
        if not any(file.name == OWNER_FILE for file in files):
            foreign.append(entry.name)
        for file in files:
            if file.is_file(follow_symlinks=False) and _OURS.fullmatch(file.name):
                num_bytes += file.stat(follow_symlinks=False).st_size
            else:
                foreign.append(f"{entry.name}/{file.name}")
    heard = (folder / MARKER).lstat().st_mtime
    return FederationState(
        folder, told["federation"], told["run"], nodes, num_bytes, heard, tuple(sorted(foreign))
    )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, links to such left out."""
    try:
        return [Path(e.path) for e in _entries(root) if e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON object in a small file; None where there is none."""
    try:
        with file.open("rb") as source:
            found = json.loads(source.read(_LONGEST_MARKER))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, told: dict[str, Any]) -> None:
    with replacing(file, private=True) as temporary:
        temporary.write_text(json.dumps(told) + "\n", encoding="utf-8")
