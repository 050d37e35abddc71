"""What Debian's archive says of its packages: names, sections, descriptions, dependencies, tags.

Read from the lists that apt keeps, the long English descriptions among them, which an image of a
container often has not. ``--apt`` hands options to apt, so that nothing of the system is changed::

    mkdir -p lists/partial
    apt-get update -o Acquire::Languages=en -o Dir::State::lists=$PWD/lists
    ... --apt Acquire::Languages=en --apt Dir::State::lists=$PWD/lists
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from compeft_fl.app.embedded.build_debian_sections import split_of

__all__ = ["Package", "add_arguments", "fields", "paragraphs", "read", "read_lists"]

_HELPER: Final = "/usr/lib/apt/apt-helper"  # decompresses lists, however apt keeps them
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.\-]*")


class Package(NamedTuple):
    """What is read of a binary package; texts are empty where the archive says nothing."""

    name: str
    source: str
    section: str
    synopsis: str
    description: str  # paragraphs, an empty line between two
    depends: tuple[str, ...]  # names alone, of alternatives the first
    tags: tuple[str, ...]

    @property
    def split(self) -> str:
        """Which of train, val and test it is in, by the hash of its source's name."""
        return split_of(self.source)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--apt`` to a script's arguments."""
    parser.add_argument(
        "--apt", metavar="OPTION=VALUE", action="append", default=[], help="an option for apt"
    )


def read(apt: Sequence[str]) -> list[Package]:
    """Return the packages that apt's lists know, by name.

    Parameters
    ----------
    apt : sequence of str
        Options for apt, as ``Acquire::Languages=en``.

    Raises
    ------
    OSError, subprocess.CalledProcessError
        Where apt is not here.
    ValueError
        Where its lists hold no packages, or no English descriptions.
    """
    options = [argument for option in apt for argument in ("-o", option)]
    text = {}
    for kind in ("Packages", "Translations"):
        form = ["--format", "$(CODENAME) $(FILENAME)", f"Created-By: {kind}"]
        lines = _output(["apt-get", "indextargets", *options, *form]).splitlines()
        files = [line.partition(" ")[2] for line in lines if "-" not in line.split()[0]]
        if not files:
            raise ValueError(
                f"expected lists of {kind} of a release of Debian, found none: apt-get update, "
                "with Acquire::Languages=en"
            )
        text[kind] = "\n".join(_output([_HELPER, "cat-file", file]) for file in files)
    return read_lists(text["Packages"], text["Translations"])


def read_lists(packages: str, translations: str) -> list[Package]:
    """Return the packages of a list ``Packages``, described as a ``Translation-en`` has it."""
    long: dict[str, str] = {}
    for paragraph in fields(translations):
        if "Description-md5" in paragraph:
            long[paragraph["Description-md5"]] = paragraph.get("Description-en", "")
    found: dict[str, Package] = {}
    for paragraph in fields(packages):
        name = paragraph.get("Package", "")
        if not name or name in found:
            continue
        described = long.get(paragraph.get("Description-md5", ""), "")
        synopsis, _, body = described.partition("\n")
        found[name] = Package(
            name,
            paragraph.get("Source", name).split()[0],
            paragraph.get("Section", "").rpartition("/")[2],
            synopsis or paragraph.get("Description", "").partition("\n")[0],
            paragraphs(body),
            _depends(paragraph.get("Depends", "")),
            tuple(sorted({tag for tag in re.split(r"[,\s]+", paragraph.get("Tag", "")) if tag})),
        )
    return [found[name] for name in sorted(found)]


def fields(text: str) -> Iterator[dict[str, str]]:
    """Yield the paragraphs of a control file; further lines keep all but their first space."""
    for paragraph in text.split("\n\n"):
        values: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line[:1].isspace() and key:
                values[key] += "\n" + line[1:]
            elif ":" in line:
                key, _, value = line.partition(":")
                values[key] = value.strip()
        if values:
            yield values


def paragraphs(body: str) -> str:
    r"""Return a long description with lines joined, where Debian's policy lets them be.

    Examples
    --------
    >>> paragraphs("A tool\nfor files.\n.\nIt has:\n - a list")
    'A tool for files.\n\nIt has:\n - a list'
    """
    lines: list[str] = []
    fresh = True
    for line in body.splitlines():
        text = line.rstrip()
        if text.strip() in ("", "."):
            lines.append("")
            fresh = True
        elif fresh or text[:1].isspace() or text[:2] in ("* ", "- "):
            lines.append(text)
            fresh = False
        else:
            lines[-1] += " " + text
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def _depends(text: str) -> tuple[str, ...]:
    names = [_NAME.match(part.strip()) for part in text.split(",")]
    return tuple(dict.fromkeys(match.group() for match in names if match))


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    return done.stdout
