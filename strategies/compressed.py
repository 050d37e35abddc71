"""Any Flower strategy over compressed links."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from compeft_fl.client.node_memory import forget_federation
from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.exchange.records import LOGGER
from compeft_fl.parts.tensor_policy import TensorPolicy
from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.broadcast import Broadcaster
from compeft_fl.server.downlink_options import DownlinkOptions
from compeft_fl.server.inner_state import InnerState
from compeft_fl.server.links import LinkGrid, Links
from compeft_fl.server.mixed_ranks import MixedRanks
from compeft_fl.server.observer import RoundCounts, RoundObserver
from compeft_fl.server.outcomes import Outcomes
from compeft_fl.server.privacy import check_outermost, wrapped
from compeft_fl.server.rounds import Checkpointing, run_rounds
from compeft_fl.server.upload_budget import UploadBudget

__all__ = ["Compressed"]


class Compressed(Strategy):
    """Lets a Flower strategy (FedAdam, Krum, FedProx, ...) run over compressed links, unchanged.

    The inner strategy sees what it always sees: ordinary arrays, in its own messages and in the
    replies, where they are the received weights plus the Update. Replies that cannot be used reach
    it as error replies; so do those whose metrics have other keys than most, at which Flower's
    strategies stop.

    All else is the inner strategy's: its methods and attributes are found here, and set there. Its
    own ``start``, where it has one, runs as it is, over a grid that compresses underneath; it has
    no checkpoints. ``count_bytes()`` of the ArrayRecords in its messages and in the replies gives
    bytes on the wire: of an Update that came, and of what a node lacks on the mean.

    Flower's strategies hold all replies of a round at once, so memory grows with the number of
    clients, as without compression; the ComPEFT strategies don't.

    Parameters
    ----------
    inner : flwr.serverapp.strategy.Strategy
        Its messages must carry one ArrayRecord of adapter weights.
    observer : RoundObserver, optional
        Is told of each message. Default: a `RoundCounts`.
    downlink : DownlinkOptions, optional
        How the global adapter goes down. Default: compressed, in versions.
    tensors : mapping of str to {"trained", "carried", "left"}, or TensorPolicy, optional
        As `ComPEFTStrategy`. What the inner strategy makes of carried tensors is kept within what
        nodes sent; of those that are left, it is not kept.
    bounds : ReplyBounds, optional
        What a single reply can do, see `Links`.
    ranks, upload
        As `ComPEFTStrategy`. The inner strategy sees replies of whole adapters: what a node does
        not have moves as it does in the mean over those that have it.

    Raises
    ------
    ParameterError
        ``inner`` is no Strategy, or reads Updates itself.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAdam
    >>> strategy = Compressed(FedAdam(eta=0.01))
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        observer: RoundObserver | None = None,
        downlink: DownlinkOptions | None = None,
        tensors: TensorPolicy | Mapping[str, str] | None = None,
        bounds: ReplyBounds | None = None,
        ranks: MixedRanks | Sequence[int] | None = None,
        upload: UploadBudget | float | None = None,
    ) -> None:
        from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy

        found = wrapped(inner)
        if not isinstance(inner, Strategy) or isinstance(found, Compressed | ComPEFTStrategy):
            order = ""
            if found is not inner:  # inside a wrapper for differential privacy
                order = f"; this order works: Compressed({type(inner).__name__}(FedAvg(...), ...))"
            raise ParameterError(
                f"expected a strategy that reads ordinary arrays, found {type(found).__name__}"
                + order
            )
        self.observer: RoundObserver = RoundCounts() if observer is None else observer
        mixed = MixedRanks.of(ranks)
        if mixed is not None:
            mixed = mixed.merged_as(("cover",))
            if found is not inner:
                raise ParameterError(
                    "expected no wrapper for differential privacy around nodes of several ranks, "
                    f"found {type(inner).__name__}"
                )
        share = float(getattr(found, "fraction_train", 1.0))
        options = (downlink or DownlinkOptions()).among(share)
        self._broadcaster = Broadcaster(
            self.observer, options, TensorPolicy.of(tensors), mixed, UploadBudget.of(upload)
        )
        self._outcomes = Outcomes(self.observer, self._broadcaster)
        self._links = Links(inner, self._outcomes, bounds)
        self._arrays: ArrayRecord | None = None
        self.inner = inner  # last: from now on, what it has is set there

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What the inner strategy has must be set there to have an effect.
        inner = self.__dict__.get("inner")
        own = name in self.__dict__ or hasattr(type(self), name)
        if inner is None or own or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    def summary(self) -> None:
        """Log the strategy's settings."""
        check_outermost(self)
        LOGGER.info("\t├──> Compressed links around %s:", type(self.inner).__name__)
        LOGGER.info("\t├──> %s", self._links.bounds.describe())
        for setting in (self._broadcaster.ranks, self._broadcaster.upload):
            if setting is not None:
                LOGGER.info("\t├──> %s", setting.describe())
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        *args: Any,
        checkpointing: Checkpointing | None = None,
        **kwargs: Any,
    ) -> Result:
        """See `ComPEFTStrategy.start`; an inner strategy's own ``start`` gets what this gets.

        Raises
        ------
        ParameterError
            Checkpointing, where the inner strategy has a ``start`` of its own.
        """
        self._arrays = None
        self._links.bounds.restore({})
        if type(self.inner).start is not Strategy.start:
            if checkpointing is not None:
                raise ParameterError(
                    f"expected no checkpointing: {type(self.inner).__name__} has a start of its "
                    "own, whose rounds cannot be gone on from"
                )
            return self._inner_start(grid, initial_arrays, *args, **kwargs)
        return run_rounds(
            self, InnerState(self.inner, self._links.bounds), self._outcomes, grid, initial_arrays,
            *args, checkpointing=checkpointing, **kwargs,
        )  # fmt: skip

    def _inner_start(self, grid: Grid, initial: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """The inner strategy's own loop over rounds."""
        self._outcomes.begin()
        LOGGER.info("Compressed links under the start of %s", type(self.inner).__name__)
        around = LinkGrid(grid, self._links, initial)
        result = self.inner.start(around, initial, *args, **kwargs)
        forget_federation(self._broadcaster.federation)
        self._outcomes.check(result)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, their arrays replaced by Updates."""
        check_outermost(self)
        self._arrays = arrays
        sized = self._links.sized(arrays, grid)
        messages = self.inner.configure_train(server_round, sized, config, grid)
        return self._links.address("train", server_round, arrays, messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the expanded replies."""
        if self._arrays is None:
            raise ParameterError("expected configure_train before aggregate_train")
        base = self._broadcaster.base(self._arrays)
        usable = self._links.usable("train", server_round, replies)
        arrays, metrics = self.inner.aggregate_train(server_round, usable)
        if arrays is None:
            if self._links.bases:
                LOGGER.warning("round %d: the global adapter stays as it was", server_round)
            return base.arrays, metrics
        try:
            return self._links.conformed(arrays, base), metrics
        except CompeftError as error:
            LOGGER.warning(
                "round %d: what %s made cannot be used, the global adapter stays as it was: %s",
                server_round,
                type(self.inner).__name__,
                error,
            )
            return self._arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, their arrays replaced by Updates."""
        sized = self._links.sized(arrays, grid)
        messages = self.inner.configure_evaluate(server_round, sized, config, grid)
        return self._links.address("evaluate", server_round, arrays, messages)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """What the inner strategy makes of the replies."""
        usable = self._links.usable("evaluate", server_round, replies)
        return self.inner.aggregate_evaluate(server_round, usable)
