"""A Flower app that trains nothing, so that a round takes what its messages take.

Each node adds a synthetic task vector to the adapter; mod, strategy, SuperNodes and SuperLink are
the real ones. The ServerApp goes through a plan of codecs and links, and asks whoever started it to
change the link: it writes ``ask-N``, with the link in it, and waits for ``go-N``. What each round
took goes to ``rounds.jsonl``, line by line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from compeft_fl import TaskVector, compress, decode, encode
from compeft_fl.client.mod import CompressionMod
from compeft_fl.exchange.ledger import Transfer
from compeft_fl.exchange.records import to_arrays, to_state
from compeft_fl.strategies import ComPEFTAverage, DownlinkOptions, RoundCounts
from compeft_fl.task_vector import Layout, TensorSpec

__all__ = [
    "DENSITY_DOWN",
    "DENSITY_UP",
    "client_app",
    "server_app",
    "synthetic_layout",
    "synthetic_task_vector",
]

DENSITY_UP: Final = 0.1
DENSITY_DOWN: Final = 0.2

_ROWS: Final = 64
_TENSORS: Final = 8
_TIMEOUT: Final = 900.0
_WAIT_SECONDS: Final = 120.0

client_app = ClientApp()
server_app = ServerApp()


def synthetic_layout(num_parameters: int) -> Layout:
    """Eight matrices of 64 rows, with about so many parameters in all."""
    columns = max(1, num_parameters // (_ROWS * _TENSORS))
    return Layout([TensorSpec(f"lora.{i}", (_ROWS, columns), "f32") for i in range(_TENSORS)])


def synthetic_task_vector(layout: Layout, *seed: int) -> TaskVector:
    """Normal values whose size differs between tensors, as in real adapters, by a factor of 8."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(layout.num_parameters, dtype=np.float32)
    for index, (_, where) in enumerate(layout.slices()):
        values[where] *= np.float32(1e-3 * 2 ** (3 * index / _TENSORS))
    return TaskVector(layout, values)


def _state(tau: TaskVector) -> dict[str, NDArray[np.float32]]:
    values: Any = tau.values
    return {spec.name: values[where].reshape(spec.shape) for spec, where in tau.layout.slices()}


# --- the client ----------------------------------------------------------------------------------


def _compression(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """The mod, with the codec that the message asks for."""
    told: Any = message.content.config_records["config"]
    layout = synthetic_layout(int(told["parameters"]))
    start = TaskVector(layout, np.zeros(layout.num_parameters, np.float32))
    mod = CompressionMod(
        density=DENSITY_UP, codec=str(told["codec"]), initial_adapter=lambda _: _state(start)
    )
    return mod(message, context, call_next)


@client_app.train(mods=[_compression])
def train(message: Message, context: Context) -> Message:
    """Add a task vector; say when this process was born and when this began and ended."""
    began = time.time()
    arrays: ArrayRecord = message.content.array_records["arrays"]
    told: Any = message.content.config_records["config"]
    state = to_state(arrays)
    seed = int(context.node_config["partition-id"]), int(told["server-round"])
    change = _state(synthetic_task_vector(Layout.of(state), *seed))
    trained = to_arrays({name: value + change[name] for name, value in state.items()})
    metrics = MetricRecord({"num-examples": 1, "began": began, "ended": time.time()})
    born = _born()
    if born is not None:
        metrics["born"] = born
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


def _born() -> float | None:
    """When this process was started, in seconds since 1970, to 0.01 s; None where /proc lacks."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


# --- the server ----------------------------------------------------------------------------------


class _Watch(RoundCounts):
    """Notes what each round of one codec took, and has the link changed between rounds."""

    def __init__(self, folder: Path, codec: str, links: list[dict[str, Any]]) -> None:
        super().__init__()
        self._folder, self._codec, self._links = folder, codec, links
        self._began = 0.0
        self._transfers: list[Transfer] = []
        self._metrics: dict[int, dict[str, float]] = {}

    def on_transfer(self, transfer: Transfer) -> None:
        """See `compeft_fl.strategies.TransferObserver`."""
        self._transfers.append(transfer)

    def on_reply(
        self, server_round: int, kind: str, node_id: int, num_bytes: int,
        metrics: MetricRecord | None, reason: str | None,
    ) -> None:  # fmt: skip
        """See `compeft_fl.strategies.RoundObserver`."""
        super().on_reply(server_round, kind, node_id, num_bytes, metrics, reason)
        if reason is not None:
            raise RuntimeError(f"a reply cannot be used: {reason}")
        self._metrics[node_id] = {k: v for k, v in (metrics or {}).items() if isinstance(v, float)}

    def after(self, server_round: int, arrays: ArrayRecord) -> None:
        """Write the round down, and get the next one's link ready."""
        ended = time.time()
        if server_round:
            row = {
                "codec": self._codec,
                "round": server_round,
                **self._links[server_round - 1],
                "began": self._began,
                "ended": ended,
                "transfers": [asdict(each) for each in self._transfers],
                "clients": self._metrics,
            }
            with (self._folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._transfers, self._metrics = [], {}
        if server_round < len(self._links):
            before = self._links[server_round - 1] if server_round else None
            if before != self._links[server_round]:
                _ask(self._folder, self._links[server_round])
        self._began = time.time()


def _ask(folder: Path, link: dict[str, Any]) -> None:
    """Have the link changed."""
    number = len(list(folder.glob("go-*")))
    fresh = folder / f".ask-{number}"
    fresh.write_text(json.dumps(link), encoding="utf-8")
    fresh.rename(folder / f"ask-{number}")
    until = time.monotonic() + _WAIT_SECONDS
    while not (folder / f"go-{number}").exists():
        if time.monotonic() > until:
            raise TimeoutError("nobody changes the link")
        time.sleep(0.02)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan."""
    plan = json.loads(Path(str(context.run_config["plan"])).read_text(encoding="utf-8"))
    folder, num_nodes = Path(plan["folder"]), int(plan["nodes"])
    layout = synthetic_layout(plan["parameters"])
    start = TaskVector(layout, np.zeros(layout.num_parameters, np.float32))
    for codec, links in plan["codecs"].items():
        warm_up(codec)
        watch = _Watch(folder, codec, links)
        strategy = ComPEFTAverage(
            observer=watch,
            downlink=DownlinkOptions(codec=codec, density=DENSITY_DOWN, first_contact="seed"),
            fraction_evaluate=0.0,
            min_train_nodes=num_nodes,
            min_available_nodes=num_nodes,
        )
        strategy.start(
            grid=grid,
            initial_arrays=to_arrays(_state(start)),
            num_rounds=len(links),
            timeout=_TIMEOUT,
            train_config=ConfigRecord({"codec": codec, "parameters": plan["parameters"]}),
            evaluate_fn=watch.after,
        )


def warm_up(codec: str) -> None:
    """Compress, encode and decode something: what is compiled for that is loaded at first use."""
    tau = synthetic_task_vector(synthetic_layout(1 << 12), 0)
    update = tau if codec.startswith("dense") else compress(tau, DENSITY_UP, "mean")
    decode(encode(update, codec)).to_task_vector()
