from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from compeft_fl.errors import ParameterError
from compeft_fl.server.metrics import Metrics, signature

aggregate = FedAvg().train_metrics_aggr_fn


def collect(records, *, foldable=True, function=aggregate) -> Metrics:
    metrics = Metrics(function, "n", foldable=foldable)
    for record in records:
        metrics.add("m", MetricRecord(record))
    return metrics


@pytest.mark.parametrize("count", [1, 31, 32, 33, 200])
def test_folding_gives_what_flower_gives(count):
    rng = np.random.default_rng(0)
    records = [
        {"n": int(rng.integers(1, 99)), "loss": float(rng.random()), "f1": rng.random(3).tolist()}
        for _ in range(count)
    ]
    whole = aggregate([RecordDict({"m": MetricRecord(dict(r))}) for r in records], "n")
    for foldable in (True, False):
        result = collect(records, foldable=foldable).result()
        assert set(result) == {"loss", "f1"}
        assert result["loss"] == pytest.approx(whole["loss"], rel=1e-12)
        assert result["f1"] == pytest.approx(whole["f1"], rel=1e-12)


def test_a_function_of_the_user_sees_every_record_at_once():
    seen = []

    def function(contents, key):
        seen.append(len(contents))
        return MetricRecord({"x": 1})

    assert dict(collect([{"n": 1}] * 100, foldable=False, function=function).result()) == {"x": 1}
    assert seen == [100]


def test_nothing_gives_none():
    assert Metrics(aggregate, "n", foldable=True).result() is None


def test_the_keys_of_most_win(caplog):
    odd = [{"n": 1, "loss": [1.0]}, {"n": 1}, {"n": 1, "loss": 1.0, "more": 1.0}]
    result = collect([odd[0], {"n": 1, "loss": 2.0}, *odd[1:], {"n": 3, "loss": 4.0}]).result()
    assert dict(result) == {"loss": 3.5}
    assert "the metrics of 3 replies are left out" in caplog.text


def test_a_name_and_the_length_of_lists_are_what_must_agree():
    same = [{"a": 1, "b": [1.0, 2.0]}, {"b": [3, 4], "a": 2.5}]
    assert len({signature("m", MetricRecord(record)) for record in same}) == 1
    others = [{"a": 1}, {"a": 1, "b": [1.0]}, {"a": [1], "b": [1.0, 2.0]}]
    assert len({signature("m", MetricRecord(record)) for record in [same[0], *others]}) == 4
    assert signature("m", MetricRecord(same[0])) != signature("k", MetricRecord(same[0]))


@pytest.mark.parametrize(
    "record",
    [
        {"n": 3, "loss": float("nan"), "f1": [1.0, 2.0]},
        {"n": 3, "loss": float("-inf"), "f1": [1.0, 2.0]},
        {"n": 3, "loss": 1.7e308, "f1": [1.0, 2.0]},
    ],
)
def test_a_nan_costs_that_metric_and_no_other(record):
    others = [{"n": 1, "loss": 1.0, "f1": [3.0, 0.0]}, {"n": 4, "loss": 2.0, "f1": [1.0, 1.0]}]
    for order in ([*others, record], [record, *others]):
        result = collect(order).result()
        assert result["loss"] == pytest.approx((1 * 1.0 + 4 * 2.0) / 5)
        assert result["f1"] == pytest.approx([(3 + 4 + 3) / 8, (0 + 4 + 6) / 8])


def test_a_nan_in_a_list_costs_that_list():
    record = {"n": 3, "f1": [float("nan"), 2.0]}
    result = collect([{"n": 1, "f1": [1.0, 0.0]}, record, {"n": 1, "f1": [3.0, 4.0]}]).result()
    assert result["f1"] == pytest.approx([2.0, 2.0])


def test_metrics_that_are_all_nan_are_left_out():
    assert collect([{"n": 1, "loss": float("nan")}] * 3).result() is None


def test_too_large_a_record_is_rejected():
    metrics = collect([{"n": 1, "loss": 1.0}])
    with pytest.raises(ParameterError):
        metrics.add("m", MetricRecord({"n": 1, "history": [0.0] * 9000}))
    nan = MetricRecord({"n": 1, "loss": float("nan")})
    for _ in range(64):
        metrics.add("m", nan)
    with pytest.raises(ParameterError, match="at most 64"):
        metrics.add("m", nan)
    assert metrics.result()["loss"] == pytest.approx(1.0)


def test_the_kinds_of_metrics_are_limited():
    metrics = collect([{"n": 1, f"key{i}": 1.0} for i in range(16)])
    with pytest.raises(ParameterError, match="at most 16 kinds"):
        metrics.add("m", MetricRecord({"n": 1, "another": 1.0}))
    metrics.add("m", MetricRecord({"n": 1, "key3": 2.0}))
    assert dict(metrics.result()) == {"key3": 1.5}


def test_memory_does_not_grow_with_the_number_of_records():
    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        try:
            collect({"n": 1, "loss": 1.0} for _ in range(count)).result()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(500) < 1.5 * peak(100)
