"""What a machine keeps of the experts that it has pulled; its processes share it.

::

    CACHE/
      blobs/DIGEST          the files, named by their SHA-256
      partial/DIGEST        downloads that have not ended: the next one goes on there
      begun/SERVER/NAME     the digest of a name's download that has not ended
      known/SERVER/NAME     what the server last said of a name: which version is the newest
      locks/...             one process at a time downloads a file, or evicts

The least recently used files go when all take more than ``max_bytes``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from compeft_fl.disk.atomic import PRIVATE_FOLDER, locked, replacing
from compeft_fl.errors import BrokenExpertError, CompeftError, ParameterError, StoreFullError
from compeft_fl.experts.blobs import Blobs
from compeft_fl.experts.expert import Expert
from compeft_fl.experts.names import Reference, check_digest, check_name

__all__ = ["CACHE_VARIABLE", "Cache", "default_folder", "parse_size"]

CACHE_VARIABLE: Final = "COMPEFT_FL_EXPERTS_CACHE"
_KEPT_VERSIONS: Final = 16  # of a name, in what is known of it
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B?")
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def default_folder() -> Path:
    """The cache where none is given: of the environment, or the user's own.

    Raises
    ------
    ParameterError
        The environment names none, and this user has no home.
    """
    if given := os.getenv(CACHE_VARIABLE):
        return Path(given).absolute()
    root = os.getenv("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(root).expanduser().absolute() / "compeft_fl" / "experts"
    except RuntimeError:
        raise ParameterError(
            f"expected a folder for the cache in {CACHE_VARIABLE}, found none, and no home"
        ) from None


def parse_size(text: str | int) -> int:
    """A number of bytes as a person writes it.

    Raises
    ------
    ParameterError

    Examples
    --------
    >>> parse_size("2 GiB"), parse_size("500M"), parse_size(7)
    (2147483648, 500000000, 7)
    """
    if isinstance(text, int) and text >= 0:
        return text
    found = _SIZE.fullmatch(str(text).strip())
    if found is None:
        raise ParameterError(f'expected a size such as "2 GiB", found {str(text)[:40]!r}')
    number, power, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power.upper()])


class Cache:
    """A cache of experts.

    Parameters
    ----------
    folder : Path
        Is made, for its owner only.
    max_bytes : int
        Of all files; one that is larger than that is kept until another comes.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder, max_bytes
        with self._errors():
            # The disk may take its time: what a power cut leaves is compared with its digest.
            self._blobs = Blobs(folder, synced=False)
            self._known, self._begun, self._locks = (
                folder / each for each in ("known", "begun", "locks")
            )
            for each in (self._known, self._begun, self._locks):
                each.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A disk's complaints in one line."""
        try:
            yield
        except OSError as error:
            text = error.strerror or str(error)
            raise StoreFullError(f"{self.folder}: the cache cannot be used: {text}") from None

    # --- blobs --------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where a file lies, if it is here."""
        return self._blobs.path(digest)

    def has(self, digest: str) -> bool:
        """Is the file here, and is it what its name says? One that is not is removed."""
        try:
            self._blobs.open(digest).close()
        except FileNotFoundError:
            return False
        except BrokenExpertError:
            self._blobs.remove(digest)
            return False
        return True

    def read(self, digest: str) -> bytes:
        """The bytes of a file.

        Raises
        ------
        FileNotFoundError
            It was evicted.
        BrokenExpertError
        """
        with self._blobs.open(digest) as file:
            os.utime(file.fileno())  # used last now
            status = os.fstat(file.fileno())
            self._blobs.trust(digest, status)
            return file.read()

    def touch(self, digest: str) -> None:
        """Say that a file was used."""
        with contextlib.suppress(FileNotFoundError):
            self.read(digest)

    def digests(self) -> set[str]:
        """Of all files that are here."""
        return set(self._blobs)

    @contextlib.contextmanager
    def downloading(self, digest: str) -> Iterator[BinaryIO]:
        """The file to go on writing a download to, for one process at a time."""
        check_digest(digest)
        with self._errors(), locked(self._locks / digest):
            partial = self._blobs.partial(digest)
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(handle, "r+b") as file:
                    file.seek(0, os.SEEK_END)
                    yield file
            except (OSError, BrokenExpertError):  # a full disk is not kept full
                partial.unlink(missing_ok=True)
                raise
            finally:
                with contextlib.suppress(OSError):
                    if digest in self._blobs:  # another process was faster
                        partial.unlink(missing_ok=True)
                    (self._locks / digest).unlink()

    def adopt(self, digest: str) -> Path:
        """Name what was downloaded, once it is whole, and make room.

        Raises
        ------
        BrokenExpertError
            Other bytes; they are removed.
        """
        with self._errors():
            path = self._blobs.adopt(self._blobs.partial(digest), digest)
            self._evict(digest)
            return path

    def add(self, content: bytes) -> str:
        """Keep some bytes, and make room; their digest."""
        with self._errors():
            digest = self._blobs.add(content)
            self._evict(digest)
            return digest

    def _evict(self, newest: str) -> None:
        """Remove the files used longest ago, until all are within the bound."""
        with locked(self._locks / ".evict"):
            found = self._blobs.used()
            total = sum(size for _, size, _ in found)
            for _, size, digest in found:
                if total <= self._max_bytes:
                    break
                if digest != newest:
                    self._blobs.remove(digest)
                    total -= size

    def begin(self, server: str, expert: Expert) -> None:
        """Remember that a download of an expert is begun, until it is here."""
        file = self._file(server, expert.name, self._begun)
        with self._errors():
            file.parent.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
            with locked(self._locks / ".known"), replacing(file, synced=False) as temporary:
                temporary.write_text(expert.digest, encoding="ascii")

    def begun(self, server: str, name: str) -> tuple[str, int]:
        """The digest of what is here of a name in part, and its bytes; ``("", 0)``: nothing."""
        file = self._file(server, name, self._begun)
        try:
            digest = check_digest(file.read_text(encoding="ascii"))
            return digest, self._blobs.partial(digest).stat().st_size
        except (OSError, ValueError, CompeftError):
            self.ended(server, name)  # what there was of it is gone
            return "", 0

    def ended(self, server: str, name: str) -> None:
        """Forget that a download is begun."""
        with contextlib.suppress(OSError):
            self._file(server, name, self._begun).unlink()

    # --- what servers have said ---------------------------------------------------------------

    def _file(self, server: str, name: str, of: Path | None = None) -> Path:
        folder = hashlib.sha256(server.encode()).hexdigest()[:16]
        return (of or self._known) / folder / check_name(name)

    def remember(self, server: str, expert: Expert, *, newest: bool) -> None:
        """Keep what a server has said of a version."""
        file = self._file(server, expert.name)
        with self._errors():
            file.parent.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
            with locked(self._locks / ".known"):
                known = self._read_known(file)
                if expert in known[1] and (not newest or known[0] == expert.version):
                    return
                versions = {entry.version: entry for entry in known[1]} | {expert.version: expert}
                kept = sorted(versions.values(), key=lambda each: -each.version)[:_KEPT_VERSIONS]
                last = expert.version if newest else known[0]
                entries = [dataclasses.asdict(each) for each in kept]
                with replacing(file, synced=False) as temporary:
                    text = json.dumps({"newest": last, "versions": entries})
                    temporary.write_text(text, encoding="utf-8")

    def recall(self, server: str, reference: Reference) -> Expert | None:
        """What a server last said that a reference means; None: it was not asked."""
        newest, versions = self._read_known(self._file(server, reference.name))
        for expert in versions:
            if reference.digest:
                meant = expert.digest.startswith(reference.digest)
            else:
                meant = expert.version == (reference.version or newest)
            if meant:
                return expert
        return None

    def known(self, server: str, name: str) -> list[Expert]:
        """The versions of a name that were asked for, the newest first."""
        return self._read_known(self._file(server, name))[1]

    def names(self, server: str) -> list[str]:
        """The names that were asked for."""
        folder = self._file(server, "x").parent
        with contextlib.suppress(FileNotFoundError):
            return sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
        return []

    def _read_known(self, file: Path) -> tuple[int, list[Expert]]:
        """A file that is missing or damaged knows nothing."""
        try:
            told: Any = json.loads(file.read_text(encoding="utf-8"))
            versions = [Expert(**entry) for entry in told["versions"]]
            for expert in versions:
                check_digest(expert.digest)
            return int(told["newest"]), versions
        except (OSError, ValueError, TypeError, KeyError, AttributeError, CompeftError):
            return 0, []
