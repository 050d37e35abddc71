"""bench merge: the contenders mean the same, and the files that are written."""

from __future__ import annotations

import csv

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.bench import layouts, merge, packages
from compeft_fl.cli.main import main

WEIGHTS = {False: [1.0] * 5, True: [1.0, 2.0, 3.0, 4.0, 1.0]}


@pytest.fixture(scope="module", params=[False, True], ids=["equal", "weights"])
def updates(request):
    return request.param, merge.Updates.synthetic("t5-base-ia3", 5, WEIGHTS[request.param])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_contenders_merge_to_the_same(updates, method):
    weighted, given = updates
    ways = merge.contenders(method, weighted)
    expected = ways[0].merge(given)
    assert np.count_nonzero(expected) > 0
    for way in ways[1:]:
        gap = np.abs(way.merge(given) - expected)
        assert gap.max() < 1e-5 * np.abs(expected).max(), way


def test_contenders_are_those_that_mean_the_same():
    found = {(way.library, way.call) for way in merge.contenders("ties", weighted=True)}
    assert ("peft", "ties") not in found
    if packages.why_missing("mergekit") is None:
        assert ("mergekit", "ties") in found
    assert len(merge.contenders("ties", weighted=False)) >= 3


def test_rows_compare_with_ours(updates):
    weighted, given = updates
    rows = merge.rows_of(given, "ties", weighted, "t5-base-ia3")
    assert rows[0]["library"] == "compeft-fl"
    assert rows[0]["times_ours"] == 1
    assert rows[0]["input_bytes"] == sum(map(len, given.blobs))
    assert all(row["entries_apart"] == 0 for row in rows)
    assert all(row["num_parameters"] == 129024 for row in rows)


def test_what_differs_is_counted(monkeypatch, updates):
    weighted, given = updates
    other = merge.Contender("other", "half", lambda each: np.asarray(each.tensors[0]))
    real = merge.contenders
    monkeypatch.setattr(merge, "contenders", lambda *options: [*real(*options)[:1], other])
    row = merge.rows_of(given, "ties", weighted)[-1]
    assert row["entries_apart"] > 1000
    assert merge._equality(row).startswith("but for")


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(packages, "_find", lambda package: package != "mergekit")
    small = layouts.get("t5-base-ia3")
    monkeypatch.setattr(layouts, "get", lambda name: small)
    assert main(["bench", "merge", "--quick", "--out", str(tmp_path)]) == 0
    assert "make peers" in (tmp_path / "merge.md").read_text()
    assert "without mergekit" in capfd.readouterr().err
    assert (tmp_path / "merge.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "merge.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["library"] for row in rows} == {"compeft-fl", "peft"}
    assert all(int(row["entries_apart"]) == 0 for row in rows)


def test_encoded_updates_are_what_is_merged(updates):
    _, given = updates
    for blob, tensor in zip(given.blobs, given.tensors, strict=True):
        assert np.array_equal(cf.decode(blob).to_task_vector().values, np.asarray(tensor))
