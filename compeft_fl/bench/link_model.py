"""What a round takes over a link, computed from a codec's bytes and seconds.

The server encodes what goes down once; the nodes work side by side, each on a link of its own; the
server decodes the replies one after another::

    seconds = encode + down * 8 / speed + latency + decode      (down; on the node)
            + encode + up * 8 / speed + latency + nodes * decode   (up; on the server)

Bytes are those of Flower's records (not the message's head, which is under 300). Nothing else takes
time: no training, no polling, no process, no round trips of a protocol, no bytes around messages.
What a real round takes beyond that is what Flower and the machine take, and
`compeft_fl.bench.bandwidth` measures it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import MetricRecord, RecordDict

from compeft_fl import codecs, compress, decode, encode
from compeft_fl.bench.link_app import (
    DENSITY_DOWN,
    DENSITY_UP,
    synthetic_layout,
    synthetic_task_vector,
)
from compeft_fl.codecs.dense import Dense
from compeft_fl.exchange.message_size import MessageSizes
from compeft_fl.exchange.protocol import UPDATE_ID_BYTES, Answer, Offer
from compeft_fl.exchange.records import (
    EXCHANGE_KEY,
    answer_record,
    offer_record,
    shipment_record,
    update_record,
)
from compeft_fl.exchange.replica import DIGEST_BYTES, Shipment

__all__ = ["CodecCost", "WayCost", "measure", "round_seconds"]


@dataclass(frozen=True)
class WayCost:
    """One direction: bytes of the Update and of the message around it, and seconds."""

    payload_bytes: int
    message_bytes: int
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class CodecCost:
    """What one codec takes for one adapter, both ways."""

    codec: str
    num_parameters: int
    up: WayCost
    down: WayCost


def measure(codec: str, num_parameters: int, repeats: int = 3) -> CodecCost:
    """Measure a codec on a synthetic task vector, in this process: the least of some repeats.

    Parameters
    ----------
    codec : str
    num_parameters : int
    repeats : int
    """
    layout = synthetic_layout(num_parameters)
    tau = synthetic_task_vector(layout, 0)
    dense = isinstance(codecs.get(codec), Dense)

    def way(density: float, wrap: Callable[[bytes], RecordDict]) -> WayCost:
        def write() -> bytes:
            update: Any = tau if dense else compress(tau, density, "mean")
            return encode(update, codec, layout_by_id=True)

        write(), decode(write(), layout=layout)  # what is compiled is loaded now
        encoding, blob = _least(write, repeats)
        decoding, _ = _least(lambda: decode(blob, layout=layout), repeats)
        size = MessageSizes().of_content(wrap(blob))
        return WayCost(len(blob), size or len(blob), encoding, decoding)

    last = bytes(UPDATE_ID_BYTES)

    def reply(blob: bytes) -> RecordDict:
        records: dict[str, Any] = {"arrays": update_record(blob, layout.num_parameters)}
        records["metrics"] = MetricRecord({"num-examples": 1, "loss": 0.5})
        records[EXCHANGE_KEY] = answer_record(Answer(1, last, seconds=(0.1, 0.1)))
        return RecordDict(records)

    def message(blob: bytes) -> RecordDict:
        offer = offer_record(Offer("0" * 16, 1, bytes(DIGEST_BYTES), last), "arrays", "deltas")
        shipment = shipment_record(Shipment("deltas", (blob,)), layout.num_parameters)
        return RecordDict({EXCHANGE_KEY: offer, "arrays": shipment})

    return CodecCost(
        codec, layout.num_parameters, way(DENSITY_UP, reply), way(DENSITY_DOWN, message)
    )


def round_seconds(cost: CodecCost, mbit_per_second: float, latency: float, num_nodes: int) -> float:
    """The model's seconds for one round, see the module.

    Parameters
    ----------
    cost : CodecCost
    mbit_per_second : float
        Of each node's link, each way.
    latency : float
        Seconds one way.
    num_nodes : int

    Examples
    --------
    >>> way = WayCost(1000, 1250, 0.25, 0.5)
    >>> round_seconds(CodecCost("any", 4000, way, way), 0.01, 0.125, 2)
    4.25
    """
    bytes_per_second = mbit_per_second * 1e6 / 8
    down = cost.down.message_bytes / bytes_per_second + latency
    up = cost.up.message_bytes / bytes_per_second + latency
    server = cost.down.encode_seconds + num_nodes * cost.up.decode_seconds
    return server + down + cost.down.decode_seconds + cost.up.encode_seconds + up


def _least(work: Callable[[], bytes | object], repeats: int) -> tuple[float, Any]:
    """The least seconds of some repeats, and what the work gives."""
    least, result = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        least = min(least, time.perf_counter() - started)
    return least, result
