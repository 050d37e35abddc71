"""The Flower client mod: what a ClientApp needs so that its messages shrink.

::

    from compeft_fl.mod import CompressionMod

    app = ClientApp(mods=[CompressionMod()])

The train function stays as it is: it takes an ArrayRecord of adapter weights and returns one. The
server needs a strategy that reads Updates: one of `compeft_fl.strategies`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from compeft_fl import codecs
from compeft_fl.client.changes import Received, changes_in
from compeft_fl.client.incoming import (
    carried_version,
    check_ranks,
    expand_incoming,
    followed,
    link_of,
    rank_of_node,
    settled,
    start_apart,
    version_of,
    whole_state,
)
from compeft_fl.client.node_memory import NodeMemory
from compeft_fl.client.privacy import Privacy, check_order, within_bound
from compeft_fl.codecs import auto
from compeft_fl.codecs.base import Update
from compeft_fl.codecs.dense import Dense
from compeft_fl.disk.arrays import release
from compeft_fl.errors import CompeftError, ParameterError, ResyncError
from compeft_fl.exchange.carried import Apart
from compeft_fl.exchange.node_state import NO_UPDATE, NOTHING, NodeState
from compeft_fl.exchange.protocol import UNKNOWN, Answer, Offer, follow, update_id
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    EXCHANGE_KEY,
    LOGGER,
    answer_record,
    array_records,
    carried_record,
    find_carried,
    find_offer,
    to_arrays,
    update_record,
)
from compeft_fl.exchange.replica import Shipment
from compeft_fl.exchange.uplink import AT_RISK, RESIDUAL_DECAY, ErrorFeedback, check_decay, within
from compeft_fl.parts.ranks import check_rank
from compeft_fl.parts.tensor_policy import TensorPolicy
from compeft_fl.reduction.quality import Quality
from compeft_fl.reduction.rates import Rate
from compeft_fl.reduction.rules import AUTO, ENERGY, Reduction
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.wire.messages import MAX_BODY_BYTES, RANK_KEY, encode_parts

__all__ = ["CompressionMod"]

_OWN_RATE = Rate()  # the server says nothing of density
_MOD_FAILED_PRECONDITION = 6  # Flower's ErrorCode for mods, which it does not export

CallNext = Callable[[Message, Context], Message]


class CompressionMod:
    """Expand the adapter that a message brings, and compress what training changed in the reply.

    On the way in, Updates are replaced by an ordinary ArrayRecord (one Array per tensor); ordinary
    ArrayRecords, as stock strategies send them, stay as they are. On the way out of training, the
    reply's ArrayRecord is replaced by one Array with the Update of returned - received weights, and
    one with the carried tensors that have changed: `compeft_fl.parts.tensor_policy.TensorPolicy`.
    Arrays in replies to evaluate messages are left out, with a line in the log. Replies to other
    messages, error replies and replies without arrays are not touched.

    What a node must remember from round to round, its residual and its copy of the global adapter,
    lies in files under a state folder, see `compeft_fl.client.node_memory`. What cannot be
    compressed (NaN, another layout) becomes an error reply that says why; a node that has lost its
    copy says so, and the server sends it within the same round.

    Parameters
    ----------
    density : float or "auto"
        In (0, 1]: the greatest share of parameters that is sent. "auto": as much as keeps a share
        of the energy, in the cheapest form, see `compeft_fl.reduction.rules`.
    energy : float
        In (0, 1): that share; more in the first rounds, and by a node that is seldom asked.
    scale : "mean", "norm" or float
        The scale rule, see `compeft_fl.compress`.
    support : "best" or "fixed"
        "best": the density is a bound; of the largest, those are sent that keep most energy.
        "fixed": always as many as the density says. See `compeft_fl.compress`.
    error_feedback : bool
        Keep what was not sent, the residual, and add it to the next task vector.
    residual_decay : float
        In [0, 1]: the part of the residual that is added; 1: all of it. Why 0.9 by default, and
        when a run is at risk: `compeft_fl.exchange.uplink.ErrorFeedback`.
    codec : str
        A name of `compeft_fl.codecs.names`. The dense codecs send the whole task vector as it is:
        no density, no scale, no residual. Or "auto": for each update the one that arrives first.
        "factored": low-rank signs, in the bytes that ternary values of that density take.
    link_mbps : float, optional
        The speed of this node's link in Mbit/s, for codec "auto", and for a server that gives each
        node a density by its link; the node config's ``link-mbps`` is before it.
    initial_adapter : callable, optional
        Takes the Context, gives the adapter that the federation starts from (names to arrays, all
        ranks of it), as this node makes it by itself, from the seed. Where it is the server's, bit
        for bit, nothing is sent at first contact.
    tensors : mapping of str to {"trained", "carried", "left"}, or TensorPolicy, optional
        Patterns of names of this node's own, above all of its personal tensors, which it does not
        send (``{"head.*": "left"}``). What is trained and what is carried, the server's strategy
        says. A tensor that the train function does not return is left, too.
    state_dir : path, optional
        The state folder. Default: the node config's ``state-dir``, then the environment's
        ``COMPEFT_FL_STATE_DIR``, then ``~/.local/state/compeft_fl``.
    rank : int or callable, optional
        The rank of the adapter that this node trains, or what gives it for a Context, where nodes
        are of several ranks: see `compeft_fl.strategies.MixedRanks`. Default: the node config's
        ``lora-rank``; where there is none, all of the server's.

    Raises
    ------
    ParameterError
        An argument out of its range.

    Notes
    -----
    Put it first in the list of mods, so that other mods see ordinary weights. It works with a
    stock strategy's broadcast, but a stock strategy cannot read its replies: wrap it in
    `compeft_fl.strategies.Compressed`.

    Flower's mods for differential privacy come after it: ``mods=[CompressionMod(),
    fixedclipping_mod]``; before it they are refused. Under a wrapper for client-side clipping what
    is sent is clipped once more, after the residual was added, so that its norm never exceeds the
    bound that the noise is for. With LocalDpMod no residual is kept. On the server the order is
    ``Compressed(DifferentialPrivacy...(FedAvg()))``.

    Adapters in bfloat16: cast to float32 before making an ArrayRecord, as Flower itself asks.

    Source: ComPEFT, https://arxiv.org/abs/2311.13171, Algorithm 1; error feedback: Karimireddy et
    al., https://arxiv.org/abs/1901.09847.
    """

    def __init__(
        self,
        *,
        density: float | str = AUTO,
        energy: float = ENERGY,
        scale: str | float = "mean",
        support: str = "best",
        error_feedback: bool = True,
        residual_decay: float = RESIDUAL_DECAY,
        codec: str = "golomb",
        link_mbps: float | None = None,
        initial_adapter: Callable[[Context], Mapping[str, Any]] | None = None,
        tensors: TensorPolicy | Mapping[str, str] | None = None,
        state_dir: str | Path | None = None,
        rank: int | Callable[[Context], int | None] | None = None,
    ) -> None:
        self.reduction = Reduction(density, scale, support, codec == "factored", energy)
        check_decay(residual_decay)
        if not isinstance(error_feedback, bool):
            raise ParameterError(f"expected error_feedback True or False, found {error_feedback!r}")
        self.error_feedback = error_feedback
        auto.check(codec, link_mbps)
        self.codec, self.link_mbps = codec, link_mbps
        self._sends_dense = codec != auto.AUTO and isinstance(codecs.get(codec), Dense)
        self.residual_decay = residual_decay
        self._initial_adapter = initial_adapter
        self.tensors = TensorPolicy.of(tensors)
        self._left: list[str] = []  # what the log has named
        self._state_dir = state_dir
        if rank is not None and not callable(rank):
            check_rank(rank)
        self.rank = rank

    def __call__(self, msg: Message, context: Context, call_next: CallNext) -> Message:
        """Handle one message; Flower calls this.

        Parameters
        ----------
        msg : flwr.app.Message
        context : flwr.app.Context
        call_next : callable
            The next mod, or the ClientApp.
        """
        if not msg.has_content():
            return call_next(msg, context)
        try:
            check_order()
            told = find_offer(msg.content)
            federation = told[0].federation if told else f"run-{context.run_id}"
            with NodeMemory.of(context, federation, self._state_dir) as memory:
                if told is None:
                    return self._without_offer(msg, context, call_next, memory)
                return self._with_offer(msg, context, call_next, memory, *told)
        except CompeftError as error:
            return _failure(msg, error)

    def _with_offer(
        self, msg: Message, context: Context, call_next: CallNext, memory: NodeMemory,
        offer: Offer, key: str, shipment: Shipment,
    ) -> Message:  # fmt: skip
        """A message of a server that knows what this node has."""
        began, trains = time.perf_counter(), _trains(msg)
        rank = rank_of_node(self.rank, context)
        check_ranks(rank, offer)
        kept_state = state = memory.state.of_rank(rank)
        kept, carried = version_of(state), carried_version(state)
        decoding, building = _Watch(), _Watch()

        def start() -> TaskVector:
            if self._initial_adapter is None:
                raise ResyncError("this node has no adapter of this federation")
            with building:
                made = dict(self._initial_adapter(context))
                return TaskVector.from_dict(made if apart is None else apart.trained(made))

        def start_beside() -> Apart | None:
            with building:
                return start_apart(self._initial_adapter, context, self.tensors, max(offer.rank, 0))

        try:
            with decoding:
                apart = followed(state, offer, find_carried(msg.content), start_beside)
                makes = None if self._initial_adapter is None else start
                replica = follow(state, offer, shipment, makes, rank)
                if apart is not None and rank and rank != offer.rank:
                    apart = apart.cut(rank)
            if trains or offer.taken != UNKNOWN:  # what is settled is smaller on disk
                state = settled(state, offer)
        except ResyncError as error:
            LOGGER.info("CompressionMod: asks for what it lacks: %s", error)
            answer = Answer(
                kept, state.trained, state.taken, resync=str(error), carried=carried, rank=rank
            )
            return Message(RecordDict({EXCHANGE_KEY: answer_record(answer)}), reply_to=msg)
        state = state.following(replica, apart)
        if (old := memory.state.replica) is not None and old is not replica:
            release(old.values)

        # What was received is kept once, as the replica that it is, and not as arrays as well.
        told = whole_state(TaskVector(replica.layout, replica.values), apart)
        received = Received({key: {}}, replica.layout, offer.version, apart, told)
        # A content of its own: in one process, several nodes' messages can share theirs.
        ours = EXCHANGE_KEY, CARRIED_KEY
        others = {name: record for name, record in msg.content.items() if name not in ours}
        msg.content = RecordDict({**others, key: to_arrays(told)})
        privacy = Privacy.of(msg, call_next, self.error_feedback) if trains else Privacy()
        reply = call_next(msg, context)
        if reply.has_error():
            memory.save(kept_state.following(replica, apart))
            return reply
        encoding, sent, quality = _Watch(), NO_UPDATE, None
        if msg.metadata.message_type.partition(".")[0] == "evaluate":
            _leave_arrays_out(reply)
        if trains and array_records(reply.content):
            with encoding:
                state, quality = self._compress_outgoing(
                    received,
                    reply,
                    state,
                    offer.version,
                    privacy,
                    offer.version - kept,
                    Rate(offer.density, offer.bits),
                )
            sent = state.trained
        if offer.last and not trains:  # training again may need what it keeps
            memory.forget()
            kept, carried = NOTHING, NOTHING
        elif memory.save(state):
            kept, carried = replica.version, carried_version(state)
        # Building an adapter from the seed is no decoding.
        seconds = max(0.0, decoding.seconds - building.seconds), encoding.seconds
        figures = None if quality is None else (quality.cosine, quality.relative_error)
        says = Answer(kept, sent, seconds=seconds, carried=carried, quality=figures, rank=rank)
        if offer.times:
            link, work = link_of(self.link_mbps, context), time.perf_counter() - began
            says = replace(says, work=work, link=link)
        reply.content = RecordDict({**reply.content, EXCHANGE_KEY: answer_record(says)})
        return reply

    def _without_offer(
        self, msg: Message, context: Context, call_next: CallNext, memory: NodeMemory
    ) -> Message:
        """A message of a stock strategy, or one Update that says all."""
        check_ranks(rank_of_node(self.rank, context), None)
        received = expand_incoming(msg)
        privacy = Privacy.of(msg, call_next, self.error_feedback) if _trains(msg) else Privacy()
        reply = call_next(msg, context)
        if not _trains(msg) or reply.has_error() or not array_records(reply.content):
            return reply
        if not received.records:  # nothing to be relative to
            return reply
        if received.layout is None:
            _say_once(
                "the server sent ordinary arrays, as a stock strategy does, which cannot read the "
                "Updates that this node answers with: wrap it in compeft_fl.strategies.Compressed"
            )
        state, _ = self._compress_outgoing(received, reply, memory.state, received.version, privacy)
        if not self._sends_dense and self.error_feedback:
            # Nobody says later whether it was taken: suppose that it was.
            memory.save(replace(state, residual=state.next_residual, next_residual=None))
        return reply

    def _compress_outgoing(
        self, received: Received, reply: Message, state: NodeState, version: int, privacy: Privacy,
        absence: int = 1, rate: Rate = _OWN_RATE,
    ) -> tuple[NodeState, Quality | None]:  # fmt: skip
        """Replace the trained arrays by the Update that they are; the state with what is left."""
        changes = changes_in(reply, received, self.tensors)
        self._say_left(changes.left)
        tau, residual, quality = changes.tau, None, None
        bound = privacy.left_for(changes.carried_norm)
        # Finer updates are not made for a bound on their norm.
        bounded = not (privacy.feedback and math.isinf(bound))
        reduction = self.reduction.after(version, absence).at(rate, ternary=bounded)
        if self._sends_dense:
            if rate != _OWN_RATE:
                _say_once(f"codec {self.codec!r} sends all; the server's density does not hold")
            codec = codecs.get(self.codec)
            assert isinstance(codec, Dense)
            parts = self._encode(within_bound(tau, bound, codec), version, state.rank)
        elif privacy.feedback:
            fits = state.layout in {None, tau.layout}
            if not fits:
                LOGGER.warning("CompressionMod: the residual is for another layout; it is dropped")
            feedback = ErrorFeedback.of(
                reduction, state.residual if fits else None, self.residual_decay
            )
            update: Update = feedback.compress(tau, bound, consume=not is_torch(tau.values))
            parts = self._encode(update, version, state.rank)
            residual = feedback.residual
            if math.isinf(bound):  # figures of what was not made private are not for others
                quality = feedback.quality
            _log_pressure(feedback)
        else:
            update = within(reduction(tau), bound)
            parts = self._encode(update, version, state.rank)
        content = {**reply.content, changes.key: update_record(parts, tau.num_parameters)}
        if changes.carried is not None:
            content[CARRIED_KEY] = carried_record(changes.carried)
        reply.content = RecordDict(content)
        LOGGER.debug(
            "CompressionMod: %d parameters, %d bytes, %.3g of the energy",
            tau.num_parameters,
            sum(map(len, parts)),
            math.nan if quality is None else 1 - quality.relative_error**2,
        )
        state = replace(state, layout=tau.layout).after_training(update_id(parts), residual)
        return state, quality

    def _encode(self, update: Update, version: int, rank: int) -> list[bytes]:
        return encode_parts(
            update,
            auto.codec_of(update, self.codec),
            link_mbps=self.link_mbps,
            layout_by_id=True,
            base_version=version,
            metadata={RANK_KEY: str(rank)} if rank else None,
            max_body_bytes=MAX_BODY_BYTES,
        )

    def _say_left(self, names: list[str]) -> None:
        """One line in the log about tensors that are not sent, and not in each round."""
        if names and names != self._left:
            self._left = names
            LOGGER.info(
                "CompressionMod: %d tensors that came are not returned, or are left by a rule, and "
                "count as unchanged: %s%s",
                len(names),
                ", ".join(names[:5]),
                ", ..." if len(names) > 5 else "",
            )


class _Watch:
    """A stopwatch around a block."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def _log_pressure(feedback: ErrorFeedback) -> None:
    """Say how much waits on this node, in updates; warn where it piles up."""
    if feedback.pressure < AT_RISK:
        LOGGER.debug("CompressionMod: the residual is %.3g times the update", feedback.pressure)
    else:
        LOGGER.warning(
            "CompressionMod: the residual is %.3g times the update: if that grows, raise the "
            "density (%s) or lower residual_decay (%g) or the learning rate",
            feedback.pressure,
            feedback.reduction.density,
            feedback.decay,
        )


def _trains(msg: Message) -> bool:
    return msg.metadata.message_type.partition(".")[0] == "train"


def _leave_arrays_out(reply: Message) -> None:
    """Take the arrays out of a reply to an evaluation, which nobody reads there."""
    arrays = array_records(reply.content)
    if not arrays:
        return
    _say_once(
        f"the arrays in replies to evaluate messages ({', '.join(arrays)}) are left out: a "
        "strategy takes their metrics only"
    )
    others = {key: record for key, record in reply.content.items() if key not in arrays}
    reply.content = RecordDict(others)


_said: set[str] = set()  # in this process


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        LOGGER.warning("CompressionMod: %s", line)


def _failure(msg: Message, error: CompeftError) -> Message:
    """An error reply, which the server logs and sets aside; this side's log says it too."""
    reason = f"CompressionMod: {type(error).__name__}: {error}"
    LOGGER.error("%s", reason)
    return Message(Error(_MOD_FAILED_PRECONDITION, reason), reply_to=msg)
