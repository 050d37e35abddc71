"""Any Flower strategy over compressed links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    LOGGER,
    array_records,
    find_carried,
    metric_records,
)
from compeft_fl.merging.carried import CarriedAverage
from compeft_fl.server.base import Base, conform
from compeft_fl.server.broadcast import Broadcaster
from compeft_fl.server.downlink_options import DownlinkOptions
from compeft_fl.server.inner_state import restore_state, state_of
from compeft_fl.server.intake import Reply, num_array_bytes, update_of, weight_of
from compeft_fl.server.metrics import Signature, check_metrics, signature
from compeft_fl.server.observer import RoundCounts, RoundObserver
from compeft_fl.server.outcomes import Outcomes
from compeft_fl.server.replies import MOD_FAILED_PRECONDITION, SizedArrays
from compeft_fl.server.rounds import Checkpointing, run_rounds
from compeft_fl.tensor_policy import TensorPolicy

__all__ = ["Compressed"]


class Compressed(Strategy):
    """Lets a Flower strategy (FedAdam, Krum, FedProx, ...) run over compressed links, unchanged.

    The inner strategy sees what it always sees: ordinary arrays, in its own messages and in the
    replies, where they are the received weights plus the Update. Replies that cannot be used reach
    it as error replies; so do those whose metrics have other keys than most, at which Flower's
    strategies stop.

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
    ) -> None:
        from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy

        if not isinstance(inner, Strategy) or isinstance(inner, Compressed | ComPEFTStrategy):
            raise ParameterError(
                f"expected a strategy that reads ordinary arrays, found {type(inner).__name__}"
            )
        self.inner = inner
        self.observer: RoundObserver = RoundCounts() if observer is None else observer
        self._broadcaster = Broadcaster(self.observer, downlink, TensorPolicy.of(tensors))
        self._outcomes = Outcomes(self.observer, self._broadcaster)
        self._arrays: ArrayRecord | None = None
        self._sent: dict[int, Base] = {}
        self._carried: dict[int, dict[str, NDArray[Any]]] = {}
        self._touched: NDArray[np.bool_] | None = None
        self._messages: dict[int, Message] = {}

    def summary(self) -> None:
        """Log the strategy's settings."""
        LOGGER.info("\t├──> Compressed links around %s:", type(self.inner).__name__)
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        *args: Any,
        checkpointing: Checkpointing | None = None,
        **kwargs: Any,
    ) -> Result:
        """See `ComPEFTStrategy.start`."""
        return run_rounds(
            self, self, self._outcomes, grid, initial_arrays, *args,
            checkpointing=checkpointing, **kwargs,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the inner strategy: its arrays (momentum, say) and numbers."""
        return state_of(self.inner)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        restore_state(self.inner, state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, their arrays replaced by Updates."""
        self._arrays = arrays
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._messages = {message.metadata.dst_node_id: message for message in messages}
        base = self._broadcaster.base(arrays)
        self._sent = self._broadcaster.address(messages, server_round, "train", base)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the expanded replies."""
        base = self._base_of_round()
        self._carried.clear()
        self._touched = None
        usable = self._usable("train", server_round, replies)
        arrays, metrics = self.inner.aggregate_train(server_round, usable)
        if arrays is None:
            if self._sent:
                LOGGER.warning("round %d: the global adapter stays as it was", server_round)
            return base.arrays, metrics
        try:
            return self._conformed(arrays), metrics
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
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        self._messages = {message.metadata.dst_node_id: message for message in messages}
        base = self._broadcaster.base(arrays)
        self._broadcaster.address(messages, server_round, "evaluate", base)
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """What the inner strategy makes of the replies."""
        return self.inner.aggregate_evaluate(
            server_round, self._usable("evaluate", server_round, replies)
        )

    def _conformed(self, arrays: ArrayRecord) -> ArrayRecord:
        """What the inner strategy made, as the adapter was; carried tensors within what was sent.

        An optimizer's step on a variance or a counter, or a mean of indices, makes no sense.
        """
        base = self._base_of_round()
        average = CarriedAverage(base.apart.carried)
        for carried in self._carried.values():
            average.add(carried)
        return conform(
            arrays, base, average, exact=not _adds_noise(self.inner), touched=self._touched
        )

    def _base_of_round(self) -> Base:
        if self._arrays is None:
            raise ParameterError("expected configure_train before aggregate_train")
        return self._broadcaster.base(self._arrays)

    def _usable(self, kind: str, server_round: int, replies: Iterable[Message]) -> list[Message]:
        """Replies as the inner strategy knows them: with ordinary arrays, or with an error."""
        outcomes = self._outcomes

        def read(reply: Reply) -> tuple[RecordDict, Signature]:
            content = reply.message.content
            kinds = self._signature(content)
            if kind == "train":
                content = self._expand(reply.node_id, content)
            return content, kinds

        kept = []
        for reply, (content, kinds) in outcomes.read(kind, server_round, replies, read):
            reply.message.content = content
            kept.append((reply, kinds))
        usable = []
        usual = [kinds for kinds, _ in Counter(kinds for _, kinds in kept).most_common(1)]
        for reply, kinds in kept:
            if kinds in usual:
                outcomes.take(reply)
                usable.append(reply.message)
            else:
                self._carried.pop(reply.node_id, None)
                reason = "its records or metrics have other keys than those of most replies"
                outcomes.set_aside(reply, reason)
        outcomes.log()
        # A strategy for differential privacy, say, must know that a node has failed.
        failed = dict(outcomes.failed)
        for message in usable:
            failed.pop(message.metadata.src_node_id, None)
        usable.extend(
            Message(Error(MOD_FAILED_PRECONDITION, reason), reply_to=self._messages[node_id])
            for node_id, reason in failed.items()
            if node_id in self._messages
        )
        return usable

    def _expand(self, node_id: int, content: RecordDict) -> RecordDict:
        """A reply's content with ordinary arrays: those that were sent, plus the Update."""
        key, parts = update_of(content)
        if node_id not in self._sent:
            raise ParameterError("expected a reply from a node that was sent the adapter")
        base = self._sent[node_id]
        blob = find_carried(content)
        carried = {} if blob is None else base.read_carried(blob)
        change = base.read(parts).to_task_vector()
        moves: Any = np.asarray(change.values != 0)
        self._touched = moves if self._touched is None else self._touched | moves
        self._carried[node_id] = carried  # so that what is made of them stays within what was sent
        others = {k: v for k, v in content.items() if k != CARRIED_KEY}
        arrays = SizedArrays(base.moved_by(change, carried), num_array_bytes(content))
        return RecordDict({**others, key: arrays})

    def _signature(self, content: RecordDict) -> Signature:
        """What must be the same in all replies for Flower's strategies; metrics are checked."""
        weight_key = getattr(self.inner, "weighted_by_key", None)
        if weight_key is None:  # Flower's wrappers for differential privacy
            weight_key = getattr(getattr(self.inner, "strategy", None), "weighted_by_key", None)
        if isinstance(weight_key, str):
            weight_of(content, weight_key)
        for metrics in metric_records(content).values():
            check_metrics(metrics)
        arrays = tuple(key for key in array_records(content) if key != CARRIED_KEY)
        return arrays, *(signature(key, m) for key, m in metric_records(content).items())


def _adds_noise(strategy: Strategy) -> bool:
    """Is this one of Flower's for differential privacy? What nodes sent must not show behind it."""
    return any(c.__name__.startswith("DifferentialPrivacy") for c in type(strategy).__mro__)
