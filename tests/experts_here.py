"""Experts for tests: small adapters without a model, and a server with a client in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compeft_fl.adapters import Adapter, save_folder
from compeft_fl.experts import ExpertClient
from compeft_fl.experts.serving import Server, running

CONFIG = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/tiny"}
MODULES = 3


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
