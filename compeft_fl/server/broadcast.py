"""What goes down in a round: to each node what it lacks of the global adapter, and an offer.

The one place where bytes go down. `Broadcaster` keeps the versions of the global adapter
(`compeft_fl.exchange.downlink`) and what is known of each node, by Flower's node id: what a node
says is only ever about itself. A node that comes under another id than before is as new as any
other, but what it has kept still counts: it says so when it is sent an offer and nothing else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.carried import Apart, Versions
from compeft_fl.exchange.cut_shipments import CutShipments
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.node_state import NO_UPDATE, NOTHING
from compeft_fl.exchange.protocol import UNKNOWN, Answer
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    EXCHANGE_KEY,
    array_records,
    find_offer,
)
from compeft_fl.exchange.replica import Shipment
from compeft_fl.parts.ranks import AXES, Cut
from compeft_fl.parts.tensor_policy import TensorPolicy
from compeft_fl.reduction.rates import Rate
from compeft_fl.server.base import Base
from compeft_fl.server.contents import Contents, Need, own_records
from compeft_fl.server.downlink_options import (
    DownlinkOptions,
    log_lag,
    say_carried,
    warn_of_huge_values,
)
from compeft_fl.server.mixed_ranks import MixedRanks
from compeft_fl.server.nodes import Node, NodeTable
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.transfers import Transfers
from compeft_fl.server.upload_budget import UploadBudget

__all__ = ["Broadcaster"]

T = TypeVar("T")

_MAX_RESYNCS = 2  # of one node in one round
_OWN_RATE = Rate()


class Broadcaster:
    """Versions of the global adapter, and who has which.

    Parameters
    ----------
    observer : RoundObserver
    options : DownlinkOptions, optional
    policy : TensorPolicy, optional
        Which tensors are trained, carried or left.
    ranks : MixedRanks, optional
        Default: all nodes have the whole adapter.
    upload : UploadBudget, optional
        Default: nodes decide on the density of their updates.
    """

    def __init__(
        self,
        observer: RoundObserver,
        options: DownlinkOptions | None = None,
        policy: TensorPolicy | None = None,
        ranks: MixedRanks | None = None,
        upload: UploadBudget | None = None,
    ) -> None:
        self._observer, self._policy = observer, policy
        self.ranks, self.upload = ranks, upload
        self.transfers = Transfers(observer)
        self.options = options or DownlinkOptions()
        self.federation = secrets.token_hex(8)
        self._downlink: Downlink | None = None
        self._carried = Versions(Apart())
        self._base: Base | None = None
        self._nodes = NodeTable()
        self._restored = False
        self._resyncs: dict[int, int] = {}  # in this round, by node id
        self._contents: Contents | None = None  # of this round
        self._addressed: dict[int, RecordDict] = {}  # likewise, by node id
        self._pushed: dict[int, tuple[float, int]] = {}  # likewise: when, and bytes
        self._cuts = CutShipments({})
        self._cut_map: dict[int, Cut | None] = {}
        self._key = ""
        self.ending = False  # what goes out now is the last of this federation

    def begin(self) -> None:
        """Forget all versions and nodes: another federation begins."""
        self.federation = secrets.token_hex(8)
        self._downlink = self._base = None
        self._carried = Versions(Apart())
        self._nodes, self._restored = NodeTable(), False
        self._resyncs.clear()
        self._addressed.clear()
        self._pushed.clear()
        self._cuts, self._cut_map = CutShipments({}), {}

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
                self._cut_for(base)
                self._downlink = self.options.make(base.adapter)
                self._carried = Versions(base.apart)
                say_carried(base)
            else:
                self._carried.advance(base.apart)
                self._downlink.advance(base.adapter)
                log_lag(self._downlink, base.adapter, self._base.adapter if self._base else None)
            self.transfers.encoded(time.perf_counter() - started)
            base.version, base.cuts = self._downlink.version, self._cut_map
            base.shared = self._downlink.shared
            self.transfers.carried_bytes = sum(v.nbytes for v in base.apart.carried.values())
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
            A message with more than one ArrayRecord; arrays of a strategy's own for some nodes,
            where ranks are mixed.
        LayoutError, NonFiniteError
            As `Base`, for arrays of a strategy's own for some nodes. These have no versions: they
            go as one dense Update.
        """
        self._resyncs.clear()
        self._addressed.clear()
        self._pushed.clear()
        self._contents = None
        self.transfers.begin()
        size = base.layout.num_parameters
        addressed: dict[int, Base] = {}
        sent: dict[tuple[object, ...], tuple[RecordDict, RecordDict]] = {}
        own_bases: dict[int, tuple[Base, dict[str, ArrayRecord], int]] = {}
        groups: dict[object, tuple[int, list[int]]] = {}  # bytes and nodes, by shipment
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
                if self.ranks is not None:
                    raise ParameterError(
                        "expected the global adapter in all messages where ranks are mixed, found "
                        "arrays of the strategy's own"
                    )
                if id(arrays) not in own_bases:
                    its = Base(arrays, base.version, self._policy)
                    own_bases[id(arrays)] = its, *own_records(its, self._key)
                own = own_bases[id(arrays)]
                message.content = RecordDict({**message.content, **own[1]})
                addressed[node_id] = own[0]
                self._observer.on_broadcast(server_round, kind, [node_id], own[2])
                self.transfers.outgoing(server_round, kind, node_id, size, own[2])
                continue
            need = self._need(self._nodes.get(node_id), trains=kind == "train")
            parameters = need.num_parameters
            self.transfers.outgoing(server_round, kind, node_id, parameters, need.num_bytes)
            content = message.content
            same = (id(content), *need.identity)
            if same not in sent:
                # The old content stays referenced, so that no other gets its id.
                sent[same] = content, self._content(content, need)
            message.content = sent[same][1]
            groups.setdefault(need.identity[:2], (need.num_bytes, []))[1].append(node_id)
            addressed[node_id] = base
            self._pushed[node_id] = 0.0, need.num_bytes
            self._addressed[node_id] = message.content
        for num_bytes, nodes in groups.values():
            self._observer.on_broadcast(server_round, kind, nodes, num_bytes)
        return addressed

    def expected_bytes(self, node_ids: Iterable[int]) -> int:
        """What one of these nodes lacks of the current version, in bytes, on the mean."""
        sizes = [self._need(self._nodes.get(node_id)).num_bytes for node_id in node_ids]
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

    def parameters_of(self, node_id: int) -> int:
        """Of the adapter of a node, which may be of a lower rank."""
        known = self._nodes.get(node_id)
        return self._cuts.size(known.rank, self.num_parameters) if known else self.num_parameters

    def node(self, node_id: int) -> Node | None:
        """What is known of a node."""
        return self._nodes.get(node_id)

    def pushed(self, messages: Iterable[Message]) -> None:
        """Note when messages of this round have gone."""
        now = time.monotonic()
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id in self._pushed:
                self._pushed[node_id] = now, self._pushed[node_id][1]

    def heard(self, node_id: int, answer: Answer, num_bytes: int = 0) -> None:
        """Note what a node says of itself, in a reply with so many bytes of arrays."""
        if node_id not in self._addressed:
            return
        self._nodes.heard(node_id, answer)
        at, sent = self._pushed.get(node_id, (0.0, 0))
        known = self._nodes.get(node_id)
        if known is not None and at and answer.work is not None:
            known.link.add(sent + num_bytes, time.monotonic() - at - answer.work)

    def refusal(self, answer: Answer) -> str | None:
        """Why a node cannot take part, whatever it is sent; None: it can."""
        if self.ranks is None or not answer.rank or answer.rank in self._cut_map:
            return None
        return (
            f"expected a rank among {', '.join(map(str, self.ranks.ranks))}, "
            f"found a node of rank {answer.rank}"
        )

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
        rank = answer.rank if answer.rank in self._cut_map else 0
        if attempts == 1 and unknown and answer.version != NOTHING:
            shipment, has = self._lacking(answer.version), answer.carried  # under another id
        elif attempts == 1 and ((unknown and self._asks) or offer.rank not in (NOTHING, rank)):
            # It was sent an offer and nothing else, or is of another rank than was known.
            shipment, has = self._lacking(self._start), self._carried_start
        else:
            shipment, has = self._snapshot(), NOTHING
        known, sent = self._nodes.get(node_id), question.metadata
        taken = known.taken if known else NO_UPDATE
        need = self._cut(shipment, has, taken, rank, Rate(offer.density, offer.bits))
        size = need.num_parameters
        self._observer.on_broadcast(server_round, "resync", [node_id], need.num_bytes)
        self.transfers.outgoing(server_round, "resync", node_id, size, need.num_bytes)
        self._pushed[node_id] = 0.0, need.num_bytes
        content = self._content(question.content, need)
        return Message(content, node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)

    @property
    def _asks(self) -> bool:
        """Are unknown nodes sent an offer and nothing else, and say what they are?

        After a restart they may have other ids, and have kept all but the last version; where ranks
        are mixed, what they are to be sent depends on theirs.
        """
        return self._restored or self.ranks is not None

    @property
    def _start(self) -> int | None:
        """The version that a node of which nothing is known can make by itself."""
        return 0 if self.options.first_contact == "seed" else None

    @property
    def _carried_start(self) -> int:
        """The version of the tensors beside the adapter that such a node can make by itself."""
        return NOTHING if self._start is None else self._start

    def _need(self, known: Node | None, *, trains: bool = False) -> Need:
        """What a node is sent, of which so much is known."""
        downlink, rate, rank = self._begun(), _OWN_RATE, 0
        if known is not None and known.rank in self._cut_map:
            rank = known.rank
        if trains and self.upload is not None:
            size = self._cuts.size(rank, self.num_parameters)
            rate = self.upload.rate(size, known.link.mbps if known else None)
        if known is None and self._asks:
            nothing = self._lacking(downlink.version)
            return self._cut(nothing, self._carried.version, UNKNOWN, 0, rate)
        if known is None:
            start = self._lacking(self._start)
            return self._cut(start, self._carried_start, UNKNOWN, 0, rate)
        version = None if known.version == NOTHING else known.version
        return self._cut(self._lacking(version), known.carried, known.taken, rank, rate)

    def _cut(self, shipment: Shipment, carried: int, taken: bytes, rank: int, rate: Rate) -> Need:
        """A node's part of a shipment, and what it lacks of the tensors beside it."""
        downlink = self._begun()
        cuts = self._cuts.of(downlink.version)
        started = time.perf_counter()
        part = cuts.shipment(rank, shipment)
        digest = cuts.digest(rank, downlink.digest, downlink.shared)
        self.transfers.encoded(time.perf_counter() - started)
        told = NOTHING if self.ranks is None else rank
        lacks = self._carried.lacking(carried, *self._cut_carried(rank))
        size = cuts.size(rank, self.num_parameters)
        return Need(part, digest, size, lacks, taken, told, rate)

    def _cut_carried(self, rank: int) -> tuple[int, Mapping[str, int]]:
        """How the tensors beside the adapter are cut for a rank."""
        cut = self._cut_map.get(rank)
        return (0, AXES) if cut is None or self.ranks is None else (rank, self.ranks.axes)

    def _cut_for(self, base: Base) -> None:
        """Lay out how each rank lies in the adapter."""
        if self.ranks is not None:
            self._cut_map = self.ranks.cuts(base.layout, base.apart)
            self._cuts = CutShipments(self._cut_map)

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
        downlink, started = self._begun(), time.perf_counter()
        made = make(downlink)
        self.transfers.encoded(time.perf_counter() - started)
        return made

    def _begun(self) -> Downlink:
        if self._downlink is None:
            raise ParameterError("expected `base` before `address`")
        return self._downlink

    def _content(self, content: RecordDict, need: Need) -> RecordDict:
        """A message's content with what a node needs in the place of its arrays."""
        version = self._begun().version
        if self._contents is None or self._contents.version != version:
            self._contents = Contents(self.federation, version, self._carried, self.ending)
        digest = self._carried.of_rank(*self._cut_carried(need.rank))[1]
        return self._contents.make(content, self._key, need, digest)

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
        self._cut_for(base)
        base.cuts, base.shared = self._cut_map, self._downlink.shared
        self._base = base
        self.federation = str(state["federation"])
        self._nodes.restore(state["nodes"])
        self._restored = True
        warn_of_huge_values(base.adapter)
