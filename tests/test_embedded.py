"""The embedded instructions and the scripts that make them, on a small archive."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from compeft_fl.app import embedded
from compeft_fl.app.embedded import build_debian_instructions as instructions
from compeft_fl.app.embedded import debian_archive
from compeft_fl.app.embedded.build_debian_sections import split_of
from compeft_fl.errors import ConfigError

PACKAGES = """\
Package: alpha
Source: alpha-source (1.0)
Depends: libc6 (>= 2.35), python3:any | python3-all, libc6 (<< 3)
Section: contrib/net
Description: tools for the networks of Alpha
Description-md5: 11
Tag: implemented-in::c, role::program,
 interface::commandline

Package: alpha
Version: 2
Section: doc
Description: an older one

Package: beta
Description: nobody says more
"""
TRANSLATIONS = """\
Package: alpha
Description-md5: 11
Description-en: tools for the networks of Alpha
 They ask, answer and measure, over wires
 and without, for as long as it takes.
 .
 There are:
  - a list
  - of two
"""
ALPHA, BETA = debian_archive.read_lists(PACKAGES, TRANSLATIONS)


def test_what_the_archive_says():
    assert ALPHA.name == "alpha"
    assert ALPHA.source == "alpha-source"
    assert ALPHA.section == "net"
    assert ALPHA.synopsis == "tools for the networks of Alpha"
    assert ALPHA.description == (
        "They ask, answer and measure, over wires and without, for as long as it takes.\n\n"
        "There are:\n - a list\n - of two"
    )
    assert ALPHA.depends == ("libc6", "python3")
    assert ALPHA.tags == ("implemented-in::c", "interface::commandline", "role::program")
    assert ALPHA.split == split_of("alpha-source")
    assert BETA == ("beta", "beta", "", "nobody says more", "", (), ())


def test_a_package_is_asked_about_in_five_ways():
    rows = instructions.build([ALPHA, BETA])
    assert {row.kind: row.response for row in rows} == {
        "depends": "libc6, python3",
        "language": "C",
        "role": "program",
        "section": "net",
        "synopsis": "tools for the networks of Alpha",
    }
    prompts = {row.kind: row.prompt for row in rows}
    assert "tools for the networks" not in prompts["synopsis"]  # it is the answer
    question, about = prompts["role"].split("\n\n")
    assert question == "What is the role of this package?"
    assert about.startswith("alpha: tools for the networks of Alpha. They ask, answer")
    assert all(row.split == ALPHA.split for row in rows)


def test_what_has_two_answers_or_none_is_not_asked():
    tags = ("implemented-in::c", "implemented-in::perl", "role::TODO")
    package = ALPHA._replace(tags=tags, depends=("libghc-base-dev-4.15.1.0-6a406",), section="odd")
    assert [row.kind for row in instructions.build([package])] == ["synopsis"]


def test_descriptions_end_with_a_sentence():
    text = "One sentence is here. " + "Another that goes on. " * 40
    (row,) = instructions.build([ALPHA._replace(description=text, tags=(), depends=(), section="")])
    assert row.prompt.endswith("that goes on.")
    assert len(row.prompt) < instructions.LONGEST + 100


def test_answers_and_sources_are_capped(monkeypatch):
    monkeypatch.setattr(instructions, "ROWS_OF_A_KIND", {"train": 20, "val": 20, "test": 20})
    many = [
        ALPHA._replace(
            name=f"p{i}", source=f"s{i // 4}", description=f"{ALPHA.description} {i} of many."
        )
        for i in range(400)
    ]
    rows = instructions.build(many)
    answers = Counter((row.kind, row.split, row.response) for row in rows)
    assert max(answers.values()) == 3  # 0.15 of 20
    assert max(Counter((row.source, row.kind) for row in rows).values()) <= 2
    assert instructions.build(reversed(many)) == rows  # whatever the order of the packages


def test_the_embedded_instructions():
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(embedded.path("debian-instructions.parquet")).to_pylist()
    assert len(rows) == 9858
    counts = Counter((row["kind"], row["split"]) for row in rows)
    assert {kind for kind, _ in counts} == set(instructions.KINDS)
    assert all(counts[kind, "train"] >= 1490 for kind in instructions.KINDS)
    assert all(counts[kind, "test"] >= 277 for kind in instructions.KINDS)
    assert all(row["split"] == split_of(row["source"]) for row in rows)
    assert all(row["prompt"].strip() and row["response"].strip() for row in rows)
    assert len({(row["kind"], row["prompt"]) for row in rows}) == len(rows)


def test_lists_that_are_not_there_are_one_line(tmp_path, capsys):
    apt = ["--apt", f"Dir::State::lists={tmp_path}"]
    code = instructions.main(["-o", str(tmp_path / "x.parquet"), *apt])
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert "apt" in said


def test_a_bundle_finds_the_installed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    installed = tmp_path / "site" / "compeft_fl" / "app" / "embedded"
    installed.mkdir(parents=True)
    (installed / "x.bin").write_bytes(b"x")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert embedded.path("x.bin") == installed / "x.bin"
    with pytest.raises(ConfigError, match=r"expected y\.bin in the installed package"):
        embedded.path("y.bin")
