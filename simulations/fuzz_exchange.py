"""What server and node read of each other, for `simulations/fuzz.py`: shipments and records."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from fuzz_targets import LAYOUT, NASTY, Target, change_fields, mutated, resealed, valid_updates

import compeft_fl as cf
from compeft_fl.errors import CompeftError
from compeft_fl.exchange import records
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.protocol import Answer, Offer
from compeft_fl.exchange.replica import Replica, Shipment
from compeft_fl.wire.messages import encode_parts

_SEPARATOR = b"\0<next>\0"  # between the blobs of one input


def exchange_targets() -> list[Target]:
    """Snapshots, deltas, and the records of Flower's messages."""
    return [_snapshots(), _deltas(), _catch_ups(), _offers(), _arrays()]


def _snapshots() -> Target:
    values = np.random.default_rng(2).standard_normal(LAYOUT.num_parameters).astype(np.float32)
    parts = encode_parts(cf.TaskVector(LAYOUT, values), "dense", max_body_bytes=1500)
    other = valid_updates("golomb")

    def make(source: random.Random) -> bytes:
        blobs = list(parts)
        at = source.randrange(len(blobs))
        kind = source.randrange(6)
        if kind == 0:
            del blobs[at]
        elif kind == 1:
            blobs[at:at] = [source.choice((*parts, *other))] * source.choice((1, 1, 2, 50))
        elif kind == 2:
            source.shuffle(blobs)
        elif kind == 3:
            blobs[at] = resealed(blobs[at], source)
        else:
            blobs[at] = change_fields(blobs[at], source)
        return _SEPARATOR.join(blobs)

    def read(content: bytes) -> object:
        return Replica.from_snapshot(content.split(_SEPARATOR))

    return Target("a snapshot", make, read, share=0.5)


def _deltas() -> Target:
    generator = np.random.default_rng(3)
    start = cf.TaskVector(LAYOUT, np.zeros(LAYOUT.num_parameters, np.float32))
    downlink = Downlink(start, density=0.05)
    deltas: list[bytes] = []
    while len(deltas) < 3:
        values = generator.standard_normal(LAYOUT.num_parameters).astype(np.float32)
        downlink.advance(cf.TaskVector(LAYOUT, values))
        shipment = downlink.lacking(downlink.version - 1)
        assert shipment.kind == "deltas"
        deltas += shipment.blobs

    def make(source: random.Random) -> bytes:
        blobs = list(deltas)
        at = source.randrange(len(blobs))
        kind = source.randrange(4)
        if kind == 0:
            blobs[at] = mutated(blobs[at], source)
        elif kind == 1:
            blobs[at] = resealed(blobs[at], source)
        elif kind == 2:
            blobs[at] = change_fields(blobs[at], source)
        else:
            blobs = source.choices(blobs, k=source.choice((0, 2, 3, 3, 4)))
        return _SEPARATOR.join(blobs)

    def read(content: bytes) -> object:
        replica = Replica(LAYOUT, start.values, 0)  # type: ignore[arg-type]
        return replica.advance(content.split(_SEPARATOR), 3)

    return Target("deltas", make, read, share=0.5)


def _catch_ups() -> Target:
    """A start and the sum of all that came after it, in parts."""
    generator = np.random.default_rng(5)
    start = np.round(64 * generator.standard_normal(LAYOUT.num_parameters)).astype(np.float32) / 64
    change = np.where(generator.random(LAYOUT.num_parameters) < 0.1, np.float32(0.5), 0)
    parts = [
        blob
        for values, version in ((start, 0), (change, 0))
        for blob in encode_parts(
            cf.TaskVector(LAYOUT, values), "steps", base_version=version, max_body_bytes=4500
        )
    ]
    other = valid_updates("dense")

    def make(source: random.Random) -> bytes:
        blobs = list(parts)
        at = source.randrange(len(blobs))
        kind = source.randrange(6)
        if kind == 0:
            del blobs[at]
        elif kind == 1:
            blobs.insert(at, source.choice((*parts, *other)))
        elif kind == 2:
            blobs[at] = mutated(blobs[at], source)
        elif kind == 3:
            blobs[at] = resealed(blobs[at], source)
        else:
            blobs[at] = change_fields(blobs[at], source)
        return _SEPARATOR.join(blobs)

    def read(content: bytes) -> object:
        return Replica.from_start(content.split(_SEPARATOR), 3)

    return Target("a start and a catch-up", make, read, share=0.5)


def _offers() -> Target:
    offer = records.offer_record(Offer("federation", 3, bytes(16), 2), "arrays", "deltas")
    answer = records.answer_record(Answer("name", 3, seconds=(0.5, 0.25)))
    blob = valid_updates("golomb")[0]

    def make(source: random.Random) -> bytes:
        return source.randbytes(8)  # the input is a seed: records are no bytes of ours

    def read(content: bytes) -> object:
        source = random.Random(content)
        told: dict[str, Any] = dict(source.choice((offer, answer)))
        for _ in range(source.randint(0, 2)):
            key = source.choice(sorted(told))
            if source.random() < 0.3 and len(told) > 1:
                del told[key]
            else:
                told[key] = _scalar(source)
        if source.random() < 0.2:
            told["x"] = _scalar(source)
        shipped = records.shipment_record(Shipment("deltas", (blob, mutated(blob, source))), 711)
        content_of = RecordDict({records.EXCHANGE_KEY: ConfigRecord(told), "arrays": shipped})
        with contextlib.suppress(CompeftError):
            records.find_answer(content_of)
        return records.find_offer(content_of)

    return Target("offers and answers", make, read, share=0.3)


def _scalar(source: random.Random) -> Any:
    """What Flower lets a record of settings hold."""
    value = source.choice(NASTY)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = 2**63 - 1
    return value if isinstance(value, str | int | float) else source.randbytes(16)


def _arrays() -> Target:
    originals = [Array(array) for array in (np.ones((3, 4), np.float32), np.array(2, np.int64))]

    def make(source: random.Random) -> bytes:
        return mutated(source.choice(originals).data, source)

    def read(content: bytes) -> object:
        array = Array("float32", (3, 4), "numpy.ndarray", content)
        return records.to_state(ArrayRecord({"w": array}))

    return Target("an array of a stock client", make, read, share=0.3)
