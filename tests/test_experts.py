"""Experts end to end, in one process: what is pushed is found, pulled, and is what it was."""

from __future__ import annotations

import json
import os
import threading

import experts_here as here
import numpy as np
import pytest

from compeft_fl.adapters import load_folder, read_update, write_update
from compeft_fl.adapters.compression import compress_adapter
from compeft_fl.errors import (
    AdapterError,
    BrokenExpertError,
    ParameterError,
    UnavailableError,
    UnknownExpertError,
)
from compeft_fl.experts import ExpertClient
from compeft_fl.reduction.quality import Quality
from compeft_fl.task_vector import TaskVector


@pytest.fixture
def start(tmp_path):
    return here.folder(tmp_path / "start", here.adapter())


@pytest.fixture
def one(tmp_path):
    return here.folder(tmp_path / "one", here.trained(here.adapter()))


def test_push_list_search_describe_pull_delete(tmp_path, one):
    with here.store(tmp_path) as (_, client):
        pushed = client.push(
            one, "sections", tags={"task": "Debian sections"}, metrics={"accuracy": 0.7}
        )
        assert (pushed.name, pushed.version, pushed.base_model) == ("sections", 1, "org/tiny")
        assert pushed.tags == {"task": "Debian sections"}
        assert client.list() == [pushed]
        for words in ("sections", "sec", "debian", "tiny sections"):
            assert [each.expert for each in client.search(words)] == [pushed], words
        assert client.search("translate") == []
        assert client.search(tags={"task": "Debian sections"})[0].expert == pushed
        assert client.search(tags={"task": "sections"}) == []
        assert client.search(base_model="org/tiny")[0].expert == pushed
        assert client.search(base_model="org/other") == []
        found, versions = client.describe("sections")
        assert found == pushed
        assert versions == [pushed]
        assert found.config == here.CONFIG
        assert found.metrics == {"accuracy": 0.7}
        pulled = client.pull("sections")
        assert pulled.expert == pushed
        assert pulled.transferred == pushed.size == len(pulled.read_bytes())
        pulled.save(tmp_path / "out")
        assert here.same(load_folder(tmp_path / "out"), pulled.adapter())
        assert client.check() == (1, [])
        assert client.delete("sections") == 1
        assert client.list() == []
        assert client.search("sections") == []
        assert list((tmp_path / "store" / "blobs").iterdir()) == []
        with pytest.raises(UnknownExpertError, match="no expert sections"):
            client.pull("sections")


def test_all_of_an_adapter_is_kept_on_a_grid_of_eleven_bits(tmp_path, one):
    given = load_folder(one)
    with here.store(tmp_path) as (_, client):
        pushed = client.push(one, "whole")
        got = client.pull("whole").adapter()
    before, after = (TaskVector.from_dict(dict(each.state)) for each in (given, got))
    assert Quality.of(before, after).cosine > 0.99999
    assert pushed.codec == "steps"
    for name, values in given.state.items():
        error = np.abs(got.state[name] - values).max()
        assert error <= np.abs(values).max() / 1023, name


def test_a_start_is_pushed_once_and_comes_along(tmp_path, one, start):
    with here.store(tmp_path) as (_, client):
        first = client.push(one, "one", init=start)
        client.push(
            here.folder(tmp_path / "two", here.trained(here.adapter(), 2)), "two", init=start
        )
        starts = [each for each in client.list() if each.name.startswith("start-")]
        assert len(starts) == 1
        assert f"start-{first.start.removeprefix('blake2b:')}" == starts[0].name
        assert client.search("start") == []  # it is no expert for a task
        pulled = client.pull("one")
        direct = compress_adapter(load_folder(one), load_folder(start))
        expected = direct.update.to_task_vector().apply(load_folder(start).state)
        got = pulled.adapter().state
        assert all(np.array_equal(got[name], expected[name]) for name in expected)
        assert first.size < starts[0].size / 4


def test_an_expert_without_its_start_says_so(tmp_path, one, start):
    made = compress_adapter(load_folder(one), load_folder(start))
    file = tmp_path / "a.compeft"
    write_update(file, made.update, here.CONFIG, made.start)
    with here.store(tmp_path) as (_, client):
        client.push(file, "alone")
        pulled = client.pull("alone")
        with pytest.raises(AdapterError, match="relative to an adapter before training"):
            pulled.adapter()
        client.push(file, "alone", init=start)
        client.pull("alone").adapter()
        with pytest.raises(AdapterError, match="expected the start"):
            client.push(file, "alone", init=one)


def test_versions_are_named_in_turn_and_never_change(tmp_path, one, start):
    with here.store(tmp_path) as (_, client):
        first = client.push(one, "x")
        assert client.push(one, "x") == first  # nothing new
        second = client.push(start, "x")
        third = client.push(one, "x")
        assert [first.version, second.version, third.version] == [1, 2, 3]
        assert third.digest == first.digest
        assert client.describe("x")[1] == [third, second, first]
        assert client.pull("x@2").expert == second
        assert client.pull(f"x@{second.digest[:12]}").expert == second
        assert client.delete("x@3") == 1
        assert client.pull("x").expert == second
        assert client.push(one, "x").version == 4  # a number is never used again
        assert client.pull("x@1").expert == first
        for reference in ("x@3", "x@9", "x@abcdefabcdef", "y"):
            with pytest.raises(UnknownExpertError, match=f"no expert {reference}"):
                client.pull(reference)
        for reference in ("x@0", "x@abc", "x@", "../x", "x/y", ""):
            with pytest.raises(ParameterError, match="expected a "):
                client.pull(reference)


def test_a_version_is_caught_up_with(tmp_path):
    """Whoever has a version is sent what has changed, and makes the same file of it."""
    states = [here.adapter()]
    for seed in range(1, 4):
        states.append(here.trained(states[-1], seed, share=0.05))
    folders = [here.folder(tmp_path / str(i), made) for i, made in enumerate(states)]
    with here.store(tmp_path) as (server, client):
        client.push(folders[0], "x")
        client.pull("x")
        for path in folders[1:]:
            newest = client.push(path, "x")
        pulled = client.pull("x")
        assert pulled.expert == newest
        assert 0 < pulled.transferred < newest.size / 2
        with ExpertClient(server.address, cache=tmp_path / "empty") as other:
            whole = other.pull("x")
            assert whole.transferred == newest.size
            assert whole.read_bytes() == pulled.read_bytes()


def test_what_is_like_what(tmp_path):
    start = here.adapter()
    base = here.trained(start, 5, share=0.9)
    near = here.trained(base, 6, share=0.05)
    init = here.folder(tmp_path / "init", start)
    with here.store(tmp_path) as (_, client):
        client.push(here.folder(tmp_path / "base", base), "base", init=init)
        client.push(here.folder(tmp_path / "near", near), "near", init=init)
        for seed in range(7, 12):
            far = here.folder(tmp_path / f"far{seed}", here.trained(start, seed, share=0.9))
            client.push(far, f"far{seed}", init=init)
        found = client.search(like="base", limit=3)
        assert found[0].expert.name == "near"
        files = [read_update(client.pull(name).path).update for name in ("base", "near")]
        expected = files[0].with_scales([1.0]).cosine(files[1].with_scales([1.0]))
        assert found[0].similarity == pytest.approx(expected, abs=0.08)  # three times its error
        assert found[1].similarity < 0.3


# --- the cache --------------------------------------------------------------------------------


def test_what_is_in_the_cache_asks_nobody(tmp_path, one, caplog):
    with here.store(tmp_path) as (server, client):
        pushed = client.push(one, "x")
        first = client.pull("x")
        assert client.pull(f"x@{pushed.digest}").from_cache
        assert client.pull("x").from_cache
    with ExpertClient(server.address, cache=tmp_path / "cache") as away:
        assert away.pull("x@1").read_bytes() == first.read_bytes()
        assert "that of the cache" not in caplog.text
        assert away.pull("x").expert == pushed  # the last that was said to be the newest
        assert "that of the cache" in caplog.text
        with pytest.raises(UnavailableError, match="no server answers there"):
            away.pull("y")
    with ExpertClient(server.address, cache=tmp_path / "cache", offline=True) as offline:
        assert offline.pull("x").from_cache
        with pytest.raises(UnknownExpertError, match="not in the cache"):
            offline.pull("y")
        with pytest.raises(UnavailableError, match="offline"):
            offline.list()


def test_a_broken_file_of_the_cache_is_fetched_again(tmp_path, one):
    with here.store(tmp_path) as (server, client):
        client.push(one, "x")
        path = client.pull("x").path
        good = path.read_bytes()
        path.write_bytes(good[:-9] + b"x" + good[-8:])
        with ExpertClient(server.address, cache=tmp_path / "cache") as other:
            assert other.pull("x").read_bytes() == good


def test_the_least_recently_used_go(tmp_path):
    with here.store(tmp_path) as (server, client):
        for seed in range(4):
            client.push(here.folder(tmp_path / str(seed), here.adapter(seed)), f"x{seed}")
        size = max(each.size for each in client.list())
        small = ExpertClient(server.address, cache=tmp_path / "small", cache_bytes=int(2.5 * size))
        with small:
            first, second = small.pull("x0"), small.pull("x1")
            os.utime(second.path, (1, 1))
            os.utime(first.path, (2, 2))
            third = small.pull("x2")
            assert [each.path.exists() for each in (first, second, third)] == [True, False, True]
            assert small.pull("x1").transferred == second.expert.size


def test_a_download_goes_on_where_it_was_cut(tmp_path, one):
    with here.store(tmp_path) as (server, client):
        pushed = client.push(one, "x")
        whole = client.pull("x").read_bytes()
        for left in (whole[:100], b"other bytes", whole + b"more", whole):
            cache = tmp_path / f"cut{len(left)}"
            with ExpertClient(server.address, cache=cache) as other:
                (cache / "partial" / pushed.digest).write_bytes(left)
                pulled = other.pull("x")
                assert pulled.read_bytes() == whole
                if left == whole[:100]:
                    assert pulled.transferred == len(whole) - 100


def test_many_clients_of_one_cache(tmp_path, one):
    with here.store(tmp_path) as (server, client):
        pushed = client.push(one, "x")
        got, failed = [], []

        def pull():
            try:
                with ExpertClient(server.address, cache=tmp_path / "shared") as other:
                    got.append(other.pull("x"))
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=pull) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert sorted(each.transferred for each in got) == [0] * 7 + [pushed.size]
        assert list((tmp_path / "shared" / "partial").iterdir()) == []


def test_a_cache_that_was_tampered_with_knows_nothing(tmp_path, one):
    with here.store(tmp_path) as (_, client):
        client.push(one, "x")
        client.pull("x")
        (known,) = (tmp_path / "cache" / "known").glob("*/x")
        for told in ("{", "[]", json.dumps({"newest": 1, "versions": [{"name": "x"}]})):
            known.write_text(told)
            assert client.pull("x").from_cache


# --- the store on the disk --------------------------------------------------------------------


def test_a_store_that_was_killed_is_tidied(tmp_path, one):
    with here.store(tmp_path) as (_, client):
        client.push(one, "x")
    blobs = tmp_path / "store" / "blobs"
    (blobs / ("0" * 64)).write_bytes(b"without a name")
    (blobs / ".x.1.tmp").write_bytes(b"half")
    with here.store(tmp_path) as (_, client):
        assert client.check() == (1, [])
        assert len(list(blobs.iterdir())) == 1


def test_a_broken_blob_is_found_and_never_sent(tmp_path, one):
    with here.store(tmp_path) as (server, client):
        pushed = client.push(one, "x")
        blob = tmp_path / "store" / "blobs" / pushed.digest
        content = bytearray(blob.read_bytes())
        content[50] ^= 1
        blob.write_bytes(content)
        count, problems = client.check()
        assert count == 1
        assert "has changed on the disk" in problems[0]
        with ExpertClient(server.address, cache=tmp_path / "empty") as other:
            with pytest.raises(BrokenExpertError, match="has changed on the disk"):
                other.pull("x")
            assert list((tmp_path / "empty" / "blobs").iterdir()) == []
        blob.unlink()
        assert "missing" in client.check()[1][0]
        with pytest.raises(BrokenExpertError, match="gone from the store"):
            client.pull("x@1")
        assert client.push(one, "x") == pushed  # which mends it
        assert client.check() == (1, [])
        assert client.pull("x").expert == pushed


def test_two_processes_do_not_open_one_store(tmp_path):
    from compeft_fl.errors import ExpertError
    from compeft_fl.experts.serving import start

    with here.store(tmp_path), pytest.raises(ExpertError, match="another process has this store"):
        start(tmp_path / "store")
