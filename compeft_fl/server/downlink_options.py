"""How the global adapter goes down, and what the log says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from compeft_fl.errors import ParameterError
from compeft_fl.exchange.downlink import Downlink, distance
from compeft_fl.exchange.records import LOGGER
from compeft_fl.exchange.uplink import AT_RISK
from compeft_fl.reduction.rules import AUTO, DOWN_ENERGY
from compeft_fl.server.base import Base
from compeft_fl.task_vector import TaskVector

__all__ = [
    "DENSITY",
    "DENSITY_FEW",
    "FEW",
    "RESULTS",
    "DownlinkOptions",
    "log_lag",
    "say_carried",
    "warn_of_huge_values",
]

DENSITY, DENSITY_FEW = 0.2, 0.07
FEW = 0.5  # of the nodes in a round: below, what a node has missed is what counts
FIRST_CONTACTS = ("coarse", "snapshot", "seed")
RESULTS = ("server", "nodes")


@dataclass(frozen=True)
class DownlinkOptions:
    """How the global adapter goes down.

    Parameters
    ----------
    codec : str
        Of the deltas. A dense codec sends the whole adapter in each version; "auto" writes each
        delta in the codec that arrives first; "factored" is low-rank signs, for nodes that are
        asked in nearly every round.
    link_mbps : float, optional
        The speed of a node's link in Mbit/s, for codec "auto" alone.
    density : float or "auto", optional
        In (0, 1]: the greatest share of parameters of a delta. "auto": as much as keeps a share of
        the energy, in the form that does so in the fewest bytes. Default: "auto", or
        `DENSITY_FEW` where fewer than half of the nodes train in a round.
    energy : float
        In (0, 1): that share, for density "auto" alone; more in the first rounds.
    scale : "mean", "norm" or float
        The deltas' scale rule, see `compeft_fl.compress`.
    support : "best" or "fixed"
        Which of the largest a delta keeps, see `compeft_fl.compress`.
    first_contact : {"coarse", "snapshot", "seed"}
        What a node gets of which nothing is known. "coarse": the start, in 11 bits or fewer a
        parameter (7 where a quarter of it is in tensors of zeros, as of a LoRA before training),
        and what came after it; the server takes what was rounded off as not yet sent. "snapshot":
        a lossless one. "seed": only what came after the start, because the node makes the same
        start by itself (``initial_adapter`` of the mod); one whose start differs says so, and gets
        the snapshot.
    result : {"server", "nodes"}, optional
        What a run is scored by, and gives: the server's own adapter, or what nodes have of it,
        which lacks what has not gone down yet. Where few nodes train in a round, the server's own
        swings with each of them, and what nodes have is the better one (``compeft-fl bench few``).
        Inside `Compressed` a ``start`` of the strategy's own gives what it makes.
        Default: "server", or "nodes" where fewer than half of the nodes train in a round.

    Raises
    ------
    ParameterError
        An unknown first contact or result; the others are checked where they are used.
    """

    codec: str = "golomb"
    density: float | str | None = None
    scale: str | float = "mean"
    first_contact: str = "coarse"
    link_mbps: float | None = None
    support: str = "best"
    energy: float = DOWN_ENERGY
    result: str | None = None

    def __post_init__(self) -> None:
        if self.first_contact not in FIRST_CONTACTS:
            raise ParameterError(
                f"expected first_contact among {', '.join(FIRST_CONTACTS)}; "
                f"found {self.first_contact!r}"
            )
        if self.result not in (None, *RESULTS):
            raise ParameterError(
                f"expected a result among {', '.join(RESULTS)}; found {self.result!r}"
            )

    def among(self, share: float) -> DownlinkOptions:
        """These options where such a share of the nodes trains in a round, 0 to 1."""
        density, result = (AUTO, "server") if share >= FEW else (DENSITY_FEW, "nodes")
        return replace(
            self,
            density=density if self.density is None else self.density,
            result=self.result or result,
        )

    def make(self, adapter: TaskVector) -> Downlink:
        """The way down of a federation that starts from an adapter."""
        return Downlink(
            adapter,
            density=AUTO if self.density is None else self.density,
            scale=self.scale,
            support=self.support,
            codec=self.codec,
            link_mbps=self.link_mbps,
            energy=self.energy,
            coarse_start=self.first_contact == "coarse",
            seeded=self.first_contact == "seed",
        )


def log_lag(downlink: Downlink, adapter: TaskVector, before: TaskVector | None) -> None:
    """Say how much of the global adapter the nodes' copy still lacks, in the last round's changes.

    It settles at a few changes; where it grows from round to round, the way down is too narrow.
    """
    change = 0.0 if before is None else distance(adapter, before)
    if not change:
        return
    lag = distance(adapter, TaskVector(adapter.layout, downlink.shared)) / change
    if lag < AT_RISK:
        LOGGER.info("\t├──> the nodes' copy of the adapter lags by %.2g times its change", lag)
    else:
        LOGGER.warning(
            "the nodes' copy of the adapter lags by %.3g times its change: if that grows, raise "
            "the density on the way down (%s), or send the adapter dense",
            lag,
            downlink.reduction.density,
        )


def say_carried(base: Base) -> None:
    """One line in the log about what is not compressed."""
    carried, apart = base.apart.carried, base.apart
    if apart.places:
        LOGGER.info(
            "%d tensors are carried as they are (%d bytes), %d are left to the nodes, "
            "%d are trained",
            len(carried),
            sum(value.nbytes for value in carried.values()),
            len(apart.places) - len(carried),
            len(base.layout.tensors),
        )


def warn_of_huge_values(adapter: TaskVector) -> None:
    """Say where a restored adapter holds values that no training makes."""
    for tensor, where in adapter.layout.slices():
        largest = float(np.abs(np.asarray(adapter.values[where])).max(initial=0.0))
        if largest > _HUGE:
            LOGGER.warning(
                "the checkpoint's adapter has values up to %.3g, in %r: something has driven it "
                "there, and training will hardly bring it back; an earlier checkpoint may be sound",
                largest,
                tensor.name,
            )
            return


_HUGE = 1e9  # no trained adapter has such a value
