"""Experts: tokens, TLS, full disks and the command. One clear error each."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import experts_here as here
import grpc
import pytest
from experts_here import FULL, raw_push, refused

from compeft_fl.cli.main import main
from compeft_fl.deploy.credentials import write_credentials
from compeft_fl.errors import (
    AccessError,
    ExpertError,
    ParameterError,
    UnavailableError,
    UnknownExpertError,
)
from compeft_fl.experts import ExpertClient
from compeft_fl.experts.serving import Tls, running, start
from compeft_fl.experts.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one(tmp_path):
    return here.folder(tmp_path / "one", here.trained(here.adapter()))


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    """A file as a store keeps it."""
    return here.stored(tmp_path_factory.mktemp("blob"))


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
            refused(
                lambda: raw_push(server, blob, name="more"),
                FULL,
                "the store's index cannot be used",
            )
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


def test_a_server_in_the_background_of_a_script_ends_when_it_is_told(tmp_path):
    """Such a shell has its jobs ignore SIGINT, and nohup has them ignore SIGHUP."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "compeft_fl.cli", "experts", "serve", "--store", str(store)]

    def ignoring():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True,
        preexec_fn=ignoring, cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            address = re.search(r" on (\S+), plain text", process.stdout.readline())[1]
            process.send_signal(signal.SIGHUP)
            with ExpertClient(address, cache=tmp_path / "cache") as client:
                assert client.list() == []
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
