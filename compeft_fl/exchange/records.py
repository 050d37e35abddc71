"""Flower's ArrayRecords: to adapter states and Updates, and back; for the mod and the strategies.

An *ordinary* ArrayRecord has one Array per tensor, in numpy's format. An *Update's* ArrayRecord
has one Array of stype ``compeft_fl.wire.v1.Update``, whose data are the bytes of
`compeft_fl.encode`: one object on the wire instead of hundreds.

Flower converts through numpy, which has no bfloat16: an adapter in bfloat16 travels as float32.
"""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, MalformedError, ParameterError
from compeft_fl.exchange.node_state import NOTHING
from compeft_fl.exchange.protocol import UPDATE_ID_BYTES, Answer, Offer
from compeft_fl.exchange.replica import Shipment
from compeft_fl.parts.ranks import check_rank
from compeft_fl.printable import PrintableFilter, one_line, quoted
from compeft_fl.reduction.rates import Rate
from compeft_fl.task_vector import MAX_DIMENSIONS, TaskVector
from compeft_fl.wire.messages import STYPE

__all__ = [
    "CARRIED_KEY",
    "EXCHANGE_KEY",
    "LOGGER",
    "NUMPY_STYPE",
    "answer_record",
    "array_records",
    "carried_record",
    "find_answer",
    "find_carried",
    "find_offer",
    "find_update",
    "metric_records",
    "offer_record",
    "shipment_record",
    "to_arrays",
    "to_state",
    "unflatten",
    "update_record",
]

# A child of Flower's own logger: shown, formatted and sent where Flower's lines are.
LOGGER = logging.getLogger("flwr.compeft_fl")
LOGGER.addFilter(PrintableFilter())  # names, errors and metrics of nodes are a stranger's text

EXCHANGE_KEY = "compeft_fl.exchange"  # the ConfigRecord of offers and answers
CARRIED_KEY = "compeft_fl.carried"  # the ArrayRecord of what is not in the task vector

_UPDATE_KEY = "update"

# A node's seconds: two half-precision floats, in 13 bytes with their key and protobuf's tags.
_SECONDS_KEY = "t"
_QUALITY_KEY = "q"
_SECONDS = struct.Struct("<2e")
_LINK_KEY = "w"
_LINK = struct.Struct("<2f")
_LONGEST_SECONDS = 65504.0

_CARRIED_STYPE = "safetensors"
NUMPY_STYPE = "numpy.ndarray"
_NUMPY_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.float32}


def to_state(arrays: Mapping[str, Array], *, copy: bool = True) -> dict[str, NDArray[Any]]:
    """An ordinary ArrayRecord as numpy arrays, in its order.

    Parameters
    ----------
    arrays : mapping of str to flwr.app.Array
    copy : bool
        False: the arrays are the record's own bytes, and cannot be written.

    Raises
    ------
    LayoutError
        An Array that is not numpy's, or whose bytes are broken; the message names it.
    """
    state = {}
    for name, array in arrays.items():
        if array.stype != NUMPY_STYPE:
            raise LayoutError(
                f"expected an Array of stype {NUMPY_STYPE!r}, found {array.stype!r} in {name!r}"
            )
        state[name] = _numpy(name, array.data, copy)
    return state


def _numpy(name: str, data: bytes, copy: bool) -> NDArray[Any]:
    """An array of numpy's bytes, once its header says as many of them as there are.

    `numpy.load`, which Flower calls, takes memory for what the header claims, and opens archives.
    """
    file = io.BytesIO(data)
    try:
        if format.read_magic(file) != (1, 0):  # numpy writes others for records only
            raise ValueError("another version of the format")
        shape, fortran, dtype = format.read_array_header_1_0(file)
    except Exception as error:  # numpy reads the header as Python's source
        raise LayoutError(
            f"expected numpy's bytes in {quoted(name)}, found others: {one_line(error, 200)}"
        ) from None
    expected, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    possible = len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0 and not dtype.hasobject
    if not possible or expected != found:
        raise LayoutError(
            f"expected numpy's bytes in {quoted(name)}, {expected} of them for {dtype} {shape}, "
            f"found {found}"
        )
    array = np.frombuffer(data, dtype, offset=file.tell()) if found else np.empty(0, dtype)
    array = array.reshape(shape, order="F" if fortran else "C")
    return array.copy() if copy else array


def to_arrays(state: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Numpy arrays as an ordinary ArrayRecord, in their order."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in state.items()})


def unflatten(adapter: TaskVector) -> dict[str, NDArray[Any]]:
    """A flat adapter as numpy arrays of its tensors' data types; bfloat16 becomes float32."""
    values: Any = adapter.values
    with np.errstate(over="ignore"):  # float16 makes inf of what it cannot hold
        return {
            tensor.name: values[where]
            .reshape(tensor.shape)
            .astype(_NUMPY_DTYPES[tensor.dtype], copy=False)
            for tensor, where in adapter.layout.slices()
        }


def update_record(blob: bytes | Sequence[bytes], num_parameters: int) -> ArrayRecord:
    """An encoded Update, or all of its parts, as an ArrayRecord of one Array each."""
    parts = (blob,) if isinstance(blob, bytes) else blob
    return ArrayRecord(
        {
            f"{_UPDATE_KEY}-{index}" if index else _UPDATE_KEY: Array(
                "float32", (num_parameters,), STYPE, part
            )
            for index, part in enumerate(parts)
        }
    )


def find_update(content: RecordDict) -> tuple[str, tuple[bytes, ...]] | None:
    """The Update that a message carries: the key of its ArrayRecord, and the bytes of its parts.

    Raises
    ------
    MalformedError
        Updates in more than one record.
    """
    found = {
        key: tuple(array.data for array in record.values() if array.stype == STYPE)
        for key, record in array_records(content).items()
    }
    found = {key: parts for key, parts in found.items() if parts}
    if len(found) > 1:
        raise MalformedError(f"expected one Update in a message, found {len(found)}")
    return next(iter(found.items()), None)


def carried_record(blob: bytes) -> ArrayRecord:
    """Tensors beside the task vector (`compeft_fl.exchange.carried`) as an ArrayRecord."""
    return ArrayRecord({"values": Array("uint8", (len(blob),), _CARRIED_STYPE, blob)})


def find_carried(content: RecordDict) -> bytes | None:
    """The bytes of the tensors that a message carries beside its task vector; None: there are none.

    Raises
    ------
    MalformedError
        Something else under their key.
    """
    record = content.get(CARRIED_KEY)
    if record is None:
        return None
    arrays = list(record.values()) if isinstance(record, ArrayRecord) else []
    if len(arrays) != 1 or arrays[0].stype != _CARRIED_STYPE:
        raise MalformedError(f"expected one Array of {_CARRIED_STYPE} under {CARRIED_KEY}")
    return arrays[0].data


def shipment_record(shipment: Shipment, num_parameters: int) -> ArrayRecord:
    """A shipment's Updates as an ArrayRecord, in order."""
    return ArrayRecord(
        {
            f"{shipment.kind}-{index}": Array("float32", (num_parameters,), STYPE, blob)
            for index, blob in enumerate(shipment.blobs)
        }
    )


def offer_record(offer: Offer, key: str, kind: str) -> ConfigRecord:
    """What the server says: the offer, and under which key the shipment of this kind lies."""
    told = asdict(offer)
    if offer.carried == NOTHING:
        del told["carried"], told["carried_digest"]
    if not offer.last:
        del told["last"]
    if offer.rank == NOTHING:
        del told["rank"]
    for name in ("density", "bits"):
        if not told[name]:
            del told[name]
    return ConfigRecord({**told, "key": key, "kind": kind})


def find_offer(content: RecordDict) -> tuple[Offer, str, Shipment] | None:
    """The offer in a message, the key that the adapter belongs under, and the shipment.

    Raises
    ------
    MalformedError
        An offer that is none.
    """
    record = content.get(EXCHANGE_KEY)
    if record is None:
        return None
    try:
        told: dict[str, Any] = dict(record)
        key, kind = told.pop("key"), told.pop("kind")
        offer = Offer(**told)
        _check_types(
            offer, federation=str, version=int, digest=bytes, taken=bytes,
            carried=int, carried_digest=bytes, last=bool, rank=int, density=float, bits=int,
        )  # fmt: skip
        Rate(offer.density, offer.bits)
        arrays = content.get(key)
        found = arrays.values() if isinstance(arrays, ArrayRecord) else ()
        blobs = tuple(array.data for array in found if array.stype == STYPE)
    except (KeyError, TypeError, ParameterError) as error:
        raise MalformedError(
            f"expected an offer in {EXCHANGE_KEY}, found another: {error}"
        ) from None
    return offer, key, Shipment(kind, blobs)


def answer_record(answer: Answer) -> ConfigRecord:
    """What a node says; what is empty is left out."""
    record = ConfigRecord({"version": answer.version})
    for key in ("update", "taken", "resync"):
        if getattr(answer, key):
            record[key] = getattr(answer, key)
    if answer.carried != NOTHING:
        record["carried"] = answer.carried
    if answer.seconds is not None:
        times = (min(seconds, _LONGEST_SECONDS) for seconds in answer.seconds)
        record[_SECONDS_KEY] = _SECONDS.pack(*times)
    if answer.quality is not None:
        cosine, error = answer.quality
        record[_QUALITY_KEY] = _SECONDS.pack(cosine, min(error, _LONGEST_SECONDS))
    if answer.rank:
        record["rank"] = answer.rank
    if answer.work is not None:
        record[_LINK_KEY] = _LINK.pack(answer.work, answer.link)
    return record


def find_answer(content: RecordDict) -> Answer | None:
    """The answer in a reply.

    Raises
    ------
    MalformedError
        An answer that is none.
    """
    record = content.get(EXCHANGE_KEY)
    if record is None:
        return None
    try:
        told: dict[str, Any] = dict(record)
        times = told.pop(_SECONDS_KEY, None)
        figures = told.pop(_QUALITY_KEY, None)
        link = told.pop(_LINK_KEY, None)
        work, mbps = (None, 0.0) if link is None else _of_link(link)
        answer = Answer(
            **told,
            work=work,
            link=mbps,
            seconds=None if times is None else _unpacked(times),
            quality=None if figures is None else _quality(figures),
        )
        _check_types(
            answer, version=int, update=bytes, taken=bytes, resync=str, carried=int, rank=int
        )
        if answer.rank:
            check_rank(answer.rank)
    except (TypeError, struct.error, ParameterError) as error:
        raise MalformedError(
            f"expected an answer in {EXCHANGE_KEY}, found another: {error}"
        ) from None
    if max(len(answer.update), len(answer.taken)) > UPDATE_ID_BYTES:
        raise MalformedError(f"expected ids of updates of at most {UPDATE_ID_BYTES} bytes")
    return answer


def _unpacked(times: Any) -> tuple[float, float]:
    """A node's seconds."""
    decoding, encoding = _SECONDS.unpack(times)
    if not (math.isfinite(decoding + encoding) and min(decoding, encoding) >= 0):
        raise TypeError(f"{_SECONDS_KEY} holds {decoding} and {encoding}")
    return decoding, encoding


def _quality(figures: Any) -> tuple[float, float]:
    """Cosine and relative error of an update."""
    cosine, error = _SECONDS.unpack(figures)
    if not (-1 <= cosine <= 1 and 0 <= error < math.inf):
        raise TypeError(f"{_QUALITY_KEY} holds {cosine} and {error}")
    return cosine, error


def _of_link(told: Any) -> tuple[float, float]:
    """A node's seconds of work, and the speed of its link in Mbit/s, 0: not said."""
    work, mbps = _LINK.unpack(told)
    if not (0 <= work < math.inf and 0 <= mbps < math.inf):
        raise TypeError(f"{_LINK_KEY} holds {work} and {mbps}")
    return work, mbps


def _check_types(message: Any, **types: type) -> None:
    for field, expected in types.items():
        value = getattr(message, field)
        if not isinstance(value, expected):
            raise TypeError(f"{field} is {type(value).__name__}")


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """A message's ArrayRecords.

    Flower's own ``content.array_records`` makes a cycle of references through the content, which
    keeps its arrays in memory until Python's garbage collector happens to come by.
    """
    return {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}


def metric_records(content: RecordDict) -> dict[str, MetricRecord]:
    """A message's MetricRecords; see `array_records`."""
    return {key: record for key, record in content.items() if isinstance(record, MetricRecord)}
