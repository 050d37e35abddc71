"""The Flower client mod: what a ClientApp needs so that its messages shrink.

::

    from compeft_fl.mod import CompressionMod

    app = ClientApp(mods=[CompressionMod(density=0.1)])

The train function stays as it is: it takes an ArrayRecord of adapter weights and returns one. The
server needs a strategy that reads Updates: one of `compeft_fl.strategies`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from numpy.typing import NDArray

from compeft_fl import codecs
from compeft_fl.codecs.dense import Dense
from compeft_fl.compeft import check_density, check_scale, compress
from compeft_fl.errors import CompeftError, LayoutError, ParameterError
from compeft_fl.exchange.uplink import ErrorFeedback
from compeft_fl.records import (
    LOGGER,
    array_records,
    find_update,
    to_arrays,
    to_state,
    unflatten,
    update_record,
)
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode, inspect, layout_id

__all__ = ["RESIDUAL_KEY", "CompressionMod"]

RESIDUAL_KEY = "compeft_fl.residual"  # the one record that the mod keeps in Context.state
_MOD_FAILED_PRECONDITION = 6  # Flower's ErrorCode for mods, which it does not export


@dataclass(frozen=True)
class _Received:
    """The adapter that a message brought: what the reply's task vector is relative to."""

    records: dict[str, dict[str, Array]]  # by key of the ArrayRecord, as the ClientApp sees them
    layout: Layout | None  # the server's; None where the arrays came without an Update
    version: int


class CompressionMod:
    """Expand the adapter that a message brings, and compress what training changed in the reply.

    On the way in, an Update is replaced by an ordinary ArrayRecord (one Array per tensor) under
    the same key; ordinary ArrayRecords, as stock strategies send them, stay as they are. On the
    way out of training, the reply's ArrayRecord is replaced by one Array with the Update of
    returned - received weights. Replies to other messages, error replies and replies without
    arrays are not touched.

    What cannot be compressed (NaN, another layout) becomes an error reply that says why.

    Parameters
    ----------
    density : float
        In (0, 1]: the share of parameters that is sent.
    scale : "mean", "norm" or float
        The scale rule, see `compeft_fl.compress`.
    error_feedback : bool
        Keep what was not sent, the residual, and add it to the next task vector. It lies in
        ``Context.state`` as one record, float32, as large as the adapter.
    codec : str
        A name of `compeft_fl.codecs.names`. The dense codecs send the whole task vector as it is:
        no density, no scale, no residual.

    Raises
    ------
    ParameterError
        An argument out of its range.

    Notes
    -----
    Put it first in the list of mods, so that other mods see ordinary weights. It works with a
    stock strategy's broadcast, but a stock strategy cannot read its replies: wrap it in
    `compeft_fl.strategies.Compressed`.

    Adapters in bfloat16: cast to float32 before making an ArrayRecord, as Flower itself asks.

    Source: ComPEFT, https://arxiv.org/abs/2311.13171, Algorithm 1; error feedback: Karimireddy et
    al., https://arxiv.org/abs/1901.09847.
    """

    def __init__(
        self,
        *,
        density: float = 0.1,
        scale: str | float = "mean",
        error_feedback: bool = True,
        codec: str = "golomb",
    ) -> None:
        check_density(density)
        check_scale(scale)
        if not isinstance(error_feedback, bool):
            raise ParameterError(f"expected error_feedback True or False, found {error_feedback!r}")
        self.density, self.scale, self.error_feedback = density, scale, error_feedback
        self.codec = codec
        self._sends_dense = isinstance(codecs.get(codec), Dense)

    def __call__(
        self, msg: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        """Handle one message; Flower calls this.

        Parameters
        ----------
        msg : flwr.app.Message
        context : flwr.app.Context
        call_next : callable
            The next mod, or the ClientApp.
        """
        try:
            received = self._expand_incoming(msg)
        except CompeftError as error:
            return _failure(msg, error)
        reply = call_next(msg, context)
        trained = msg.metadata.message_type.partition(".")[0] == "train"
        if not trained or reply.has_error() or not array_records(reply.content):
            return reply
        if not received.records:  # nothing to be relative to
            return reply
        try:
            self._compress_outgoing(received, reply, context)
        except CompeftError as error:
            return _failure(msg, error)
        return reply

    def _expand_incoming(self, msg: Message) -> _Received:
        """Replace an Update by the arrays that it stands for."""
        if not msg.has_content():
            return _Received({}, None, 0)
        found = find_update(msg.content)
        if found is None:
            # Copies of the records: a ClientApp may empty those that it gets.
            plain = {key: dict(record) for key, record in array_records(msg.content).items()}
            return _Received(plain, None, 0)
        key, blob = found
        header, adapter = inspect(blob), decode(blob).to_task_vector()
        arrays = to_arrays(unflatten(adapter))
        # A content of its own: in one process, several nodes' messages can share theirs.
        msg.content = RecordDict({**msg.content, key: arrays})
        return _Received({key: dict(arrays)}, adapter.layout, header.base_version)

    def _compress_outgoing(self, received: _Received, reply: Message, context: Context) -> None:
        """Replace the trained arrays by the Update that they are."""
        key, tau = _task_vector(received, reply)
        feedback = None
        update: TaskVector | TernaryVector = tau
        if not self._sends_dense and self.error_feedback:
            residual = _load_residual(context, tau.layout)
            feedback = ErrorFeedback(self.density, self.scale, residual)
            update = feedback.compress(tau)
        elif not self._sends_dense:
            update = compress(tau, self.density, self.scale)
        blob = encode(update, self.codec, layout_by_id=True, base_version=received.version)
        reply.content = RecordDict({**reply.content, key: update_record(blob, tau.num_parameters)})
        if feedback is not None:  # only now: what could not be encoded was not sent
            _save_residual(context, tau.layout, feedback.residual)
        LOGGER.debug("CompressionMod: %d parameters, %d bytes", tau.num_parameters, len(blob))


def _task_vector(received: _Received, reply: Message) -> tuple[str, TaskVector]:
    """What training changed, and the key of the reply's record that says so."""
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
    before = to_state(received.records.get(key) or next(iter(received.records.values())))
    after = to_state(returned[key])
    if list(after) == [str(index) for index in range(len(before))]:
        # ArrayRecord(list of arrays) has numbers for names; Flower's users return such.
        after = dict(zip(before, after.values(), strict=True))
    tau = TaskVector.between(before, after)
    return key, tau if received.layout is None else TaskVector(received.layout, tau.values)


def _load_residual(context: Context, layout: Layout) -> NDArray[np.float32] | None:
    """What earlier rounds have left for this layout; None, and said, where it does not fit."""
    record = context.state.get(RESIDUAL_KEY)
    if record is None:
        return None
    name = layout_id(layout).hex()
    try:
        if not isinstance(record, ArrayRecord) or name not in record:
            raise LayoutError("it is for another layout")
        residual: NDArray[Any] = to_state(record)[name]
        if residual.shape != (layout.num_parameters,) or residual.dtype != np.float32:
            raise LayoutError(
                f"expected {layout.num_parameters} float32 values, "
                f"found {residual.dtype} of shape {residual.shape}"
            )
        if not np.isfinite(residual).all():
            raise LayoutError("it has NaN or Inf")
    except LayoutError as error:
        LOGGER.warning(
            "CompressionMod: the residual in Context.state is dropped, which is as if nothing had "
            "been left: %s",
            error,
        )
        del context.state[RESIDUAL_KEY]
        return None
    return residual


def _save_residual(context: Context, layout: Layout, residual: NDArray[np.float32] | None) -> None:
    """Keep the residual until the next round, with the layout that it is for."""
    if residual is not None:
        context.state[RESIDUAL_KEY] = ArrayRecord({layout_id(layout).hex(): Array(residual)})


def _failure(msg: Message, error: CompeftError) -> Message:
    """An error reply, which the server logs and sets aside; this side's log says it too."""
    reason = f"CompressionMod: {type(error).__name__}: {error}"
    LOGGER.error("%s", reason)
    return Message(Error(_MOD_FAILED_PRECONDITION, reason), reply_to=msg)
