"""The weighted mean of the clients' task vectors."""

from __future__ import annotations

from compeft_fl.merging.accumulators import Accumulator, Average
from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy
from compeft_fl.task_vector import Layout

__all__ = ["ComPEFTAverage"]


class ComPEFTAverage(ComPEFTStrategy):
    """Federated averaging over compressed links: global + sum of w_i tau_i / sum of w_i.

    The weights are the numbers of examples. With lossless Updates it is FedAvg.

    Parameters
    ----------
    **options
        As `ComPEFTStrategy`.

    Notes
    -----
    Source: McMahan et al., https://arxiv.org/abs/1602.05629; ComPEFT,
    https://arxiv.org/abs/2311.13171.
    """

    _rank_merges = ("cover", "product")

    def accumulator(self, layout: Layout) -> Accumulator:
        """See `ComPEFTStrategy.accumulator`."""
        return Average(layout=layout)

    def describe(self) -> str:
        """See `ComPEFTStrategy.describe`."""
        return f"Merge: average, weighted by '{self.weighted_by_key}'"
