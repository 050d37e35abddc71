"""`make faults`: the service of experts is killed while clients push and pull, again and again.

Nothing that was acknowledged may be lost, and no bytes other than their digest's be taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time

import experts_here as here
import numpy as np
import pytest

from compeft_fl.adapters import write_update
from compeft_fl.bench.expert_store import serving
from compeft_fl.compeft import compress
from compeft_fl.errors import UnavailableError
from compeft_fl.experts import ExpertClient
from compeft_fl.task_vector import TaskVector

SHAPE = (64, 1 << 12)  # a file of about 100 kB: it is on its way for some time


class Storm:
    """Clients that push and pull whatever becomes of the server, and remember what it said."""

    def __init__(self, folder, port):
        self.folder, self.server = folder, f"127.0.0.1:{port}"
        self.acknowledged = []  # (name, version, digest)
        self.pulled = self.cut = 0
        self.wrong = []
        self.over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work, index))
            for work in (self._push, self._pull)
            for index in range(2)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, work, index):
        turn = 0
        while not self.over.is_set():
            turn += 1
            try:
                work(index, turn)
            except UnavailableError:
                self.cut += 1
                time.sleep(0.05)
            except Exception as error:
                self.wrong.append(repr(error))
                return

    def _push(self, index, turn):
        name = f"x{index}-{turn % 7}"
        values = np.random.default_rng([index, turn]).standard_normal(SHAPE).astype(np.float32)
        tau = TaskVector.from_dict({"base_model.model.l.lora_A.weight": values})
        file = self.folder / f"{index}.compeft"
        write_update(file, compress(tau, 0.3), here.CONFIG, "0")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        with ExpertClient(self.server, cache=self.folder / f"push{index}") as client:
            expert = client.push(file, name)
        if expert.digest != digest:
            self.wrong.append(f"{expert.reference} has another digest")
        self.acknowledged.append((name, expert.version, digest))

    def _pull(self, index, turn):
        if not self.acknowledged:
            time.sleep(0.01)
            return
        name, version, digest = random.choice(self.acknowledged)
        cache = self.folder / f"pull{index}-{turn}"
        with ExpertClient(self.server, cache=cache) as client:
            pulled = client.pull(f"{name}@{version}")
        found = hashlib.sha256(pulled.read_bytes()).hexdigest()
        if (pulled.expert.digest, found) != (digest, digest):
            self.wrong.append(f"{name}@{version} has other bytes")
        self.pulled += 1


def killed(tmp_path, kills, seed):
    """Kill the service so many times at random moments; what clients have seen."""
    source = random.Random(seed)
    store, port = tmp_path / "store", 0
    with contextlib.ExitStack() as end:
        storm = None
        for _ in range(kills):
            with serving(store, port) as (process, address):
                if storm is None:
                    port = int(address.rpartition(":")[2])
                    storm = end.enter_context(Storm(tmp_path, port))
                seen = len(storm.acknowledged) + storm.pulled
                time.sleep(source.uniform(0.0, 0.6))
                deadline = time.monotonic() + 60
                while len(storm.acknowledged) + storm.pulled == seen and not storm.wrong:
                    time.sleep(0.01)  # it has to have done something since it is up
                    assert time.monotonic() < deadline
                time.sleep(source.uniform(0.0, 0.1))
                process.kill()
        with serving(store, port):
            time.sleep(0.3)
            end.close()
            with ExpertClient(storm.server, cache=tmp_path / "last") as client:
                for name, version, digest in storm.acknowledged:
                    pulled = client.pull(f"{name}@{version}")
                    assert hashlib.sha256(pulled.read_bytes()).hexdigest() == digest
                assert storm.wrong == []
                count, problems = client.check()
                assert problems == []
                assert count >= len({digest for *_, digest in storm.acknowledged})
    return storm


@pytest.mark.faults
def test_a_killed_service_loses_nothing(tmp_path):
    storm = killed(tmp_path, kills=2, seed=1)
    assert len(storm.acknowledged) >= 2


@pytest.mark.slow_faults
@pytest.mark.timeout(1500)
def test_a_service_that_is_killed_fifty_times_loses_nothing(tmp_path, fault_seen):
    storm = killed(tmp_path, kills=50, seed=2)
    assert storm.cut >= 10
    fault_seen(
        "the service of experts is killed 50 times, while clients push and pull",
        f"{len(storm.acknowledged)} pushes were acknowledged and {storm.pulled} pulls ended well; "
        f"{storm.cut} were cut off for good, and were begun anew",
        "all that was acknowledged is there, and each pull gave the bytes of its digest",
    )
