"""What a single reply can do to the adapter: no more than is in proportion to what others do.

On by default in every strategy. A reply's weight, its norm, its largest step of a parameter, and
what weight and norm come to together count as at most so many times the median of the replies: of
this round's as far as they have come, and of those before where these are few. Scalars of the last
replies are all that is kept, and each reply is looked at once, as it comes. The first of a round
wait until a median means something, in no more memory than a dense adapter or two takes.

Where a whole round waits, so that all its replies are in hand, one that points against the others
is set aside: among few nodes a share in proportion is enough to undo what the others learn. Among
many it is not, and there it can pass.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flwr.app import MetricRecord, RecordDict

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import LOGGER, metric_records
from compeft_fl.merging.majority import Agreement, SignMajority
from compeft_fl.server.intake import Reply
from compeft_fl.server.observer import BoundsObserver
from compeft_fl.server.robustness import Candidate, Update, shortened
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

__all__ = ["ReplyBounds"]

_ENOUGH = 8  # replies that a median is of: a round's, filled up with those before
_REMEMBERED = 64  # replies whose sizes are kept
_WAITING = 4, 16  # replies of a round that wait: at least, and at most
_WAITING_BYTES = 16  # a parameter: beyond, the most of them do not wait

_FEWEST_VOTERS = 4  # with fewer replies there are no others to be against
_OPPOSED = 6.0  # standard deviations below what unrelated signs have in common
_APART = 4.0  # times the median distance from the median cosine
_AS_FAR = 0.5  # of what the median reply agrees by: so much it disagrees, whatever a deviation is
_PAST_SHARE = 0.9  # that a round before counts of what this one does
_PAST_NODES = 256  # whose direction is remembered


class _Size(NamedTuple):
    """A reply in four numbers.

    Of a node that has a share of the adapter's entries, the norm is what it would be if all were
    like those that it has.
    """

    weight: float
    norm: float
    impact: float  # weight times norm
    largest: float  # magnitude of an entry


class ReplyBounds:
    """Bounds on what a single reply can do, relative to the median reply.

    Parameters
    ----------
    max_weight : float
        A weight (number of examples) counts as at most this many times the median.
    max_norm : float
        A longer update is shortened to this many times the median norm.
    max_impact : float
        Where weight times norm is more than this many times its median, the weight is lowered.
    max_largest : float
        An update whose largest entry is more than this many times the median one is shortened.
    set_aside : bool
        Set aside a reply that opposes all others of a round that is small enough to wait.

    Raises
    ------
    ParameterError
        A factor below 1. Infinity: no such bound.

    Notes
    -----
    A reply opposes the others where its signs, over the past rounds too, agree with their majority
    less than unrelated signs do, by six standard deviations and half as much as the median reply
    agrees, and far less than the others' agree; and where no more than one of eight do so: two
    camps of like size are no outliers.

    What it cannot do: two hostile nodes of ten, or one that opposes the others in half of its
    entries only, can cost more than a bounded share; see `compeft_fl.strategies` for the
    `SignAgreementFilter`. Sources: bounds on the norm, Sun et al.,
    https://arxiv.org/abs/1911.07963; the vote on signs, Bernstein et al.,
    https://arxiv.org/abs/1810.05291.
    """

    def __init__(
        self,
        *,
        max_weight: float = 3.0,
        max_norm: float = 3.0,
        max_impact: float = 2.5,
        max_largest: float = 30.0,
        set_aside: bool = True,
    ) -> None:
        self._most = _Size(max_weight, max_norm, max_impact, max_largest)
        for name, value in self._most._asdict().items():
            if not value >= 1:
                raise ParameterError(f"expected max_{name} of 1 or more, found {value!r}")
        self.set_aside = set_aside
        self._recent: deque[_Size] = deque(maxlen=_REMEMBERED)
        self._in_round = 0
        self._usual: _Size | None = None  # the last medians in which most updates were not 0
        self._past: OrderedDict[int, Agreement] = OrderedDict()  # by node id, the last heard last

    def describe(self) -> str:
        """The bounds, for the log."""
        most = self._most
        return (
            f"Bounds on one reply: {most.weight:g} times the median weight, {most.norm:g} times "
            f"the median norm, {most.impact:g} times the median of both together"
        )

    def state(self) -> dict[str, Any]:
        """What is remembered from round to round, as plain values for a checkpoint."""
        past = {str(node): [p.agree, p.oppose, p.norms] for node, p in self._past.items()}
        usual = list(self._usual or ())
        return {"sizes": [list(size) for size in self._recent], "usual": usual, "past": past}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; nothing is remembered where it gave nothing."""
        self._recent.clear()
        self._recent.extend(_Size(*map(float, size)) for size in state.get("sizes", ()))
        usual = state.get("usual", ())
        self._usual = _Size(*map(float, usual)) if usual else None
        past = state.get("past", {})
        self._past = OrderedDict((int(node), Agreement(*sums)) for node, sums in past.items())

    def within(
        self,
        server_round: int,
        candidates: Iterator[tuple[Reply, Candidate]],
        observer: object,
        *,
        whole: bool = False,
    ) -> Iterator[tuple[Reply, Candidate]]:
        """Hand a round's replies on within bounds, in their order.

        Parameters
        ----------
        server_round : int
        candidates : iterator of (Reply, Candidate)
            Those with a reason are handed on as they are.
        observer : object
            Is told who was bounded where it is a `BoundsObserver`.
        whole : bool
            Replies that wait keep their messages; else only the metrics in them.
        """
        self._in_round = 0
        bounded: dict[int, str] = {}
        waiting: list[tuple[Reply, Candidate]] = []
        held, waits = 0, True
        for reply, found in candidates:
            if found.reason is not None:
                yield reply, found
            else:
                self._note(found)
                waiting.append((reply, found) if whole or not waits else _light(reply, found))
                held += _num_bytes(found.update)
                least, most = _WAITING
                full = held >= _WAITING_BYTES * found.update.layout.num_parameters
                waits = waits and len(waiting) < most and not (len(waiting) >= least and full)
            while waiting and not waits:
                reply, found = waiting.pop(0)
                yield reply, self._bounded(reply.node_id, found, bounded)
            del reply, found  # before the next one is pulled
        reasons = self._opposed(waiting) if self.set_aside else {}
        while waiting:
            reply, found = waiting.pop(0)
            reason = reasons.get(reply.key)
            if reason is not None:
                yield reply, found._replace(reason=reason)
            else:
                yield reply, self._bounded(reply.node_id, found, bounded)
        if bounded:
            said = "; ".join(f"node {node}: {what}" for node, what in list(bounded.items())[:20])
            LOGGER.warning("round %d: counted within bounds: %s", server_round, said)
            if isinstance(observer, BoundsObserver):
                observer.on_bounds(server_round, bounded)

    def _note(self, found: Candidate) -> None:
        """Keep a reply's sizes."""
        norm, largest = _lengths(found)
        self._recent.append(_Size(found.weight, norm, found.weight * norm, largest))
        self._in_round += 1

    def _medians(self) -> _Size:
        """Of the latest replies; of updates, of those that are not 0."""
        count = min(len(self._recent), max(self._in_round, _ENOUGH))
        latest = list(self._recent)[-count:]
        moving = [size for size in latest if size.norm > 0]
        weight = _median(size.weight for size in latest)
        if 2 * len(moving) <= len(latest) and self._usual is not None:
            # Most have come to rest, and those that have not are no measure of themselves.
            return self._usual._replace(weight=weight)
        if not moving:
            return _Size(weight, 0.0, 0.0, 0.0)
        medians = _Size(
            weight,
            _median(size.norm for size in moving),
            _median(size.impact for size in moving),
            _median(size.largest for size in moving),
        )
        if 2 * len(moving) > len(latest) >= _FEWEST_VOTERS:
            self._usual = medians
        return medians

    def _bounded(self, node_id: int, found: Candidate, bounded: dict[int, str]) -> Candidate:
        """A reply within bounds; what was too much is noted."""
        median, most = self._medians(), self._most
        (norm, largest), weight = _lengths(found), found.weight
        said = []
        factor = 1.0
        if norm > most.norm * median.norm:
            factor = most.norm * median.norm / norm
            said.append(f"norm {norm:.3g} as {norm * factor:.3g}")
        if largest * factor > most.largest * median.largest:
            factor = most.largest * median.largest / largest
            said.append(f"largest entry {largest:.3g} as {largest * factor:.3g}")
        if weight > most.weight * median.weight:
            weight = most.weight * median.weight
        if weight * norm * factor > most.impact * median.impact:
            weight = most.impact * median.impact / (norm * factor)
        if weight < found.weight:
            said.append(f"weight {found.weight:.3g} as {weight:.3g}")
        if not said:
            return found
        bounded[node_id] = ", ".join(said)
        update = shortened(found.update, factor) if factor < 1 else found.update
        return found._replace(weight=weight, update=update)

    def _opposed(self, replies: Sequence[tuple[Reply, Candidate]]) -> dict[int, str]:
        """Which of a whole round's replies are against the others, by their keys, and why."""
        layouts = {found.update.layout for _, found in replies}
        if len(replies) < _FEWEST_VOTERS or len(layouts) > 1:
            return {}
        majority = SignMajority(replies[0][1].update.layout)
        for _, found in replies:
            majority.add(found.update)
        now = {
            reply.key: majority.compare(
                found.update, within=None if found.cut is None else found.cut.covered
            )
            for reply, found in replies
        }
        then = {
            reply.key: now[reply.key].after(self._past.get(reply.node_id, Agreement()), _PAST_SHARE)
            for reply, _ in replies
        }
        for reply, _ in replies:
            self._past.pop(reply.node_id, None)
            self._past[reply.node_id] = then[reply.key]
        while len(self._past) > _PAST_NODES:
            self._past.popitem(last=False)
        found_apart = {**_apart(then), **_apart(now)}
        if len(found_apart) > max(1, len(replies) // 8):
            return {}
        return {
            key: (
                f"its signs oppose those of all others: cosine {each.cosine:.3f} to their "
                f"majority, {-each.deviations:.1f} standard deviations below that of unrelated "
                "signs"
            )
            for key, each in found_apart.items()
        }


def _median(values: Iterable[float]) -> float:
    """Of two, the lower: the other may be anything."""
    known = sorted(values)
    return known[0] if len(known) == 2 else statistics.median(known)


def _apart(found: dict[int, Agreement]) -> dict[int, Agreement]:
    """Those that oppose the majority of the others, and are far from the others in that."""
    median = statistics.median(each.cosine for each in found.values())
    spread = statistics.median(abs(each.cosine - median) for each in found.values())
    return {
        key: each
        for key, each in found.items()
        if each.deviations < -_OPPOSED
        and each.cosine < min(median - _APART * spread, -_AS_FAR * median)
    }


def _light(reply: Reply, found: Candidate) -> tuple[Reply, Candidate]:
    """A reply that waits: its metrics, and what was read in it."""
    message = copy.copy(reply.message)
    records = metric_records(message.content)
    message.content = RecordDict({key: MetricRecord(dict(each)) for key, each in records.items()})
    return replace(reply, message=message, question=None), found._replace(parts=())


def _lengths(found: Candidate) -> tuple[float, float]:
    """The norm and the largest magnitude of a reply's update; see `_Size`."""
    norm, largest = _lengths_of(found.update)
    return norm / math.sqrt(found.share), largest


def _lengths_of(update: Update) -> tuple[float, float]:
    """The norm and the largest magnitude of an update, in float64."""
    if isinstance(update, TernaryVector):
        if not update.num_nonzeros:
            return 0.0, 0.0
        return math.sqrt(update.dot(update)), float(update.scales.max())
    values: Any = update.values
    host = values.cpu().numpy() if is_torch(values) else values
    norm = math.sqrt(float(np.square(host, dtype=np.float64).sum()))
    return norm, float(np.abs(host).max(initial=0.0))


def _num_bytes(update: Update) -> int:
    """What an update takes in memory."""
    size = update.layout.num_parameters
    return size * 4 if isinstance(update, TaskVector) else size // 4
