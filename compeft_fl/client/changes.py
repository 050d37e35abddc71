"""What training has changed: the reply's tensors against those that the message brought."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, Message, RecordDict
from numpy.typing import NDArray

from compeft_fl.disk.arrays import LARGE_BYTES, give_back
from compeft_fl.errors import LayoutError, NonFiniteError
from compeft_fl.exchange.carried import Apart
from compeft_fl.exchange.records import array_records, find_update, to_state
from compeft_fl.merging.carried import same
from compeft_fl.parts.tensor_policy import LEFT, TensorPolicy
from compeft_fl.task_vector import Layout, TaskVector

__all__ = ["Changes", "Received", "changes_in"]

State = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Received:
    """The adapter that a message brought: what the reply's task vector is relative to."""

    records: dict[str, dict[str, Array]]  # by key of the ArrayRecord, as the ClientApp sees them
    layout: Layout | None  # the server's; None where the arrays came without an Update
    version: int
    apart: Apart | None = None  # the server's, where it has tensors beside the task vector
    state: State | None = None  # what the records hold, where they are empty: a large adapter once


@dataclass(frozen=True)
class Changes:
    """What training has changed.

    Attributes
    ----------
    key : str
        Of the reply's record that says so.
    tau : TaskVector
        Zero where a tensor is left: it was not returned, or a rule says so.
    carried : bytes or None
        The tensors beside it that are others now, see `Apart.to_bytes`; None: there are none.
    carried_norm : float
        The norm of what they have changed by.
    left : list of str
        Trained and carried tensors that the reply does not have.
    """

    key: str
    tau: TaskVector
    carried: bytes | None
    carried_norm: float
    left: list[str]


def changes_in(reply: Message, received: Received, policy: TensorPolicy) -> Changes:
    """Compare a reply's tensors with those that were received; they are taken out of the reply.

    Parameters
    ----------
    reply : flwr.app.Message
    received : Received
    policy : TensorPolicy
        The node's own: which tensors are left, and, where the server has said nothing, which are
        carried.

    Raises
    ------
    LayoutError
        Not one ArrayRecord to compare; other names or shapes than were received; no trained tensor
        at all.
    NonFiniteError
        NaN or Inf in a carried tensor.
    """
    key, before, after = _before_and_after(reply, received)
    apart = received.apart
    if apart is None:  # a stock strategy says nothing of it; ours has said that there is nothing
        apart = Apart.of(before, policy) if received.layout is None else Apart()
    after = _without_left(before, after, policy)
    layout = received.layout or Layout.of(apart.trained(before))
    changed = _carried(apart, after)
    carried = apart.with_values(changed).to_bytes(changed) if changed else None
    left = [name for name in before if name not in after and not apart.is_left(name)]
    tau = _trained(layout, before, after)
    return Changes(key, tau, carried, _norm_of_change(apart.carried, changed), left)


def _before_and_after(reply: Message, received: Received) -> tuple[str, State, State]:
    """The record to compare, and what it is compared with."""
    returned = array_records(reply.content)
    keys = list(returned) if len(returned) == 1 else [k for k in returned if k in received.records]
    if len(keys) != 1:
        raise LayoutError(
            f"expected one ArrayRecord in the reply, or one under the key that it came with "
            f"({', '.join(received.records)}); found {', '.join(returned)}"
        )
    key = keys[0]
    if find_update(RecordDict({key: returned[key]})) is not None:
        raise LayoutError(
            "expected trained weights in the reply, found an Update: is CompressionMod there twice?"
        )
    if key not in received.records and len(received.records) > 1:
        raise LayoutError(
            f"expected an ArrayRecord under one of {', '.join(received.records)} in the reply, "
            f"found {key}"
        )
    before = received.state
    if before is None:
        records = received.records.get(key) or next(iter(received.records.values()))
        before = to_state(records, copy=False)
    after = to_state(returned.pop(key), copy=False)
    # What was returned goes tensor by tensor as tau is made, so that a large one is there once.
    reply.content = RecordDict({k: record for k, record in reply.content.items() if k != key})
    if list(after) == [str(index) for index in range(len(before))]:
        # ArrayRecord(list of arrays) has numbers for names; Flower's users return such.
        after = dict(zip(before, after.values(), strict=True))
    return key, before, after


def _without_left(before: State, after: State, policy: TensorPolicy) -> State:
    """What was returned, without the node's personal tensors."""
    kept = {name: value for name, value in after.items() if policy.rule(name) != LEFT}
    extra = sorted(set(kept) - set(before))
    if extra:
        raise LayoutError(
            f"expected {len(before)} tensors, found also {extra[0]!r}: a tensor of this node's "
            f'own? CompressionMod(tensors={{"{extra[0]}": "left"}}) keeps it here'
        )
    for name, value in kept.items():
        if value.shape != before[name].shape:
            raise LayoutError(
                f"expected shape {before[name].shape}, found {value.shape} in tensor {name!r}"
            )
    return kept


def _trained(layout: Layout, before: State, after: State) -> TaskVector:
    """What was returned minus what was received, in float32; what was returned is used up."""
    names = [tensor.name for tensor in layout.tensors]
    if names and not any(name in after for name in names):
        raise LayoutError(f"expected tensor {names[0]!r} or another that is trained, found none")
    values = np.zeros(layout.num_parameters, np.float32)
    freed = 0
    for tensor, where in layout.slices():
        if freed > LARGE_BYTES:
            give_back()
            freed = 0
        if tensor.name not in after:
            continue
        start, end = before[tensor.name], after.pop(tensor.name)
        if end.dtype.kind != "f":
            raise LayoutError(f"expected floats, found {end.dtype} in tensor {tensor.name!r}")
        wide = np.float64 in (start.dtype, end.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found later
            exact = np.float64 if wide else np.float32
            change = end.astype(exact, copy=False) - start.astype(exact, copy=False)
            values[where] = change.reshape(-1)
        freed += end.nbytes
        del end
    return TaskVector(layout, values)


def _carried(apart: Apart, after: State) -> State:
    """The carried tensors that are others now, of the data types that they had."""
    changed = {}
    for name, old in apart.carried.items():
        new = after.get(name)
        if new is None:
            continue
        if new.dtype != old.dtype:
            if not np.can_cast(new.dtype, old.dtype, "same_kind"):
                raise LayoutError(f"expected {old.dtype}, found {new.dtype} in tensor {name!r}")
            new = new.astype(old.dtype)
        if new.dtype.kind == "f" and not np.isfinite(new).all():
            raise NonFiniteError(f"expected finite values, found NaN or Inf in tensor {name!r}")
        if not same(new, old):
            changed[name] = new
    return changed


def _norm_of_change(before: State, after: State) -> float:
    """The Euclidean norm of what carried tensors have changed by."""
    total = 0.0
    for name, new in after.items():
        with np.errstate(over="ignore"):
            change = new.astype(np.float64) - before[name].astype(np.float64)
            total += float(np.sum(change * change))
    return math.sqrt(total)
