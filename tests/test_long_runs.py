"""Both directions compressed over many rounds: the distance to a target falls, and stays down."""

from __future__ import annotations

import numpy as np
import pytest

import compeft_fl as cf
from compeft_fl.exchange.downlink import Downlink
from compeft_fl.exchange.uplink import AT_RISK, ErrorFeedback

pytestmark = pytest.mark.long

NODES = 3


class Federation:
    """Nodes that each step towards one target, with a little noise, and a server with momentum."""

    def __init__(self, target, rate, momentum=0.0, **options):
        self.target, self.rate, self.momentum = target, rate, momentum
        self.layout = cf.Layout([cf.TensorSpec("w", target.shape)])
        self.nodes = [ErrorFeedback(0.1, **options) for _ in range(NODES)]
        self.theta = self.velocity = np.zeros_like(target)
        support = {key: value for key, value in options.items() if key == "support"}
        start = cf.TaskVector(self.layout, self.theta)
        self.downlink = Downlink(start, density=0.2, **support)
        self.pressures = []

    def run(self, rounds):
        rng, distances = np.random.default_rng(0), []
        for _ in range(rounds):
            sent = []
            for node in self.nodes:
                noise = 0.02 * rng.standard_normal(self.target.size)
                tau = self.rate * (self.target - self.downlink.shared) + noise
                update = node.compress(cf.TaskVector(self.layout, tau.astype(np.float32)))
                sent.append(update.to_task_vector().values)
                self.pressures.append(node.pressure)
            self.velocity = self.momentum * self.velocity + np.mean(sent, axis=0)
            self.theta = (self.theta + self.velocity).astype(np.float32)
            self.downlink.advance(cf.TaskVector(self.layout, self.theta))
            distances.append(np.linalg.norm(self.theta - self.target))
        return distances


def heavy_tailed():
    rng = np.random.default_rng(1)
    return (rng.standard_normal(2000) * rng.exponential(1, 2000)).astype(np.float32)


@pytest.mark.parametrize("rate", [0.3, 0.1])
def test_a_heavy_tailed_target_is_reached_and_kept(rate):
    federation = Federation(heavy_tailed(), rate)
    distances = federation.run(100)
    assert max(distances[60:]) < 0.05 * np.linalg.norm(federation.target)
    assert max(federation.pressures) < AT_RISK


def test_filling_the_quota_goes_back_and_is_said_to_be_at_risk():
    """What the default prevents; the logs would warn."""
    federation = Federation(heavy_tailed(), 0.3, support="fixed", decay=1.0)
    distances = federation.run(100)
    assert max(distances[60:]) > 0.1 * np.linalg.norm(federation.target)
    assert max(federation.pressures) > AT_RISK


def test_momentum_on_the_server_needs_residuals_that_decay():
    target = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    default = Federation(target, 0.03, momentum=0.9).run(160)
    kept_all = Federation(target, 0.03, momentum=0.9, decay=1.0).run(160)
    assert np.mean(default[120:]) < 0.25 * np.linalg.norm(target)
    assert np.mean(kept_all[120:]) > 2 * np.mean(default[120:])
