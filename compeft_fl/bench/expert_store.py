"""A store of many experts under load: its size, its latency, and what it loses (nothing).

A server in a process of its own; clients in others, each thread with a connection of its own, as
fast as they are answered. `compeft_fl.bench.experts` prints what comes of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import compeft_fl as cf
from compeft_fl.errors import CompeftError
from compeft_fl.experts.client import ExpertClient

__all__ = ["Load", "StoreFigures", "measure_store", "serving"]

_PROCESSES: Final = 4
_MODULES: Final = 12  # of the app's own adapter: MiniLM's query and value, r = 8
_WORDS: Final = tuple(
    f"{verb}-{thing}"
    for verb in ("translate", "summarise", "classify", "answer", "rewrite", "rank", "extract")
    for thing in ("news", "mail", "code", "reviews", "contracts", "patents", "recipes", "chat")
)
_LANGUAGES: Final = ("en", "de", "fr", "es", "zh", "ar", "hi", "sw")
_SERVER: Final = """
import sys
from pathlib import Path
from compeft_fl.experts.serving import start
server = start(Path(sys.argv[1]), port=int(sys.argv[2]))
print(server.address, flush=True)
server.wait()
"""


@dataclass(frozen=True)
class Load:
    """What clients did at once, for some seconds.

    Attributes
    ----------
    what : str
    clients : int
    requests, failed : int
    per_second : float
    median, p99 : float
        Seconds from a request to its answer.
    """

    what: str
    clients: int
    requests: int
    failed: int
    per_second: float
    median: float
    p99: float


@dataclass(frozen=True)
class StoreFigures:
    """A store of many experts.

    Attributes
    ----------
    experts : int
    index_bytes, blob_bytes : int
    memory : int
        Of the server's process, resident, at the end.
    loads : list of Load
    """

    experts: int
    index_bytes: int
    blob_bytes: int
    memory: int
    loads: list[Load]


def measure_store(
    experts: int = 10_000, clients: int = 16, seconds: float = 15.0,
    say: Callable[[str], object] = print,
) -> StoreFigures:  # fmt: skip
    """Fill a store over gRPC, then search it by words, tags and similarity, and pull from it.

    Searches by words come twice: such as nobody has asked before, so that the store keeps no
    answer, and ("search again") the same 56 over and over.

    Parameters
    ----------
    experts : int
    clients : int
        At once.
    seconds : float
        Of each load but the filling.
    say : callable
        Is told what is done now.
    """
    import psutil

    with tempfile.TemporaryDirectory(prefix="compeft-fl-") as folder:
        store = Path(folder) / "store"
        with serving(store) as (process, address):
            loads = []
            for what, count, until in (
                ("push", clients, 0.0), ("search", clients, seconds),
                ("search again", clients, seconds),
                ("search by tags", clients, seconds), ("search --like", clients, seconds),
                ("pull", clients, seconds), ("search, one client", 1, seconds),
            ):  # fmt: skip
                say(f"{what}: {count} clients")
                loads.append(_load(what, address, Path(folder), count, experts, until))
            memory = psutil.Process(process.pid).memory_info().rss
            index = sum(file.stat().st_size for file in store.glob("index.sqlite*"))
            blobs = sum(file.stat().st_size for file in (store / "blobs").iterdir())
    return StoreFigures(experts, index, blobs, memory, loads)


@contextlib.contextmanager
def serving(store: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of a store in a process of its own: the process, and its address."""
    command = [sys.executable, "-c", _SERVER, str(store), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def _load(
    what: str, address: str, folder: Path, clients: int, experts: int, seconds: float
) -> Load:
    """Let clients ask, in a few processes, and put their seconds together."""
    processes = min(_PROCESSES, clients)
    each = [
        (
            what, address, str(folder), clients // processes, (index, processes), experts, seconds
        )
        for index in range(processes)
    ]  # fmt: skip
    if processes == 1:
        parts = [_client_process(*each[0])]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            parts = [job.result() for job in [pool.submit(_client_process, *a) for a in each]]
    times = np.concatenate([part[0] for part in parts])
    return Load(
        what=what,
        clients=clients,
        requests=len(times),
        failed=sum(part[1] for part in parts),
        per_second=sum(len(part[0]) / part[2] for part in parts),
        median=float(np.median(times)),
        p99=float(np.quantile(times, 0.99)),
    )


def _client_process(
    what: str, address: str, folder: str, threads: int, place: tuple[int, int], experts: int,
    seconds: float,
) -> tuple[NDArray[np.float64], int, float]:  # fmt: skip
    """Some threads, each with a client: seconds of each request, how many failed, and of all."""
    found: list[list[float]] = [[] for _ in range(threads)]
    failed = [0] * threads
    index, processes = place

    def work(thread: int) -> None:
        mine = index * threads + thread
        cache = Path(folder) / f"cache-{what.replace(' ', '')}-{mine}"
        rng = np.random.default_rng([mine, experts])
        turns = range(mine, experts, threads * processes) if what == "push" else None
        with ExpertClient(address, cache=cache, cache_bytes=1 << 20) as client:
            ask = _requests(what, client, rng, experts)
            client.list(limit=1)  # connected before it counts
            end = time.perf_counter() + seconds
            for turn in turns if turns is not None else _until(end):
                request = ask(turn)
                began = time.perf_counter()
                try:
                    request()
                except CompeftError:
                    failed[thread] += 1
                found[thread].append(time.perf_counter() - began)

    began = time.perf_counter()
    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return np.concatenate([np.array(each) for each in found]), sum(failed), (
        time.perf_counter() - began
    )  # fmt: skip


def _until(end: float) -> Iterator[int]:
    turn = 0
    while time.perf_counter() < end:
        yield turn
        turn += 1


def _requests(
    what: str, client: ExpertClient, rng: np.random.Generator, experts: int
) -> Callable[[int], Callable[[], object]]:
    """What a client asks in its n-th turn; what it asks with is ready before the clock runs."""

    def name() -> str:
        return _name(int(rng.integers(experts)))

    if what == "push":
        make = _maker(rng)
        return lambda turn: partial(client.push, make(), _name(turn), tags=_tags(turn))
    if what == "pull":
        return lambda turn: partial(client.pull, name())
    if what == "search by tags":
        return lambda turn: partial(client.search, tags={"language": _any(rng, _LANGUAGES)})
    if what == "search --like":
        return lambda turn: partial(client.search, like=name())
    if what == "search again":
        return lambda turn: partial(client.search, _any(rng, _WORDS).replace("-", " "))
    return lambda turn: partial(client.search, _new(rng, _any(rng, _WORDS).replace("-", " ")))


def _any(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _new(rng: np.random.Generator, words: str) -> str:
    """The same words in capitals and small letters as never before: no answer is there already."""
    turns = int(rng.integers(1 << len(words)))
    return "".join(c.upper() if turns >> i & 1 else c for i, c in enumerate(words))


def _name(turn: int) -> str:
    return f"{_WORDS[turn % len(_WORDS)]}-{turn:06d}"


def _tags(turn: int) -> dict[str, str]:
    task = _WORDS[turn % len(_WORDS)].replace("-", " ")
    return {"task": task, "language": _LANGUAGES[turn // 7 % len(_LANGUAGES)]}


def _maker(rng: np.random.Generator) -> Callable[[], bytes]:
    """Makes files of adapters in the shape of the app's own, at density 0.05, no two alike."""
    tensors = [
        cf.TensorSpec(f"base_model.model.encoder.layer.{i // 2}.{i % 2}.lora_{key}.weight", shape)
        for i in range(_MODULES)
        for key, shape in (("A", (8, 384)), ("B", (384, 8)))
    ]
    layout = cf.Layout(tensors)
    config = '{"peft_type":"LORA","r":8,"base_model_name_or_path":"all-MiniLM-L6-v2"}'

    def make() -> bytes:
        values: Any = rng.standard_normal(layout.num_parameters).astype(np.float32)
        update = cf.compress(cf.TaskVector(layout, values), 0.05)
        return cf.encode(update, metadata={"adapter_config": config, "start": "0"})

    return make
