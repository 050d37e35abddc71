"""Rebuild ``debian-section.jsonl`` from a Debian system's package lists.

::

    apt-get update
    python -m compeft_fl.app.embedded.build_debian_sections -o debian-section.jsonl

It reads ``apt-cache dumpavail`` (or the file given by ``--dump``), and ``--compare`` says how what
it found differs from another such file. What comes out depends on the release of Debian and on
nothing else: splits and choices go by hashes, not by order or chance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Row", "build", "main", "packages", "split_of", "strip_names"]

SECTIONS: Final = {
    *("admin", "devel", "doc", "fonts", "games", "graphics"),
    *("math", "net", "science", "sound", "text", "web"),
}
ROWS_OF_A_SECTION: Final = 500
ROWS_OF_A_SOURCE: Final = 2  # and section
SHORTEST: Final = 12  # characters

_PREFIXES: Final = re.compile(r"^(python3?-|lib)")
_SUFFIXES: Final = re.compile(r"(-(tools|utils|plugins|gtk|data|doc|common)|[\d.]+)$")
_WORDS: Final = re.compile(r"\w+")


class Package(NamedTuple):
    """What is read of a binary package."""

    name: str
    source: str
    section: str
    description: str


class Row(NamedTuple):
    """A line of the file."""

    text: str
    label: str
    split: str
    source: str


def packages(dump: str) -> Iterator[Package]:
    """Yield the packages of an ``apt-cache dumpavail``."""
    for paragraph in dump.split("\n\n"):
        fields = dict(
            line.split(":", 1)
            for line in paragraph.splitlines()
            if ":" in line and not line[0].isspace()
        )
        if "Package" in fields and "Description" in fields:
            name = fields["Package"].strip()
            source = fields.get("Source", name).split()[0]
            section = fields.get("Section", "").strip().rpartition("/")[2]
            yield Package(name, source, section, fields["Description"].strip())


def strip_names(text: str, package: str, source: str) -> str:
    """Return a description without the package's own name, which would tell too much.

    Examples
    --------
    >>> strip_names("Documentation for log4cxx", "liblog4cxx-doc", "log4cxx")
    'Documentation for'
    """
    names = {package, source, _PREFIXES.sub("", package)}
    names |= {_SUFFIXES.sub("", name) for name in names}
    names = {name for name in names if len(name) > 2}
    for name in sorted(names, key=lambda name: (-len(name), name)):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split()).strip(" -:,;")


def split_of(source: str) -> str:
    """Return train, val or test (70, 10, 20 %) by the SHA-256 of a source package's name."""
    place = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 100
    return "train" if place < 70 else "val" if place < 80 else "test"


def build(found: Iterable[Package]) -> list[Row]:
    """Return the rows: near-duplicates and what is too short left out, sources and sections capped.

    Two texts are near-duplicates where they have the same words in the same order, whatever their
    case, digits and punctuation. Of what is over a cap, the smallest hashes stay.
    """
    rows = {}
    for package in found:
        if package.section in SECTIONS:
            text = strip_names(package.description, package.name, package.source)
            if len(text) >= SHORTEST:
                row = Row(text, package.section, split_of(package.source), package.source)
                rows[_hash(row)] = row
    kept: list[Row] = []
    seen: set[str] = set()
    of_source: Counter[tuple[str, str]] = Counter()
    of_section: Counter[str] = Counter()
    for _, row in sorted(rows.items()):
        words = " ".join(re.sub(r"\d+", "", word) for word in _WORDS.findall(row.text.lower()))
        if words in seen or of_source[row.source, row.label] >= ROWS_OF_A_SOURCE:
            continue
        if of_section[row.label] >= ROWS_OF_A_SECTION:
            continue
        seen.add(words)
        of_source[row.source, row.label] += 1
        of_section[row.label] += 1
        kept.append(row)
    return kept


def main(arguments: list[str] | None = None) -> int:
    """Write the file and say what is in it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--dump", type=Path, help="output of apt-cache dumpavail, saved")
    parser.add_argument("--compare", type=Path, help="another such file to compare with")
    options = parser.parse_args(arguments)
    if options.dump:
        dump = options.dump.read_text(encoding="utf-8")
    else:
        try:
            dump = subprocess.run(
                ["apt-cache", "dumpavail"], capture_output=True, check=True, encoding="utf-8"
            ).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"apt-cache dumpavail does not work here: {error}", file=sys.stderr)
            return 2
    rows = build(packages(dump))
    lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]
    options.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} rows: {_counts(row.split for row in rows)}")
    print(f"sections: {_counts(row.label for row in rows)}")
    if options.compare:
        _compare(rows, options.compare)
    return 0 if rows else 1


def _hash(row: Row) -> str:
    return hashlib.sha256("\n".join(row).encode()).hexdigest()


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{value} {count}" for value, count in sorted(Counter(values).items()))


def _compare(rows: list[Row], other: Path) -> None:
    theirs = {
        Row(**json.loads(line)) for line in other.read_text(encoding="utf-8").splitlines() if line
    }
    ours = set(rows)
    print(f"{other}: {len(theirs)} rows, of which {len(ours & theirs)} are here as well")
    both = {row.source for row in ours} & {row.source for row in theirs}
    splits = {row.source: row.split for row in theirs}
    moved = sum(row.split != splits[row.source] for row in ours if row.source in both)
    print(f"source packages in both: {len(both)}; rows of theirs in another split: {moved}")


if __name__ == "__main__":
    sys.exit(main())
