"""Where a node's state lies, and under which names.

The folder is ``ROOT/FEDERATION/NODE``. ROOT is the state folder of this machine; FEDERATION is the
server's name for the federation, which outlives restarts of the server; NODE is ``node-name`` of
the node config, or ``PARTITION-of-PARTITIONS`` where Flower's usual ``partition-id`` and
``num-partitions`` are given, or else the node's id. Nodes of one name share nothing: see
`compeft_fl.client.state_store`, which also says what is removed, and when.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context

from compeft_fl.client import state_store
from compeft_fl.errors import ParameterError, StateError
from compeft_fl.exchange.node_state import NodeState, StateFile
from compeft_fl.exchange.records import LOGGER

__all__ = [
    "ENVIRONMENT_KEY", "NodeMemory", "default_root", "forget_federation", "node_name", "state_root",
]  # fmt: skip

ENVIRONMENT_KEY = "COMPEFT_FL_STATE_DIR"
_NODE_CONFIG_KEY = "state-dir"
_ATTEMPTS = 3


def state_root(context: Context, state_dir: str | Path | None = None) -> Path:
    """The state folder: as given, of the node config, of the environment, or the user's own.

    Raises
    ------
    StateError
        None is given, and this user has no home.
    """
    given = state_dir or context.node_config.get(_NODE_CONFIG_KEY)
    return _expanded(str(given)) if given else default_root()


def default_root() -> Path:
    """The state folder where none is given: of the environment, or the user's own.

    Raises
    ------
    StateError
        The environment names none, and this user has no home.
    """
    if given := os.getenv(ENVIRONMENT_KEY):
        return _expanded(given)
    return _expanded(os.getenv("XDG_STATE_HOME") or "~/.local/state") / "compeft_fl"


def forget_federation(federation: str) -> None:
    """Remove what this machine's nodes remember of a federation that has ended for good.

    Those are the nodes of a simulation, say, which share the server's state folder. What lies
    elsewhere goes as `compeft_fl.client.state_store` says.
    """
    with contextlib.suppress(StateError):
        state_store.forget(default_root(), federation)


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise StateError(
            f"expected a home folder for {path}, found none: set {ENVIRONMENT_KEY}, or state-dir "
            "in the node config"
        ) from None


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
        """The memory of this node in this federation, locked until the end of the block.

        Where there can be none, the log says why, and the node goes on without.
        """
        name = node_name(context)
        with contextlib.ExitStack() as stack:
            file = None
            try:
                file, name = _opened(stack, context, federation, state_root(context, state_dir))
            except StateError as error:
                LOGGER.warning("CompressionMod: this node remembers nothing: %s", error)
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

    def forget(self) -> None:
        """Keep nothing: the federation has ended. The folders go too, as far as they are empty."""
        self.state = NodeState()
        if self._file is not None:
            state_store.leave(self._file.folder)


def _opened(
    stack: contextlib.ExitStack, context: Context, federation: str, root: Path
) -> tuple[StateFile, str]:
    """The node's file, locked on the stack, and the name that the node bears."""
    run = str(context.run_id)
    for _ in range(_ATTEMPTS):
        folder = state_store.open_federation(root, federation, run)
        try:
            own, name = state_store.claim_node(folder, node_name(context), context.node_id, run)
            if (own, threading.get_ident()) in _held:
                raise ParameterError(
                    "expected CompressionMod once in the mods: is CompressionMod there twice?"
                )
            file = StateFile(own)
            stack.enter_context(file.locked(make=False))
            stack.enter_context(_holding(own))
            return file, name
        except FileNotFoundError:  # somebody has just cleared it
            continue
        except OSError as error:
            raise StateError(f"expected a folder to keep state in, {folder}: {error}") from None
    raise StateError(f"expected a folder to keep state in, {folder}: it vanishes")


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
