"""bench experts, on the adapter that is real: what its tables say is so."""

from __future__ import annotations

import csv
import re

import pytest

from compeft_fl.bench import expert_links, expert_swaps, experts, lorahub
from compeft_fl.bench.expert_models import Bench

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def bench():
    import transformers  # noqa: F401 - a test of models

    return Bench("0.07M")


def test_an_expert_takes_what_the_pool_says_and_is_soon_there(bench):
    assert bench.num_parameters == 73_728
    row = expert_swaps.memory_row(bench)
    assert row["bytes_each"] <= row["pool_says"] < 1.5 * row["bytes_each"]
    assert row["of_dense"] > 20
    rows = {row["sent_as"]: row for row in expert_links.computed_rows(bench, repeats=1)}
    ours, dense = rows[expert_links.OURS], rows[expert_links.DENSE]
    assert dense["bytes"] > 2 * bench.num_parameters > 20 * ours["bytes"]
    for mbps in expert_links.LINKS:
        seconds = 8e-6 * ours["bytes"] / mbps + ours["decode_and_load_s"]
        assert ours[f"at_{mbps}"] == pytest.approx(seconds, abs=1e-4)


def test_a_download_over_the_relay_ends_in_the_model(bench):
    rows = expert_links.measured_rows(bench, links=(20,))
    passed = {row["sent_as"]: row for row in rows}
    assert passed["ours"]["bytes"] < passed["ours"]["bytes_passed"] < 2 * passed["ours"]["bytes"]
    assert passed["ours"]["seconds"] > 8e-6 * passed["ours"]["bytes"] / 20
    assert passed[expert_links.DENSE]["bytes"] > 20 * passed["ours"]["bytes"]


def test_every_way_of_swapping_is_in_the_table(bench, monkeypatch):
    monkeypatch.setitem(expert_swaps._REPEATS, "0.07M", 2)
    rows = expert_swaps.swap_rows(bench)
    assert len(rows) == 6
    assert {row["way"] for row in rows} > set(expert_swaps.OURS)
    (copy,) = (row for row in rows if row["way"] == "copy of the tensors")
    assert copy["of_a_copy"] == 1.0
    assert all(row["fastest_ms"] <= row["median_ms"] <= row["p99_ms"] for row in rows)


@pytest.mark.long
def test_a_store_under_load_fails_no_request_and_says_how_soon(tmp_path):
    experts.store(tmp_path, "the command", 12, 0.2, clients=1)
    with (tmp_path / "experts_store.csv").open(newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert set(rows) == {
        "push", "search", "search again", "search by tags", "search --like", "pull",
        "search, one client",
    }  # fmt: skip
    assert rows["push"]["requests"] == "12"
    for row in rows.values():
        assert (row["failed"], int(row["requests"]) > 0) == ("0", True)
        assert 0 < float(row["median"]) <= float(row["p99"])
    text = (tmp_path / "experts_store.md").read_text()
    assert "12 experts" in text
    assert re.search(r"The index takes [\d.]+ MB \([1-9]", text)


def test_other_devices_are_for_swaps_alone(capsys, tmp_path):
    from compeft_fl.cli.main import main

    assert main(["bench", "experts", "--device", "cuba", "--out", str(tmp_path)]) == 2
    assert "expected cpu, or cuda where it is, found 'cuba'" in capsys.readouterr().err


def test_the_error_is_that_of_the_means_of_seeds():
    found = [
        {"task": task, "form": form, "method": "factors", "candidates": 9, "evaluations": 24,
         "seed": seed, "accuracy": base + seed + (2.0 if form == "dense" else 0.0)}
        for form in ("dense", "compressed")
        for task, base in (("role", 50.0), ("lang", 70.0))
        for seed in range(3)
    ]  # fmt: skip
    (row,) = lorahub.summary(found)
    assert (row["dense"], row["compressed"]) == (63.0, 61.0)
    assert row["dense_error"] == pytest.approx(3**-0.5)
    assert row["within_one_error"] is False
