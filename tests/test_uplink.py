"""exchange/uplink.py: nothing is lost between what was trained and what was sent."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.errors import LayoutError, NonFiniteError, ParameterError
from compeft_fl.exchange.uplink import ErrorFeedback

LAYOUT = cf.Layout([cf.TensorSpec("w", (1000,))])


def taus(count):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, 1000)).astype(np.float32)
    return [cf.TaskVector(LAYOUT, row) for row in rows]


@pytest.mark.parametrize("scale", ["mean", "norm", 1.0])
def test_sent_and_residual_add_up_to_what_was_trained(scale):
    feedback = ErrorFeedback(0.1, scale, decay=1.0)
    total, sent = np.zeros(1000), np.zeros(1000)
    for tau in taus(20):
        update = feedback.compress(tau)
        total += tau.values
        sent += update.to_task_vector().values
        np.testing.assert_allclose(sent + feedback.residual, total, atol=1e-4)


def test_the_first_round_is_plain_compression():
    tau = taus(1)[0]
    feedback = ErrorFeedback(0.05)
    plain = cf.compress(tau, 0.05, "mean", "best")
    assert cf.encode(feedback.compress(tau)) == cf.encode(plain)


def test_a_residual_from_before_goes_on():
    first, second = taus(2)
    one = ErrorFeedback()
    one.compress(first)
    two = ErrorFeedback(residual=one.residual.copy())
    assert cf.encode(one.compress(second)) == cf.encode(two.compress(second))
    assert np.array_equal(one.residual, two.residual)


def test_the_residual_stays_bounded_with_scale_mean():
    """Error feedback contracts: the residual does not grow with the rounds."""
    feedback = ErrorFeedback(0.1, "mean")
    norms = []
    for tau in taus(200):
        feedback.compress(tau)
        norms.append(np.linalg.norm(feedback.residual))
    assert max(norms[100:]) < 1.2 * max(norms[50:100])


def test_a_residual_of_another_length():
    with pytest.raises(LayoutError, match="1000 values"):
        ErrorFeedback(residual=np.zeros(3, np.float32)).compress(taus(1)[0])


def test_a_failure_leaves_the_residual():
    feedback = ErrorFeedback()
    feedback.compress(taus(1)[0])
    before = feedback.residual.copy()
    bad = taus(1)[0]
    bad.values[5] = np.nan
    with pytest.raises(NonFiniteError):
        feedback.compress(bad)
    assert np.array_equal(feedback.residual, before)


def test_settings_are_checked_at_once():
    with pytest.raises(ParameterError, match="density"):
        ErrorFeedback(density=2)
    with pytest.raises(ParameterError, match="scale"):
        ErrorFeedback(scale="median")
    with pytest.raises(ParameterError, match="support"):
        ErrorFeedback(support="median")
    for decay in (-0.1, 1.1, float("nan"), True, None):
        with pytest.raises(ParameterError, match="residual decay"):
            ErrorFeedback(decay=decay)


def test_the_residual_is_added_decayed():
    first, second = taus(2)
    feedback = ErrorFeedback(0.1, decay=0.5)
    feedback.compress(first)
    total = second.values + np.float32(0.5) * feedback.residual
    wanted = cf.compress(cf.TaskVector(LAYOUT, total), 0.1, "mean", "best")
    assert cf.encode(feedback.compress(second)) == cf.encode(wanted)
    assert np.array_equal(feedback.residual, total - wanted.to_task_vector().values)


def test_pressure_is_what_waits_in_updates():
    feedback = ErrorFeedback(0.1)
    for tau in taus(3):
        feedback.compress(tau)
        wanted = np.linalg.norm(feedback.residual) / np.linalg.norm(tau.values)
        assert feedback.pressure == pytest.approx(wanted, rel=1e-6)
    feedback.compress(cf.TaskVector(LAYOUT, np.zeros(1000, np.float32)))
    assert feedback.pressure == 0


@pytest.mark.parametrize("scale", ["mean", "norm", 8.0])
def test_what_is_sent_stays_within_a_bound_and_the_rest_waits(scale):
    feedback = ErrorFeedback(0.1, scale, decay=1.0)
    total, sent = np.zeros(1000), np.zeros(1000)
    for tau in taus(20):
        update = feedback.compress(tau, bound=0.7)
        norm = float(update.scales[0]) * np.sqrt(update.num_nonzeros)
        assert 0.7 * (1 - 1e-6) < norm <= 0.7
        total += tau.values
        sent += update.to_task_vector().values
    np.testing.assert_allclose(sent + feedback.residual, total, atol=1e-4)
