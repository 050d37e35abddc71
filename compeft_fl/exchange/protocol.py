"""What the server and a node tell each other beside the Updates, and how a node follows.

The server's *offer* says which version of the global adapter the node must have before it works,
its digest, and which of the node's updates was taken last. The node's *answer* says what it has
kept, and its name, by which a server that was restarted knows it again. A node that cannot follow
answers with a *resync*: the reason, and nothing else; the server sends it what it lacks within the
same round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compeft_fl.errors import CompeftError, ResyncError
from compeft_fl.exchange.downlink import Replica, Shipment
from compeft_fl.exchange.node_state import NOTHING, NodeState
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.wire.messages import inspect

__all__ = ["UNKNOWN", "Answer", "Offer", "follow", "settle"]

UNKNOWN = -2  # the server does not know this node, and so not what it took of it


@dataclass(frozen=True)
class Offer:
    """What the server says with each message.

    Attributes
    ----------
    federation : str
        Names the federation, also across restarts of the server; 16 hexadecimal digits.
    version : int
        The version of the global adapter that the message is about.
    digest : bytes, 16
        Of theta_shared at that version.
    taken : int
        The version that the node's last update that was taken is relative to; `NOTHING`: none was;
        `UNKNOWN`: this node has not been heard of.
    """

    federation: str
    version: int
    digest: bytes
    taken: int


@dataclass(frozen=True)
class Answer:
    """What a node says with each reply.

    Attributes
    ----------
    name : str
        The node's name for itself.
    version : int
        The version that it has kept; `NOTHING`: none.
    resync : str
        Why it cannot follow; empty: it does.
    seconds : (float, float), optional
        What decoding the message took, and compressing and encoding the reply.
    """

    name: str
    version: int
    resync: str = ""
    seconds: tuple[float, float] | None = None


def follow(
    state: NodeState,
    offer: Offer,
    shipment: Shipment,
    initial: Callable[[], TaskVector] | None = None,
) -> Replica:
    """The replica at the offer's version, bit for bit the server's.

    Parameters
    ----------
    state : NodeState
    offer : Offer
    shipment : Shipment
    initial : callable, optional
        Makes the adapter that the federation starts from, version 0, where the node can.

    Raises
    ------
    ResyncError
        The node lacks what the shipment builds on, or the digest differs.
    """
    try:
        replica = _built_on(state, shipment, initial)
    except CompeftError as error:
        raise ResyncError(f"{type(error).__name__}: {error}") from None
    if replica.version != offer.version:
        raise ResyncError(f"expected version {offer.version}, found {replica.version}")
    if replica.digest != offer.digest:
        raise ResyncError(
            f"expected digest {offer.digest.hex()} of version {offer.version}, "
            f"found {replica.digest.hex()}"
        )
    return replica


def _built_on(
    state: NodeState, shipment: Shipment, initial: Callable[[], TaskVector] | None
) -> Replica:
    if shipment.kind == "snapshot":
        return Replica.from_snapshot(shipment.blobs)
    replica = state.replica
    if replica is None:
        if initial is None:
            raise ResyncError("this node has no adapter of this federation")
        adapter = initial()
        values = adapter.values
        if is_torch(values):
            values = values.cpu().numpy()  # type: ignore[union-attr]
        replica = Replica(adapter.layout, values, 0)  # type: ignore[arg-type]
    if not shipment.blobs:
        return replica
    # Of deltas that the server thinks are lacking, some may have arrived already.
    versions = [inspect(blob, layout=replica.layout).base_version for blob in shipment.blobs]
    new = [
        blob for blob, base in zip(shipment.blobs, versions, strict=True) if base >= replica.version
    ]
    return replica.advance(new, versions[-1] + 1)


def settle(state: NodeState, offer: Offer) -> NodeState:
    """The state once the offer has said which update was taken last.

    Raises
    ------
    ResyncError
        The server does not know this node, which has something left to send.
    StateError
        It took an update that this state does not know.
    """
    if offer.taken != UNKNOWN:
        return state.settled(offer.taken)
    if state.taken == NOTHING and state.trained == NOTHING:
        return state
    raise ResyncError("this node has taken part before: which of its updates was taken last?")
