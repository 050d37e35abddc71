"""Experts: what callers and servers can do wrong. One clear error each."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import experts_here as here
import grpc
import pytest
from experts_here import FULL, INVALID, LOST, raw_push, refused

from compeft_fl.errors import (
    BrokenExpertError,
    CompeftError,
    ExpertError,
    ParameterError,
    UnavailableError,
)
from compeft_fl.experts import ExpertClient
from compeft_fl.experts.protocol import PROTOCOL_KEY
from compeft_fl.experts.serving import running
from compeft_fl.experts.store import Limits
from compeft_fl.experts.v1 import experts_pb2, experts_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one(tmp_path):
    return here.folder(tmp_path / "one", here.trained(here.adapter()))


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    """A file as a store keeps it."""
    return here.stored(tmp_path_factory.mktemp("blob"))


# --- callers ----------------------------------------------------------------------------------

PUSHES = {
    "another blob under the digest": (
        lambda s, b: raw_push(s, b[:-1] + b"x", digest=hashlib.sha256(b).digest()),
        LOST, "nothing of them is kept",
    ),
    "a truncated blob": (lambda s, b: raw_push(s, b, chunks=[b[:-9]]), LOST, "found 1922"),
    "more than was said": (lambda s, b: raw_push(s, b, chunks=[b, b]), INVALID, "expected at most"),
    "what does not decode": (lambda s, b: raw_push(s, b"no update at all"), INVALID, "checksum"),
    "half an update": (lambda s, b: raw_push(s, b[:900]), INVALID, "expected part"),
    "no header": (
        lambda s, b: experts_pb2_grpc.ExpertsStub(grpc.insecure_channel(s.address)).Push(
            iter([experts_pb2.PushRequest(chunk=b)])
        ),
        INVALID, "expected a header first",
    ),
    "two headers": (
        lambda s, b: experts_pb2_grpc.ExpertsStub(grpc.insecure_channel(s.address)).Push(
            iter(2 * [experts_pb2.PushRequest(header=experts_pb2.PushHeader(
                name="x", digest=hashlib.sha256(b).digest(), size=len(b)))])
        ),
        INVALID, "expected chunks after the header",
    ),
    "nothing": (lambda s, b: raw_push(s, b"", chunks=[b""]), FULL, "bytes, found 0"),
    "a path": (lambda s, b: raw_push(s, b, name="../../etc/x"), INVALID, "found '../../etc/x'"),
    "a name with an end of line": (lambda s, b: raw_push(s, b, name="a\nb"), INVALID, "a\\nb"),
    "dots": (lambda s, b: raw_push(s, b, name="a..b"), INVALID, "expected a name"),
    "a digest that is none": (lambda s, b: raw_push(s, b, digest=b"../.."), INVALID, "SHA-256"),
    "too large": (lambda s, b: raw_push(s, b, size=1 << 40), FULL, "expected a file"),
    "an offset beyond what is here": (
        lambda s, b: raw_push(s, b, offset=100, chunks=[b[100:]]), INVALID, "offset of at most 0",
    ),
    "too many tags": (
        lambda s, b: raw_push(s, b, tags={f"t{i}": "x" for i in range(40)}), INVALID, "32 tags",
    ),
    "a tag that a terminal acts on": (
        lambda s, b: raw_push(s, b, tags={"t": "\x1b[2J"}), INVALID, "printable",
    ),
    "a metric that is none": (
        lambda s, b: raw_push(s, b, metrics={"m": float("nan")}), INVALID, "finite",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """A server that takes little."""
    folder = tmp_path_factory.mktemp("bounded")
    with running(folder / "store", limits=Limits(max_expert_bytes=10_000)) as server:
        yield server, folder / "store"


@pytest.mark.parametrize("what", PUSHES)
def test_a_push_that_cannot_be(what, bounded, blob):
    server, store = bounded
    push, code, text = PUSHES[what]
    refused(lambda: push(server, blob), code, text)
    assert list((store / "blobs").iterdir()) == []
    with ExpertClient(server.address, cache=store.parent / "cache") as client:
        assert client.list() == []
        assert client.check() == (0, [])


def test_a_store_has_bounds(tmp_path, blob, one):
    limits = Limits(max_bytes=len(blob) + 100, max_parameters=700, max_uploads=2)
    with running(tmp_path / "store", limits=limits) as server:
        refused(lambda: raw_push(server, blob), INVALID, "found 768")
        for at in range(2):  # begun, and left
            with contextlib.suppress(grpc.RpcError):
                raw_push(server, bytes(50 + at), chunks=[b"x"])
        refused(lambda: raw_push(server, blob), FULL, "at most 2 uploads that have begun")
    limits = Limits(max_bytes=len(blob) + 100)
    with running(tmp_path / "store", limits=limits) as server:
        raw_push(server, blob)
        raw_push(server, blob, name="y")  # the same bytes take no room
        refused(lambda: raw_push(server, bytes(200)), FULL, "the store is full")


def test_streams_are_bounded(tmp_path, one):
    with running(tmp_path / "store", max_streams=0) as server:
        client = ExpertClient(server.address, cache=tmp_path / "cache")
        with client, pytest.raises(UnavailableError, match="busy: 0 uploads and downloads"):
            client.push(one, "x")


def test_a_silent_upload_is_ended_and_can_be_resumed(tmp_path, blob):
    silence = threading.Event()

    def slow():
        yield experts_pb2.PushRequest(
            header=experts_pb2.PushHeader(
                name="x", digest=hashlib.sha256(blob).digest(), size=len(blob)
            )
        )
        yield experts_pb2.PushRequest(chunk=blob[:100])
        silence.wait(60)
        yield experts_pb2.PushRequest(chunk=blob[100:])

    with (
        running(tmp_path / "store", silent_seconds=2.0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = experts_pb2_grpc.ExpertsStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.Push(slow())
        assert error.value.code() is grpc.StatusCode.CANCELLED
        asked = experts_pb2.ResumeRequest(digest=hashlib.sha256(blob).digest(), size=len(blob))
        silence.set()
        deadline = time.monotonic() + 20  # the server's file closes after the call
        while stub.Resume(asked).offset != 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stub.Resume(asked).offset == 100
        raw_push(server, blob, offset=100, chunks=[blob[100:]])
        assert stub.List(experts_pb2.ListRequest()).experts[0].name == "x"


def test_numbers_that_no_index_holds(tmp_path, blob):
    with (
        running(tmp_path / "store") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = experts_pb2_grpc.ExpertsStub(channel)
        raw_push(server, blob)
        huge = 2**64 - 1
        reference = experts_pb2.Reference(name="x", version=huge)
        for call, request in (
            (stub.Delete, experts_pb2.DeleteRequest(name="x", version=huge)),
            (stub.Describe, experts_pb2.DescribeRequest(reference=reference)),
        ):
            refused(lambda call=call, request=request: call(request), INVALID, "a version")
        pull = experts_pb2.PullRequest(reference=experts_pb2.Reference(name="x"), offset=huge)
        refused(lambda: list(stub.Pull(pull)), INVALID, "an offset of at most")
        assert len(stub.List(experts_pb2.ListRequest(limit=2**32 - 1)).experts) == 1


def test_a_later_protocol_is_refused(tmp_path):
    with (
        running(tmp_path / "store") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = experts_pb2_grpc.ExpertsStub(channel)
        for later in ("2", "9" * 50, "x", "-1"):
            refused(
                lambda later=later: stub.List(
                    experts_pb2.ListRequest(), metadata=[(PROTOCOL_KEY, later)]
                ),
                grpc.StatusCode.FAILED_PRECONDITION, "this server is older",
            )  # fmt: skip


def test_a_client_of_a_later_protocol_says_so_once(tmp_path, monkeypatch):
    from compeft_fl.experts import transport

    monkeypatch.setattr(transport, "PROTOCOL", 2)
    with here.store(tmp_path) as (_, client):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="expected protocol 1, found 2"):
            client.list()
        assert time.monotonic() - began < 1  # asking again would not help


# --- servers ----------------------------------------------------------------------------------


class Lying(experts_pb2_grpc.ExpertsServicer):
    """A server that says of `blob` what it likes."""

    def __init__(self, replies):
        self.replies = replies

    def Pull(self, request, context):  # noqa: N802
        yield from self.replies(request)


@contextlib.contextmanager
def lying(replies, tmp_path):
    server = grpc.server(ThreadPoolExecutor(2))
    experts_pb2_grpc.add_ExpertsServicer_to_server(Lying(replies), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with ExpertClient(f"127.0.0.1:{port}", cache=tmp_path / "cache") as client:
            yield client
    finally:
        server.stop(0).wait()


def reply(blob, **changed):
    """A header that fits a blob, but for what is changed."""
    told = {"name": "x", "version": 1, "digest": hashlib.sha256(blob).digest(), "size": len(blob)}
    expert = experts_pb2.Expert(**{**told, "layout_id": bytes(16)} | changed)
    return experts_pb2.PullHeader(expert=expert, size=expert.size)


def part(**fields):
    return experts_pb2.PullReply(**fields)


LIES = {
    "nothing": (lambda b: [], BrokenExpertError, "expected a header"),
    "no header": (lambda b: [part(chunk=b)], BrokenExpertError, "expected a header"),
    "other bytes": (
        lambda b: [part(header=reply(b)), part(chunk=bytes(len(b)))], BrokenExpertError,
        "nothing of them is kept",
    ),
    "too few": (
        lambda b: [part(header=reply(b)), part(chunk=b[:-1]), part(end=experts_pb2.PullEnd())],
        BrokenExpertError, "cut off",
    ),
    "too many": (
        lambda b: [part(header=reply(b)), part(chunk=b), part(chunk=b)], BrokenExpertError,
        "bytes more, found",
    ),
    "another name": (lambda b: [part(header=reply(b, name="y"))], BrokenExpertError, "found y"),
    "a path": (lambda b: [part(header=reply(b, name="../x"))], ParameterError, "expected a name"),
    "no digest": (lambda b: [part(header=reply(b, digest=b"/"))], ParameterError, "SHA-256"),
    "no version": (lambda b: [part(header=reply(b, version=0))], ExpertError, "a version"),
    "a configuration that is none": (
        lambda b: [part(header=reply(b, config="{"))], CompeftError, "expected JSON",
    ),
    "a change of what is not here": (
        lambda b: [part(header=experts_pb2.PullHeader(
            expert=reply(b).expert, size=5, catch_up_from=bytes(32))), part(chunk=bytes(5))],
        BrokenExpertError, "a change of what is here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_server_that_lies(what, blob, tmp_path):
    lie, kind, text = LIES[what]
    with lying(lambda request: lie(blob), tmp_path) as client, pytest.raises(kind, match=text):
        client.pull("x")
    cache = tmp_path / "cache"
    assert list((cache / "blobs").iterdir()) == []
    assert list((cache / "known").iterdir()) == []


def test_a_change_that_does_not_fit_is_followed_by_the_whole(tmp_path):
    old = here.adapter()
    folders = [
        here.folder(tmp_path / name, made)
        for name, made in (("old", old), ("new", here.trained(old, share=0.05)))
    ]
    blobs = []
    with here.store(tmp_path / "real") as (_, client):
        for folder in folders:
            client.push(folder, "x")
            blobs.append(client.pull("x").read_bytes())
    asked = []

    def replies(request):
        asked.append(list(request.have))
        if not request.have and len(asked) == 1:
            yield part(header=reply(blobs[0]))
            yield part(chunk=blobs[0])
        elif request.have:
            header = experts_pb2.PullHeader(
                expert=reply(blobs[1], version=2).expert, size=9, catch_up_from=request.have[0]
            )
            yield part(header=header)
            yield part(chunk=b"no change")
        else:
            yield part(header=reply(blobs[1], version=2))
            yield part(chunk=blobs[1])

    with lying(replies, tmp_path) as client:
        client.pull("x")
        assert client.pull("x").read_bytes() == blobs[1]
    assert [len(have) for have in asked] == [0, 1, 0]


_SLOW_SERVER = """
import sys, time
from pathlib import Path
from compeft_fl.experts import service, serving
from compeft_fl.experts.store import Store

class Slow:
    def __init__(self, file):
        self.file, self.seek = file, file.seek
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def read(self, size):
        time.sleep(0.05)
        return self.file.read(size)

service.CHUNK_BYTES = 1 << 14
fast = Store.open
Store.open = lambda store, expert: Slow(fast(store, expert))
server = serving.start(Path(sys.argv[1]), port=int(sys.argv[2]))
print(server.address, flush=True)
server.wait()
"""


@contextlib.contextmanager
def slow_server(folder, port=0):
    """A server in a process of its own, whose disk is slow."""
    command = [sys.executable, "-c", _SLOW_SERVER, str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_server_that_stops_in_mid_stream(tmp_path, monkeypatch):
    """What has come is kept; the pull after that goes on there."""
    from compeft_fl.experts import streams

    monkeypatch.setattr(streams, "_WAIT", 0.01)
    monkeypatch.setattr(streams, "_LONGEST_WAIT", 0.02)
    big = here.adapter()
    big.state["base_model.model.big.lora_A.weight"] = here.noise((8, 1 << 14))
    folder = here.folder(tmp_path / "big", big)
    with (
        slow_server(tmp_path / "store") as (process, address),
        ExpertClient(address, cache=tmp_path / "cache") as client,
    ):
        pushed = client.push(folder, "x")
        stopped = []

        def stop(done, total):
            if not stopped and done > total // 3:
                stopped.append(done)
                process.kill()

        with pytest.raises(UnavailableError, match="no server answers there"):
            client.pull("x", progress=stop)
        partial = tmp_path / "cache" / "partial" / pushed.digest
        kept = partial.stat().st_size
        assert stopped[0] <= kept < pushed.size
        assert list((tmp_path / "cache" / "blobs").iterdir()) == []
        process.wait()
        monkeypatch.undo()
        with slow_server(tmp_path / "store", address.rpartition(":")[2]):
            pulled = client.pull("x")
        assert pulled.transferred == pushed.size - kept
        assert not partial.exists()
