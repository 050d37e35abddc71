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
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.carried import Apart, Versions
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.node_state import NO_UPDATE, NOTHING
from compeft_fl.exchange.protocol import UNKNOWN, Answer, Offer
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    EXCHANGE_KEY,
    LOGGER,
    array_records,
    carried_record,
    find_offer,
    offer_record,
    shipment_record,
    update_record,
)
from compeft_fl.exchange.replica import Shipment
from compeft_fl.server.base import Base
from compeft_fl.server.downlink_options import DownlinkOptions, log_lag
from compeft_fl.server.nodes import Node, NodeTable
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.transfers import Transfers
from compeft_fl.task_vector import TaskVector
from compeft_fl.tensor_policy import TensorPolicy
from compeft_fl.wire.messages import encode_parts

__all__ = ["Broadcaster"]

T = TypeVar("T")

_MAX_RESYNCS = 2  # of one node in one round
_HUGE = 1e9  # no trained adapter has such a value


class Broadcaster:
    """Versions of the global adapter, and who has which.

    Parameters
    ----------
    observer : RoundObserver
    options : DownlinkOptions, optional
    policy : TensorPolicy, optional
        Which tensors are trained, carried or left.
    """

    def __init__(
        self,
        observer: RoundObserver,
        options: DownlinkOptions | None = None,
        policy: TensorPolicy | None = None,
    ) -> None:
        self._observer, self._policy = observer, policy
        self.transfers = Transfers(observer)
        self.options = options or DownlinkOptions()
        self.federation = secrets.token_hex(8)
        self._downlink: Downlink | None = None
        self._carried = Versions(Apart())
        self._base: Base | None = None
        self._nodes = NodeTable()
        self._restored = False
        self._resyncs: dict[int, int] = {}  # in this round, by node id
        self._records: dict[int, tuple[Shipment, ArrayRecord]] = {}  # likewise, by their ids
        self._addressed: dict[int, RecordDict] = {}  # contents of this round, by node id
        self._key = ""
        self.ending = False  # what goes out now is the last of this federation

    def begin(self) -> None:
        """Forget all versions and nodes: another federation begins."""
        self.federation = secrets.token_hex(8)
        self._downlink = self._base = None
        self._carried = Versions(Apart())
        self._nodes, self._restored = NodeTable(), False
        self._resyncs.clear()
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
            base = Base(arrays, 0, self._policy)
            started = time.perf_counter()
            if self._downlink is None:
                self._downlink = self.options.make(base.adapter)
                self._carried = Versions(base.apart)
                self._say_carried(base)
            else:
                self._carried.advance(base.apart)
                self._downlink.advance(base.adapter)
                log_lag(self._downlink, base.adapter, self._base.adapter if self._base else None)
            self.transfers.encoded(time.perf_counter() - started)
            base.version = self._downlink.version
            self.transfers.carried_bytes = base.apart.num_bytes
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
        self._records.clear()
        self._addressed.clear()
        self.transfers.begin()
        size = base.layout.num_parameters
        addressed: dict[int, Base] = {}
        sent: dict[tuple[int, int, int, bytes], tuple[RecordDict, RecordDict]] = {}
        own_bases: dict[int, tuple[Base, dict[str, ArrayRecord], int]] = {}
        groups: dict[tuple[int, int], tuple[int, list[int]]] = {}  # bytes and nodes, by shipment
        messages = list(messages)
        self._prepare(message.metadata.dst_node_id for message in messages)
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
                if id(arrays) not in own_bases:
                    own_bases[id(arrays)] = self._own(arrays, base.version)
                own = own_bases[id(arrays)]
                message.content = RecordDict({**message.content, **own[1]})
                addressed[node_id] = own[0]
                self._observer.on_broadcast(server_round, kind, [node_id], own[2])
                self.transfers.outgoing(server_round, kind, node_id, size, own[2])
                continue
            shipment, carried, taken = self._for(node_id)
            num_bytes = shipment.num_bytes + len(carried or b"")
            self.transfers.outgoing(server_round, kind, node_id, size, num_bytes)
            content = message.content
            same = (id(content), id(shipment), id(carried), taken)
            if same not in sent:
                # The old content stays referenced, so that no other gets its id.
                sent[same] = content, self._content(content, shipment, carried, taken)
            message.content = sent[same][1]
            groups.setdefault(same[1:3], (num_bytes, []))[1].append(node_id)
            addressed[node_id] = base
            self._addressed[node_id] = message.content
        for num_bytes, nodes in groups.values():
            self._observer.on_broadcast(server_round, kind, nodes, num_bytes)
        return addressed

    def expected_bytes(self, node_ids: Iterable[int]) -> int:
        """What one of these nodes lacks of the current version, in bytes, on the mean."""
        found = [self._lacked_by(self._nodes.get(node_id)) for node_id in node_ids]
        sizes = [shipment.num_bytes + len(carried or b"") for shipment, carried in found]
        return round(sum(sizes) / len(sizes)) if sizes else 0

    def restore_offers(self, messages: Iterable[Message]) -> None:
        """Give messages their offers back, where a strategy's own code has made new contents.

        Empty ArrayRecords, which stand where a node lacks nothing, are taken out.
        """
        for message in messages:
            addressed = self._addressed.get(message.metadata.dst_node_id)
            content = message.content
            if addressed is None:
                continue
            if EXCHANGE_KEY not in content and self._key in content:
                kept = (EXCHANGE_KEY, CARRIED_KEY)
                offer = {key: addressed[key] for key in kept if key in addressed}
                message.content = content = RecordDict({**content, **offer})
            record = content.get(self._key)
            if isinstance(record, ArrayRecord) and not record:
                del content[self._key]

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
            carried = self._carried.lacking(answer.carried)
        elif attempts == 1 and unknown and self._restored:
            shipment = self._lacking(self._start)  # it was sent an offer and nothing else
            carried = self._carried.lacking(NOTHING)
        else:
            shipment, carried = self._snapshot(), self._carried.lacking(NOTHING)
        num_bytes = shipment.num_bytes + len(carried or b"")
        self._observer.on_broadcast(server_round, "resync", [node_id], num_bytes)
        self.transfers.outgoing(server_round, "resync", node_id, self.num_parameters, num_bytes)
        known, sent = self._nodes.get(node_id), question.metadata
        taken = known.taken if known else NO_UPDATE
        content = self._content(question.content, shipment, carried, taken)
        return Message(content, node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)

    @property
    def _start(self) -> int | None:
        """The version that a node of which nothing is known can make by itself."""
        return 0 if self.options.first_contact == "seed" else None

    def _for(self, node_id: int) -> tuple[Shipment, bytes | None, bytes]:
        """What a node is sent, also of carried tensors, and which of its updates was taken last."""
        known = self._nodes.get(node_id)
        shipment, carried = self._lacked_by(known)
        return shipment, carried, UNKNOWN if known is None else known.taken

    def _lacked_by(self, known: Node | None) -> tuple[Shipment, bytes | None]:
        """What a node lacks, and what of carried tensors."""
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        if known is None and self._restored:
            # After a restart the nodes may have other ids, and have kept all but the last version.
            return self._lacking(self._downlink.version), None
        if known is None:
            return self._lacking(self._start), self._carried.lacking(NOTHING)
        version = None if known.version == NOTHING else known.version
        return self._lacking(version), self._carried.lacking(known.carried)

    def _lacking(self, version: int | None) -> Shipment:
        """See `Downlink.lacking`; timed."""
        return self._timed(lambda downlink: downlink.lacking(version))

    def _prepare(self, node_ids: Iterable[int]) -> None:
        """See `Downlink.prepare`; timed."""
        known = (self._nodes.get(node_id) for node_id in node_ids)
        versions = {node.version for node in known if node and node.version != NOTHING}
        if len(versions) > 1:
            self._timed(lambda downlink: downlink.prepare(versions))

    def _snapshot(self) -> Shipment:
        """See `Downlink.snapshot`; timed."""
        return self._timed(lambda downlink: downlink.snapshot())

    def _timed(self, make: Callable[[Downlink], T]) -> T:
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        started = time.perf_counter()
        made = make(self._downlink)
        self.transfers.encoded(time.perf_counter() - started)
        return made

    def _content(
        self, content: RecordDict, shipment: Shipment, carried: bytes | None, taken: bytes
    ) -> RecordDict:
        """A message's content with a shipment in the place of its arrays."""
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        offer = Offer(
            self.federation, self._downlink.version, self._downlink.digest, taken, last=self.ending
        )
        if self._carried.apart:
            offer = replace(
                offer, carried=self._carried.version, carried_digest=self._carried.digest
            )
        others = {key: record for key, record in content.items() if key != self._key}
        others[EXCHANGE_KEY] = offer_record(offer, self._key, shipment.kind)
        # An empty record goes no further than `restore_offers`: a strategy's own code may look.
        others[self._key] = self._record(shipment) if shipment.blobs else ArrayRecord()
        if carried is not None:
            others[CARRIED_KEY] = carried_record(carried)
        return RecordDict(others)

    def _record(self, shipment: Shipment) -> ArrayRecord:
        """The shipment's record, one for all nodes that lack the same."""
        known = self._records.get(id(shipment))
        if known is None:
            record = shipment_record(shipment, self.num_parameters)
            known = self._records[id(shipment)] = shipment, record
        return known[1]

    def _own(self, arrays: ArrayRecord, version: int) -> tuple[Base, dict[str, ArrayRecord], int]:
        """Arrays that are not the global adapter: a base of their own, and all that it is."""
        base = Base(arrays, version, self._policy)
        parts = encode_parts(base.adapter, "dense", base_version=version)
        records = {self._key: update_record(parts, base.adapter.num_parameters)}
        num_bytes = sum(map(len, parts))
        if base.apart:
            carried = base.apart.to_bytes()
            records[CARRIED_KEY] = carried_record(carried)
            num_bytes += len(carried)
        return base, records, num_bytes

    def _say_carried(self, base: Base) -> None:
        """One line in the log about what is not compressed."""
        carried, apart = base.apart.carried, base.apart
        if apart.places:
            LOGGER.info(
                "%d tensors are carried as they are (%d bytes), %d are left to the nodes, "
                "%d are trained",
                len(carried),
                sum(value.nbytes for value in carried.values()),
                len(apart.places) - len(carried),
                len(base.layout.tensors),
            )

    # What a checkpoint keeps.

    def state(self) -> dict[str, Any]:
        """Versions and nodes, for `restore`: a dict with arrays, bytes and plain values."""
        if self._downlink is None:
            raise ParameterError("expected a version before a checkpoint")
        return {
            "federation": self.federation,
            "nodes": self._nodes.state(),
            "carried": self._carried.state(),
            **self._downlink.state(),
        }

    def restore(self, arrays: ArrayRecord, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, with the global adapter of that moment.

        Raises
        ------
        StateError
            What it says of nodes is not what this version writes.
        """
        base = Base(arrays, int(state["version"]), self._policy)
        self._downlink = self.options.make(base.adapter)
        self._downlink.restore(state)
        self._carried = Versions(base.apart)
        self._carried.restore(state.get("carried", {}))
        self._base = base
        self.federation = str(state["federation"])
        self._nodes.restore(state["nodes"])
        self._restored = True
        _warn_of_huge_values(base.adapter)


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
