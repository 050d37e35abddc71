"""The part of bench experts on slow links: from bytes elsewhere to a model that answers.

Seconds are the bytes over the link, plus what it takes to decode them and have them in the model's
tensors. Some are measured as a whole too: ours from a real store over a throttled relay, a dense
file by HTTP over the same; and ours once with the connection cut half-way.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from compeft_fl.bench import packages, peers
from compeft_fl.bench.expert_models import Bench
from compeft_fl.deploy.relay import Link, Relay
from compeft_fl.experts import serving
from compeft_fl.experts.client import ExpertClient
from compeft_fl.experts.pool import ExpertPool

__all__ = ["DENSE", "LINKS", "OURS", "computed_rows", "measured_rows"]

LINKS: Final = (2, 20, 200, 1000)  # Mbit/s
DENSE: Final = "safetensors, bf16"
OURS: Final = "ours, Golomb"
_LONGEST: Final = 45.0  # seconds of one download that is measured


def computed_rows(bench: Bench, repeats: int = 3) -> list[dict[str, Any]]:
    """A row for each way to send an expert: its bytes, seconds to decode (the fastest of several),
    and in all by link.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size, usable in _contenders(bench, Path(folder)):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                usable()
                seconds.append(time.perf_counter() - start)
            local = min(seconds)  # what else the machine does is no part of it
            row: dict[str, Any] = {
                "size": bench.size,
                "parameters": bench.num_parameters,
                "sent_as": name,
                "bytes": size,
                "decode_and_load_s": round(local, 4),
            }
            row |= {f"at_{mbps}": round(8e-6 * size / mbps + local, 4) for mbps in LINKS}
            rows.append(row)
    dense = rows[0]
    for row in rows:
        row |= {
            f"sooner_{mbps}": round(dense[f"at_{mbps}"] / row[f"at_{mbps}"], 1) for mbps in LINKS
        }
    return rows


def _contenders(bench: Bench, folder: Path) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Each way to send: its name, its bytes, and what makes the model usable with them."""
    import safetensors.torch
    import torch

    expert = bench.expert()
    own = dict(bench.model.named_parameters())
    live = {name: own[name.replace(".weight", ".default.weight")] for name in _names(bench)}

    def put(state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(torch.as_tensor(state[name]))

    dense = {name: tensor.to(torch.bfloat16) for name, tensor in bench.dense_state().items()}
    blob = safetensors.torch.save(dense)
    yield DENSE, len(blob), lambda: put(safetensors.torch.load(blob))
    if packages.why_missing("numcodecs") is None:
        zstd = packages.load("numcodecs.zstd").Zstd(level=3)
        packed = bytes(zstd.encode(blob))
        yield (
            "the same by zstd",
            len(packed),
            lambda: put(safetensors.torch.load(bytes(zstd.decode(packed)))),
        )
    values: Any = bench.task_vector().values
    for name, text in (("int8-blockwise", "8 bits"), ("nf4", "4 bits, NF4")):
        codec = peers.get(name)
        if peers.available(name):
            coded = codec.encode(values, bench.layout)
            yield text, len(coded), functools.partial(_load_peer, codec, coded, bench, put)
    pool = ExpertPool(bench.model, memory="8 GiB")
    for name, codec_name in ((OURS, "golomb"), ("ours, context", "context")):
        file = folder / f"{codec_name}.compeft"
        size = bench.file(file, expert, codec_name)
        yield name, size, functools.partial(_load_ours, pool, file)


def _names(bench: Bench) -> list[str]:
    return [tensor.name for tensor in bench.layout.tensors]


def _load_peer(codec: Any, coded: bytes, bench: Bench, put: Callable[[Any], None]) -> None:
    values = codec.decode(coded, bench.layout)
    put({t.name: values[where].reshape(t.shape) for t, where in bench.layout.slices()})


def _load_ours(pool: ExpertPool, file: Path) -> None:
    pool.add("expert", file)
    pool.swap("expert")


# --- measured ---------------------------------------------------------------------------------


def measured_rows(bench: Bench, links: tuple[int, ...] = LINKS) -> list[dict[str, Any]]:
    """Whole downloads over a throttled relay, those that take less than 45 seconds."""
    import safetensors.torch

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expert = bench.expert()
        size = bench.file(folder / "expert.compeft", expert)
        dense = folder / "dense.safetensors"
        state = {n: t.bfloat16() for n, t in bench.dense_state().items()}
        safetensors.torch.save_file(state, dense)
        with serving.running(folder / "store") as server:
            with ExpertClient(server.address, cache=folder / "pushed") as client:
                client.push(folder / "expert.compeft", "expert")
            port = int(server.address.rpartition(":")[2])
            _pull(bench, port, 1000, None, folder / "warm")  # imports and compiles
            for mbps in links:
                cuts = {"ours": None, "ours, cut half-way and resumed": size // 2}
                for way, cut in cuts.items():
                    if 8e-6 * size / mbps < _LONGEST and (cut is None or size > 1 << 20):
                        cache = folder / f"{mbps}-{cut}"
                        took, passed = _pull(bench, port, mbps, cut, cache)
                        rows.append(_row(bench, way, mbps, size, passed, took))
        with _web(folder) as port:
            for mbps in links:
                if 8e-6 * dense.stat().st_size / mbps < _LONGEST:
                    took, passed = _get(bench, port, mbps, dense.name)
                    rows.append(_row(bench, DENSE, mbps, dense.stat().st_size, passed, took))
    return rows


def _row(bench: Bench, way: str, mbps: int, size: int, passed: int, took: float) -> dict[str, Any]:
    return {
        "size": bench.size,
        "sent_as": way,
        "mbit_per_second": mbps,
        "bytes": size,
        "bytes_passed": passed,
        "seconds": round(took, 3),
    }


def _pull(bench: Bench, port: int, mbps: int, cut: int | None, cache: Path) -> tuple[float, int]:
    """Seconds until the model answers as an expert of the store, and the bytes that passed."""
    pool_model = bench.model
    with Relay(port, link=Link(mbit_per_second=mbps)) as relay:
        cutter = None
        if cut is not None:
            cutter = threading.Timer(8e-6 * cut / mbps, relay.close_connections)
        with ExpertClient(f"127.0.0.1:{relay.ports[0]}", cache=cache) as client:
            pool = ExpertPool(pool_model, client)
            start = time.perf_counter()
            if cutter is not None:
                cutter.start()
            pool.swap("expert")
            took = time.perf_counter() - start
            pool.swap(None)
        return took, relay.total("down")


def _get(bench: Bench, port: int, mbps: int, name: str) -> tuple[float, int]:
    """The same of a dense file by HTTP."""
    import safetensors.torch
    import torch

    own = dict(bench.model.named_parameters())
    with Relay(port, link=Link(mbit_per_second=mbps)) as relay:
        start = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{relay.ports[0]}/{name}") as answer:
            state = safetensors.torch.load(answer.read())
        with torch.no_grad():
            for key, tensor in state.items():
                own[key.replace(".weight", ".default.weight")].copy_(tensor)
        return time.perf_counter() - start, relay.total("down")


@contextlib.contextmanager
def _web(folder: Path) -> Iterator[int]:
    """A web server of a folder's files, on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
