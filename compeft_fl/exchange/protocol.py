"""What the server and a node tell each other beside the Updates, and how a node follows.

The server's *offer* says which version of the global adapter the node must have before it works,
its digest, and which of the node's updates was taken last. The node's *answer* says what it has
kept, and which update it sends. A node that cannot follow answers with a *resync*: the reason, and
nothing else; the server sends it what it lacks within the same round.

Who a node is, Flower says: its node id, and nothing in an answer. An update has an id, a digest of
its bytes, which only its node and the server know. So a node that comes back under another node
id says which update it sent last, and a server that has taken it can tell; what a node says is
about itself, and a lie costs the liar alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compeft_fl.errors import CompeftError, ResyncError, WireError
from compeft_fl.exchange.grid import Grid
from compeft_fl.exchange.node_state import NO_UPDATE, NOTHING, NodeState
from compeft_fl.exchange.replica import MAX_DELTAS, Replica, Shipment
from compeft_fl.parts.ranks import Cut
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.wire.messages import inspect
from compeft_fl.wire.opening import parse

__all__ = ["UNKNOWN", "UPDATE_ID_BYTES", "Answer", "Offer", "follow", "settle", "update_id"]

UNKNOWN = b"?"  # the server does not know this node, and so not what it took of it
UPDATE_ID_BYTES = 8


def update_id(parts: Iterable[bytes]) -> bytes:
    """8 bytes that stand for an encoded update, all of its parts: BLAKE2b-64."""
    digest = hashlib.blake2b(digest_size=UPDATE_ID_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


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
    taken : bytes
        The id of the node's update that was taken last; `NO_UPDATE`: none was; `UNKNOWN`: this node
        has not been heard of.
    carried : int
        The version of the tensors beside the task vector; `NOTHING`: there are none.
    carried_digest : bytes, 16
        Of these.
    last : bool
        The federation ends with this message, and nobody can go on with it.
    rank : int
        The rank for which adapter and digest are cut (`compeft_fl.parts.ranks`); 0: they are whole,
        and the server takes other ranks; `NOTHING`: it takes whole adapters only.
    density : float
        What the node's update is to have at most; 0: the node decides.
    bits : int
        A parameter, of an update that is no ternary one; 0: it is one.
    """

    federation: str
    version: int
    digest: bytes
    taken: bytes
    carried: int = NOTHING
    carried_digest: bytes = b""
    last: bool = False
    rank: int = NOTHING
    density: float = 0.0
    bits: int = 0

    @property
    def times(self) -> bool:
        """Does the server want to know of the node's link and of its work?"""
        return bool(self.density or self.bits)


@dataclass(frozen=True)
class Answer:
    """What a node says with each reply.

    Attributes
    ----------
    version : int
        The version that it has kept; `NOTHING`: none.
    update : bytes
        The id of the update in this reply; of a resync, of the last one whose fate it does not
        know. `NO_UPDATE`: there is none.
    taken : bytes
        Of a resync alone: the id of the last update that was taken, as far as the node knows.
    resync : str
        Why it cannot follow; empty: it does.
    seconds : (float, float), optional
        What decoding the message took, and compressing and encoding the reply.
    carried : int
        The version that it has kept of the tensors beside the task vector; `NOTHING`: none.
    quality : (float, float), optional
        Cosine and relative error of the update, against what the node has compressed.
    rank : int
        The rank of what the node holds and sends; 0: all of the server's.
    work : float, optional
        Seconds between the message's arrival and this answer, where the server asks.
    link : float
        The speed of the node's link in Mbit/s, as its config says; 0: it says nothing.
    """

    version: int
    update: bytes = NO_UPDATE
    taken: bytes = NO_UPDATE
    resync: str = ""
    seconds: tuple[float, float] | None = None
    carried: int = NOTHING
    quality: tuple[float, float] | None = None
    rank: int = 0
    work: float | None = None
    link: float = 0.0


def follow(
    state: NodeState,
    offer: Offer,
    shipment: Shipment,
    initial: Callable[[], TaskVector] | None = None,
    rank: int = 0,
) -> Replica:
    """The replica at the offer's version, bit for bit the server's, or its part of a lower rank.

    Parameters
    ----------
    state : NodeState
    offer : Offer
    shipment : Shipment
    initial : callable, optional
        Makes the adapter that the federation starts from, version 0, where the node can; all of it.
    rank : int
        The node's; 0: all of the server's.

    Raises
    ------
    ResyncError
        The node lacks what the shipment builds on, or the digest differs, or the server does not
        know the node's rank.
    """
    if rank and offer.rank != rank:
        if offer.rank or state.replica is not None or initial is None:
            raise ResyncError(f"expected an adapter of rank {rank}, found {_ranked(offer.rank)}")
        # Of a new node nothing is known, but the start can be cut here.
        replica = follow(NodeState(), offer, shipment, initial)
        return _cut(replica, rank)
    try:
        replica = _built_on(state, shipment, offer.version, initial, rank)
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


def _ranked(rank: int) -> str:
    return f"one of rank {rank}" if rank else "all of it"


def _cut(replica: Replica, rank: int) -> Replica:
    """The part of a lower rank."""
    try:
        return replica.cut(Cut(replica.layout, rank))
    except CompeftError as error:  # factors under other names: the server knows them
        raise ResyncError(f"the start cannot be cut to rank {rank}: {error}") from None


def _built_on(
    state: NodeState,
    shipment: Shipment,
    version: int,
    initial: Callable[[], TaskVector] | None,
    rank: int = 0,
) -> Replica:
    if shipment.kind == "snapshot":
        return Replica.from_snapshot(shipment.blobs)
    if shipment.kind == "start":
        return Replica.from_start(shipment.blobs, version)
    replica = state.replica
    base = _base_version(shipment)
    if replica is not None and shipment.kind == "catchup" and base == 0 != replica.version:
        replica = None if initial is not None else replica  # anew, from the start
    if replica is None:
        if initial is None:
            raise ResyncError("this node has no adapter of this federation")
        adapter = initial()
        values = adapter.values
        if is_torch(values):
            values = values.cpu().numpy()  # type: ignore[union-attr]
        start = Grid.of_start(values).nearest(values)  # type: ignore[arg-type]
        replica = Replica(adapter.layout, start, 0)
        del adapter, values  # large ones are not kept twice
        replica = _cut(replica, rank) if rank else replica
    if not shipment.blobs or replica.version == version:
        return replica
    if shipment.kind == "catchup":
        return replica.catch_up(shipment.blobs, version)
    if len(shipment.blobs) > MAX_DELTAS:
        raise WireError(f"expected at most {MAX_DELTAS} deltas, found {len(shipment.blobs)}")
    # Of deltas that the server thinks are lacking, some may have arrived already.
    versions = [inspect(blob, layout=replica.layout).base_version for blob in shipment.blobs]
    new = [
        blob for blob, base in zip(shipment.blobs, versions, strict=True) if base >= replica.version
    ]
    return replica.advance(new, versions[-1] + 1)


def _base_version(shipment: Shipment) -> int:
    """The version that a shipment's first Update builds on; -1: it has none."""
    return parse(shipment.blobs[0], None)[0].base_version if shipment.blobs else -1


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
    if state.taken == NO_UPDATE and state.trained == NO_UPDATE:
        return state
    raise ResyncError("this node has taken part before: which of its updates was taken last?")
