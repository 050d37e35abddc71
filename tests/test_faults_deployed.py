"""`make faults`: parts of a deployment killed with kill -9, or late; what is seen, what is left.

Real SuperLink, SuperNodes, ServerApp and ClientApps over gRPC with TLS. Where nothing is lost the
final adapter has the bytes of the undisturbed run; where a reply is lost, those of a run in which
the node was not asked.
"""

from __future__ import annotations

import importlib.metadata
import signal
import time

import numpy as np
import plain_federation
import pytest
from deployed import Federation
from local_grid import LocalGrid

from compeft_fl.strategies import RoundCounts

FLWR = importlib.metadata.version("flwr")
pytestmark = [
    pytest.mark.slow_faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not FLWR.startswith("1.39."), reason="the recipe is for flwr 1.39"),
]


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """The final adapter of the same federation in one process, with some replies lost."""

    def run(lost: set[tuple[int, int]]) -> np.ndarray:
        home = tmp_path_factory.mktemp("in-process")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDERATION_FOLDER", str(home))
            patch.setenv("COMPEFT_FL_STATE_DIR", str(home / "state"))
            rounds = dict.fromkeys(range(2), 0)

            def fault(node, reply):
                partition = node - 1001
                rounds[partition] += 1
                return [] if (partition, rounds[partition]) in lost else [reply]

            grid = LocalGrid(plain_federation.client_app, 2, fault=fault)
            return plain_federation.federate(grid, RoundCounts(), timeout=2)

    return run


def test_nothing_happens(tmp_path, in_process, fault_seen):
    with Federation(tmp_path) as federation:
        assert federation.finished(federation.submit()) == "finished:completed", federation.logs()
    np.testing.assert_array_equal(federation.final(), in_process(set()))
    fault_seen(
        "none: 2 nodes, 4 rounds over gRPC with TLS", federation.said("2 replies taken"),
        "completes; the bytes of the same federation in one process",
    )  # fmt: skip


def test_a_client_s_process_is_killed_in_training(tmp_path, in_process, fault_seen):
    """The SuperNode misses its heartbeats, and says so after a minute or so."""
    with Federation(tmp_path) as federation:
        hold = federation.hold(1, 2)
        run_id = federation.submit()
        federation.in_training(1, 2).send_signal(signal.SIGKILL)
        hold.unlink()
        assert federation.finished(run_id) == "finished:completed", federation.logs()
    np.testing.assert_array_equal(federation.final(), in_process({(1, 2)}))
    fault_seen(
        "kill -9 of a ClientApp in training", federation.said("is set aside"),
        "after a minute the round goes on without it; the node takes part in the next; the bytes "
        "of a run in which it was not asked",
    )  # fmt: skip


def test_a_client_answers_after_the_deadline(tmp_path, in_process, fault_seen):
    with Federation(tmp_path, timeout=75) as federation:
        hold = federation.hold(0, 2)
        federation.hold(1, 3)
        run_id = federation.submit()
        federation.in_training(1, 3)  # the third round has begun: the second's deadline is over
        hold.unlink()
        time.sleep(5)
        (federation.folder / "hold-1-3").unlink()
        assert federation.finished(run_id) == "finished:completed", federation.logs()
    np.testing.assert_array_equal(federation.final(), in_process({(0, 2)}))
    fault_seen(
        "a client that answers after the deadline", federation.said("1 replies taken", "missing"),
        "the late reply counts for nothing and is undone on the node; the bytes of a run in which "
        "it was not asked",
    )  # fmt: skip


def test_a_supernode_is_killed_and_comes_back(tmp_path, in_process, fault_seen):
    with Federation(tmp_path) as federation:
        hold = federation.hold(1, 2)
        run_id = federation.submit()
        client = federation.in_training(1, 2)
        federation.nodes[1].kill()
        federation.nodes[1].wait()
        if client.is_running():
            client.kill()
        hold.unlink()
        returned = federation.deployment.start_node(1)
        while not any(event.get("round") == 3 for event in federation.events()):
            if returned.poll() is not None:  # Flower lets a known key in again after a minute
                time.sleep(5)
                returned = federation.deployment.start_node(1)
            time.sleep(0.2)
        assert federation.finished(run_id) == "finished:completed", federation.logs()
    sent = [each for each in federation.events() if each["event"] == "sent" and each["round"] == 3]
    assert sum(each["size"] * each["nodes"] for each in sent) < 20_000  # no snapshot: it remembers
    np.testing.assert_array_equal(federation.final(), in_process({(1, 2)}))
    fault_seen(
        "kill -9 of a SuperNode, restarted with its key", federation.said("is set aside", "code"),
        "the round goes on without it; it comes back with what it remembers; the bytes of a run in "
        "which it was not asked",
    )  # fmt: skip


def test_the_serverapp_is_killed_and_the_run_resumed(tmp_path, in_process, fault_seen):
    with Federation(tmp_path) as federation:
        hold = federation.hold(0, 3)
        run_id = federation.submit()
        federation.in_training(0, 3)
        federation.program("flwr-serverapp").kill()
        status = federation.finished(run_id)
        assert status.startswith("finished:failed"), status
        hold.unlink()
        assert federation.finished(federation.submit()) == "finished:completed", federation.logs()
    np.testing.assert_array_equal(federation.final(), in_process(set()))
    fault_seen(
        "kill -9 of the ServerApp, the run submitted again",
        f"Flower says {status}; then: {federation.said('Going on after round')}",
        "goes on from the checkpoint; the bytes of the undisturbed run",
    )  # fmt: skip


def test_the_superlink_is_killed_and_comes_back(tmp_path, in_process, fault_seen):
    with Federation(tmp_path) as federation:
        hold = federation.hold(0, 2)
        run_id = federation.submit()
        federation.in_training(0, 2)
        federation.deployment.stop_superlink(hard=True)
        time.sleep(3)
        federation.deployment.start_superlink()
        hold.unlink()
        assert federation.finished(run_id) == "finished:completed", federation.logs()
    np.testing.assert_array_equal(federation.final(), in_process(set()))
    fault_seen(
        "kill -9 of the SuperLink, restarted on its database",
        federation.said("Connection to the SuperLink is unavailable").strip("│ "),
        "the run completes; the bytes of the undisturbed run",
    )  # fmt: skip
