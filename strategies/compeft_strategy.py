"""What the ComPEFT strategies share: Updates down, Updates up, each reply checked on its own."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict, Unpack

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.exchange.records import LOGGER, find_carried
from compeft_fl.merging.accumulators import Accumulator
from compeft_fl.merging.carried import CarriedAverage
from compeft_fl.parts.tensor_policy import TensorPolicy
from compeft_fl.server.base import Base
from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.broadcast import Broadcaster
from compeft_fl.server.downlink_options import DownlinkOptions
from compeft_fl.server.intake import Reply, describe, update_of, weight_of
from compeft_fl.server.links import RoundGrid
from compeft_fl.server.metrics import Metrics
from compeft_fl.server.mixed_ranks import MixedRanks, RankMerge
from compeft_fl.server.observer import RoundCounts, RoundObserver
from compeft_fl.server.outcomes import Outcomes
from compeft_fl.server.privacy import check_outermost
from compeft_fl.server.robustness import (
    Candidate,
    SignAgreementFilter,
    Similarity,
    screened,
    tell_similarities,
)
from compeft_fl.server.rounds import Checkpointing, run_rounds
from compeft_fl.server.server_step import ServerStep
from compeft_fl.server.upload_budget import UploadBudget
from compeft_fl.task_vector import Layout

__all__ = ["ComPEFTStrategy", "FedAvgOptions", "SharedOptions"]

# How far one node may move a statistic: in medians of how far nodes do. With one of ten at most at
# odds, what it adds to a mean dies out from round to round.
_MOST_MEDIANS = 4.0

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


class FedAvgOptions(TypedDict, total=False):
    """The keywords of `flwr.serverapp.strategy.FedAvg`, with its defaults."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsFunction | None
    evaluate_metrics_aggr_fn: MetricsFunction | None


class SharedOptions(FedAvgOptions, total=False):
    """FedAvg's keywords, and those that every ComPEFT strategy hands on to `ComPEFTStrategy`."""

    downlink: DownlinkOptions | None
    tensors: TensorPolicy | Mapping[str, str] | None
    server_learning_rate: float
    server_momentum: float
    ranks: MixedRanks | Sequence[int] | None
    upload: UploadBudget | float | None


class ComPEFTStrategy(FedAvg):
    """The base: a FedAvg whose messages carry Updates, merged as they arrive.

    Each node is sent what it lacks of the global adapter. Clients with
    `compeft_fl.mod.CompressionMod` answer with Updates, which go into an accumulator one by one:
    the server's memory does not grow with the number of clients. A reply that is broken, hostile,
    late or for another adapter is set aside with a line in the log, and the round goes on; with
    none left, the global adapter stays as it was.

    Parameters
    ----------
    observer : RoundObserver, optional
        Is told of each message. Default: a `RoundCounts`.
    downlink : DownlinkOptions, optional
        How the global adapter goes down. Default: compressed, in versions.
    tensors : mapping of str to {"trained", "carried", "left"}, or TensorPolicy, optional
        Patterns of names, for whole models: what is trained, and compressed; what is carried as it
        is, and averaged; what is left to the nodes (personal layers). Default: by data type and
        name, see `compeft_fl.parts.tensor_policy.TensorPolicy`; the nodes are told.
    robustness : SignAgreementFilter, optional
        Sets replies aside that point away from most. Default: none is, but by the bounds.
    bounds : ReplyBounds, optional
        What a single reply can do, relative to the median reply. Default: ``ReplyBounds()``.
    server_learning_rate, server_momentum : float
        How far the global adapter goes along a round's merge, see
        `compeft_fl.server.server_step.ServerStep`. Default: all the way, without momentum.
    ranks : MixedRanks or sequence of int, optional
        The ranks that nodes may have. Default: all have the whole adapter.
    upload : UploadBudget or float, optional
        Gives each node a density such that its upload ends within so many seconds. Default: the
        nodes' own.
    **options
        FedAvg's keywords: sampling, record keys, aggregation of metrics (by default Flower's
        weighted mean; functions of your own get the MetricRecords only).

    Raises
    ------
    LayoutError, NonFiniteError
        From `start` and `configure_train`, for arrays that are no adapter's.
    """

    _rank_merges: ClassVar[tuple[str, ...]] = ("cover",)  # how updates of several ranks can merge
    _weighs_cover: ClassVar[bool] = True  # entries by the weight of those that have them

    def __init__(
        self,
        *,
        observer: RoundObserver | None = None,
        downlink: DownlinkOptions | None = None,
        robustness: SignAgreementFilter | None = None,
        tensors: TensorPolicy | Mapping[str, str] | None = None,
        bounds: ReplyBounds | None = None,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.0,
        ranks: MixedRanks | Sequence[int] | None = None,
        upload: UploadBudget | float | None = None,
        **options: Unpack[FedAvgOptions],
    ) -> None:
        super().__init__(**options)
        self._step = ServerStep(server_learning_rate, server_momentum)
        mixed = MixedRanks.of(ranks)
        self.ranks = None if mixed is None else mixed.merged_as(self._rank_merges)
        self.upload = UploadBudget.of(upload)
        self.robustness = robustness
        self.bounds = ReplyBounds() if bounds is None else bounds
        self.observer: RoundObserver = RoundCounts() if observer is None else observer
        self._own_metrics = {
            "train": options.get("train_metrics_aggr_fn") is not None,
            "evaluate": options.get("evaluate_metrics_aggr_fn") is not None,
        }
        downlink = (downlink or DownlinkOptions()).among(self.fraction_train)
        self._broadcaster = Broadcaster(
            self.observer, downlink, TensorPolicy.of(tensors), self.ranks, self.upload
        )
        self._outcomes = Outcomes(self.observer, self._broadcaster)
        self._base: Base | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "start" in cls.__dict__:
            cls.start = _over_rounds(cls.start)  # type: ignore[method-assign]

    @abstractmethod
    def accumulator(self, layout: Layout) -> Accumulator:
        """An empty accumulator for one round."""

    def merging_weight(self, num_examples: float) -> float:
        """The weight of a reply in the merge, from the one in its metrics."""
        return num_examples

    @abstractmethod
    def describe(self) -> str:
        """The merge rule and its settings, for the log."""

    def summary(self) -> None:
        """Log the strategy's settings."""
        check_outermost(self)
        LOGGER.info("\t├──> %s", self.describe())
        LOGGER.info("\t├──> %s", self._step.describe())
        if self.robustness is not None:
            LOGGER.info("\t├──> %s", self.robustness.describe())
        LOGGER.info("\t├──> %s", self.bounds.describe())
        for setting in (self.ranks, self.upload):
            if setting is not None:
                LOGGER.info("\t├──> %s", setting.describe())
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        *args: Any,
        checkpointing: Checkpointing | None = None,
        **kwargs: Any,
    ) -> Result:
        """Run the federation, as `flwr.serverapp.strategy.Strategy.start`; replies stream in.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
        initial_arrays : flwr.app.ArrayRecord
            One Array per tensor of the adapter.
        *args, **kwargs
            As Flower's: num_rounds, timeout, train_config, evaluate_config, evaluate_fn.
        checkpointing : Checkpointing, optional
            Keep what a killed server needs to go on, and go on from it.

        Returns
        -------
        flwr.serverapp.strategy.Result
            Its arrays have one Array per tensor, of the initial order and data types.
        """
        self.restore({})
        return run_rounds(
            self, self, self._outcomes, grid, initial_arrays, *args,
            checkpointing=checkpointing, keep_replies=self._is_extended(), **kwargs,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the strategy itself: what its bounds and step go on from."""
        return {"bounds": self.bounds.state(), "step": self._step.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.bounds.restore(state.get("bounds", {}))
        self._step.restore(state.get("step", {}))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of the next round of training, each with what its node lacks."""
        check_outermost(self)
        self._base = self._broadcaster.base(arrays)
        if self.ranks is not None and self.ranks.merge == "product":  # errors before a round
            RankMerge.of(self.ranks, self._base, weighs_cover=self._weighs_cover)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._broadcaster.address(messages, server_round, "train", self._base)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The global adapter plus the merged replies; unchanged where none can be used."""
        if self._base is None:
            raise ParameterError("expected configure_train before aggregate_train")
        base = self._base
        accumulator = self.accumulator(base.layout)
        mixed = RankMerge.of(self.ranks, base, weighs_cover=self._weighs_cover)
        average = CarriedAverage(base.apart.carried, most=_MOST_MEDIANS)
        metrics = self._metrics("train")

        def read(reply: Reply) -> Candidate:
            content = reply.message.content
            _, _, weight = weight_of(content, self.weighted_by_key)
            _, parts = update_of(content)
            carried = find_carried(content)
            if carried is not None:
                base.read_carried(carried)
            update, cut = base.read(parts, reply.answer.rank if reply.answer else 0)
            weight = self.merging_weight(weight)
            return Candidate(weight, parts, update, carried or b"", cut=cut)

        def tell(rule: SignAgreementFilter, similarities: list[Similarity]) -> None:
            tell_similarities(rule, server_round, similarities, self.observer)

        candidates = self._outcomes.read("train", server_round, replies, read)
        kept = screened(self.robustness, base.layout, candidates, tell)
        for reply, found in self.bounds.within(server_round, kept, self.observer):
            try:
                if found.reason is not None:
                    raise CompeftError(found.reason)
                accumulator.add(found.update, found.weight)
                mixed.add(found)
                carried = base.read_carried(found.carried) if found.carried else {}
                average.add(carried, found.weight, who=reply.node_id)
            except CompeftError as error:
                self._outcomes.set_aside(reply, describe(error))
            else:
                self._add_metrics(metrics, reply, found.weight)
                self._outcomes.take(reply)
            del reply, found  # before the next one is pulled
        self._outcomes.log()
        merged = self._merge(server_round, base, accumulator, average, mixed)
        return merged, metrics.result()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of the next evaluation, each with what its node lacks."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if messages:
            # The version that the next round of training starts from: nothing is sent twice.
            base = self._broadcaster.base(arrays)
            self._broadcaster.address(messages, server_round, "evaluate", base)
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The clients' metrics, aggregated."""
        metrics = self._metrics("evaluate")

        def read(reply: Reply) -> float:
            return weight_of(reply.message.content, self.weighted_by_key)[2]

        for reply, _ in self._outcomes.read("evaluate", server_round, replies, read):
            self._add_metrics(metrics, reply)
            self._outcomes.take(reply)
            del reply  # before the next one is pulled
        if self.fraction_evaluate > 0:
            self._outcomes.log()
        return metrics.result()

    def _is_extended(self) -> bool:
        """Whether a user's own code stands before the aggregation, or after it."""
        names = ("aggregate_train", "aggregate_evaluate")
        own = (getattr(getattr(self, name), "__func__", None) for name in names)
        return list(own) != [getattr(ComPEFTStrategy, name) for name in names]

    def _merge(
        self, server_round: int, base: Base, accumulator: Accumulator, average: CarriedAverage,
        mixed: RankMerge,
    ) -> ArrayRecord:  # fmt: skip
        if not accumulator.count:
            if self.fraction_train > 0:
                LOGGER.warning(
                    "round %d: no reply could be used; the global adapter stays as it was",
                    server_round,
                )
            return base.arrays
        try:
            step = self._step.next(mixed.result(accumulator.result()))
            arrays = base.moved_by(step, average.result())
            self._step.accept()
            _say_of_carried(server_round, average)
            return arrays
        except CompeftError as error:
            LOGGER.warning(
                "round %d: the merge cannot be used; the global adapter stays as it was: %s",
                server_round,
                error,
            )
            return base.arrays

    def _metrics(self, kind: str) -> Metrics:
        function = self.train_metrics_aggr_fn if kind == "train" else self.evaluate_metrics_aggr_fn
        return Metrics(function, self.weighted_by_key, foldable=not self._own_metrics[kind])

    def _add_metrics(self, metrics: Metrics, reply: Reply, counted: float | None = None) -> None:
        """A client whose metrics are no use still has a say in the merge.

        They have the weight that its update has; ``counted`` is the latter's in the merge.
        """
        key, record, weight = weight_of(reply.message.content, self.weighted_by_key)
        if counted is not None and counted < self.merging_weight(weight):
            share = counted / self.merging_weight(weight)
            record = MetricRecord({**record, self.weighted_by_key: weight * share})
        try:
            metrics.add(key, record)
        except CompeftError as error:
            LOGGER.warning("the metrics of node %d are left out: %s", reply.node_id, error)


def _say_of_carried(server_round: int, average: CarriedAverage) -> None:
    """Name who has gone too far, and the tensors that should be the same on all nodes."""
    by_node: dict[int, list[str]] = {}
    for node_id, name in average.shortened:
        by_node.setdefault(node_id, []).append(name)
    for node_id, names in by_node.items():
        LOGGER.warning(
            "round %d: node %d moves %d carried tensors by over %g times the median, %r first; "
            "their changes are shortened",
            server_round,
            node_id,
            len(names),
            _MOST_MEDIANS,
            names[0],
        )
    for name in average.disputed:
        LOGGER.warning(
            "round %d: nodes do not agree on the integers or Booleans of %r; the majority's hold",
            server_round,
            name,
        )


def _over_rounds(start: Callable[..., Result]) -> Callable[..., Result]:
    """A user's own loop over rounds, on a grid that tells what came of each reply."""

    @functools.wraps(start)
    def around(self: ComPEFTStrategy, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        if isinstance(grid, RoundGrid):
            return start(self, grid, *args, **kwargs)
        self._outcomes.begin()
        self.restore({})
        result = start(self, RoundGrid(grid, self._outcomes), *args, **kwargs)
        self._outcomes.close()
        self._outcomes.check(result)
        return result

    return around
