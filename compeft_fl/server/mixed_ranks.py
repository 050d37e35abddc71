"""Nodes of different ranks: which a federation takes, and how their updates are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.errors import LayoutError, MalformedError, ParameterError
from compeft_fl.exchange.carried import Apart
from compeft_fl.exchange.records import LOGGER
from compeft_fl.merging.accumulators import Average
from compeft_fl.merging.coverage import Coverage
from compeft_fl.merging.products import ProductMean
from compeft_fl.parts.ranks import AXES, Cut, check_rank, rank_axis, rank_of
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.wire.messages import RANK_KEY, inspect

if TYPE_CHECKING:
    from compeft_fl.server.base import Base
    from compeft_fl.server.robustness import Candidate

__all__ = ["MERGES", "MixedRanks", "RankMerge", "check_stated", "filled", "stated_rank"]

MERGES: Final = ("auto", "cover", "product")


@dataclass(frozen=True)
class MixedRanks:
    """The ranks that nodes may have, and how updates of several ranks are merged.

    A node states its rank, and holds the leading rows of A and columns of B of the server's
    adapter, which has the largest. Keep LoRA's scaling the same at each rank:
    `compeft_fl.adapters.lora_settings` gives the settings.

    Parameters
    ----------
    ranks : sequence of int
        A node that states another is refused; one that states none has the whole adapter.
    merge : {"auto", "cover", "product"}
        "cover": an entry moves by the mean over the nodes that have it. "product": the products
        B A are averaged, and brought back to the server's rank by a singular value decomposition.
        "auto": products where the strategy averages, and trains LoRA's A and B of linear maps;
        else cover.
    least_cover : float
        In [0, 1]: an entry counts as covered by at least this share of a round's weight, so that
        one that a single node has does not move all that way.
    axes : mapping of str to int
        Patterns of tensors' names to the axis that is the rank; the first that matches holds.
        Default: LoRA's A and B, as PEFT names them.

    Raises
    ------
    ParameterError
        A value out of its range.

    Notes
    -----
    Sources: HetLoRA, https://arxiv.org/abs/2401.06432, which pads with zeros and weighs updates by
    their norms, where this takes the mean over those that have an entry; FlexLoRA,
    https://arxiv.org/abs/2402.11505.

    Examples
    --------
    >>> MixedRanks((8, 2)).ranks
    (2, 8)
    """

    ranks: Sequence[int]
    merge: str = "auto"
    least_cover: float = 0.2
    axes: Mapping[str, int] = field(default_factory=lambda: AXES)

    def __post_init__(self) -> None:
        if isinstance(self.ranks, str | bytes) or not isinstance(self.ranks, Sequence):
            raise ParameterError(f"expected ranks as a list of integers, found {self.ranks!r}")
        ranks = tuple(sorted({check_rank(rank) for rank in self.ranks}))
        if not 1 <= len(ranks) <= _MOST_RANKS:
            raise ParameterError(f"expected 1 to {_MOST_RANKS} ranks, found {len(ranks)}")
        object.__setattr__(self, "ranks", ranks)
        if self.merge not in MERGES:
            raise ParameterError(f"expected merge among {', '.join(MERGES)}; found {self.merge!r}")
        if isinstance(self.least_cover, bool) or not 0 <= self.least_cover <= 1:
            raise ParameterError(f"expected least_cover in [0, 1], found {self.least_cover!r}")
        for pattern, axis in self.axes.items():
            if not isinstance(pattern, str) or axis not in (0, 1, 2, 3):
                raise ParameterError(
                    f"expected axes as patterns to 0 .. 3, found {pattern!r}: {axis!r}"
                )

    @classmethod
    def of(cls, given: MixedRanks | Sequence[int] | None) -> MixedRanks | None:
        """The setting, from what a person may give for one; None: all nodes are alike."""
        if given is None or isinstance(given, MixedRanks):
            return given
        return cls(given)

    def merged_as(self, merges: Sequence[str]) -> MixedRanks:
        """The setting of a strategy that can merge in these ways alone.

        Raises
        ------
        ParameterError
            The merge that was asked for is none of them.
        """
        if self.merge == "auto" and "product" not in merges:
            return replace(self, merge="cover")
        if self.merge not in ("auto", *merges):
            raise ParameterError(
                f"expected ranks merged by {' or '.join(merges)}, found {self.merge!r}"
            )
        return self

    def describe(self) -> str:
        """The setting, for the log."""
        return f"Ranks of nodes: {', '.join(map(str, self.ranks))}; merged by {self.merge}"

    def cuts(self, layout: Layout, apart: Apart) -> dict[int, Cut | None]:
        """How each rank lies in an adapter; None where it is all of it.

        Raises
        ------
        ParameterError
            A rank above the adapter's.
        LayoutError
            Factors that are carried: only what is trained, or left to the nodes, can be cut.
        """
        largest = rank_of(layout, self.axes)
        if self.ranks[-1] > largest:
            raise ParameterError(
                f"expected ranks of at most {largest}, the adapter's, found {self.ranks[-1]}"
            )
        for name, value in apart.carried.items():
            if rank_axis(name, value.shape, self.axes) is not None:
                raise LayoutError(
                    f"expected factors of mixed ranks to be trained or left, found {name!r} carried"
                )
        found = {rank: Cut(layout, rank, self.axes) for rank in self.ranks}
        return {rank: None if cut.is_whole else cut for rank, cut in found.items()}


_MOST_RANKS = 64  # each costs the server an encoding of every version


def stated_rank(parts: Sequence[bytes]) -> int:
    """The rank that an Update says it is of; 0: it says none.

    Raises
    ------
    WireError
        Bytes that are no Update; no rank under its key.
    """
    told = inspect(parts[0]).metadata.get(RANK_KEY) if parts else None
    if told is None:
        return 0
    if not (told.isascii() and told.isdigit() and len(told) < _DIGITS):
        raise MalformedError(f"expected a rank in the update's metadata, found {told[:20]!r}")
    return int(told)


_DIGITS = 8


def check_stated(rank: int, cuts: Mapping[int, Any], said: int) -> None:
    """Raise for an update of a rank that its node may not have.

    Parameters
    ----------
    rank : int
        Of the update; 0: none, the whole adapter.
    cuts : mapping of int
        The ranks that are taken; none: the whole adapter only.
    said : int
        The rank that the node states of itself.

    Raises
    ------
    MalformedError
    """
    if rank and not cuts:
        raise MalformedError(
            f"expected an update of the whole adapter, found one of rank {rank}: the strategy's "
            "`ranks` says which are taken"
        )
    if rank and rank not in cuts:
        raise MalformedError(
            f"expected a rank among {', '.join(map(str, cuts))}; found an update of rank {rank}"
        )
    if rank != said:
        raise MalformedError(
            f"expected an update of rank {said or 'all'}, which the node states, "
            f"found one of rank {rank or 'all'}"
        )


class RankMerge:
    """What a round's merge needs to know of ranks.

    Parameters
    ----------
    coverage : Coverage
    products : ProductMean, optional
        Takes the place of the mean of factors.
    weighs_cover : bool
        Entries count by the weight of those that have them.
    """

    def __init__(
        self, coverage: Coverage, products: ProductMean | None, *, weighs_cover: bool
    ) -> None:
        self._coverage, self._products, self._weighs = coverage, products, weighs_cover

    @classmethod
    def of(cls, ranks: MixedRanks | None, base: Base, *, weighs_cover: bool) -> RankMerge:
        """Of a round.

        Raises
        ------
        LayoutError
            An adapter without products, where these are merged.
        """
        if ranks is None:
            return cls(Coverage(0.0), None, weighs_cover=False)
        products = None
        if ranks.merge != "cover":
            try:
                products = ProductMean(base.adapter, ranks.axes)
            except LayoutError:
                if ranks.merge == "product":
                    raise
        return cls(Coverage(ranks.least_cover), products, weighs_cover=weighs_cover)

    def add(self, found: Candidate) -> None:
        """Count a reply that was merged."""
        self._coverage.add(found.cut, found.weight)
        if self._products is not None:
            rank = None if found.cut is None else found.cut.rank
            self._products.add(found.update, found.weight, rank)

    def result(self, merged: TaskVector) -> TaskVector:
        """The merge, each entry by those that have it; or that of the products."""
        if self._weighs:
            merged = self._coverage.weighed(merged)
        if self._products is None:
            return merged
        merged = self._products.replaced(merged)
        if self._products.projected:
            LOGGER.info(
                "%d products have no factors near the mean of the factors: A is its mean",
                self._products.projected,
            )
        return merged


def filled(found: Sequence[Candidate], ranks: MixedRanks) -> list[TaskVector]:
    """Replies of several ranks for a strategy that knows whole adapters only.

    What a node does not have moves as it does in the mean over those that have it, so that the
    weighted mean of all is that mean.

    Parameters
    ----------
    found : sequence of Candidate
        All of a round.
    ranks : MixedRanks
    """
    if not any(each.cut is not None for each in found):
        return [each.update.to_task_vector() for each in found]
    mean, coverage = Average(), Coverage(ranks.least_cover)
    for each in found:
        mean.add(each.update, each.weight)
        coverage.add(each.cut, each.weight)
    usual: Any = coverage.weighed(mean.result()).values
    filled = []
    for each in found:
        update = each.update.to_task_vector()
        if each.cut is not None:
            values = np.where(each.cut.covered, np.asarray(update.values), usual)
            update = TaskVector(update.layout, values)
        filled.append(update)
    return filled
