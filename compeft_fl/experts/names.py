"""Names of experts and references to them, and what may stand in tags and metrics.

A name is letters, digits, ``.``, ``_`` and ``-``, and begins with a letter or a digit: it is a
file's name on every system, and never a path. A reference is a name, by itself for the newest
version, or with ``@`` and a version (``sections@3``) or the first 12 digits or more of a digest
(``sections@9f86d081884c``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from compeft_fl.errors import ParameterError
from compeft_fl.printable import quoted

__all__ = ["Reference", "check_digest", "check_metrics", "check_name", "check_tags"]

MAX_NAME: Final = 100
MAX_VERSION: Final = 10**9 - 1
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
MAX_KEY: Final = 64
_KEY: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_KEY - 1}}}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PREFIX: Final = re.compile(r"[0-9a-f]{12,64}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")
MAX_ENTRIES: Final = 32  # tags, and metrics, of a version
_MAX_VALUE: Final = 256  # characters of a tag's value


def check_name(name: str) -> str:
    """Return a name that is one.

    Raises
    ------
    ParameterError

    Examples
    --------
    >>> check_name("sections-v2")
    'sections-v2'
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise ParameterError(
            f"expected a name of at most {MAX_NAME} letters, digits, '.', '_' and '-', found "
            f"{quoted(name)}"
        )
    return name


def check_digest(digest: str) -> str:
    """Return a SHA-256 of 64 hexadecimal digits; ParameterError for any other text."""
    if not _DIGEST.fullmatch(digest):
        raise ParameterError(f"expected a SHA-256 of 64 hexadecimal digits, found {quoted(digest)}")
    return digest


def check_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags that are few, short and printable; ParameterError for others."""
    found = dict(tags)  # a message's mapping is slow to go through
    _check_entries("tags", found)
    for key, value in found.items():
        if len(value) > _MAX_VALUE or not value.isprintable():
            raise ParameterError(
                f"expected at most {_MAX_VALUE} printable characters in tag {key}, found "
                f"{quoted(value)}"
            )
    return found


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics that are few, named and finite; ParameterError for others."""
    found = {key: float(value) for key, value in metrics.items()} if metrics else {}
    _check_entries("metrics", found)
    for key, value in found.items():
        if not math.isfinite(value):
            raise ParameterError(f"expected a finite number as metric {key}, found {value}")
    return found


def _check_entries(what: str, entries: Mapping[str, object]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise ParameterError(f"expected at most {MAX_ENTRIES} {what}, found {len(entries)}")
    for key in entries:
        if not _KEY.fullmatch(key):
            raise ParameterError(
                f"expected {what} named by at most 64 letters, digits, '.', '_' and '-', found "
                f"{quoted(key)}"
            )


@dataclass(frozen=True)
class Reference:
    """Which version of which expert is meant.

    Attributes
    ----------
    name : str
    version : int
        0: not by version.
    digest : str
        The first digits of a digest, at least 12; empty: not by digest.
    """

    name: str
    version: int = 0
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``NAME``, ``NAME@VERSION`` or ``NAME@DIGEST``.

        Raises
        ------
        ParameterError

        Examples
        --------
        >>> Reference.parse("sections"), Reference.parse("sections@3").version
        (Reference(name='sections', version=0, digest=''), 3)
        >>> Reference.parse("sections@9F86D081884C").digest
        '9f86d081884c'
        """
        name, at, which = text.partition("@")
        if at and not which:
            raise ParameterError("expected a version or a digest after '@', found nothing")
        if _VERSION.fullmatch(which):
            return cls(name, version=int(which)).checked()
        return cls(name, digest=which.lower()).checked()

    def checked(self) -> Reference:
        """Return a reference that is one.

        Raises
        ------
        ParameterError
        """
        check_name(self.name)
        if self.version and (self.digest or not 0 < self.version <= MAX_VERSION):
            raise ParameterError(f"expected a version in 1 .. {MAX_VERSION}, found {self.version}")
        if self.digest and not _PREFIX.fullmatch(self.digest):
            raise ParameterError(
                "expected a version, or at least 12 digits of a digest, found "
                f"{quoted(self.digest)}"
            )
        return self

    def __str__(self) -> str:
        return f"{self.name}@{self.version or self.digest}".rstrip("@")
