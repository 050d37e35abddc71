"""Similarity of each reply to the direction of the round, and outliers set aside by a rule.

The direction is the majority of signs (`compeft_fl.merging.majority`): bit masks, no dense vectors.
A reply cannot be compared with it before all have come, so the rule goes over a round's replies
more than once. They wait as the encoded bytes that they came as, in a temporary file beyond a
limit, and are decoded again one at a time: the server's memory stays flat, at the price of two
more decodings, and of some more where there are outliers.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from compeft_fl.errors import CompeftError
from compeft_fl.exchange.records import LOGGER, metric_records
from compeft_fl.merging.majority import Agreement, SignMajority
from compeft_fl.parts.ranks import Cut
from compeft_fl.server.intake import Reply
from compeft_fl.server.sign_agreement import SignAgreementFilter
from compeft_fl.server.streaming_grid import name_nodes
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode_parts

__all__ = [
    "Candidate",
    "SignAgreementFilter",
    "Similarity",
    "SimilarityObserver",
    "screened",
    "tell_similarities",
]

Update = TernaryVector | TaskVector

_PASSES = 8  # over a round's replies, at most, to find whose votes count


class Candidate(NamedTuple):
    """A reply that has been read.

    Attributes
    ----------
    weight : float
    parts : tuple of bytes
        Its Update as it came; empty where a rule has had its say.
    update : TernaryVector or TaskVector
    carried : bytes
        The tensors beside it, as they came, see `compeft_fl.exchange.carried`; empty: none.
    reason : str or None
        Why a rule sets it aside.
    cut : Cut or None
        Which entries its node has, where that is of a lower rank; the update is 0 elsewhere.
    """

    weight: float
    parts: tuple[bytes, ...]
    update: Update
    carried: bytes = b""
    reason: str | None = None
    cut: Cut | None = None

    @property
    def share(self) -> float:
        """Of the adapter's entries, that its node has."""
        return _share(self.cut)

    @property
    def density(self) -> float:
        """Of the entries that its node has, those that are not 0."""
        return num_nonzeros(self.update) / max(1.0, self.share * self.update.num_parameters)


@dataclass(frozen=True)
class Similarity:
    """How a reply relates to the others of its round.

    Attributes
    ----------
    node_id : int
    cosine : float
        Of its signs to the majority of the other replies' signs, -1 .. 1.
    norm : float
        The update's Euclidean norm.
    num_nonzeros : int
    reason : str or None
        Why the rule sets it aside (a dry run: would set it aside); None where it does not.
    """

    node_id: int
    cosine: float
    norm: float
    num_nonzeros: int
    reason: str | None


@runtime_checkable
class SimilarityObserver(Protocol):
    """What a strategy's observer may have besides `RoundObserver`'s methods."""

    def on_similarity(self, server_round: int, similarities: Sequence[Similarity]) -> None:
        """All usable training replies of a round, in the order in which they came."""


@dataclass(slots=True)
class _Entry:
    """A reply that waits: where its bytes are, and what is known of it."""

    node_id: int
    num_bytes: int
    key: int
    weight: float
    position: int
    sizes: tuple[int, ...]  # of the metrics, the carried tensors, and the Update's parts
    norm: float  # as of an update of all entries, where its node has a part of them
    largest: float  # scale; 0 for a dense update
    num_nonzeros: float  # likewise
    cut: Cut | None
    votes: bool = True
    found: Agreement = field(default_factory=Agreement)
    reason: str | None = None


class _Screening:
    """The replies of one round, spooled and judged."""

    def __init__(self, rule: SignAgreementFilter, layout: Layout) -> None:
        self._rule, self._layout = rule, layout
        self._majority = SignMajority(layout)
        self._entries: list[_Entry] = []
        self._spool = tempfile.SpooledTemporaryFile(max_size=rule.memory_bytes)  # noqa: SIM115
        self._carrier: Message | None = None
        self._most_norm = math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._spool.close()

    def add(self, reply: Reply, candidate: Candidate) -> None:
        """Count a reply's vote, and keep its bytes and metrics."""
        update = candidate.update
        records = metric_records(reply.message.content)
        told = json.dumps({key: dict(metrics) for key, metrics in records.items()}).encode()
        entry = _Entry(
            reply.node_id, reply.num_bytes, reply.key, candidate.weight, self._spool.tell(),
            (len(told), len(candidate.carried), *map(len, candidate.parts)),
            *_sizes(update, candidate.share), candidate.cut,
        )  # fmt: skip
        try:
            for each in (told, candidate.carried, *candidate.parts):
                self._spool.write(each)
        except OSError as error:
            self._spool.seek(entry.position)
            raise CompeftError(f"the reply cannot be kept until all have come: {error}") from None
        self._majority.add(update)
        self._entries.append(entry)
        if self._carrier is None:
            self._carrier = copy.copy(reply.message)
            self._carrier.content = RecordDict()

    def judge(self) -> list[Similarity]:
        """Compare each reply with the others, and note which are set aside."""
        entries, rule = self._entries, self._rule
        enough = len(entries) >= rule.min_replies
        if enough:
            self._judge_sizes()
        self._compare()
        if enough:
            self._most_norm = rule.max_norm * statistics.median(entry.norm for entry in entries)
            outliers = self._judge_signs()
            for entry in entries:
                entry.reason = entry.reason or outliers.get(entry.node_id)
        return [
            Similarity(
                e.node_id,
                e.found.cosine,
                e.norm * math.sqrt(_share(e.cut)),
                round(e.num_nonzeros * _share(e.cut)),
                e.reason,
            )
            for e in entries
        ]

    def _compare(self) -> None:
        for entry in self._entries:
            within = None if entry.cut is None else entry.cut.covered
            entry.found = self._majority.compare(
                self._update(entry), voted=entry.votes, within=within
            )

    def _judge_signs(self) -> dict[int, str]:
        """Those that differ lose their votes, the worst first, until the others agree."""
        outliers: dict[int, str] = {}
        for _ in range(_PASSES):
            found = {entry.node_id: entry.found for entry in self._entries}
            voters = [entry for entry in self._entries if entry.votes]
            voter_ids = [entry.node_id for entry in voters]
            outliers = self._rule.judge_signs(found, voter_ids)
            worst = [entry for entry in voters if entry.node_id in outliers]
            if not worst:
                break
            worst.sort(key=lambda entry: entry.found.deviations)
            for entry in worst[: (len(worst) + 1) // 2]:
                self._silence(entry)
            self._compare()
        self._rule.remember(found, voter_ids, outliers)
        return outliers

    def _silence(self, entry: _Entry) -> None:
        """Take an entry's vote back."""
        entry.votes = False
        self._majority.remove(self._update(entry))

    def replies(self) -> Iterator[tuple[Reply, Candidate]]:
        """Each reply with its update and weight, both within bounds, and why it is set aside."""
        if not self._entries or self._carrier is None:
            return
        most = self._rule.max_weight * statistics.median(e.weight for e in self._entries)
        if len(self._entries) < self._rule.min_replies:
            most = math.inf
        for entry in self._entries:
            self._spool.seek(entry.position)
            told: dict[str, Any] = json.loads(self._spool.read(entry.sizes[0]))
            # A message is kilobytes of Python objects. A copy of one stands for each in turn.
            carrier = copy.copy(self._carrier)
            carrier.content = RecordDict(
                {key: MetricRecord(metrics) for key, metrics in told.items()}
            )
            reply = Reply(entry.node_id, carrier, entry.num_bytes, entry.key)
            carried = self._spool.read(entry.sizes[1])
            update = self._update(entry)
            if entry.norm > self._most_norm:
                update = shortened(update, self._most_norm / entry.norm)
            weight = min(entry.weight, most)
            yield reply, Candidate(weight, (), update, carried, entry.reason, entry.cut)

    def _update(self, entry: _Entry) -> Update:
        self._spool.seek(entry.position + sum(entry.sizes[:2]))
        parts = [self._spool.read(size) for size in entry.sizes[2:]]
        if entry.cut is None:
            return decode_parts(parts, layout=self._layout)
        return entry.cut.spread(decode_parts(parts, layout=entry.cut.layout))

    def _judge_sizes(self) -> None:
        """Those far larger than the median are set aside; they and the far wider have no vote."""
        most = self._rule.max_size
        norm = most * statistics.median(e.norm for e in self._entries)
        scale = most * statistics.median(e.largest for e in self._entries)
        width = most * statistics.median(e.num_nonzeros for e in self._entries)
        for entry in self._entries:
            if norm > 0 and entry.norm > norm:
                entry.reason = f"its norm {entry.norm:.3g} is over {most:g} times the median"
            elif scale > 0 and entry.largest > scale:
                entry.reason = f"its scale {entry.largest:.3g} is over {most:g} times the median"
            if entry.reason is not None or entry.num_nonzeros > width > 0:
                self._silence(entry)


def screened(
    rule: SignAgreementFilter | None,
    layout: Layout,
    candidates: Iterator[tuple[Reply, Candidate]],
    tell: Callable[[SignAgreementFilter, list[Similarity]], None],
) -> Iterator[tuple[Reply, Candidate]]:
    """Hand a round's replies on by way of a rule, where there is one.

    Parameters
    ----------
    rule : SignAgreementFilter, optional
    layout : Layout
    candidates : iterator of (Reply, Candidate)
    tell : callable
        Is told of the similarities.

    Returns
    -------
    iterator of (Reply, Candidate)
        Without a rule, or with a dry run of it, as they come. Else when all have come, with a
        message that has metrics and no arrays; those that are set aside have the reason.
    """
    if rule is None:
        yield from candidates
        return
    with _Screening(rule, layout) as screening:
        for reply, candidate in candidates:
            reason = None
            try:
                screening.add(reply, candidate)
            except CompeftError as error:
                reason = str(error)
            if rule.dry_run or reason is not None:
                yield reply, candidate._replace(reason=reason)
            del reply, candidate  # before the next one is pulled
        tell(rule, screening.judge())
        if not rule.dry_run:
            yield from screening.replies()


def tell_similarities(
    rule: SignAgreementFilter,
    server_round: int,
    similarities: list[Similarity],
    observer: object,
) -> None:
    """One line in the log, and the observer's share where it is a `SimilarityObserver`."""
    if not similarities:
        return
    cosines = [each.cosine for each in similarities]
    outliers = [each.node_id for each in similarities if each.reason is not None]
    said = f"outliers{' (dry run)' if rule.dry_run else ''}: {name_nodes(outliers)}"
    LOGGER.info(
        "round %d: cosine of signs to the majority of the others: min %.3f, median %.3f of %d; %s",
        server_round,
        min(cosines),
        statistics.median(cosines),
        len(cosines),
        said if outliers else "no outliers",
    )
    if isinstance(observer, SimilarityObserver):
        observer.on_similarity(server_round, similarities)


def _share(cut: Cut | None) -> float:
    return 1.0 if cut is None else cut.share


def num_nonzeros(update: Update) -> int:
    """How many of an update's entries are not 0."""
    if isinstance(update, TernaryVector):
        return update.num_nonzeros
    dense: Any = update.values
    return int(np.count_nonzero(dense.cpu().numpy() if is_torch(dense) else dense))


def _sizes(update: Update, share: float) -> tuple[float, float, float]:
    """The norm, the largest scale of a ternary update, and the number of nonzeros.

    Norm and number are what they would be if the entries that the node does not have, all but a
    share, were like those that it has.
    """
    count = num_nonzeros(update) / share
    if isinstance(update, TernaryVector):
        largest = float(update.scales.max(initial=0.0))
        return math.sqrt(update.dot(update) / share), largest, count
    dense: Any = update.values
    values = dense.cpu().numpy() if is_torch(dense) else dense
    norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()) / share)
    return norm, 0.0, count


def shortened(update: Update, factor: float) -> Update:
    """An update that many times as long."""
    if isinstance(update, TernaryVector):
        return update.with_scales((update.scales * float(factor)).astype(np.float32))
    values: Any = update.values
    host = values.cpu().numpy() if is_torch(values) else values
    return TaskVector(update.layout, (host * float(factor)).astype(np.float32))
