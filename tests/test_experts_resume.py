"""A download that was cut: how many bytes are sent once more."""

from __future__ import annotations

import threading
import time

import experts_here as here
import numpy as np
import pytest

from compeft_fl.adapters import write_update
from compeft_fl.deploy.relay import DOWN, Link, Relay
from compeft_fl.errors import UnavailableError
from compeft_fl.experts import ExpertClient, streams
from compeft_fl.experts.service import ExpertsService
from compeft_fl.task_vector import TaskVector

MBIT = 40  # of the link: what takes 0.2 s


@pytest.fixture
def large(tmp_path):
    """A file of a megabyte, which no codec makes smaller."""
    tau = TaskVector.from_dict({"base_model.model.l.lora_A.weight": here.noise((64, 1 << 12))})
    file = tmp_path / "large.compeft"
    write_update(file, tau, here.CONFIG, "0", "dense")
    return file


def cut_at_half(relay):
    """A progress that cuts the connection once, half-way."""
    done = []

    def progress(here, total):
        if not done and here > total // 2:
            done.append(here)
            relay.close_connections()

    return progress, done


def test_what_has_come_is_not_sent_again(tmp_path, large):
    size = large.stat().st_size
    with here.store(tmp_path) as (server, client):
        client.push(large, "x")
        with (
            Relay(int(server.address.rpartition(":")[2]), link=Link(MBIT)) as relay,
            ExpertClient(f"127.0.0.1:{relay.ports[0]}", cache=tmp_path / "far") as far,
        ):
            progress, cut = cut_at_half(relay)
            began = time.monotonic()
            assert far.pull("x", progress=progress).read_bytes() == large.read_bytes()
            took = time.monotonic() - began
            # What was on the link when it was cut comes again: less than two chunks, of eight.
            assert size < relay.total(DOWN) < size + (256 << 10)
            assert cut[0] > size // 2
            assert took < 8e-6 * size / MBIT + 1.0


def test_the_next_process_goes_on_there_in_one_stream(tmp_path, large, monkeypatch):
    """And so does a client of a server that knows only offsets, in two."""
    monkeypatch.setattr(streams, "FIRST_PATIENCE", 1)
    monkeypatch.setattr(streams, "PATIENCE", 1)
    asked = []
    pull = ExpertsService.Pull

    def noted(service, request, context):
        asked.append((request.begun_size, request.offset))
        if forgetful.is_set():
            request.ClearField("begun")
        yield from pull(service, request, context)

    forgetful = threading.Event()
    monkeypatch.setattr(ExpertsService, "Pull", noted)
    content = large.read_bytes()
    with here.store(tmp_path) as (server, client):
        digest = client.push(large, "x").digest
        for knows in (True, False):
            cache = tmp_path / f"far-{knows}"
            with (
                Relay(int(server.address.rpartition(":")[2]), link=Link(MBIT)) as relay,
                ExpertClient(f"127.0.0.1:{relay.ports[0]}", cache=cache) as far,
                monkeypatch.context() as patch,
            ):
                patch.setattr("compeft_fl.experts.client.FIRST_PATIENCE", 1)
                progress, _ = cut_at_half(relay)
                with pytest.raises(UnavailableError, match="stopped in mid-call"):
                    far.pull("x", progress=progress)
                kept = (cache / "partial" / digest).stat().st_size
                assert len(content) // 2 < kept < len(content)
                del asked[:]
                (forgetful.clear if knows else forgetful.set)()
                pulled = far.pull("x")
                assert (pulled.transferred, pulled.read_bytes()) == (len(content) - kept, content)
                assert asked == [(kept, 0)] if knows else [(kept, 0), (0, kept)]
                assert not (cache / "partial" / digest).exists()
                assert list((cache / "begun").rglob("x")) == []


def test_another_version_meanwhile_is_sent_whole(tmp_path, large):
    with here.store(tmp_path) as (server, client):
        client.push(large, "x")
        with ExpertClient(server.address, cache=tmp_path / "far") as far:
            stale = far._cache
            expert = client.describe("x")[0]
            stale.begin(server.address, expert)
            with stale.downloading(expert.digest) as file:
                file.write(large.read_bytes()[:1000])
            assert stale.begun(server.address, "x") == (expert.digest, 1000)
            values = here.noise((64, 1 << 12), seed=1)
            tau = TaskVector.from_dict({"base_model.model.l.lora_A.weight": np.float32(2) * values})
            write_update(large, tau, here.CONFIG, "0", "dense")
            client.push(large, "x")
            pulled = far.pull("x")
            assert pulled.transferred == large.stat().st_size
            assert pulled.read_bytes() == large.read_bytes()
            # The first version still goes on where it was, though its name has moved.
            assert far.pull("x@1").transferred == expert.size - 1000


def test_a_beginning_that_is_wrong_is_thrown_away(tmp_path, large):
    with here.store(tmp_path) as (server, client):
        expert = client.push(large, "x")
        with ExpertClient(server.address, cache=tmp_path / "far") as far:
            for begin in (bytes(1000), large.read_bytes() + b"more"):
                far._cache.begin(server.address, expert)
                with far._cache.downloading(expert.digest) as file:
                    file.write(begin)
                assert far.pull("x").read_bytes() == large.read_bytes()
                far._cache._blobs.remove(expert.digest)
