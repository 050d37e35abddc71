"""Memory and seconds of large adapters through real messages: 2 of 20 nodes, 3 rounds.

LoRA on all linear layers of a 7-billion Llama: 40 million parameters at rank 16, 160 million at
rank 64. Each node is a process of its own, with the ready-made app's ClientApp, the mod and a task
that trains nothing (it moves the adapter at random); the server is the one that runs this, with
ComPEFTAverage. Messages go as bytes through a pipe. Memory is the peak of a process's resident set
over its model and the adapter in it (a node), or what it had
before the rounds (the server), in copies of the
adapter (4 bytes a parameter). ``--out DIR`` writes bench_messages.md there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import pickle
import platform
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table

from compeft_fl.exchange.records import to_arrays
from compeft_fl.strategies import ComPEFTAverage, RoundCounts

NODES, PER_ROUND, ROUNDS = 20, 2, 3
LAYERS, HIDDEN, INNER = 32, 4096, 11008
RANKS = {"40m": 16, "160m": 64, "10m": 16}
SEED = 7
START = "start.npy"  # drawn once, for the server and all nodes
RETURNING = 24  # with it Flower draws two nodes twice


def layout(size: str) -> dict[str, tuple[int, int]]:
    """Names and shapes of LoRA's factors on all linear layers of Llama 2 7B."""
    layers = LAYERS // 4 if size == "10m" else LAYERS
    ins_and_outs = {
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj": (HIDDEN, INNER) for name in ("gate", "up")},
        "mlp.down_proj": (INNER, HIDDEN),
    }
    rank, shapes = RANKS[size], {}
    for layer in range(layers):
        for name, (into, out) in ins_and_outs.items():
            where = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{where}.lora_A.weight"] = (rank, into)
            shapes[f"{where}.lora_B.weight"] = (out, rank)
    return dict(sorted(shapes.items()))


# --- memory -----------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _status("VmRSS")


def restart_peak() -> None:
    """Let the peak begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most that was resident since `restart_peak`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"expected {key} in /proc/self/status: this runs on Linux")


# --- a node -----------------------------------------------------------------------------------


def synthetic_task(config: Any, shapes: Mapping[str, tuple[int, int]], start: Path) -> Any:
    """A task whose model is the adapter alone, as it lies in a file; training adds noise to it."""
    import torch

    from compeft_fl.app.tasks.base import Score, Task, TrainResult
    from compeft_fl.app.tasks.peft_network import tensors_of

    class Synthetic(Task):
        base_digest = b"no base at all.."

        def __init__(self) -> None:
            super().__init__(config)
            values, self.tensors = np.load(start), {}
            for name, shape in shapes.items():
                size = shape[0] * shape[1]
                self.tensors[name] = torch.from_numpy(values[:size].reshape(shape))
                values = values[size:]

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def adapter_state(self, *, copy: bool = True) -> dict[str, Any]:
            state = {name: tensor.numpy() for name, tensor in self.tensors.items()}
            return {name: value.copy() for name, value in state.items()} if copy else state

        def load_adapter_state(self, state: Mapping[str, Any]) -> None:
            given = tensors_of(state)
            for name, tensor in self.tensors.items():
                tensor.copy_(given[name])

        def node_rows(self, node_config: Mapping[str, Any]) -> list[int]:
            return [0]

        test_rows = ()

        def train(self, rows: Any, server_round: int, seed: int) -> TrainResult:
            generator = torch.Generator().manual_seed(seed)
            for tensor in self.tensors.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
            return TrainResult(1.0, 1, 10, 0.0)

        def evaluate(self, rows: Any) -> Score:
            return Score(0.0, 1.0, 1)

        def save(self, folder: Path, record: Any) -> None:
            raise NotImplementedError("nothing of this is kept")

    return Synthetic()


def identify() -> None:
    """Be somebody: Flower's messages ask who makes them."""
    with contextlib.suppress(ImportError):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def warm_up() -> None:
    """Load what the first message would load, which is the same for any size."""
    import compeft_fl as cf

    rng = np.random.default_rng(0)
    tau = cf.TaskVector.from_dict({"w": rng.standard_normal(1 << 17).astype(np.float32)})
    for support in ("best", "fixed"):
        blob = cf.encode(cf.compress(tau, 0.1, "mean", support=support))
        cf.merge([blob], cf.Average())
        cf.decode(blob).to_task_vector().apply(tau.to_dict())


def node_process(pipe: Connection, partition: int, nodes: int, size: str, folder: Path) -> None:
    """Answer messages; with each reply goes what it took."""
    os.environ["COMPEFT_FL_STATE_DIR"] = str(folder / str(partition))
    identify()
    from compeft_fl.app import client_app
    from compeft_fl.app.config import AppConfig

    config = AppConfig(preset="compeft")
    warm_up()
    task = synthetic_task(config, layout(size), folder / START)
    model = resident()  # what a node has without a federation
    client_app.keep(config, task)
    context = Context(
        run_id=1,
        node_id=1001 + partition,
        node_config={"partition-id": partition, "num-partitions": nodes},
        state=RecordDict(),
        run_config=config.to_run_config(),
    )
    warm_up()
    while (data := pipe.recv_bytes()) != b"end":
        message = pickle.loads(data)
        started = time.perf_counter()
        restart_peak()
        reply = client_app.app(message, context)
        used, seconds = peak() - model, time.perf_counter() - started
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
        pipe.send_bytes(pickle.dumps((reply, used, seconds), protocol=5))
        del message, reply


class ProcessGrid(Grid):
    """Nodes that are processes, started when they are first asked."""

    def __init__(self, size: str, nodes: int, folder: Path) -> None:
        self._size, self._nodes, self._folder = size, nodes, folder
        self._pipes: dict[int, tuple[Connection, Any]] = {}
        self._waiting: dict[str, tuple[int, Message]] = {}
        self.rows: list[dict[str, Any]] = []
        self.round = 0

    def set_run(self, run: object) -> None:
        """Nothing to set."""

    run = None

    def create_message(
        self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: Any = None
    ) -> Message:
        """As Flower's grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return [1001 + index for index in range(self._nodes)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            ids.append(message.metadata.message_id)
            self._waiting[ids[-1]] = message.metadata.dst_node_id, pickle.dumps(message, protocol=5)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """One reply after the other: the machine is not shared."""
        for message_id in list(message_ids):
            node, data = self._waiting.pop(message_id)
            pipe = self._pipe(node)
            pipe.send_bytes(data)
            reply, used, seconds = pickle.loads(pipe.recv_bytes())
            reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            down, up = len(data), len(pickle.dumps(reply, protocol=5))
            self.rows.append(
                {"round": self.round, "node": node, "down": down, "up": up,
                 "copies": used, "seconds": seconds}
            )  # fmt: skip
            copies = used / 4 / sum(a * b for a, b in layout(self._size).values())
            print(
                f"{self._size} round {self.round} {copies:.2f} copies, {seconds:.1f} s", flush=True
            )
            yield reply

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        """All replies."""
        return list(self.pull_messages(self.push_messages(messages)))

    def close(self) -> None:
        """End the nodes."""
        for pipe, process in self._pipes.values():
            pipe.send_bytes(b"end")
            process.join()

    def _pipe(self, node: int) -> Connection:
        if node not in self._pipes:
            ours, theirs = multiprocessing.Pipe()
            made = multiprocessing.get_context("spawn").Process(
                target=node_process,
                args=(theirs, node - 1001, self._nodes, self._size, self._folder),
            )
            made.start()
            self._pipes[node] = ours, made
        return self._pipes[node][0]


def measure(
    size: str, nodes: int = NODES, per_round: int = PER_ROUND
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run three rounds; a row for each message, and what the server took."""
    identify()
    warm_up()
    shapes = layout(size)
    rng = np.random.default_rng(SEED)
    initial: dict[str, Any] = {}
    for name, shape in shapes.items():
        start = rng.normal(0, 0.02, shape) if "lora_A" in name else np.zeros(shape)
        bits = np.ascontiguousarray(start, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)  # to bfloat16
        initial[name] = rounded.view(np.float32)
    parameters = sum(value.size for value in initial.values())
    random.seed(RETURNING)
    strategy = ComPEFTAverage(
        fraction_train=per_round / nodes,
        fraction_evaluate=0.0,
        min_available_nodes=nodes,
        observer=RoundCounts(),
    )
    with tempfile.TemporaryDirectory() as folder:
        grid = ProcessGrid(size, nodes, Path(folder))
        with (Path(folder) / START).open("wb") as file:
            np.save(file, np.concatenate([value.ravel() for value in initial.values()]))
        arrays = to_arrays(initial)
        del initial
        before, started = resident(), time.perf_counter()
        restart_peak()

        def after(server_round: int, _: ArrayRecord) -> MetricRecord:
            grid.round = server_round + 1
            return MetricRecord({"peak": peak() - before})

        strategy.start(
            grid=grid,
            initial_arrays=arrays,
            num_rounds=ROUNDS,
            timeout=3600,
            evaluate_fn=after,
            train_config=ConfigRecord({"base": b"no base at all.."}),
        )
        server = {"copies": (peak() - before) / 4 / parameters, "parameters": parameters}
        server["seconds"] = time.perf_counter() - started - sum(r["seconds"] for r in grid.rows)
        grid.close()
    for row in grid.rows:
        row["copies"] = row["copies"] / 4 / parameters
    return grid.rows, server


def main() -> int:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="40m,160m", help="of 10m, 40m, 160m, by comma")
    parser.add_argument(
        "--more", type=int, default=10, metavar="N",
        help="the server with N nodes a round as well, of the first size; 0: not",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, default=NODES, metavar="N", help="of which 2 a round")
    parser.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args()
    heads = ["size", "round", "node", "MB down", "MB up", "of float32", "seconds", "copies"]
    table, lines = Table(), ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for head in heads:
        table.add_column(head, justify="right")
    for size in options.sizes.split(","):
        rows, server = measure(size, options.nodes)
        whole = 4 * server["parameters"]
        for row in rows:
            cells = [
                size, str(row["round"]), str(row["node"]), f"{row['down'] / 1e6:.2f}",
                f"{row['up'] / 1e6:.2f}", f"1/{whole / row['up']:.3g}", f"{row['seconds']:.1f}",
                f"{row['copies']:.2f}",
            ]  # fmt: skip
            table.add_row(*cells)
            lines.append("| " + " | ".join(cells) + " |")
        servers = {PER_ROUND: server}
        if options.more and size == options.sizes.split(",")[0]:  # nodes take memory too
            servers[options.more] = measure(size, options.nodes, options.more)[1]
        for nodes, each in servers.items():
            cells = [
                size, "all", f"server, {nodes} nodes a round", "", "", "",
                f"{each['seconds']:.1f}", f"{each['copies']:.2f}",
            ]  # fmt: skip
            table.add_row(*cells)
            lines.append("| " + " | ".join(cells) + " |")
    Console(width=100).print(table)
    if options.out:
        about = (
            "`python simulations/bench_messages.py --out simulations/results` "
            f"({platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}): {PER_ROUND} "
            f"of {options.nodes} nodes, {ROUNDS} rounds, density 0.1. A copy is the adapter in "
            "float32, 4 bytes a parameter. Of a node: what a message took beyond its model, with "
            "the adapter in it. Of the server: all that the rounds took beyond the adapter that it "
            "began with. "
            "Seconds of the server are without its nodes'.\n"
        )
        (options.out / "bench_messages.md").write_text("\n".join([about, *lines]) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
