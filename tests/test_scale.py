"""The benchmarks of scale, small: memory that stays flat, and a tree of processes."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "simulations"))

import bench_scale  # noqa: E402


@pytest.mark.parametrize("kind", bench_scale.KINDS)
def test_memory_is_flat_from_40_to_240_updates(kind, monkeypatch):
    size = 200_000
    # The spool goes to a file at once: what waits is not in memory.
    rule = bench_scale.SignAgreementFilter
    monkeypatch.setattr(
        bench_scale, "SignAgreementFilter", lambda **given: rule(**given, memory_bytes=1)
    )

    def peak(nodes):
        grid = bench_scale.SyntheticGrid(nodes, size)
        gc.collect()
        tracemalloc.start()
        try:
            bench_scale.one_round(kind, grid, size)
            return tracemalloc.get_traced_memory()[1], grid.num_bytes
        finally:
            tracemalloc.stop()

    bench_scale.identify()
    peak(40)  # imports and compiles
    few, before = peak(40)  # more than wait as masks: all that the sums need is there
    many, after = peak(240)
    assert few > 4 * size  # it measures something: a dense vector at least
    assert after - before > 10 * size  # and 200 replies more would be seen
    assert many < few + 0.5 * (after - before)


def test_the_replies_of_the_benchmark_are_distinct():
    grid = bench_scale.SyntheticGrid(40, 6_400)
    bench_scale.identify()
    seen = []
    pull = grid.pull_messages

    def watched(ids):
        for reply in pull(ids):
            seen.append(next(iter(reply.content["arrays"].values())).data)
            yield reply

    grid.pull_messages = watched
    strategy = bench_scale.strategy("ties")
    arrays = bench_scale.ArrayRecord({"w": bench_scale.Array(bench_scale.np.zeros(6_400, "f4"))})
    result = strategy.start(grid, arrays, num_rounds=1)
    assert len(seen) == len(set(seen)) == 40
    assert strategy.observer.train[1].replies == 40
    assert next(iter(result.arrays.values())).numpy().any()


@pytest.mark.parametrize("regions", [0, 2])
def test_a_tree_of_processes_gives_what_one_server_gives(regions):
    command = [
        sys.executable, str(ROOT / "simulations" / "aggregation_tree.py"), "--edges", "2",
        "--clients", "3", "--regions", str(regions), "--parameters", "2000", "--methods", "ties",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max difference from flat: 0" in done.stdout
    assert "6 updates of 2000 parameters" in done.stdout
