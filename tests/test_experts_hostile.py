"""Experts: what callers, servers, tokens and disks can do wrong. One clear error each."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import experts_here as here
import grpc
import pytest

from compeft_fl.cli.main import main
from compeft_fl.deploy.credentials import write_credentials
from compeft_fl.errors import (
    AccessError,
    BrokenExpertError,
    CompeftError,
    ExpertError,
    ParameterError,
    UnavailableError,
    UnknownExpertError,
)
from compeft_fl.experts import ExpertClient
from compeft_fl.experts.protocol import PROTOCOL_KEY
from compeft_fl.experts.serving import Tls, running, start
from compeft_fl.experts.store import Limits
from compeft_fl.experts.tokens import Tokens
from compeft_fl.experts.v1 import experts_pb2, experts_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one(tmp_path):
    return here.folder(tmp_path / "one", here.trained(here.adapter()))


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    """A file as a store keeps it."""
    path = tmp_path_factory.mktemp("blob")
    folder = here.folder(path / "one", here.trained(here.adapter()))
    with here.store(path) as (_, client):
        client.push(folder, "x")
        return client.pull("x").read_bytes()


def raw_push(server, content, *, name="x", digest=None, size=None, chunks=None, **header):
    """Push as somebody who has written a client of their own."""
    digest = hashlib.sha256(content).digest() if digest is None else digest
    size = len(content) if size is None else size
    first = experts_pb2.PushHeader(name=name, digest=digest, size=size, **header)
    messages = [experts_pb2.PushRequest(header=first)]
    messages += [experts_pb2.PushRequest(chunk=each) for each in chunks or [content]]
    with grpc.insecure_channel(server.address) as channel:
        return experts_pb2_grpc.ExpertsStub(channel).Push(iter(messages))


def refused(call, code, text):
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert (error.value.code(), text in error.value.details()) == (code, True), error.value
    assert "\n" not in error.value.details()


# --- callers ----------------------------------------------------------------------------------

INVALID, FULL, LOST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
)
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
    def slow():
        yield experts_pb2.PushRequest(
            header=experts_pb2.PushHeader(
                name="x", digest=hashlib.sha256(blob).digest(), size=len(blob)
            )
        )
        yield experts_pb2.PushRequest(chunk=blob[:100])
        time.sleep(1.5)
        yield experts_pb2.PushRequest(chunk=blob[100:])

    with (
        running(tmp_path / "store", silent_seconds=0.3) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = experts_pb2_grpc.ExpertsStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.Push(slow())
        assert error.value.code() is grpc.StatusCode.CANCELLED
        asked = experts_pb2.ResumeRequest(digest=hashlib.sha256(blob).digest(), size=len(blob))
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


# --- tokens and TLS ---------------------------------------------------------------------------


def test_tokens_say_who_may_do_what(tmp_path, one, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    tokens = Tokens(store)
    secrets = {
        "reader": tokens.add("reader", ["read"], 1),
        "writer": tokens.add("writer", ["read", "write"], 1),
        "late": tokens.add("late", ["read"], 1e-9),
        "wrong": "cft_wrong",
        "none": "",
    }
    assert all(
        secret not in (store / "tokens.json").read_text() for secret in list(secrets.values())[:3]
    )
    assert (store / "tokens.json").stat().st_mode & 0o777 == 0o600
    with running(store, tokens=True) as server:

        def client(name):
            return ExpertClient(server.address, token=secrets[name], cache=tmp_path / "cache")

        with client("writer") as writer, client("reader") as reader:
            writer.push(one, "x")
            assert [each.name for each in reader.list()] == ["x"]
            assert reader.pull("x").expert.name == "x"
            for call in (lambda: reader.push(one, "y"), lambda: reader.delete("x")):
                with pytest.raises(AccessError, match="token reader may read, not write"):
                    call()
            for name, text in (
                ("late", "token 'late' expired at"),
                ("wrong", "expected a token of this store, found another"),
                ("none", "expected a token, found none"),
            ):
                with client(name) as other:
                    for call in (other.list, lambda other=other: other.search("x"), other.check):
                        with pytest.raises(AccessError, match=text):
                            call()
                    with pytest.raises(AccessError, match=text):
                        other.pull("y")
            tokens.remove("reader")
            with pytest.raises(AccessError, match="found another"):
                reader.list()


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    write_credentials(folder / "ours", ["127.0.0.1"], 0)
    write_credentials(folder / "theirs", ["127.0.0.1"], 0)
    write_credentials(folder / "elsewhere", ["example.org"], 0)
    return folder


def tls_of(folder):
    server = folder / "server"
    return Tls((server / "server.crt").read_bytes(), (server / "server.key").read_bytes())


def test_tls_and_plain_text(tmp_path, one, credentials):
    ca = credentials / "ours" / "server" / "ca.crt"
    with running(tmp_path / "store", tls=tls_of(credentials / "ours")) as server:
        with ExpertClient(server.address, ca=ca, cache=tmp_path / "cache") as client:
            client.push(one, "x")
            assert client.pull("x").expert.name == "x"
        wrong = {
            "expected plain text, found TLS": None,
            "expected a certificate of the given authority": credentials
            / "theirs" / "server" / "ca.crt",
        }  # fmt: skip
        for text, given in wrong.items():
            with (
                ExpertClient(server.address, ca=given, cache=tmp_path / "other") as client,
                pytest.raises(UnavailableError, match=text),
            ):
                client.list()
    with running(tmp_path / "store") as server:
        client = ExpertClient(server.address, ca=ca, cache=tmp_path / "other")
        with client, pytest.raises(UnavailableError, match="a server that speaks plain text"):
            client.list()
    with running(tmp_path / "store", tls=tls_of(credentials / "elsewhere")) as server:
        elsewhere = credentials / "elsewhere" / "server" / "ca.crt"
        client = ExpertClient(server.address, ca=elsewhere, cache=tmp_path / "other")
        with client, pytest.raises(UnavailableError, match="for this host, found another"):
            client.list()


def test_other_machines_need_tls_and_tokens(tmp_path, credentials):
    tls = tls_of(credentials / "ours")
    for options in ({}, {"tls": tls}, {"tokens": True}):
        with pytest.raises(ParameterError, match="expected TLS and tokens where other machines"):
            start(tmp_path / "store", "0.0.0.0", **options)
    with pytest.raises(ParameterError, match="expected tokens, found none"):
        start(tmp_path / "store", "0.0.0.0", tls=tls, tokens=True)
    with pytest.raises(ParameterError, match=r"expected TLS to example\.org:1, for a token"):
        ExpertClient("example.org:1", token="secret", cache=tmp_path / "cache")
    with pytest.raises(ExpertError, match="certificate and key are none"):
        start(tmp_path / "store", tls=Tls(b"none", b"none"))
    with running(tmp_path / "store") as server, pytest.raises(ExpertError, match="in use"):
        start(tmp_path / "second", port=int(server.address.rpartition(":")[2]))


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


# --- disks ------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_beyond(size):
    """A disk that is full once a file has so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_of_the_store(tmp_path, blob):
    store = tmp_path / "store"
    with here.store(tmp_path) as (server, client):
        raw_push(server, blob, name="small")
        index = (store / "index.sqlite-wal").stat().st_size
        with no_file_beyond(len(blob) - 100):
            other = blob + b"x"  # its digest is new
            refused(lambda: raw_push(server, other), FULL, "cannot keep it: File too large")
        with no_file_beyond(index + 100):  # room for the file, and none for its name
            for count in range(2, 40):
                with contextlib.suppress(grpc.RpcError):
                    raw_push(server, blob, name=f"name{count}")
            refused(lambda: raw_push(server, blob, name="more"), FULL, "the index cannot be used")
        named = [each.name for each in client.list()]
        assert "small" in named
        assert "more" not in named
        assert client.check() == (1, [])
        assert list((store / "partial").iterdir()) == []
        raw_push(server, blob, name="more")  # there is room again
        assert "more" in [each.name for each in client.list()]


def test_a_full_disk_of_the_client(tmp_path, one, capsys, monkeypatch):
    cache, out = tmp_path / "own", tmp_path / "out"
    with here.store(tmp_path) as (server, client):
        pushed = client.push(one, "x")
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_SERVER", server.address)
        arguments = ("pull", "x", "--cache", cache, "--to", out)
        for limit in (pushed.size - 100, pushed.size + 100):  # the cache, then the folder
            with no_file_beyond(limit):
                said = one_line(capsys, *arguments)
            assert "File too large" in said
            assert not out.exists()
            assert list((cache / "partial").iterdir()) == []
            assert len(list((cache / "blobs").iterdir())) == (limit > pushed.size)
        assert main(["experts", *map(str, arguments)]) == 0


# --- the command ------------------------------------------------------------------------------


def one_line(capsys, *arguments):
    assert main(["experts", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.replace("\n", "").isprintable()
    assert "unexpected" not in err, err
    return err


def test_each_command_says_in_one_line_what_is_wrong(tmp_path, one, capsys, monkeypatch):
    with running(tmp_path / "store") as server:
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_SERVER", server.address)
        monkeypatch.setenv("COMPEFT_FL_EXPERTS_CACHE", str(tmp_path / "cache"))
        assert "no expert x" in one_line(capsys, "pull", "x")
        assert "no expert x" in one_line(capsys, "describe", "x")
        assert "no expert x@3" in one_line(capsys, "delete", "x@3")
        assert "no expert x" in one_line(capsys, "search", "--like", "x")
        assert "expected a name" in one_line(capsys, "push", one, "../x")
        assert "nothing of that name" in one_line(capsys, "push", tmp_path / "no", "x")
        assert "KEY=VALUE" in one_line(capsys, "push", one, "x", "--tag", "t")
        assert "expected a number" in one_line(capsys, "push", one, "x", "--metric", "m=x")
        assert "no density" in one_line(
            capsys, "push", one, "x", "--codec", "steps", "--density", "0.1"
        )
        assert "another process has this store" in one_line(
            capsys, "check", "--store", tmp_path / "store"
        )
        assert "another process has this store" in one_line(
            capsys, "serve", "--store", tmp_path / "store", "--listen", "127.0.0.1:0"
        )
        (tmp_path / "token").write_text("a\x1btoken")
        assert "printable ASCII" in one_line(capsys, "list", "--token-file", tmp_path / "token")
        assert "found files: use --force" in one_line(capsys, "pull", "x", "--to", one)
        assert "expected a size" in one_line(capsys, "list", "--cache-size", "much")
        assert "expected a certificate" in one_line(capsys, "list", "--ca", __file__)
        assert "No such file" in one_line(capsys, "list", "--ca", tmp_path / "none")
        assert main(["experts", "push", str(one), "x", "--json"]) == 0
        assert '"version": 1' in capsys.readouterr().out
        for command in (["list"], ["search"], ["describe", "x"], ["pull", "x"], ["check"]):
            assert main(["experts", *command]) == 0
            assert main(["experts", *command, "--json"]) == 0
            assert capsys.readouterr().err == ""
    assert "no server answers there" in one_line(capsys, "list")
    elsewhere = ("serve", "--store", tmp_path / "store", "--listen", "0.0.0.0:0")
    files = ("--cert", tmp_path / "none", "--key", tmp_path / "none")
    assert "No such file" in one_line(capsys, *elsewhere, *files)
    assert "together" in one_line(capsys, *elsewhere, *files[:2])
    assert main(["experts", "check", "--store", str(tmp_path / "store")]) == 0
    assert "1 files are" in capsys.readouterr().out
    assert "expected a store" in one_line(capsys, "check", "--store", tmp_path / "no")


def test_the_command_makes_tokens(tmp_path, capsys):
    store = ["--store", str(tmp_path / "store")]
    assert main(["experts", "token", "add", "laptop", "--rights", "read,write", *store]) == 0
    secret = capsys.readouterr().out.strip()
    assert Tokens(tmp_path / "store").find(secret).rights == ("read", "write")
    assert main(["experts", "token", "list", *store]) == 0
    shown = capsys.readouterr().out
    assert "laptop" in shown
    assert secret not in shown
    assert "twice" in one_line(capsys, "token", "add", "laptop", *store)
    assert "expected rights" in one_line(capsys, "token", "add", "x", "--rights", "all", *store)
    assert "days over 0" in one_line(capsys, "token", "add", "x", "--days", "-1", *store)
    assert "token's name" in one_line(capsys, "token", "remove", "x", *store)
    assert "a token's name with add" in one_line(capsys, "token", "add", *store)
    assert main(["experts", "token", "remove", "laptop", *store]) == 0
    with pytest.raises(AccessError):
        Tokens(tmp_path / "store").find(secret)


def test_health_and_reflection_answer(tmp_path):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with (
        running(tmp_path / "store") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        name = "compeft_fl.experts.v1.Experts"
        for service in ("", name):
            found = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([asked]))
        assert name in [each.name for each in answer.list_services_response.service]


def test_an_unknown_expert_is_not_asked_for_again(tmp_path):
    with here.store(tmp_path) as (_, client):
        began = time.monotonic()
        with pytest.raises(UnknownExpertError):
            client.pull("x")
        assert time.monotonic() - began < 1
