"""Similarity of each reply to the direction of the round, and a rule that sets outliers aside.

The direction is the majority of signs (`compeft_fl.majority`): bit masks, no dense vectors. A reply
cannot be compared with it before all have come, so the rule goes over a round's replies more than
once. They wait as the encoded bytes that they came as, in a temporary file beyond a limit, and are
decoded again one at a time: the server's memory stays flat, at the price of two more decodings.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.majority import SignMajority
from compeft_fl.records import LOGGER, metric_records
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode
from strategies.observer import RoundObserver
from strategies.replies import Intake, Reply
from strategies.streaming_grid import name_nodes

__all__ = ["SignAgreementFilter", "Similarity", "SimilarityObserver", "take_screened"]

Update = TernaryVector | TaskVector

_NOISE = 3.0  # standard deviations of the cosine between unrelated signs


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


class SignAgreementFilter:
    """Set aside replies that point away from the majority of a round, or are absurdly large.

    For each reply: the cosine between its signs and the majority of the *other* replies' signs,
    parameter by parameter. Honest updates of one model agree more than chance; random noise does
    not, and a flipped update opposes. Votes have no scale and no weight, so that nobody can shout.
    A finite but huge scale, which any decoder has to let pass, is compared with the round's median.

    Parameters
    ----------
    min_cosine : float
        In 0 .. 1: replies whose cosine is below this part of the round's median are set aside.
    max_size : float
        Over 1: replies whose norm, or whose largest scale, is more than this many times the round's
        median are set aside and have no vote. Neither has a reply that moves so many times more
        parameters than the median one, but it can stay.
    max_weight : float
        Over 1: a weight (number of examples) counts as at most this many times the median.
    min_replies : int
        At least 3: with fewer replies nothing is set aside.
    dry_run : bool
        Say what would be set aside, merge everything: replies are merged as they come.
    memory_bytes : int
        Encoded replies that wait in memory; beyond that, in a temporary file.

    Raises
    ------
    ParameterError
        An argument out of its range.

    Notes
    -----
    Near the end of training honest updates have little in common, and where the median cosine is
    no more than chance there is no direction to compare with. Such a round is judged by the last
    one that had one: who was set aside then still is, and no norm counts as more than the median.

    What the rule cannot do: a coalition that sends nearly the
    same update outvotes sparse honest ones wherever few of them move a parameter; an update that
    mostly agrees and hides a backdoor in few parameters passes; where honest nodes have nothing in
    common, those that differ most are set aside, which costs what only they know.

    Sources: the vote on signs, Bernstein et al., signSGD with majority vote,
    https://arxiv.org/abs/1810.05291, and Li et al., RSA, https://arxiv.org/abs/1811.03761, which
    bounds each client's influence to its signs; bounds on the norm, Sun et al.,
    https://arxiv.org/abs/1911.07963. Krum, Blanchard et al., https://arxiv.org/abs/1703.02757,
    picks the reply with the nearest neighbours instead: all pairs of dense vectors at once.
    """

    def __init__(
        self,
        *,
        min_cosine: float = 0.3,
        max_size: float = 5.0,
        max_weight: float = 10.0,
        min_replies: int = 4,
        dry_run: bool = False,
        memory_bytes: int = 16 << 20,
    ) -> None:
        if not 0 <= min_cosine <= 1:
            raise ParameterError(f"expected min_cosine in 0 .. 1, found {min_cosine!r}")
        for name, value in (("max_size", max_size), ("max_weight", max_weight)):
            if not value > 1:
                raise ParameterError(f"expected {name} over 1, found {value!r}")
        if min_replies < 3:
            raise ParameterError(f"expected min_replies of 3 or more, found {min_replies!r}")
        if memory_bytes < 1:
            raise ParameterError(f"expected memory_bytes over 0, found {memory_bytes!r}")
        self.min_cosine, self.max_size, self.max_weight = min_cosine, max_size, max_weight
        self.min_replies, self.dry_run, self.memory_bytes = min_replies, dry_run, memory_bytes
        self._suspects: set[int] = set()  # node ids

    def describe(self) -> str:
        """The rule and its settings, for the log."""
        return (
            f"Outliers: cosine of signs below {self.min_cosine:g} of the median, size over "
            f"{self.max_size:g} times the median"
            f"{' (dry run: said, not set aside)' if self.dry_run else ''}"
        )

    def state(self) -> dict[str, list[int]]:
        """What is remembered from round to round, as plain values for a checkpoint."""
        return {"suspects": sorted(self._suspects)}

    def restore(self, state: dict[str, list[int]]) -> None:
        """Go on from what `state` gave."""
        self._suspects = set(state["suspects"])

    def judge_signs(self, cosines: dict[int, float], threshold: float | None) -> dict[int, str]:
        """Who is set aside for its signs, and why.

        Parameters
        ----------
        cosines : dict of int to float
            By node id.
        threshold : float or None
            None: this round has no direction.
        """
        if threshold is None:
            said = (
                "its signs differed in an earlier round, and this one has no direction of its own"
            )
            return {node: said for node in cosines if node in self._suspects}
        outliers = {node: cosine for node, cosine in cosines.items() if cosine < threshold}
        self._suspects = (self._suspects - cosines.keys()) | outliers.keys()
        return {
            node: f"its signs have cosine {cosine:.3f} to the majority of the others', "
            f"below {threshold:.3f}"
            for node, cosine in outliers.items()
        }


@dataclass(slots=True)
class _Entry:
    """A reply that waits: where its bytes are, and what is known of it."""

    node_id: int
    num_bytes: int
    weight: float
    position: int
    sizes: tuple[int, int]  # of the metrics and of the Update
    norm: float
    largest: float  # scale; 0 for a dense update
    num_nonzeros: int
    votes: bool = True
    cosine: float = 0.0
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

    def add(self, reply: Reply, blob: bytes, update: Update, weight: float) -> None:
        """Count a reply's vote, and keep its bytes and metrics."""
        records = metric_records(reply.message.content)
        told = json.dumps({key: dict(metrics) for key, metrics in records.items()}).encode()
        entry = _Entry(
            reply.node_id, reply.num_bytes, weight, self._spool.tell(), (len(told), len(blob)),
            *_sizes(update),
        )  # fmt: skip
        try:
            self._spool.write(told)
            self._spool.write(blob)
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
        for entry in entries:
            entry.cosine = self._majority.cosine(self._update(entry), voted=entry.votes)
        cosines = [entry.cosine for entry in entries if entry.votes]
        if enough:
            threshold = self._threshold(cosines)
            if threshold is None:
                self._most_norm = statistics.median(entry.norm for entry in entries)
            outliers = rule.judge_signs({e.node_id: e.cosine for e in entries}, threshold)
            for entry in entries:
                entry.reason = entry.reason or outliers.get(entry.node_id)
        return [Similarity(e.node_id, e.cosine, e.norm, e.num_nonzeros, e.reason) for e in entries]

    def replies(self) -> Iterator[tuple[Reply, Update, float, str | None]]:
        """Each reply with its update and weight, both within bounds, and why it is set aside."""
        if not self._entries or self._carrier is None:
            return
        most = self._rule.max_weight * statistics.median(e.weight for e in self._entries)
        if len(self._entries) < self._rule.min_replies:
            most = math.inf
        for entry in self._entries:
            self._spool.seek(entry.position)
            told: dict[str, Any] = json.loads(self._spool.read(entry.sizes[0]))
            # A message is kilobytes of Python objects. One stands for all, with their contents.
            self._carrier.content = RecordDict(
                {key: MetricRecord(metrics) for key, metrics in told.items()}
            )
            reply = Reply(entry.node_id, self._carrier, entry.num_bytes)
            update = self._update(entry)
            if entry.norm > self._most_norm:
                update = _shortened(update, self._most_norm / entry.norm)
            yield reply, update, min(entry.weight, most), entry.reason

    def _update(self, entry: _Entry) -> Update:
        self._spool.seek(entry.position + entry.sizes[0])
        return decode(self._spool.read(entry.sizes[1]), layout=self._layout)

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
                entry.votes = False
                self._majority.remove(self._update(entry))

    def _threshold(self, cosines: list[float]) -> float | None:
        """The least cosine that stays; None where the replies have no direction in common."""
        decided = self._majority.direction().num_nonzeros
        if not decided or not cosines:
            return None
        median = statistics.median(cosines)
        return self._rule.min_cosine * median if median > _NOISE / math.sqrt(decided) else None


def take_screened(
    rule: SignAgreementFilter | None,
    layout: Layout,
    intake: Intake,
    observer: RoundObserver,
    replies: Iterable[Message],
    read: Callable[[Reply], tuple[float, bytes, Update]],
    add: Callable[[Reply, Update, float], None],
) -> None:
    """Take a round's training replies by way of an `Intake`, and of a rule where there is one.

    Parameters
    ----------
    rule : SignAgreementFilter, optional
    layout : Layout
    intake : Intake
    observer : RoundObserver
        Is told of the similarities where it is a `SimilarityObserver`.
    replies : iterable of flwr.app.Message
    read : callable
        Checks a reply; gives its weight, its Update's bytes, and what they decode to.
    add : callable
        Merges an update with a weight, and accepts the reply. With a rule that sets replies aside
        it is called when all have come, with a message that has metrics and no arrays. A
        CompeftError sets the reply aside.
    """
    if rule is None:

        def merge(reply: Reply, value: tuple[float, bytes, Update]) -> None:
            weight, _, update = value
            add(reply, update, weight)

        intake.take(replies, read, merge)
        return
    with _Screening(rule, layout) as screening:

        def keep(reply: Reply, value: tuple[float, bytes, Update]) -> None:
            weight, blob, update = value
            screening.add(reply, blob, update, weight)
            if rule.dry_run:
                add(reply, update, weight)

        intake.take(replies, read, keep)
        similarities = screening.judge()
        _tell(rule, intake.server_round, similarities, observer)
        if rule.dry_run:
            return
        for reply, update, weight, reason in screening.replies():
            try:
                if reason is not None:
                    raise CompeftError(reason)
                add(reply, update, weight)
            except CompeftError as error:
                intake.set_aside(reply.node_id, reply.num_bytes, str(error))


def _tell(
    rule: SignAgreementFilter,
    server_round: int,
    similarities: list[Similarity],
    observer: RoundObserver,
) -> None:
    """One line in the log, and the observer's share."""
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


def _sizes(update: Update) -> tuple[float, float, int]:
    """The norm, the largest scale of a ternary update, and the number of nonzeros."""
    if isinstance(update, TernaryVector):
        largest = float(update.scales.max(initial=0.0))
        return math.sqrt(update.dot(update)), largest, update.num_nonzeros
    dense: Any = update.values
    values = dense.cpu().numpy() if is_torch(dense) else dense
    norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()))
    return norm, 0.0, int(np.count_nonzero(values))


def _shortened(update: Update, factor: float) -> Update:
    if isinstance(update, TernaryVector):
        return update.with_scales(update.scales * np.float32(factor))
    return TaskVector(update.layout, update.values * factor)
