"""Where a node's state lies, and under which names.

The folder is ``ROOT/FEDERATION/NODE``. ROOT is the state folder of this machine; FEDERATION is the
server's name for the federation, which outlives restarts of the server; NODE is ``node-name`` of
the node config, or ``PARTITION-of-PARTITIONS`` where Flower's usual ``partition-id`` and
``num-partitions`` are given, or else the node's id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context

from compeft_fl.errors import ParameterError, StateError
from compeft_fl.exchange.node_state import NodeState, StateFile, state_folder
from compeft_fl.exchange.records import LOGGER

__all__ = ["ENVIRONMENT_KEY", "NodeMemory", "node_name", "state_root"]

ENVIRONMENT_KEY = "COMPEFT_FL_STATE_DIR"
_NODE_CONFIG_KEY = "state-dir"
_KEPT_SECONDS = 30 * 24 * 3600.0  # of a federation that nobody has heard of


def state_root(context: Context, state_dir: str | Path | None = None) -> Path:
    """The state folder: as given, of the node config, of the environment, or the user's own."""
    for given in (state_dir, context.node_config.get(_NODE_CONFIG_KEY), os.getenv(ENVIRONMENT_KEY)):
        if given:
            return Path(str(given)).expanduser()
    home = os.getenv("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "compeft_fl"


def node_name(context: Context) -> str:
    """What the node calls itself, also after a restart."""
    config = context.node_config
    if config.get("node-name"):
        return str(config["node-name"])[:128]
    if "partition-id" in config and "num-partitions" in config:
        return f"{config['partition-id']}-of-{config['num-partitions']}"
    return str(context.node_id)


class NodeMemory:
    """A node's state while one message is handled; other processes of the node wait.

    Attributes
    ----------
    name : str
    state : NodeState
        As it was found; empty where there was none, or none that could be read (which is logged).
    """

    def __init__(self, name: str, file: StateFile | None) -> None:
        self.name, self._file = name, file
        self.state = NodeState()
        if file is not None:
            try:
                self.state = file.load() or self.state
            except StateError as error:
                LOGGER.warning("CompressionMod: the node's state is lost: %s", error)
                file.forget()

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, context: Context, federation: str, state_dir: str | Path | None = None
    ) -> Iterator[NodeMemory]:
        """The memory of this node in this federation, locked until the end of the block."""
        name, root = node_name(context), state_root(context, state_dir)
        with contextlib.ExitStack() as stack:
            file: StateFile | None = StateFile(state_folder(root, federation, name))
            try:
                assert file is not None
                if (file.folder, threading.get_ident()) in _held:
                    raise ParameterError(
                        "expected CompressionMod once in the mods: is CompressionMod there twice?"
                    )
                new = not file.folder.parent.exists()
                stack.enter_context(file.locked())
                stack.enter_context(_holding(file.folder))
                if new:
                    _forget_old_federations(root)
            except StateError as error:
                LOGGER.warning("CompressionMod: this node remembers nothing: %s", error)
                file = None
            yield cls(name, file)

    def save(self, state: NodeState) -> bool:
        """Keep a state for the next message; whether that went well (else it is logged)."""
        if state is self.state:
            return self._file is not None
        if self._file is None:
            return False
        try:
            self._file.save(state)
        except StateError as error:
            LOGGER.warning("CompressionMod: %s", error)
            return False
        self.state = state
        return True


_held: set[tuple[Path, int]] = set()


@contextlib.contextmanager
def _holding(folder: Path) -> Iterator[None]:
    """Note that this thread has the folder: it would wait for itself for ever."""
    held = folder, threading.get_ident()
    _held.add(held)
    try:
        yield
    finally:
        _held.discard(held)


def _forget_old_federations(root: Path) -> None:
    """Remove the state of federations that were last heard of long ago."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            files = [file.stat().st_mtime for file in folder.glob("*/*")]
            if files and time.time() - max(files) > _KEPT_SECONDS:
                shutil.rmtree(folder)
