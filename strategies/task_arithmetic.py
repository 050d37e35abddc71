"""Task Arithmetic: the scaled sum of the clients' task vectors."""

from __future__ import annotations

from typing import Unpack

from compeft_fl.merging.accumulators import Accumulator, TaskArithmetic
from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.observer import RoundObserver
from compeft_fl.server.robustness import SignAgreementFilter
from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy, SharedOptions
from compeft_fl.task_vector import Layout

__all__ = ["ComPEFTTaskArithmetic"]


class ComPEFTTaskArithmetic(ComPEFTStrategy):
    """Task Arithmetic over compressed links: global + lambda * sum of tau_i, every client alike.

    Parameters
    ----------
    scaling : float, optional
        lambda, finite and not 0. Default: one over the number of replies, which is the plain mean.
    observer, **options
        As `ComPEFTStrategy`.

    Raises
    ------
    ParameterError
        A scaling out of its range.

    Notes
    -----
    Source: Ilharco et al., https://arxiv.org/abs/2212.04089.
    """

    def __init__(
        self,
        *,
        scaling: float | None = None,
        observer: RoundObserver | None = None,
        robustness: SignAgreementFilter | None = None,
        bounds: ReplyBounds | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        self._method = TaskArithmetic(scaling)
        super().__init__(observer=observer, robustness=robustness, bounds=bounds, **options)

    def accumulator(self, layout: Layout) -> Accumulator:
        """See `ComPEFTStrategy.accumulator`."""
        return self._method.fresh(layout)

    def merging_weight(self, num_examples: float) -> float:
        """1: every client alike."""
        return 1.0

    def describe(self) -> str:
        """See `ComPEFTStrategy.describe`."""
        scaling = self._method.scaling
        return f"Merge: task arithmetic, scaling {'1 / replies' if scaling is None else scaling}"
