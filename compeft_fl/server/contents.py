"""What a message to a node holds: an offer, and the shipment in the place of its arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from flwr.app import ArrayRecord, RecordDict

from compeft_fl.exchange.carried import Versions
from compeft_fl.exchange.protocol import Offer
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    EXCHANGE_KEY,
    carried_record,
    offer_record,
    shipment_record,
    update_record,
)
from compeft_fl.exchange.replica import Shipment
from compeft_fl.reduction.rates import Rate
from compeft_fl.server.base import Base
from compeft_fl.wire.messages import encode_parts

__all__ = ["Contents", "Need", "own_records"]


class Need(NamedTuple):
    """What one node is sent.

    Attributes
    ----------
    shipment : Shipment
        What it lacks of the adapter, or of its part of it.
    digest : bytes
        Of what it then has.
    num_parameters : int
        Of that.
    carried : bytes or None
        What it lacks of the tensors beside it.
    taken : bytes
        Which of its updates was taken last.
    rank : int
        For which all this is cut, see `Offer.rank`.
    rate : Rate
        What it is to answer.
    """

    shipment: Shipment
    digest: bytes
    num_parameters: int
    carried: bytes | None
    taken: bytes
    rank: int
    rate: Rate

    @property
    def num_bytes(self) -> int:
        """The payload."""
        return self.shipment.num_bytes + len(self.carried or b"")

    @property
    def identity(self) -> tuple[int, int, bytes, int, Rate]:
        """What is the same for two nodes that are sent the same."""
        return id(self.shipment), id(self.carried), self.taken, self.rank, self.rate


@dataclass
class Contents:
    """Makes the contents of a round's messages; records are shared where nodes lack the same.

    Parameters
    ----------
    federation : str
    version : int
    carried : Versions
    last : bool
        The federation ends with these messages.
    """

    federation: str
    version: int
    carried: Versions
    last: bool

    def __post_init__(self) -> None:
        self._records: dict[int, tuple[Shipment, ArrayRecord]] = {}  # by ids of shipments

    def make(self, content: RecordDict, key: str, need: Need, carried_digest: bytes) -> RecordDict:
        """A message's content with a shipment in the place of the arrays under a key.

        Parameters
        ----------
        content : flwr.app.RecordDict
        key : str
        need : Need
        carried_digest : bytes
            Of the tensors beside the adapter, as this node has them.
        """
        offer = Offer(
            self.federation, self.version, need.digest, need.taken, last=self.last, rank=need.rank,
            density=need.rate.density, bits=need.rate.bits,
        )  # fmt: skip
        if self.carried.apart:
            offer = replace(offer, carried=self.carried.version, carried_digest=carried_digest)
        others = {name: record for name, record in content.items() if name != key}
        others[EXCHANGE_KEY] = offer_record(offer, key, need.shipment.kind)
        # An empty record goes no further than `restore_offers`: a strategy's own code may look.
        others[key] = self._record(need) if need.shipment.blobs else ArrayRecord()
        if need.carried is not None:
            others[CARRIED_KEY] = carried_record(need.carried)
        return RecordDict(others)

    def _record(self, need: Need) -> ArrayRecord:
        """The shipment's record, one for all nodes that lack the same."""
        known = self._records.get(id(need.shipment))
        if known is None:
            record = shipment_record(need.shipment, need.num_parameters)
            known = self._records[id(need.shipment)] = need.shipment, record
        return known[1]


def own_records(base: Base, key: str) -> tuple[dict[str, ArrayRecord], int]:
    """Arrays that are not the global adapter, as one dense Update under a key, and their bytes."""
    parts = encode_parts(base.adapter, "dense", base_version=base.version)
    records = {key: update_record(parts, base.adapter.num_parameters)}
    num_bytes = sum(map(len, parts))
    if base.apart:
        carried = base.apart.to_bytes()
        records[CARRIED_KEY] = carried_record(carried)
        num_bytes += len(carried)
    return records, num_bytes
