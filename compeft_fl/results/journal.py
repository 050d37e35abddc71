"""What happens in a run, written down as it happens and summed up by round.

``progress.jsonl`` in the run's folder has one JSON object per line, so that a display in another
process can follow it: events ``run``, ``sent``, ``reply``, ``score``, ``end`` and ``error``, each
with ``time``, the seconds since the run began. Each message by itself is in ``ledger.csv``, see
`compeft_fl.exchange.ledger`. A full disk costs lines, and not the run.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.disk.lines import Lines
from compeft_fl.exchange.ledger import Ledger, RoundTotals, Transfer
from compeft_fl.exchange.records import LOGGER

if TYPE_CHECKING:
    from flwr.app import MetricRecord

__all__ = ["PROGRESS_FILE", "Journal", "RoundRecord", "RunRecord", "event_of"]

PROGRESS_FILE: Final = "progress.jsonl"

Scalar = bool | int | float | str

_BYTES_PER_PARAMETER: Final = 4  # of the dense comparison: float32
_MOST: Final = 1e24  # no measurement is beyond; a mean with such a value says nothing


@dataclass
class RoundRecord:
    """One round in numbers; round 0 has a score only.

    Attributes
    ----------
    accuracy, loss : float or None
        Of the global adapter after the round, on the server's test split.
    train_loss : float or None
        Mean of the nodes' training losses.
    nodes, replies, set_aside : int
        Nodes asked to train, their replies merged, and their replies set aside.
    uplink_payload_bytes, downlink_payload_bytes : int
        Bytes of the Updates, summed over nodes, training and evaluation together.
    uplink_dense_bytes, downlink_dense_bytes : int
        What the same exchange takes with dense float32 adapters: one in every message to a node,
        and one in every reply that brings an update; of the node's rank, and of what is trained.
    seconds : float
        From the end of the round before to the end of this one.
    more : dict of str to float
        Further scores of the task, such as ``perplexity``.
    """

    accuracy: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    nodes: int = 0
    replies: int = 0
    set_aside: int = 0
    uplink_payload_bytes: int = 0
    downlink_payload_bytes: int = 0
    uplink_dense_bytes: int = 0
    downlink_dense_bytes: int = 0
    seconds: float = 0.0
    more: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass
class RunRecord:
    """A whole run in numbers: what ``summary.json`` and the reports are made of."""

    scenario: str
    nodes: int
    num_parameters: int
    rounds: list[RoundRecord]
    wall_seconds: float
    config: dict[str, Scalar]
    ledger: dict[str, Any] | None = None  # see `compeft_fl.exchange.ledger.Ledger.summary`

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds.

        ``accuracy`` and ``loss`` begin with round 0; the lists of bytes begin with round 1.
        """
        trained = self.rounds[1:]
        more = [record.more for record in self.rounds]
        fields = [
            f"{way}_{kind}_bytes" for kind in ("payload", "dense") for way in ("uplink", "downlink")
        ]
        return {
            "scenario": self.scenario,
            "rounds": len(trained),
            "nodes": self.nodes,
            "num_parameters": self.num_parameters,
            "accuracy": [record.accuracy for record in self.rounds],
            "loss": [record.loss for record in self.rounds],
            **({"more": more} if any(more) else {}),
            **{name: [getattr(record, name) for record in trained] for name in fields},
            "replies": [record.replies for record in trained],
            "set_aside": [record.set_aside for record in trained],
            "wall_seconds": round(self.wall_seconds, 3),
            "config": self.config,
            **({} if self.ledger is None else {"ledger": self.ledger}),
        }


def event_of(line: bytes) -> dict[str, Any] | None:
    """The event that a line of ``progress.jsonl`` tells; None where a damaged line tells none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    told = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if told else None


class Journal:
    """Writes a run's events down and sums them up; a `compeft_fl.strategies.RoundObserver`.

    Parameters
    ----------
    folder : Path
        The run's folder; it is made where it is missing.
    scenario : str
        Its name.
    rounds : int
        How many are to be run.
    settings : mapping of str to bool, int, float or str
        All keys of the run, for ``summary.json``.
    """

    def __init__(
        self, folder: Path, scenario: str, rounds: int, settings: Mapping[str, Scalar]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ledger = Ledger(folder)
        self._scenario, self._num_rounds, self._settings = scenario, rounds, dict(settings)
        self._lines = Lines(folder / PROGRESS_FILE, LOGGER)
        self._started = time.perf_counter()
        self._round_ended = self._started
        self._num_parameters = 0
        self._node_ids: set[int] = set()
        self._earlier_nodes = 0
        self._rounds: list[RoundRecord] = []
        self.reasons: list[str] = []

    def begin(self, num_parameters: int) -> None:
        """Say that a run of an adapter with so many parameters begins."""
        self._num_parameters = num_parameters
        self._write(
            "run",
            scenario=self._scenario,
            rounds=self._num_rounds,
            num_parameters=num_parameters,
        )

    def on_broadcast(
        self, server_round: int, kind: str, node_ids: Sequence[int], num_bytes: int
    ) -> None:
        """See `compeft_fl.strategies.RoundObserver.on_broadcast`."""
        record = self._round(server_round)
        record.downlink_payload_bytes += len(node_ids) * num_bytes
        if kind in ("train", "evaluate"):  # a dense exchange has no resyncs
            record.downlink_dense_bytes += len(node_ids) * self._dense_bytes
        self._node_ids.update(node_ids)
        if kind == "train":
            record.nodes += len(node_ids)
        self._write("sent", round=server_round, kind=kind, nodes=len(node_ids), bytes=num_bytes)

    def on_reply(
        self,
        server_round: int,
        kind: str,
        node_id: int,
        num_bytes: int,
        metrics: MetricRecord | None,
        reason: str | None,
    ) -> None:
        """See `compeft_fl.strategies.RoundObserver.on_reply`."""
        record = self._round(server_round)
        record.uplink_payload_bytes += num_bytes
        record.uplink_dense_bytes += self._dense_bytes if num_bytes else 0
        numbers = {
            name: value
            for name, value in (metrics or {}).items()
            if name in ("loss", "seconds", "accuracy")
            and isinstance(value, int | float)
            and abs(value) <= _MOST  # which NaN is not
        }
        if reason is not None:
            record.set_aside += kind == "train"
            self.reasons.append(reason)
            numbers["reason"] = reason  # type: ignore[assignment]
        elif kind == "train":
            record.replies += 1
            if "loss" in numbers:
                before = record.train_loss or 0.0
                record.train_loss = before + (float(numbers["loss"]) - before) / record.replies
        self._write(
            "reply", round=server_round, kind=kind, node=node_id, bytes=num_bytes, **numbers
        )

    def on_bounds(self, server_round: int, bounded: Mapping[int, str]) -> None:
        """See `compeft_fl.strategies.BoundsObserver.on_bounds`."""
        for node_id, how in bounded.items():
            self._write("bounded", round=server_round, node=node_id, how=how)

    def on_transfer(self, transfer: Transfer) -> None:
        """See `compeft_fl.strategies.TransferObserver.on_transfer`."""
        self.ledger.add(transfer)
        # A node of a lower rank has fewer parameters, dense or not.
        fewer = self._num_parameters - transfer.parameters
        if transfer.parameters and fewer > 0 and transfer.kind != "resync":
            record, less = self._round(transfer.round), _BYTES_PER_PARAMETER * fewer
            if transfer.direction == "up":
                record.uplink_dense_bytes -= less
            else:
                record.downlink_dense_bytes -= less

    def on_score(
        self,
        server_round: int,
        accuracy: float,
        loss: float,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Note the global adapter's accuracy (0 to 1) and loss after a round; the round ends.

        ``more`` has further scores by name.
        """
        record = self._round(server_round)
        record.accuracy, record.loss, record.more = accuracy, loss, dict(more or {})
        now = time.perf_counter()
        record.seconds, self._round_ended = now - self._round_ended, now
        sent = {
            f"{direction}_{what}": getattr(
                self.ledger.totals.get((server_round, direction), RoundTotals()), f"{what}_bytes"
            )
            for direction in ("up", "down")
            for what in ("raw", "payload", "message")
        }
        self._write(
            "score", round=server_round, accuracy=accuracy, loss=loss, **record.more, **sent
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `restore`."""
        return {
            "rounds": [dataclasses.asdict(record) for record in self._rounds],
            "nodes": self._nodes(),
            "seconds": time.perf_counter() - self._started,
        }

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave; what came after it is told anew."""
        self._rounds = [RoundRecord(**record) for record in state["rounds"]]
        self._earlier_nodes = int(state["nodes"])
        self._started = time.perf_counter() - float(state["seconds"])
        self._round_ended = time.perf_counter()
        self._write("resumed", round=len(self._rounds) - 1)

    def end(self) -> None:
        """Say that the run has come to its end and its files are written."""
        self._write("end")

    def error(self, reason: str) -> None:
        """Say that the run stops here, and why."""
        self._write("error", reason=reason)

    def record(self) -> RunRecord:
        """Return the run so far."""
        return RunRecord(
            self._scenario,
            self._nodes(),
            self._num_parameters,
            [dataclasses.replace(record) for record in self._rounds],
            time.perf_counter() - self._started,
            dict(self._settings),
            self.ledger.summary(),
        )

    def _nodes(self) -> int:
        """How many nodes took part; a resumed simulation gives the same ones other ids."""
        return max(self._earlier_nodes, len(self._node_ids))

    @property
    def _dense_bytes(self) -> int:
        return _BYTES_PER_PARAMETER * self._num_parameters

    def _round(self, server_round: int) -> RoundRecord:
        while len(self._rounds) <= server_round:
            self._rounds.append(RoundRecord())
        return self._rounds[server_round]

    def _write(self, event: str, **fields: Any) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        self._lines.add(json.dumps({"event": event, "time": seconds, **fields}))
