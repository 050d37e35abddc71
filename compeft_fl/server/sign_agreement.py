"""The rule by which `compeft_fl.server.robustness` tells outliers from the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from compeft_fl.errors import ParameterError
from compeft_fl.merging.majority import Agreement

__all__ = ["SignAgreementFilter"]

_NOISE = 3.0  # standard deviations of the cosine between unrelated signs
_OPPOSED = 6.0  # such deviations below 0, which no honest node reaches by itself
_PAST_SHARE = 0.9  # that a round before counts of what this one does
_REMEMBERED = 10_000  # nodes


class SignAgreementFilter:
    """Set aside replies that point away from the majority of a round, or are absurdly large.

    For each reply: the cosine between its signs and the majority of the *other* replies' signs,
    parameter by parameter. Honest updates of one model agree more than chance; random noise does
    not, and a flipped update opposes. Where few replies move a parameter one hostile vote decides,
    so those that differ lose theirs, the worst first, and the others are compared again without.
    Votes have no scale and no weight, so that nobody can shout; a finite but huge scale, which any
    decoder has to let pass, is compared with the round's median.

    Parameters
    ----------
    min_cosine : float
        In 0 .. 1: replies whose cosine is below this part of the round's median are set aside, if
        it was so over the past rounds too.
    max_size : float
        Over 1: replies whose norm, or whose largest scale, is more than this many times the round's
        median are set aside and have no vote. Neither has a reply that moves so many times more
        parameters than the median one, but it can stay.
    max_norm : float
        At least 1: of what stays, a norm counts as at most this many times the median.
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
    no more than chance there is no direction to compare with. In such a round those are set aside
    that were in the last one that had one, and those whose signs oppose the others' by more than
    chance.

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
        max_norm: float = 2.0,
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
        if not max_norm >= 1:
            raise ParameterError(f"expected max_norm of 1 or more, found {max_norm!r}")
        if min_replies < 3:
            raise ParameterError(f"expected min_replies of 3 or more, found {min_replies!r}")
        if memory_bytes < 1:
            raise ParameterError(f"expected memory_bytes over 0, found {memory_bytes!r}")
        self.min_cosine, self.max_size, self.max_norm = min_cosine, max_size, max_norm
        self.max_weight, self.min_replies = max_weight, min_replies
        self.dry_run, self.memory_bytes = dry_run, memory_bytes
        self._suspects: set[int] = set()  # node ids
        self._past: dict[int, Agreement] = {}  # by node id, the last heard of last

    def describe(self) -> str:
        """The rule and its settings, for the log."""
        return (
            f"Outliers: cosine of signs below {self.min_cosine:g} of the median, size over "
            f"{self.max_size:g} times the median"
            f"{' (dry run: said, not set aside)' if self.dry_run else ''}"
        )

    def state(self) -> dict[str, Any]:
        """What is remembered from round to round, as plain values for a checkpoint."""
        past = {str(node): [p.agree, p.oppose, p.norms] for node, p in self._past.items()}
        return {"suspects": sorted(self._suspects), "past": past}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._suspects = set(state["suspects"])
        self._past = {int(node): Agreement(*sums) for node, sums in state["past"].items()}

    def judge_signs(self, found: dict[int, Agreement], voters: Sequence[int]) -> dict[int, str]:
        """Who is set aside for its signs, and why.

        Parameters
        ----------
        found : dict of int to Agreement
            Of this round's replies with the majority of the others, by node id.
        voters : sequence of int
            The nodes that have a vote.
        """
        past = self._with_past(found)
        least = self._least_cosine([found[node] for node in voters])
        least_in_past = self._least_cosine([past[node] for node in voters])
        said: dict[int, str] = {}
        for node, now in found.items():
            differed = least_in_past is None or past[node].cosine < least_in_past
            opposes = now.deviations < -_OPPOSED or (
                now.deviations < -_NOISE and past[node].deviations < -_OPPOSED
            )
            if least is not None and differed and now.cosine < least:
                said[node] = (
                    f"its signs have cosine {now.cosine:.3f} to the majority of the others', "
                    f"below {least:.3f}"
                )
            elif opposes:
                said[node] = (
                    f"its signs oppose the majority of the others': cosine {now.cosine:.3f}, "
                    f"{-now.deviations:.1f} standard deviations below that of unrelated signs"
                )
            elif least is None and differed and node in self._suspects:
                said[node] = (
                    "its signs differed in an earlier round, and this one has no direction of its "
                    "own"
                )
        return said

    def remember(
        self, found: dict[int, Agreement], voters: Sequence[int], outliers: Iterable[int]
    ) -> None:
        """Note how a round was judged, for the next ones."""
        if self._least_cosine([found[node] for node in voters]) is not None:
            self._suspects -= found.keys()
        self._suspects |= set(outliers)
        for node, past in self._with_past(found).items():
            self._past.pop(node, None)
            self._past[node] = past
        for node in list(self._past)[:-_REMEMBERED]:
            del self._past[node]
            self._suspects.discard(node)

    def _with_past(self, found: dict[int, Agreement]) -> dict[int, Agreement]:
        nothing = Agreement()
        return {
            node: each.after(self._past.get(node, nothing), _PAST_SHARE)
            for node, each in found.items()
        }

    def _least_cosine(self, found: Sequence[Agreement]) -> float | None:
        """The least cosine that stays; None where the replies have no direction in common."""
        if not found:
            return None
        median = statistics.median(each.cosine for each in found)
        chance = statistics.median(each.chance for each in found)
        return self.min_cosine * median if median > _NOISE * chance else None
