"""What a message brings to a node: the global adapter, expanded, and what is known beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict

from compeft_fl.client.changes import Received
from compeft_fl.errors import CompeftError, ParameterError, StateError
from compeft_fl.exchange.carried import Apart, follow_apart
from compeft_fl.exchange.node_state import NOTHING, NodeState
from compeft_fl.exchange.protocol import Offer, settle
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    LOGGER,
    array_records,
    find_carried,
    find_update,
    to_arrays,
    unflatten,
)
from compeft_fl.parts.ranks import check_rank
from compeft_fl.parts.tensor_policy import TensorPolicy
from compeft_fl.task_vector import TaskVector
from compeft_fl.wire.messages import decode_parts, inspect

__all__ = [
    "carried_version", "check_ranks", "expand_incoming", "followed", "link_of", "rank_of_node",
    "settled", "start_apart", "version_of", "whole",
    "whole_state",
]  # fmt: skip

RANK_KEY = "lora-rank"  # of the node config
LINK_KEY = "link-mbps"

Initial = Callable[[Context], Mapping[str, Any]]


def version_of(state: NodeState) -> int:
    """The version of the adapter that a node keeps."""
    return NOTHING if state.replica is None else state.replica.version


def carried_version(state: NodeState) -> int:
    """The version of the tensors beside it that a node keeps."""
    return NOTHING if state.apart is None else state.apart.version


def followed(
    state: NodeState, offer: Offer, blob: bytes | None, start: Callable[[], Apart | None]
) -> Apart | None:
    """The tensors beside the task vector at the offer's version; None: it says of none.

    Parameters
    ----------
    state : NodeState
    offer : Offer
    blob : bytes or None
        What the message brings of them.
    start : callable
        Gives those of the start, where the node can make it.

    Raises
    ------
    ResyncError
        The node lacks what the bytes build on, or the digest differs.
    """
    if offer.carried == NOTHING:
        return None
    held = state.apart
    if held is None and blob is None:
        held = start()
    return follow_apart(held, blob, offer.carried, offer.carried_digest)


def whole(adapter: TaskVector, apart: Apart | None) -> ArrayRecord:
    """What the ClientApp sees: a flat adapter, and the tensors beside it, in their order."""
    return to_arrays(whole_state(adapter, apart))


def whole_state(adapter: TaskVector, apart: Apart | None) -> dict[str, Any]:
    """The same as numpy arrays; those of a float32 adapter are its own memory."""
    trained = unflatten(adapter)
    return trained if apart is None else apart.whole(trained)


def settled(state: NodeState, offer: Offer) -> NodeState:
    """See `settle`; a state that lost what was left to send goes on without."""
    try:
        return settle(state, offer)
    except StateError as error:
        LOGGER.warning("CompressionMod: the residual is dropped: %s", error)
        return state.without_residual(offer.taken)


def expand_incoming(msg: Message) -> Received:
    """Replace an Update that says all by the arrays that it stands for."""
    found = find_update(msg.content)
    if found is None:
        # Copies of the records: a ClientApp may empty those that it gets.
        plain = {key: dict(record) for key, record in array_records(msg.content).items()}
        return Received(plain, None, 0)
    key, parts = found
    header, adapter = inspect(parts[0]), decode_parts(parts).to_task_vector()
    blob = find_carried(msg.content)
    apart = None if blob is None else Apart.from_bytes(blob, header.base_version)
    arrays = whole(adapter, apart)
    others = {name: record for name, record in msg.content.items() if name != CARRIED_KEY}
    msg.content = RecordDict({**others, key: arrays})
    return Received({key: dict(arrays)}, adapter.layout, header.base_version, apart)


# --- what a node says of itself --------------------------------------------------------------


def rank_of_node(given: int | Callable[[Context], int | None] | None, context: Context) -> int:
    """A node's rank: as the app says, or of the node config; 0: all of the server's.

    Raises
    ------
    ParameterError
        No rank.
    """
    rank = given(context) if callable(given) else given
    if rank is None:
        rank = context.node_config.get(RANK_KEY)  # type: ignore[assignment]
    return 0 if rank is None else check_rank(rank)


def check_ranks(rank: int, offer: Offer | None) -> None:
    """Raise where a node has a rank of its own, and the server takes none.

    Raises
    ------
    ParameterError
    """
    if rank and (offer is None or offer.rank == NOTHING):
        raise ParameterError(
            f"expected a server that takes nodes of rank {rank}, found one for whole adapters "
            "only: its strategy's `ranks` says which are taken"
        )


def link_of(given: float | None, context: Context) -> float:
    """The speed of a node's link in Mbit/s, as its config says, or the app; 0: neither does.

    Raises
    ------
    ParameterError
        No speed.
    """
    stated = context.node_config.get(LINK_KEY, given)
    if stated is None:
        return 0.0
    if isinstance(stated, bool | str | bytes) or not 0 < float(stated) < _FASTEST:
        raise ParameterError(f"expected {LINK_KEY} over 0 in the node config, found {stated!r}")
    return float(stated)


_FASTEST = 1e6  # Mbit/s


def start_apart(
    initial: Initial | None, context: Context, policy: TensorPolicy, rank: int
) -> Apart | None:
    """What of the start is not trained, as this node makes it; None: it cannot.

    Parameters
    ----------
    initial : callable or None
        Makes the start, all of the server's.
    context : flwr.app.Context
    policy : TensorPolicy
    rank : int
        Of the part that is wanted; 0: all of it.
    """
    if initial is None:
        return None
    try:
        found = Apart.of({n: np.asarray(v) for n, v in initial(context).items()}, policy)
        return found.cut(rank) if rank else found
    except CompeftError as error:
        LOGGER.debug("the start cannot be made here: %s", error)
        return None
