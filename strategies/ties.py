"""TIES: the clients elect each parameter's sign, and those that agree are averaged."""

from __future__ import annotations

from typing import Unpack

from compeft_fl.merging.accumulators import Accumulator, Ties
from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.robustness import SignAgreementFilter
from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy, SharedOptions
from compeft_fl.task_vector import Layout

__all__ = ["ComPEFTTies"]


class ComPEFTTies(ComPEFTStrategy):
    """TIES-merging over compressed links, weighted by the clients' numbers of examples.

    Parameters
    ----------
    scaling : float
        lambda, finite and not 0. In rounds, 1 overshoots; 0.4 was on a par with averaging.
    tie : {"zero", "positive", "majority"}
        What happens where both signs weigh the same; see `compeft_fl.Ties`.
    observer, **options
        As `ComPEFTStrategy`.

    Raises
    ------
    ParameterError
        A scaling out of its range, or an unknown tie rule.

    Notes
    -----
    Source: Yadav et al., https://arxiv.org/abs/2306.01708.
    """

    _weighs_cover = False  # what a node does not have takes no part in the election

    def __init__(
        self,
        *,
        scaling: float = 0.4,
        tie: str = "zero",
        observer: RoundObserver | None = None,
        robustness: SignAgreementFilter | None = None,
        bounds: ReplyBounds | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        self._method = Ties(scaling, tie)
        super().__init__(observer=observer, robustness=robustness, bounds=bounds, **options)

    def accumulator(self, layout: Layout) -> Accumulator:
        """See `ComPEFTStrategy.accumulator`."""
        return self._method.fresh(layout)

    def describe(self) -> str:
        """See `ComPEFTStrategy.describe`."""
        return f"Merge: TIES, scaling {self._method.scaling}, tie '{self._method.tie}'"
