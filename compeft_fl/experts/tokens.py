"""Who may do what with a store: tokens, each with rights and an end.

``tokens.json`` beside the index has a name, the SHA-256 of the token, its rights and the time until
which it holds; the token itself is shown once, when it is made. A service looks at the file again
when it has changed, so a token that is taken away is refused at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compeft_fl.disk.atomic import locked, replacing
from compeft_fl.errors import AccessError, ExpertError, ParameterError
from compeft_fl.experts.names import check_name
from compeft_fl.printable import quoted

__all__ = ["RIGHTS", "Token", "Tokens"]

RIGHTS: Final = ("read", "write")
_FILE: Final = "tokens.json"
_BYTES: Final = 32
_PREFIX: Final = "cft_"  # so that scanners of secrets know one


@dataclass(frozen=True)
class Token:
    """One token as the file has it.

    Attributes
    ----------
    name : str
    sha256 : str
        Of the token.
    rights : tuple of str
        Of ``RIGHTS``.
    expires : float
        Seconds since 1970.
    """

    name: str
    sha256: str
    rights: tuple[str, ...]
    expires: float


class Tokens:
    """The tokens of a store.

    Parameters
    ----------
    folder : Path
        The store's.

    Examples
    --------
    >>> import tempfile
    >>> tokens = Tokens(Path(tempfile.mkdtemp()))
    >>> secret = tokens.add("laptop", ["read"], days=30)
    >>> tokens.find(secret).rights
    ('read',)
    >>> tokens.find("another")
    Traceback (most recent call last):
    ...
    compeft_fl.errors.AccessError: expected a token of this store, found another
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._seen: tuple[int, int, int] | None = None
        self._known: list[Token] = []

    def all(self) -> list[Token]:
        """Every token, expired ones as well.

        Raises
        ------
        ExpertError
            A file that is none of ours.
        """
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return []
        mark = (status.st_ino, status.st_mtime_ns, status.st_size)
        if mark != self._seen:
            self._known = self._read()
            self._seen = mark
        return self._known

    def _read(self) -> list[Token]:
        try:
            entries: Any = json.loads(self._file.read_text(encoding="utf-8"))
            return [
                Token(
                    str(entry["name"]),
                    str(entry["sha256"]),
                    tuple(right for right in RIGHTS if right in entry["rights"]),
                    float(entry["expires"]),
                )
                for entry in entries
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise ExpertError(f"{self._file}: expected tokens, found other text: {error}") from None

    def add(self, name: str, rights: Iterable[str], days: float) -> str:
        """Make a token and return it; nothing but its digest is kept.

        Raises
        ------
        ParameterError
            A name that is taken or none, no right or an unknown one, days that are not over 0.
        """
        check_name(name)
        asked = tuple(rights)
        if not asked or not set(asked) <= set(RIGHTS):
            raise ParameterError(f"expected rights of {RIGHTS}, found {asked}")
        if not 0 < days < 36_500:
            raise ParameterError(f"expected days over 0, found {days}")
        secret = _PREFIX + secrets.token_urlsafe(_BYTES)
        with locked(self._file.with_name(f".{_FILE}.lock")):
            tokens = self.all()
            if any(token.name == name for token in tokens):
                raise ParameterError(f"expected a new token's name, found {quoted(name)} twice")
            expires = time.time() + days * 24 * 3600
            self._write([*tokens, Token(name, _sha256(secret), asked, expires)])
        return secret

    def remove(self, name: str) -> None:
        """Take a token away.

        Raises
        ------
        ParameterError
            No token of that name.
        """
        with locked(self._file.with_name(f".{_FILE}.lock")):
            tokens = self.all()
            if all(token.name != name for token in tokens):
                raise ParameterError(f"expected a token's name, found {quoted(name)}")
            self._write([token for token in tokens if token.name != name])

    def _write(self, tokens: list[Token]) -> None:
        entries = [token.__dict__ for token in tokens]
        with replacing(self._file, private=True) as temporary:
            temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        self._seen = None

    def find(self, secret: str) -> Token:
        """The token of a secret.

        Raises
        ------
        AccessError
            None, an unknown or an expired one.
        """
        if not secret:
            raise AccessError("expected a token, found none (COMPEFT_FL_EXPERTS_TOKEN)")
        digest = _sha256(secret)
        for token in self.all():
            if hmac.compare_digest(token.sha256, digest):
                if token.expires < time.time():
                    ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(token.expires))
                    raise AccessError(f"token {quoted(token.name)} expired at {ended}")
                return token
        raise AccessError("expected a token of this store, found another")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
