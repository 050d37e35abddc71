"""What goes down in a round: the global adapter as one Update, encoded once for all nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.records import array_records, to_arrays, to_state, update_record
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode
from strategies.observer import RoundObserver

__all__ = ["Broadcast", "Broadcaster", "conform"]


class Broadcast:
    """The global adapter of one version, and the Update that brings it to the nodes.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
        One Array per tensor.
    version : int
        The version of the global adapter; replies must be relative to it.

    Attributes
    ----------
    state : dict of str to ndarray
    layout : Layout
    record : flwr.app.ArrayRecord
        The Update as a message carries it: the whole adapter, dense and lossless.
    num_bytes : int
        The Update's size.

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
        adapter = TaskVector.from_dict(self.state)
        if not adapter.num_parameters:
            raise LayoutError("expected a global adapter with parameters, found none")
        self.layout = adapter.layout
        halves = all(tensor.dtype == "f16" for tensor in self.layout.tensors)
        blob = encode(adapter, "dense-fp16" if halves else "dense", base_version=version)
        self.record = update_record(blob, adapter.num_parameters)
        self.num_bytes = len(blob)

    def is_for(self, arrays: ArrayRecord, version: int) -> bool:
        """Is this the broadcast of these arrays (the same object) and this version?"""
        return self.arrays is arrays and self.version == version

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
    """Replaces the arrays of a round's messages by Updates: the one place where bytes go down.

    Parameters
    ----------
    observer : RoundObserver
    """

    def __init__(self, observer: RoundObserver) -> None:
        self._observer = observer
        self._last: list[Broadcast] = []

    def encode(self, arrays: ArrayRecord, version: int) -> Broadcast:
        """The broadcast of these arrays, made once however often it is asked for."""
        for broadcast in self._last:
            if broadcast.is_for(arrays, version):
                return broadcast
        broadcast = Broadcast(arrays, version)
        self._last = [other for other in self._last if other.version == version] + [broadcast]
        return broadcast

    def replace(
        self, messages: Iterable[Message], server_round: int, kind: str, version: int
    ) -> dict[int, Broadcast]:
        """Put Updates in the place of ordinary arrays; messages that shared their content still do.

        Returns
        -------
        dict of int to Broadcast
            What each node was sent. Nodes whose message has no arrays are left out.

        Raises
        ------
        ParameterError
            A message with more than one ArrayRecord.
        LayoutError, NonFiniteError
            As `Broadcast`.
        """
        sent: dict[int, Broadcast] = {}
        done: dict[int, tuple[RecordDict, RecordDict, Broadcast]] = {}  # by id of the old content
        for message in messages:
            content = message.content
            if id(content) not in done:
                records = array_records(content)
                if not records:
                    continue
                if len(records) > 1:
                    raise ParameterError(
                        f"expected one ArrayRecord in a message, found {len(records)}: "
                        f"{', '.join(records)}"
                    )
                ((key, arrays),) = records.items()
                broadcast = self.encode(arrays, version)
                replaced = RecordDict({**content, key: broadcast.record})
                done[id(content)] = (content, replaced, broadcast)
            _, message.content, sent[message.metadata.dst_node_id] = done[id(content)]
        for broadcast in {id(each): each for each in sent.values()}.values():
            nodes = [node for node, each in sent.items() if each is broadcast]
            self._observer.on_broadcast(server_round, kind, nodes, broadcast.num_bytes)
        return sent


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
