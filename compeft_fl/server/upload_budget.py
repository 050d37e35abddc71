"""Density by bandwidth: each node sends as much as its link carries in the time of a round.

A node's link is what its config says (``link-mbps``), or what its last messages took: their bytes
over the time between request and reply, less the time that the node says it worked. A lie about
either changes the liar's own density and nothing else. Error feedback on the nodes makes updates
of different densities worth the same in the long run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from compeft_fl.errors import ParameterError
from compeft_fl.reduction.rates import Rate

__all__ = ["TIERS", "LinkTimes", "UploadBudget"]

TIERS: Final = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 2, 3, 4, 6, 8, 12, 16)
"""Each takes less than twice the bytes of the one before."""

_MESSAGE_BYTES = 1600  # of Flower's own records and ids around an update, about
_SAMPLES = 8  # of a node's last messages
_APART = 1.25  # two messages tell a link's speed apart from its latency where bytes differ so


@dataclass(frozen=True)
class UploadBudget:
    """The time in which each node's upload is to end, and what a node may send.

    Parameters
    ----------
    seconds : float
        For the bytes of an upload at the speed of the node's link; latency does not count.
    tiers : sequence of float
        What the server chooses from. Up to 1: a density of ternary updates. From 2 on: whole bits
        a parameter of finer ones, for links that carry more than a ternary update says.
        Their first and last are the bounds.
    start : float
        The tier of nodes whose link is not known yet.

    Raises
    ------
    ParameterError
        A number out of its range.

    Examples
    --------
    >>> budget = UploadBudget(0.1)
    >>> [str(budget.rate(1_000_000, mbps)) for mbps in (1, 10, 100)]
    ['0.005', '0.15', '8 bits']
    """

    seconds: float
    tiers: Sequence[float] = TIERS
    start: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, int | float):
            raise ParameterError(f"expected seconds as a number, found {self.seconds!r}")
        if not 0 < self.seconds < math.inf:
            raise ParameterError(f"expected seconds over 0, found {self.seconds}")
        if isinstance(self.tiers, str | bytes) or not isinstance(self.tiers, Sequence):
            raise ParameterError(f"expected tiers as a list of numbers, found {self.tiers!r}")
        rates = [Rate.of_tier(tier) for tier in (*self.tiers, self.start)][:-1]
        if not rates:
            raise ParameterError("expected at least one tier, found none")
        ordered = sorted(self.tiers, key=lambda tier: Rate.of_tier(tier).bits_a_parameter)
        object.__setattr__(self, "tiers", tuple(ordered))

    @classmethod
    def of(cls, given: UploadBudget | float | None) -> UploadBudget | None:
        """The setting, from what a person may give for one: seconds."""
        if given is None or isinstance(given, UploadBudget):
            return given
        return cls(given)

    def describe(self) -> str:
        """The setting, for the log."""
        tiers = ", ".join(str(Rate.of_tier(tier)) for tier in self.tiers)
        return f"Uploads end within {self.seconds:g} s, by tiers of {tiers}"

    def rate(self, num_parameters: int, mbps: float | None) -> Rate:
        """What a node sends of so many parameters over a link; None: the link is not known."""
        if mbps is None:
            return Rate.of_tier(self.start)
        found = Rate.of_tier(self.tiers[0])
        for tier in self.tiers[1:]:
            rate = Rate.of_tier(tier)
            if self.seconds_of(rate, num_parameters, mbps) > self.seconds:
                break
            found = rate
        return found

    def seconds_of(self, rate: Rate, num_parameters: int, mbps: float) -> float:
        """What an upload of a rate is expected to take."""
        num_bytes = rate.bits_a_parameter * num_parameters / 8 + _MESSAGE_BYTES
        return 8e-6 * num_bytes / mbps


@dataclass
class LinkTimes:
    """What is known of one node's link.

    Attributes
    ----------
    stated : float
        Mbit/s, as the node's config says; 0: it says nothing.
    samples : deque of (int, float)
        Bytes of its last exchanges, both ways, and seconds less work.
    seconds : float or None
        Of the last one.
    """

    stated: float = 0.0
    samples: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    seconds: float | None = None

    def add(self, num_bytes: int, seconds: float) -> None:
        """An exchange of so many bytes has taken so many seconds, without the node's work."""
        self.seconds = max(0.0, seconds)
        self.samples.append((num_bytes + 2 * _MESSAGE_BYTES, self.seconds))

    @property
    def mbps(self) -> float | None:
        """Mbit/s: stated, or seen; None: nothing is known.

        Where exchanges differ in bytes, what more bytes take tells the speed, and latency does not
        count. Where they do not, all of the time counts as the link's: it is faster than that.
        """
        if self.stated:
            return self.stated
        if not self.samples:
            return None
        slopes = [
            (one[1] - other[1]) / (one[0] - other[0])
            for one, other in combinations(self.samples, 2)
            if max(one[0], other[0]) > _APART * min(one[0], other[0])
        ]
        slope = statistics.median(slopes) if slopes else 0.0
        if slope <= 0:
            slope = statistics.median(seconds / size for size, seconds in self.samples)
        return 8e-6 / max(slope, _FASTEST)


_FASTEST = 8e-6 / 1e5  # seconds a byte at 100 Gbit/s
