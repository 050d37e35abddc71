"""The index of a store: what it keeps in memory never shows in what it finds."""

from __future__ import annotations

import os
import threading

import numpy as np
import psutil
import pytest

from compeft_fl.errors import UnknownExpertError
from compeft_fl.experts.expert import Expert
from compeft_fl.experts.index import Index
from compeft_fl.experts.kept import Kept
from compeft_fl.experts.names import Reference
from compeft_fl.experts.sketches import SIZE

LAYOUT = "ab" * 16
TASKS = ("sections", "roles", "languages")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "index.sqlite"


def version(name, rng=None, **told):
    rng = np.random.default_rng(0) if rng is None else rng
    given = {"digest": rng.bytes(32).hex(), "size": 9, "layout_id": LAYOUT, "base_model": "tiny"}
    return Expert(name, 0, **given | told)


def signs(rng):
    return rng.integers(-127, 128, SIZE).astype(np.int8)


def test_what_is_found_is_what_a_fresh_index_finds(file):
    """Pushes and deletions in between, of the row with the largest number as well."""
    rng = np.random.default_rng(7)
    index = Index(file)
    names: list[str] = []
    for turn in range(160):
        if names and (turn > 120 or turn % 5 == 4):
            name = names.pop()  # its row is the newest: SQLite would give its number again
            index.remove(name)
        name = f"{TASKS[turn % 3]}-{turn % 130}"
        tags = {"task": TASKS[turn % 3], "language": "de" if turn % 2 else "en"}
        index.add(version(name, rng, tags=tags, base_model=f"base{turn % 2}"), signs(rng))
        names.append(name)
        if turn % 4 and turn < 150:
            continue
        fresh = Index(file)
        for words, given, base in (
            ("sections", {}, ""), ("sec", {}, "base1"), ("roles", {"language": "de"}, ""),
            ("", {"task": "roles"}, ""), ("", {"task": "roles", "language": "en"}, "base0"),
            ("", {}, "base1"), ("", {}, ""), ("none", {}, ""),
        ):  # fmt: skip
            found = [each.search(words, given, base, 20) for each in (index, index, fresh)]
            assert found[0] == found[1] == found[2], (turn, words, given, base)
            assert [each.tags for each in found[0]] == [each.tags for each in found[2]]
            assert all(given.items() <= each.tags.items() for each in found[0])
        asked = index.find(Reference(names[0]))
        assert index.like(asked, {}, "", 20) == fresh.like(asked, {}, "", 20), turn
        fresh.close()
    index.close()


def test_signs_of_a_version_that_is_gone_are_not_those_of_the_next(file):
    """With so many that the signs in memory choose which are looked at."""
    rng = np.random.default_rng(1)
    index = Index(file)
    for number in range(130):
        index.add(version(f"x{number}", rng), signs(rng))
    given = signs(rng)
    asked = index.add(version("asked", rng), given)
    index.add(version("gone", rng), (-given).astype(np.int8))
    assert "gone" not in [each.name for each, _ in index.like(asked, {}, "", 20)]
    index.remove("gone")
    index.add(version("twin", rng), given)
    (nearest, similarity), *_ = index.like(asked, {}, "", 20)
    assert (nearest.name, similarity) == ("twin", pytest.approx(1.0))
    index.remove("asked")
    with pytest.raises(UnknownExpertError, match="asked@1: it was deleted just now"):
        index.like(asked, {}, "", 20)
    index.close()


def test_what_is_acknowledged_is_found_at_once_while_others_search(file):
    index = Index(file)
    rng = np.random.default_rng(3)
    for number in range(40):
        index.add(version(f"roles-{number}", rng, tags={"n": str(number)}), signs(rng))
    stop, failed = threading.Event(), []

    def search():
        while not stop.is_set():
            for words in ("roles", "mine"):
                found = [each.name for each in index.search(words, {}, "", 100)]
                if len(found) != len(set(found)) or (words == "roles" and len(found) < 40):
                    failed.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(16):
            pushed = index.add(version("mine", rng, tags={"n": str(number)}), signs(rng))
            assert index.search("mine", {}, "", 5) == [pushed], number
            assert index.search("", {"n": str(number)}, "", 5)[0].version == pushed.version
            if number % 2:
                index.remove("mine")
                assert index.search("mine", {}, "", 5) == [], number
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    index.close()


def test_many_threads_open_the_file_a_few_times(file):
    """Each connection maps the file: one for each thread took a gigabyte of addresses."""
    index = Index(file)
    index.add(version("x"), np.ones(SIZE, np.int8))
    together = threading.Barrier(24)

    def search():
        together.wait()
        assert len(index.search("x", {}, "", 5)) == 1

    threads = [threading.Thread(target=search) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened = [each for each in psutil.Process(os.getpid()).open_files() if each.path == str(file)]
    assert 0 < len(opened) <= 5
    index.close()


def test_what_was_read_once_is_kept_within_its_bytes():
    asked: list[int] = []

    def read(rows):
        asked.extend(rows)
        return [(row, f"x{row}".ljust(100)) for row in rows if row < 90]

    kept = Kept(read, len, max_bytes=1050)
    for _ in range(2):
        found = kept.values([3, 1, 99])
        assert {row: each.strip() for row, each in found.items()} == {3: "x3", 1: "x1"}
    assert asked == [3, 1, 99, 99]  # what is gone is looked for again
    kept.values(range(90))
    assert len(kept) == 10
    assert list(kept.values([5])) == [5]
    assert asked[-1] == 5  # the oldest ones went


def test_what_was_read_while_somebody_wrote_is_not_kept(file, monkeypatch):
    rng = np.random.default_rng(2)
    index = Index(file)
    index.add(version("x0", rng), signs(rng))
    rows = index._rows

    def slow(sql, *values):
        found = rows(sql, *values)
        if "words MATCH" in sql:
            monkeypatch.setattr(index, "_rows", rows)
            index.add(version("x1", rng), signs(rng))
        return found

    monkeypatch.setattr(index, "_rows", slow)
    assert [each.name for each in index.search("x", {}, "", 5)] == ["x0"]  # as of its beginning
    assert sorted(each.name for each in index.search("x", {}, "", 5)) == ["x0", "x1"]
    index.close()
