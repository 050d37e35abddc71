"""Experts for tests: small adapters without a model, and a server with a client in this process."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from compeft_fl.adapters import Adapter, save_folder
from compeft_fl.experts import ExpertClient
from compeft_fl.experts.serving import Server, running
from compeft_fl.experts.v1 import experts_pb2, experts_pb2_grpc

CONFIG = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/tiny"}
MODULES = 3
INVALID, FULL, LOST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
)


def adapter(seed: int = 0, *, config: dict[str, Any] | None = None) -> Adapter:
    """A LoRA of three modules."""
    rng = np.random.default_rng(seed)
    shapes = {"A": ((4, 32), 0.1), "B": ((32, 4), 0.01)}
    state = {
        f"base_model.model.l{index}.q.lora_{factor}.weight": np.asarray(
            size * rng.standard_normal(shape), np.float32
        )
        for index in range(MODULES)
        for factor, (shape, size) in shapes.items()
    }
    return Adapter(CONFIG if config is None else config, state)


def trained(start: Adapter, seed: int = 1, share: float = 0.1) -> Adapter:
    """An adapter some of whose values have moved."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, values in start.state.items():
        moved = 0.05 * rng.standard_normal(values.shape) * (rng.random(values.shape) < share)
        state[name] = np.asarray(values + moved, np.float32)
    return Adapter(start.config, state)


def folder(path: Path, made: Adapter) -> Path:
    save_folder(made, path)
    return path


@contextlib.contextmanager
def store(path: Path, **options: Any) -> Iterator[tuple[Server, ExpertClient]]:
    """A server, and a client with a cache of its own."""
    with (
        running(path / "store", **options) as server,
        ExpertClient(server.address, cache=path / "cache") as client,
    ):
        yield server, client


def same(one: Adapter, other: Adapter) -> bool:
    return one.config == other.config and all(
        np.array_equal(one.state[name], other.state[name]) for name in one.state | other.state
    )


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values that no codec makes small."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(path: Path) -> bytes:
    """A file as a store keeps it."""
    source = folder(path / "one", trained(adapter()))
    with store(path) as (_, client):
        client.push(source, "x")
        return client.pull("x").read_bytes()


def raw_push(server, content, *, name="x", digest=None, size=None, chunks=None, **header):
    """Push as somebody who has written a client of their own."""
    digest = hashlib.sha256(content).digest() if digest is None else digest
    size = len(content) if size is None else size
    first = experts_pb2.PushHeader(name=name, digest=digest, size=size, **header)
    messages = [experts_pb2.PushRequest(header=first)]
    messages += [experts_pb2.PushRequest(chunk=each) for each in chunks or [content]]
    with grpc.insecure_channel(server.address) as channel:
        return experts_pb2_grpc.ExpertsStub(channel).Push(iter(messages))


def refused(call, code, text):
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert (error.value.code(), text in error.value.details()) == (code, True), error.value
    assert "\n" not in error.value.details()
