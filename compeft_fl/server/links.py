"""Compressed links under a strategy that knows ordinary arrays only.

`Links` turns such a strategy's messages into Updates and offers, and the replies back into what it
expects. `LinkGrid` does so under a strategy's own `start`, which calls the grid itself; `RoundGrid`
lies under that of a strategy which reads Updates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    EXCHANGE_KEY,
    LOGGER,
    array_records,
    find_carried,
    metric_records,
)
from compeft_fl.merging.carried import CarriedAverage
from compeft_fl.server.base import Base, conform
from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.intake import Reply, describe, num_array_bytes, update_of, weight_of
from compeft_fl.server.metrics import Signature, check_metrics, mended, signature, spoiled
from compeft_fl.server.mixed_ranks import MixedRanks, filled
from compeft_fl.server.outcomes import Outcomes
from compeft_fl.server.privacy import check_clippable, wrapped
from compeft_fl.server.replies import MOD_FAILED_PRECONDITION, Replies, SizedArrays
from compeft_fl.server.robustness import Candidate
from compeft_fl.server.streaming_grid import GridAround, StreamingGrid

__all__ = ["LinkGrid", "Links", "RoundGrid"]


class Links:
    """The compressed links of one strategy.

    Parameters
    ----------
    inner : flwr.serverapp.strategy.Strategy
    outcomes : Outcomes
    bounds : ReplyBounds, optional
        Default: ``ReplyBounds()``; under Flower's wrappers for differential privacy, whose clipping
        bounds norms, weights alone.
    """

    def __init__(
        self, inner: Strategy, outcomes: Outcomes, bounds: ReplyBounds | None = None
    ) -> None:
        self.inner, self.outcomes = inner, outcomes
        self.bounds = _default_bounds(inner) if bounds is None else bounds
        self.bases: dict[int, Base] = {}  # what each node's reply is relative to
        self._carried: dict[int, dict[str, NDArray[Any]]] = {}  # what nodes sent, of this round
        self._touched: NDArray[np.bool_] | None = None
        self._messages: dict[int, Message] = {}  # of this round, by node id

    def sized(self, arrays: ArrayRecord, grid: Grid) -> ArrayRecord:
        """The same arrays, for which ``count_bytes`` gives what a node will be sent.

        That is the mean over the grid's nodes, of which the strategy samples some.
        """
        broadcaster = self.outcomes.broadcaster
        return SizedArrays(arrays, lambda: broadcaster.expected_bytes(grid.get_node_ids()))

    def address(
        self, kind: str, server_round: int, arrays: ArrayRecord, messages: Iterable[Message]
    ) -> list[Message]:
        """The strategy's messages, their arrays replaced by Updates; see `Broadcaster.address`."""
        messages = list(messages)
        self._messages = {message.metadata.dst_node_id: message for message in messages}
        broadcaster = self.outcomes.broadcaster
        base = broadcaster.base(arrays)
        self.bases = broadcaster.address(messages, server_round, kind, base)
        return messages

    def usable(self, kind: str, server_round: int, replies: Iterable[Message]) -> list[Message]:
        """Replies as the strategy knows them: with ordinary arrays, or with an error."""
        outcomes = self.outcomes
        if kind == "train":
            self._carried.clear()
            self._touched = None

        signatures: dict[int, Signature] = {}

        def read(reply: Reply) -> Candidate | None:
            content = reply.message.content
            if not _brought_the_adapter(reply.question) and not array_records(content):
                # A node that was asked something else answers as the strategy wants.
                _check_all_metrics(content)
                signatures[reply.key] = ()
                return None
            signatures[reply.key] = self._signature(content)
            return self._candidate(reply) if kind == "train" else None

        kept: list[tuple[Reply, str, Signature]] = []
        for reply in self._expanded(server_round, outcomes.read(kind, server_round, replies, read)):
            kept.append((reply, reply.message.metadata.message_type, signatures[reply.key]))
        usable = []
        usual = _usual([(message_type, kinds) for _, message_type, kinds in kept])
        for reply, message_type, kinds in kept:
            if kinds == usual[message_type]:
                outcomes.take(reply)
                usable.append(reply.message)
            else:
                self._carried.pop(reply.node_id, None)
                reason = "its records or metrics have other keys than those of most replies"
                outcomes.set_aside(reply, reason)
        outcomes.log()
        _mend_metrics(usable, self._weight_key() or "")
        return usable + self._errors(usable)

    def _errors(self, usable: Sequence[Message]) -> list[Message]:
        """A strategy for differential privacy, say, must know that a node has failed."""
        failed = dict(self.outcomes.failed)
        for message in usable:
            failed.pop(message.metadata.src_node_id, None)
        return [
            Message(Error(MOD_FAILED_PRECONDITION, reason), reply_to=self._messages[node_id])
            for node_id, reason in failed.items()
            if node_id in self._messages
        ]

    def _candidate(self, reply: Reply) -> Candidate:
        """What a reply brings for the merge."""
        content = reply.message.content
        _, parts = update_of(content)
        if reply.node_id not in self.bases:
            raise ParameterError("expected a reply from a node that was sent the adapter")
        base, blob, key = self.bases[reply.node_id], find_carried(content), self._weight_key()
        if blob is not None:
            base.read_carried(blob)
        weight = 1.0 if key is None else weight_of(content, key)[2]
        update, cut = base.read(parts, reply.answer.rank if reply.answer else 0)
        return Candidate(weight, parts, update, blob or b"", cut=cut)

    def _expanded(
        self, server_round: int, found: Iterable[tuple[Reply, Candidate | None]]
    ) -> list[Reply]:
        """Replies with ordinary arrays, their Updates within bounds, and those without any."""
        kept: list[Reply] = []

        def updates() -> Iterator[tuple[Reply, Candidate]]:
            for reply, candidate in found:
                if candidate is None:
                    kept.append(reply)
                else:
                    yield reply, candidate

        observer, ranks = self.outcomes.observer, self.outcomes.broadcaster.ranks
        bounded = self.bounds.within(server_round, updates(), observer, whole=True)
        for reply, within in bounded if ranks is None else _filled(bounded, ranks):
            try:
                if within.reason is not None:
                    raise CompeftError(within.reason)
                reply.message.content = self._expand(reply, within)
            except CompeftError as error:
                self.outcomes.set_aside(reply, describe(error))
            else:
                kept.append(reply)
        return kept

    def _expand(self, reply: Reply, found: Candidate) -> RecordDict:
        """A reply's content with ordinary arrays: those that were sent, plus the Update."""
        content, node_id = reply.message.content, reply.node_id
        (key, _), base = update_of(content), self.bases[node_id]
        carried = base.read_carried(found.carried) if found.carried else {}
        change = found.update.to_task_vector()
        moved = base.moved_by(change, carried)
        check_clippable(self.inner, lambda: base.norm_to(moved))
        moves: Any = np.asarray(change.values != 0)
        self._touched = moves if self._touched is None else self._touched | moves
        self._carried[node_id] = carried  # so that what is made of them stays within what was sent
        records = {k: v for k, v in content.items() if k != CARRIED_KEY}
        size, weight_key = num_array_bytes(content), self._weight_key()
        if weight_key is not None:
            metrics_key, metrics, weight = weight_of(content, weight_key)
            if found.weight < weight:
                records[metrics_key] = MetricRecord({**metrics, weight_key: found.weight})
        records[key] = SizedArrays(moved, lambda: size)
        return RecordDict(records)

    def conformed(self, arrays: ArrayRecord, base: Base) -> ArrayRecord:
        """What the strategy made, as the adapter was; carried tensors within what was sent.

        An optimizer's step on a variance or a counter, or a mean of indices, makes no sense.

        Raises
        ------
        LayoutError, NonFiniteError
            See `conform`.
        """
        average = CarriedAverage(base.apart.carried)
        for carried in self._carried.values():
            average.add(carried)
        return conform(
            arrays, base, average, exact=wrapped(self.inner) is self.inner, touched=self._touched
        )

    def _weight_key(self) -> str | None:
        """The name of the weight in the metrics; None where the strategy has none."""
        key = getattr(self.inner, "weighted_by_key", None)
        if key is None:  # Flower's wrappers for differential privacy
            key = getattr(getattr(self.inner, "strategy", None), "weighted_by_key", None)
        return key if isinstance(key, str) else None

    def _signature(self, content: RecordDict) -> Signature:
        """What must be the same in all replies for Flower's strategies; metrics are checked."""
        weight_key = self._weight_key()
        if weight_key is not None:
            weight_of(content, weight_key)
        _check_all_metrics(content)
        arrays = tuple(key for key in array_records(content) if key != CARRIED_KEY)
        return arrays, *(signature(key, m) for key, m in metric_records(content).items())


def _filled(
    bounded: Iterable[tuple[Reply, Candidate]], ranks: MixedRanks
) -> Iterator[tuple[Reply, Candidate]]:
    """Replies whose updates say something of every entry; see `filled`."""
    all_of_them = list(bounded)
    usable = [found for _, found in all_of_them if found.reason is None]
    updates = iter(filled(usable, ranks))
    for reply, found in all_of_them:
        yield reply, found if found.reason else found._replace(update=next(updates))


class RoundGrid(GridAround):
    """A grid for a ComPEFT strategy with a `start` of its own, which calls `send_and_receive`.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    outcomes : Outcomes
    """

    def __init__(self, grid: Grid, outcomes: Outcomes) -> None:
        super().__init__(grid)
        self._streaming, self._outcomes, self._round = StreamingGrid.around(grid), outcomes, 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """See `flwr.serverapp.Grid.send_and_receive`; the replies are `Replies`."""
        messages = list(messages)
        self._outcomes.close()  # of the round before
        return self._send(self._kind(messages), messages, timeout, keep=True)

    def _kind(self, messages: Sequence[Message]) -> str:
        """What these are for; messages to train with begin a round."""
        trains = any(m.metadata.message_type.partition(".")[0] == "train" for m in messages)
        self._round += trains
        return "train" if trains else "evaluate"

    def _send(
        self, kind: str, messages: Sequence[Message], timeout: float | None, *, keep: bool
    ) -> Replies:
        return self._outcomes.send(
            self._streaming, kind, self._round, messages, timeout, keep=keep
        )  # fmt: skip


class LinkGrid(RoundGrid):
    """A grid whose `send_and_receive` takes and gives ordinary arrays, and sends Updates.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    links : Links
    initial : flwr.app.ArrayRecord
        What the federation starts from; its order and data types hold for all that follows.
    """

    def __init__(self, grid: Grid, links: Links, initial: ArrayRecord) -> None:
        super().__init__(grid, links.outcomes)
        self._links = links
        # The last adapter: as the strategy has it, and as it goes. Errors now, before any message.
        self._conformed = initial, links.outcomes.broadcaster.base(initial)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """See `flwr.serverapp.Grid.send_and_receive`.

        Raises
        ------
        ParameterError
            A message with more than one ArrayRecord.
        """
        messages = list(messages)
        if not any(array_records(message.content) for message in messages):
            return list(self._streaming.send_and_receive(messages, timeout=timeout))
        trains = any(m.metadata.message_type.partition(".")[0] == "train" for m in messages)
        kind = "train" if trains else "evaluate"
        self._round += trains
        arrays = self._conform(messages)
        outcomes = self._links.outcomes
        messages = self._links.address(kind, self._round, arrays, messages)
        replies = outcomes.send(
            self._streaming, kind, self._round, messages, timeout, keep=False
        )  # fmt: skip
        usable = self._links.usable(kind, self._round, replies)
        outcomes.close()
        return usable

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `flwr.serverapp.Grid.push_messages`.

        Raises
        ------
        ParameterError
            Messages with arrays: their replies could not be expanded.
        """
        messages = list(messages)
        if any(array_records(message.content) for message in messages):
            raise ParameterError(
                "expected send_and_receive for messages with arrays under Compressed, found "
                "push_messages: their replies are Updates"
            )
        return super().push_messages(messages)

    def _conform(self, messages: Sequence[Message]) -> ArrayRecord:
        """The global adapter of these messages, in which it then is as it goes."""
        found = {id(each): each for m in messages for each in array_records(m.content).values()}
        counts = Counter(id(r) for m in messages for r in array_records(m.content).values())
        arrays = found[counts.most_common(1)[0][0]]
        known, base = self._conformed
        if arrays is not known:
            try:
                goes = self._links.conformed(arrays, base)
                base = self._outcomes.broadcaster.base(goes)
            except CompeftError as error:
                LOGGER.warning(
                    "what %s made cannot be used, the global adapter stays as it was: %s",
                    type(self._links.inner).__name__,
                    error,
                )
            self._conformed = arrays, base
        goes = base.arrays
        contents: dict[int, tuple[RecordDict, RecordDict]] = {}
        for message in messages:
            content = message.content
            if any(record is arrays for record in content.values()):
                new = RecordDict({k: goes if r is arrays else r for k, r in content.items()})
                message.content = contents.setdefault(id(content), (content, new))[1]
        return goes


def _usual(kinds: list[tuple[str, Signature]]) -> dict[str, Signature]:
    """The signature of most replies, by message type."""
    usual: dict[str, Signature] = {}
    for (message_type, kind), _ in Counter(kinds).most_common():
        usual.setdefault(message_type, kind)
    return usual


def _brought_the_adapter(question: Message | None) -> bool:
    """Whether a message had arrays, or an offer; of what is not known, it is supposed."""
    if question is None:
        return True
    return EXCHANGE_KEY in question.content or bool(array_records(question.content))


def _check_all_metrics(content: RecordDict) -> None:
    for metrics in metric_records(content).values():
        check_metrics(metrics)


def _default_bounds(inner: Strategy) -> ReplyBounds:
    if wrapped(inner) is not inner:  # for differential privacy
        free = math.inf
        return ReplyBounds(max_norm=free, max_impact=free, max_largest=free, set_aside=False)
    return ReplyBounds()


def _mend_metrics(messages: Sequence[Message], weight_key: str) -> None:
    """Put the others' mean where a metric is NaN or absurd; leave it out where all are."""
    for key in {key for message in messages for key in metric_records(message.content)}:
        having = [message for message in messages if key in metric_records(message.content)]
        records = [metric_records(message.content)[key] for message in having]
        sound = [record for record in records if not spoiled(record)]
        if len(sound) < len(records):
            LOGGER.warning(
                "metrics of %d replies are left out: NaN or absurd", len(records) - len(sound)
            )
        useless = set() if sound else {name for record in records for name in spoiled(record)}
        for message, record in zip(having, records, strict=True):
            like = (each for each in sound if signature(key, each) == signature(key, record))
            changed = mended(like, record, weight_key) if spoiled(record) else None
            if changed is None and useless:
                changed = MetricRecord({k: v for k, v in record.items() if k not in useless})
            if changed is not None:
                message.content = RecordDict({**message.content, key: changed})
