"""Rebuild ``debian-instructions.parquet``: five kinds of questions on Debian's packages.

::

    python -m compeft_fl.app.embedded.build_debian_instructions -o debian-instructions.parquet

It reads apt's lists (`compeft_fl.app.embedded.debian_archive` says how they get there). What comes
out depends on the release of Debian alone: splits and choices go by hashes. No source package is in
two splits, and the held-out fifth is the one that the embedded model has not seen either.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from compeft_fl.app.embedded import debian_archive
from compeft_fl.app.embedded.debian_archive import Package

__all__ = ["KINDS", "Row", "build", "main"]

KINDS: Final = ("depends", "language", "role", "section", "synopsis")
ROWS_OF_A_KIND: Final = {"train": 1600, "val": 100, "test": 300}
ROWS_OF_AN_ANSWER: Final = 0.15  # the most of a kind and split that have one and the same response
ROWS_OF_A_SOURCE: Final = 2  # and kind
LONGEST: Final = 360  # characters of a description
SHORTEST: Final = 60
DEPENDENCIES: Final = range(1, 5)

_LANGUAGES: Final = {
    "c": "C",
    "c++": "C++",
    "java": "Java",
    "lisp": "Lisp",
    "ocaml": "OCaml",
    "perl": "Perl",
    "php": "PHP",
    "python": "Python",
    "r": "R",
    "ruby": "Ruby",
    "shell": "Shell",
}
_ROLES: Final = {
    "app-data": "data of an application",
    "devel-lib": "development library",
    "documentation": "documentation",
    "metapackage": "metapackage",
    "plugin": "plugin",
    "program": "program",
    "shared-lib": "shared library",
}
_SECTIONS: Final = {
    *("admin", "comm", "database", "devel", "doc", "editors", "electronics", "fonts"),
    *("games", "gnome", "gnu-r", "golang", "graphics", "haskell", "hamradio", "httpd"),
    *("interpreters", "java", "javascript", "kde", "libdevel", "libs", "lisp", "localization"),
    *("mail", "math", "metapackages", "misc", "net", "ocaml", "otherosfs", "perl"),
    *("php", "python", "ruby", "rust", "science", "sound", "tex", "text"),
    *("utils", "vcs", "video", "web", "x11"),
}
_HASHED: Final = re.compile(r"-[0-9a-f]{5,}$")  # Haskell's libraries name a hash
_SENTENCE: Final = re.compile(r"(?<=[.!?:;])\s")


class Row(NamedTuple):
    """A row of the file."""

    prompt: str
    response: str
    kind: str
    package: str
    source: str
    split: str


def build(packages: Iterable[Package]) -> list[Row]:
    """Return the rows of the smallest hashes; no kind, answer or source has more than its cap."""
    rows = {_hash(row): row for package in packages for row in _rows(package)}
    kept: list[Row] = []
    of_kind: Counter[tuple[str, str]] = Counter()
    of_answer: Counter[tuple[str, str, str]] = Counter()
    of_source: Counter[tuple[str, str]] = Counter()
    seen: set[tuple[str, str]] = set()
    for _, row in sorted(rows.items()):
        kind, answer = (row.kind, row.split), (row.kind, row.split, row.response)
        text = (row.kind, row.prompt.partition("\n\n")[2])
        most = ROWS_OF_A_KIND[row.split]
        if (
            of_kind[kind] >= most
            or of_answer[answer] >= ROWS_OF_AN_ANSWER * most
            or of_source[row.source, row.kind] >= ROWS_OF_A_SOURCE
            or text in seen
        ):
            continue
        seen.add(text)
        of_kind[kind] += 1
        of_answer[answer] += 1
        of_source[row.source, row.kind] += 1
        kept.append(row)
    return kept


def _rows(package: Package) -> Iterator[Row]:
    """Yield the questions that a package answers."""
    name, synopsis = package.name, package.synopsis
    text = _shortened(package.description.replace("\n\n", "\n"))
    if len(text) < SHORTEST or len(synopsis) < 12:
        return

    def row(kind: str, question: str, about: str, answer: str) -> Row:
        prompt = f"{question}\n\n{about}"
        return Row(prompt, answer, kind, name, package.source, package.split)

    about = f"{name}: {synopsis}"
    described = f"{about}. {_shortened(text, LONGEST - len(synopsis))}".strip()
    yield row("synopsis", f"Write a one-line synopsis of the package {name}.", text, synopsis)
    if package.section in _SECTIONS:
        question = "Which section of the archive is this package in?"
        yield row("section", question, described, package.section)
    if len(package.depends) in DEPENDENCIES and not any(map(_HASHED.search, package.depends)):
        answer = ", ".join(sorted(package.depends))
        yield row("depends", "Which packages does this package depend on?", described, answer)
    language = _only(package, "implemented-in::", _LANGUAGES)
    if language:
        yield row("language", "Which language is this written in?", described, language)
    role = _only(package, "role::", _ROLES)
    if role:
        yield row("role", "What is the role of this package?", described, role)


def _only(package: Package, facet: str, names: dict[str, str]) -> str:
    """Return the value of a facet of Debian's tags where it has one that has a name here."""
    values = [tag.removeprefix(facet) for tag in package.tags if tag.startswith(facet)]
    return names.get(values[0], "") if len(values) == 1 else ""


def _shortened(text: str, longest: int = LONGEST) -> str:
    """Return the sentences of a text that fit, or else the words."""
    for parts, space in ((_SENTENCE.split(text), " "), (text.split(), " ")):
        kept = ""
        for part in parts:
            if len(kept) + len(part) + 1 > longest:
                break
            kept += space * bool(kept) + part
        if len(kept) >= min(SHORTEST, len(text)):
            return kept
    return text[:longest]


def _hash(row: Row) -> str:
    return hashlib.sha256("\n".join(row).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Write the file and say what is in it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    debian_archive.add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        rows = build(debian_archive.read(options.apt))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"apt's lists cannot be read: {error}", file=sys.stderr)
        return 2
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(
        {column: [row[i] for row in rows] for i, column in enumerate(Row._fields)}
    )
    parquet.write_table(table, options.output, compression="zstd", compression_level=19)
    print(f"{len(rows)} rows, {options.output.stat().st_size} bytes")
    for kind in KINDS:
        mine = [row for row in rows if row.kind == kind]
        counts = Counter(row.split for row in mine)
        answers = Counter(row.response for row in mine if row.split == "test")
        common = ", ".join(f"{answer} {count}" for answer, count in answers.most_common(4))
        print(f"{kind}: {dict(counts)}, {len(answers)} responses in test: {common}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
