"""Any Flower strategy over compressed links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.exchange.records import LOGGER, array_records, metric_records
from compeft_fl.server.broadcast import Base, Broadcaster, conform
from compeft_fl.server.downlink_options import DownlinkOptions
from compeft_fl.server.inner_state import restore_state, state_of
from compeft_fl.server.intake import Reply, update_of, weight_of
from compeft_fl.server.metrics import Signature, check_metrics, signature
from compeft_fl.server.observer import RoundCounts, RoundObserver
from compeft_fl.server.outcomes import Outcomes
from compeft_fl.server.replies import MOD_FAILED_PRECONDITION, SizedArrays
from compeft_fl.server.rounds import Checkpointing, run_rounds

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
    ) -> None:
        from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy

        if not isinstance(inner, Strategy) or isinstance(inner, Compressed | ComPEFTStrategy):
            raise ParameterError(
                f"expected a strategy that reads ordinary arrays, found {type(inner).__name__}"
            )
        self.inner = inner
        self.observer: RoundObserver = RoundCounts() if observer is None else observer
        self._broadcaster = Broadcaster(self.observer, downlink)
        self._outcomes = Outcomes(self.observer, self._broadcaster)
        self._arrays: ArrayRecord | None = None
        self._sent: dict[int, Base] = {}
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
        if self._arrays is None:
            raise ParameterError("expected configure_train before aggregate_train")
        usable = self._usable("train", server_round, replies)
        arrays, metrics = self.inner.aggregate_train(server_round, usable)
        if arrays is None:
            if self._sent:
                LOGGER.warning("round %d: the global adapter stays as it was", server_round)
            return self._arrays, metrics
        try:
            return conform(arrays, self._arrays), metrics
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
        key, blob = update_of(content)
        if node_id not in self._sent:
            raise ParameterError("expected a reply from a node that was sent the adapter")
        base = self._sent[node_id]
        arrays = base.moved_by(base.read(blob).to_task_vector())
        return RecordDict({**content, key: SizedArrays(arrays, content[key].count_bytes())})

    def _signature(self, content: RecordDict) -> Signature:
        """What must be the same in all replies for Flower's strategies; metrics are checked."""
        weight_key = getattr(self.inner, "weighted_by_key", None)
        if weight_key is None:  # Flower's wrappers for differential privacy
            weight_key = getattr(getattr(self.inner, "strategy", None), "weighted_by_key", None)
        if isinstance(weight_key, str):
            weight_of(content, weight_key)
        for metrics in metric_records(content).values():
            check_metrics(metrics)
        arrays = tuple(array_records(content))
        return arrays, *(signature(key, m) for key, m in metric_records(content).items())
