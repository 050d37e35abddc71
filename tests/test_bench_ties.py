"""The rules of simulations/bench_ties.py are the library's where they have its name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import compeft_fl as cf

pytestmark = pytest.mark.models  # the script imports torch
FILE = Path(__file__).resolve().parents[1] / "simulations" / "bench_ties.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_ties", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_ties"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["average", "TIES, 0.4", "TIES, 0.2"])
def test_merges_are_the_librarys(bench, name):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(5, 400)) * (rng.random((5, 400)) < 0.3)
    weights = np.array([1.0, 7, 2, 5, 3])
    taus = [cf.TaskVector.from_dict({"w": row.astype("f4")}) for row in values]
    rule = {"average": cf.Average(), "TIES, 0.4": cf.Ties(0.4), "TIES, 0.2": cf.Ties(0.2)}[name]
    expected = cf.merge(taus, rule, weights=list(weights)).values
    found, _ = bench.merge(bench.RULES[name], values.astype("f4").astype("f8"), weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_who_decides_a_sign(bench):
    values = np.array([[9.0], [-1.0], [-1.0]])
    weights = np.array([1.0, 3.0, 1.0])
    for elected, sign in (("mass", 1), ("weight", -1), ("nodes", -1)):
        merged, counted = bench.merge(bench.Rule(elected, "agreeing"), values, weights)
        assert np.sign(merged) == sign
        assert counted.ravel().tolist() == [sign > 0, sign < 0, sign < 0]
    everyone, _ = bench.merge(bench.Rule("mass"), values, weights)
    assert everyone == pytest.approx(9 / 5)
