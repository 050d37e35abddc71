"""What goes down in a round: to each node what it lacks of the global adapter, and an offer.

The one place where bytes go down. `Broadcaster` keeps the versions of the global adapter
(`compeft_fl.exchange.downlink`) and what is known of each node, by Flower's node id: what a node
says is only ever about itself. A node that comes under another id than before is as new as any
other, but what it has kept still counts: it says so when it is sent an offer and nothing else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.exchange.downlink import Downlink, Shipment
from compeft_fl.exchange.node_state import NO_UPDATE, NOTHING
from compeft_fl.exchange.protocol import UNKNOWN, Answer, Offer
from compeft_fl.exchange.records import (
    EXCHANGE_KEY,
    LOGGER,
    array_records,
    find_offer,
    offer_record,
    shipment_record,
    to_arrays,
    to_state,
    update_record,
)
from compeft_fl.server.downlink_options import DownlinkOptions, log_lag
from compeft_fl.server.nodes import NodeTable
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.transfers import Transfers
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode

__all__ = ["Base", "Broadcaster", "conform"]

_MAX_RESYNCS = 2  # of one node in one round
_HUGE = 1e9  # no trained adapter has such a value


class Base:
    """The global adapter that a round's replies are relative to.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
        One Array per tensor: theta.
    version : int
        What the nodes hold of it; replies must be relative to that version.

    Raises
    ------
    LayoutError
        Arrays that are no adapter's: not numpy's, or of another data type.
    NonFiniteError
        NaN or Inf; the message names the tensor.
    """

    def __init__(self, arrays: ArrayRecord, version: int) -> None:
        self.arrays, self.version = arrays, version
        self.state: dict[str, NDArray[Any]] = to_state(arrays)
        self.adapter = TaskVector.from_dict(self.state)
        if not self.adapter.num_parameters:
            raise LayoutError("expected a global adapter with parameters, found none")
        self.adapter.check_finite()
        self.layout: Layout = self.adapter.layout

    def read(self, blob: bytes) -> TernaryVector | TaskVector:
        """A reply's Update, which must be for this adapter and relative to this version.

        Raises
        ------
        WireError
        """
        return decode(blob, layout=self.layout, base_version=self.version)

    def moved_by(self, change: TaskVector) -> ArrayRecord:
        """The adapter plus a task vector, one Array per tensor, of the data types that it had.

        Raises
        ------
        NonFiniteError
            A value beyond what its tensor's data type holds; the message names the tensor.
        """
        with np.errstate(over="ignore"):
            return _finite(change.apply(self.state))


class Broadcaster:
    """Versions of the global adapter, and who has which.

    Parameters
    ----------
    observer : RoundObserver
    options : DownlinkOptions, optional
    """

    def __init__(self, observer: RoundObserver, options: DownlinkOptions | None = None) -> None:
        self._observer = observer
        self.transfers = Transfers(observer)
        self.options = options or DownlinkOptions()
        self.federation = secrets.token_hex(8)
        self._downlink: Downlink | None = None
        self._base: Base | None = None
        self._nodes = NodeTable()
        self._restored = False
        self._resyncs: dict[int, int] = {}  # in this round, by node id
        self._shipments: dict[tuple[str, int], Shipment] = {}  # of this round
        self._records: dict[int, tuple[Shipment, ArrayRecord]] = {}  # likewise, by their ids
        self._addressed: set[int] = set()  # nodes of this round
        self._key = ""

    def begin(self) -> None:
        """Forget all versions and nodes: another federation begins."""
        self.federation = secrets.token_hex(8)
        self._downlink = self._base = None
        self._nodes, self._restored = NodeTable(), False
        self._resyncs.clear()
        self._shipments.clear()
        self._records.clear()
        self._addressed.clear()

    def base(self, arrays: ArrayRecord) -> Base:
        """Make a version of these arrays, unless they have one, and say what it is.

        Raises
        ------
        LayoutError, NonFiniteError
            As `Base`; arrays of another layout than before.
        """
        if self._base is None or self._base.arrays is not arrays:
            base = Base(arrays, 0)
            started = time.perf_counter()
            if self._downlink is None:
                self._downlink = self.options.make(base.adapter)
            else:
                self._downlink.advance(base.adapter)
                log_lag(self._downlink, base.adapter, self._base.adapter if self._base else None)
            self.transfers.encoded(time.perf_counter() - started)
            base.version = self._downlink.version
            self._base = base
        return self._base

    def address(
        self, messages: Iterable[Message], server_round: int, kind: str, base: Base
    ) -> dict[int, Base]:
        """Replace the adapter in a round's messages by what each node lacks, and an offer.

        Messages that shared their content share it still, where the nodes lack the same.

        Returns
        -------
        dict of int to Base
            What each node's reply will be relative to. Nodes whose message has no arrays are left
            out.

        Raises
        ------
        ParameterError
            A message with more than one ArrayRecord.
        LayoutError, NonFiniteError
            As `Base`, for arrays of a strategy's own for some nodes. These have no versions: they
            go as one dense Update.
        """
        self._resyncs.clear()
        self._shipments.clear()
        self._records.clear()
        self._addressed.clear()
        self.transfers.begin()
        size = base.layout.num_parameters
        addressed: dict[int, Base] = {}
        sent: dict[tuple[int, int, bytes], tuple[RecordDict, RecordDict]] = {}
        own_bases: dict[int, tuple[Base, ArrayRecord, int]] = {}
        groups: dict[int, tuple[int, list[int]]] = {}  # bytes and nodes, by shipment
        for message in messages:
            records = array_records(message.content)
            node_id = message.metadata.dst_node_id
            if not records:
                self.transfers.outgoing(server_round, kind, node_id, 0, 0)
                continue
            if len(records) > 1:
                raise ParameterError(
                    f"expected one ArrayRecord in a message, found {len(records)}: "
                    f"{', '.join(records)}"
                )
            ((self._key, arrays),) = records.items()
            if arrays is not base.arrays and arrays != base.arrays:
                own = own_bases.setdefault(id(arrays), _own(arrays, base.version))
                message.content = RecordDict({**message.content, self._key: own[1]})
                addressed[node_id] = own[0]
                self._observer.on_broadcast(server_round, kind, [node_id], own[2])
                self.transfers.outgoing(server_round, kind, node_id, size, own[2])
                continue
            shipment, taken = self._for(node_id)
            self.transfers.outgoing(server_round, kind, node_id, size, shipment.num_bytes)
            content = message.content
            same = (id(content), id(shipment), taken)
            if same not in sent:
                # The old content stays referenced, so that no other gets its id.
                sent[same] = content, self._content(content, shipment, taken)
            message.content = sent[same][1]
            groups.setdefault(id(shipment), (shipment.num_bytes, []))[1].append(node_id)
            addressed[node_id] = base
            self._addressed.add(node_id)
        for num_bytes, nodes in groups.values():
            self._observer.on_broadcast(server_round, kind, nodes, num_bytes)
        return addressed

    @property
    def num_parameters(self) -> int:
        """Of the adapter; 0 before there is one."""
        return self._downlink.layout.num_parameters if self._downlink else 0

    def heard(self, node_id: int, answer: Answer) -> None:
        """Note what a node says of itself."""
        if node_id in self._addressed:
            self._nodes.heard(node_id, answer)

    def took(self, node_id: int) -> None:
        """Note that the update in a node's reply was merged."""
        self._nodes.took(node_id)

    def resync(self, question: Message, answer: Answer, server_round: int) -> Message | None:
        """A node's message once more, with what it lacks; all else as it was sent.

        Parameters
        ----------
        question : flwr.app.Message
            The message that the node could not follow.
        answer : Answer
            The node's, after `heard`.
        server_round : int

        Returns
        -------
        flwr.app.Message or None
            None where the message had no offer, or the node has had its chances.
        """
        node_id = question.metadata.dst_node_id
        attempts = self._resyncs[node_id] = self._resyncs.get(node_id, 0) + 1
        told = find_offer(question.content)
        if attempts > _MAX_RESYNCS or self._downlink is None or told is None:
            return None
        offer, self._key, _ = told
        unknown = offer.taken == UNKNOWN
        if attempts == 1 and unknown and answer.version != NOTHING:
            shipment = self._lacking(answer.version)  # it was here before, under another id
        elif attempts == 1 and unknown and self._restored:
            shipment = self._lacking(self._start)  # it was sent an offer and nothing else
        else:
            shipment = self._snapshot()
        self._observer.on_broadcast(server_round, "resync", [node_id], shipment.num_bytes)
        size = self.num_parameters
        self.transfers.outgoing(server_round, "resync", node_id, size, shipment.num_bytes)
        known, sent = self._nodes.get(node_id), question.metadata
        content = self._content(question.content, shipment, known.taken if known else NO_UPDATE)
        return Message(content, node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)

    @property
    def _start(self) -> int | None:
        """The version that a node of which nothing is known can make by itself."""
        return 0 if self.options.first_contact == "seed" else None

    def _for(self, node_id: int) -> tuple[Shipment, bytes]:
        """What a node is sent, and which of its updates was taken last."""
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        known = self._nodes.get(node_id)
        if known is None:
            # After a restart the nodes may have other ids, and have kept all but the last version.
            first = Shipment("nothing") if self._restored else self._lacking(self._start)
            return self._shared(first), UNKNOWN
        version = None if known.version == NOTHING else known.version
        return self._shared(self._lacking(version)), known.taken

    def _lacking(self, version: int | None) -> Shipment:
        """See `Downlink.lacking`; timed."""
        return self._timed(lambda downlink: downlink.lacking(version))

    def _snapshot(self) -> Shipment:
        """See `Downlink.snapshot`; timed."""
        return self._timed(lambda downlink: downlink.snapshot())

    def _timed(self, make: Callable[[Downlink], Shipment]) -> Shipment:
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        started = time.perf_counter()
        shipment = make(self._downlink)
        self.transfers.encoded(time.perf_counter() - started)
        return shipment

    def _shared(self, shipment: Shipment) -> Shipment:
        """The same object for equal shipments, so that messages share their content."""
        return self._shipments.setdefault((shipment.kind, len(shipment.blobs)), shipment)

    def _content(self, content: RecordDict, shipment: Shipment, taken: bytes) -> RecordDict:
        """A message's content with a shipment in the place of its arrays."""
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        offer = Offer(self.federation, self._downlink.version, self._downlink.digest, taken)
        others = {key: record for key, record in content.items() if key != self._key}
        others[EXCHANGE_KEY] = offer_record(offer, self._key, shipment.kind)
        if shipment.blobs:
            others[self._key] = self._record(shipment)
        return RecordDict(others)

    def _record(self, shipment: Shipment) -> ArrayRecord:
        """The shipment's record, one for all nodes that lack the same."""
        known = self._records.get(id(shipment))
        if known is None:
            record = shipment_record(shipment, self.num_parameters)
            known = self._records[id(shipment)] = shipment, record
        return known[1]

    # What a checkpoint keeps.

    def state(self) -> dict[str, Any]:
        """Versions and nodes, for `restore`: a dict with arrays, bytes and plain values."""
        if self._downlink is None:
            raise ParameterError("expected a version before a checkpoint")
        return {
            "federation": self.federation,
            "nodes": self._nodes.state(),
            **self._downlink.state(),
        }

    def restore(self, arrays: ArrayRecord, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, with the global adapter of that moment.

        Raises
        ------
        StateError
            What it says of nodes is not what this version writes.
        """
        base = Base(arrays, int(state["version"]))
        self._downlink = self.options.make(base.adapter)
        self._downlink.restore(state)
        self._base = base
        self.federation = str(state["federation"])
        self._nodes.restore(state["nodes"])
        self._restored = True
        _warn_of_huge_values(base.adapter)


def _own(arrays: ArrayRecord, version: int) -> tuple[Base, ArrayRecord, int]:
    """Arrays that are not the global adapter: a base of their own, and one Update that says all."""
    base = Base(arrays, version)
    blob = encode(base.adapter, "dense", base_version=version)
    return base, update_record(blob, base.adapter.num_parameters), len(blob)


def _warn_of_huge_values(adapter: TaskVector) -> None:
    """Say where a restored adapter holds values that no training makes."""
    for tensor, where in adapter.layout.slices():
        largest = float(np.abs(np.asarray(adapter.values[where])).max(initial=0.0))
        if largest > _HUGE:
            LOGGER.warning(
                "the checkpoint's adapter has values up to %.3g, in %r: something has driven it "
                "there, and training will hardly bring it back; an earlier checkpoint may be sound",
                largest,
                tensor.name,
            )
            return


def conform(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """Arrays in the order and the data types of others (Flower's adaptive strategies make float64).

    Raises
    ------
    LayoutError, NonFiniteError
        Other names or shapes; values that are no numbers, or beyond their data type.
    """
    found, wanted = to_state(arrays), to_state(like)
    Layout.of(wanted).check(found)
    with np.errstate(over="ignore"):
        return _finite({name: found[name].astype(old.dtype) for name, old in wanted.items()})


def _finite(state: dict[str, NDArray[Any]]) -> ArrayRecord:
    TaskVector.from_dict(state).check_finite()
    return to_arrays(state)
