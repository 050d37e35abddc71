"""The parts of bench experts in memory: how long a swap takes, and how many experts fit.

PEFT's ways start from dense tensors that are in memory already; ours from a Golomb-coded expert, or
from its bit masks. A copy of the adapter's tensors is the bound that none of PEFT's ways is below.
On a GPU, PEFT's dense tensors are in its own memory, which is its best case, and ours are not; the
same from the CPU's memory, where thousands of experts would have to be, stands beside it.
"""

from __future__ import annotations

import functools
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, Final

from compeft_fl.bench.expert_models import Bench, materialise
from compeft_fl.experts.held import Held
from compeft_fl.experts.pool import ExpertPool

__all__ = ["memory_row", "swap_rows"]

OURS: Final = ("ours, from streams", "ours, from masks")
_REPEATS: Final = {"0.07M": 100, "4M": 50, "40M": 20, "160M": 8}
_EXPERTS: Final = 8  # in memory at once, to measure what one takes


def swap_rows(bench: Bench) -> list[dict[str, Any]]:
    """A row for each way from one expert to another: median and p99 of turns, in milliseconds."""
    ways = _ways(bench)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    synchronise = _synchroniser(bench.device)
    for way in ways.values():
        way(0)
        way(1)
        synchronise()
    for turn in range(_REPEATS[bench.size]):
        for name, way in ways.items():
            start = time.perf_counter()
            way(turn % 2)
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    copy = statistics.median(seconds["copy of the tensors"])
    hotswap = statistics.median(seconds["PEFT hotswap_adapter"])
    rows = []
    for name, times in seconds.items():
        times.sort()
        median = statistics.median(times)
        rows.append(
            {
                "size": bench.size,
                "dtype": bench.dtype,
                "device": bench.device,
                "parameters": bench.num_parameters,
                "way": name,
                "median_ms": round(1e3 * median, 3),
                "p99_ms": round(1e3 * times[min(len(times) - 1, int(0.99 * len(times)))], 3),
                "fastest_ms": round(1e3 * times[0], 3),
                "of_a_copy": round(median / copy, 2),
                "of_hotswap": round(median / hotswap, 2),
            }
        )
    return rows


def _ways(bench: Bench) -> dict[str, Callable[[int], Any]]:
    """Each way to put one of two experts into the model."""
    import torch
    from peft import set_peft_model_state_dict
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    model = bench.model
    experts = [bench.expert(seed) for seed in range(2)]
    here = [bench.dense_state(seed) for seed in range(2)]
    dense = [{name: x.to(bench.device) for name, x in state.items()} for state in here]
    pools = {}
    for name in OURS:
        pool = ExpertPool(model, memory="8 GiB")
        for seed, expert in enumerate(experts):
            pool.add(str(seed), expert)
            if name == OURS[0]:
                _held(pool, str(seed)).pack()
        pools[name] = pool
    named, named_here = (
        [
            {name.replace(".weight", ".default.weight"): x for name, x in state.items()}
            for state in states
        ]
        for states in (dense, here)
    )
    own = dict(model.named_parameters())
    live = [own[name] for name in named[0]]
    config = model.peft_config["default"]

    def hotswap(turn: int, states: Any = named) -> None:
        hotswap_adapter_from_state_dict(model, states[turn], "default", config)

    def load(turn: int) -> None:
        set_peft_model_state_dict(model, dict(dense[turn]), adapter_name="default")

    def copy(turn: int, states: Any = named) -> None:
        with torch.no_grad():
            for to, of in zip(live, states[turn].values(), strict=True):
                to.copy_(of)

    def ours(pool: ExpertPool) -> Callable[[int], Any]:
        return lambda turn: pool.swap(str(turn))

    ways = {name: ours(pool) for name, pool in pools.items()}
    ways |= {
        "copy of the tensors": copy,
        "PEFT hotswap_adapter": hotswap,
        "PEFT set_peft_model_state_dict": load,
    }
    if bench.size != "160M":  # a second adapter in the model takes as much memory again
        model.add_adapter("second", config)
        materialise(model, getattr(torch, bench.dtype), bench.device)
        ways["PEFT set_adapter, both in the model"] = lambda turn: model.set_adapter(
            ("default", "second")[turn]
        )
    if bench.device != "cpu":
        ways["copy, from the CPU's memory"] = functools.partial(copy, states=named_here)
        ways["PEFT hotswap_adapter, from the CPU's memory"] = functools.partial(
            hotswap, states=named_here
        )
    return ways


def _synchroniser(device: str) -> Callable[[], object]:
    """What waits until a device has done all that it was given."""
    import torch

    if device == "cpu":
        return lambda: None
    return functools.partial(torch.cuda.synchronize, device)


def _held(pool: ExpertPool, name: str) -> Held:
    held = pool.held(name)
    assert held is not None
    return held


def memory_row(bench: Bench) -> dict[str, Any]:
    """What an expert takes in a pool, by tracemalloc, against dense bfloat16."""
    expert = bench.expert()
    warm = ExpertPool(bench.model, memory="8 GiB")  # compiles and imports: no part of an expert
    warm.add("0", expert)
    _held(warm, "0").pack()
    pool = ExpertPool(bench.model, memory="8 GiB")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(_EXPERTS):
            pool.add(str(number), expert)
            _held(pool, str(number)).pack()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    each, dense = taken / _EXPERTS, 2 * bench.num_parameters
    masks = _held(pool, "0").masks_bytes
    return {
        "size": bench.size,
        "parameters": bench.num_parameters,
        "bytes_each": round(each),
        "pool_says": _held(pool, "0").nbytes,
        "masks_bytes": masks,
        "dense_bf16_bytes": dense,
        "per_gib": round(2**30 / each),
        "per_gib_masks": round(2**30 / (masks + 2048)),
        "per_gib_dense": round(2**30 / dense, 1),
        "of_dense": round(dense / each, 1),
    }
