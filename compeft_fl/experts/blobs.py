"""Files named by the SHA-256 of their bytes: what a store and a cache keep.

::

    FOLDER/
      blobs/DIGEST        whole, and on the disk before they have this name
      partial/KEY         what has arrived so far

A file is read through before it is handed out for the first time, and compared with its name: a
disk that has lost or changed bytes shows as an error, and not as another expert.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from compeft_fl.disk.atomic import PRIVATE_FOLDER, replacing
from compeft_fl.errors import BrokenExpertError
from compeft_fl.experts.names import check_digest

__all__ = ["Blobs", "digest_of"]

_PIECE: Final = 1 << 20


def digest_of(file: BinaryIO) -> str:
    """The SHA-256 of what is left of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


class Blobs:
    """A folder of blobs; threads and processes may share it.

    Parameters
    ----------
    folder : Path
        Is made, for its owner only.
    """

    def __init__(self, folder: Path, *, synced: bool = True) -> None:
        self._synced = synced
        self._blobs, self._partial = folder / "blobs", folder / "partial"
        for each in (folder, self._blobs, self._partial):
            each.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path:
        """Where a blob lies, if it is here."""
        return self._blobs / check_digest(digest)

    def partial(self, key: str) -> Path:
        """Where what has arrived of a blob lies; ``key`` is a name that its caller vouches for."""
        return self._partial / key

    def partials(self) -> list[Path]:
        """All that has arrived in part."""
        return sorted(self._partial.iterdir())

    def used(self) -> list[tuple[int, int, str]]:
        """When each blob was last used, its bytes and its digest; the one used last is last."""
        found = []
        with os.scandir(self._blobs) as entries:
            for entry in entries:
                if len(entry.name) == 64:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.name))
        return sorted(found)

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def __iter__(self) -> Iterator[str]:
        """The digests of all blobs, in order."""
        with os.scandir(self._blobs) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if len(name) == 64 and not name.startswith("."):
                yield name

    def open(self, digest: str, *, again: bool = False) -> BinaryIO:
        """Open a blob whose bytes are what its name says.

        Parameters
        ----------
        digest : str
        again : bool
            Read it through also where this object has done so before, and nothing has changed.

        Raises
        ------
        FileNotFoundError
        BrokenExpertError
            The disk has other bytes.
        """
        file = self.path(digest).open("rb")
        try:
            status = os.fstat(file.fileno())
            mark = (status.st_ino, status.st_mtime_ns, status.st_size)
            if again or self._verified.get(digest) != mark:
                found = digest_of(file)
                if found != digest:
                    raise BrokenExpertError(
                        f"expected bytes of the digest {digest[:12]}..., found {found[:12]}...: "
                        "the file has changed on the disk"
                    )
                file.seek(0)
                self.trust(digest, status)
            return file
        except BaseException:
            file.close()
            raise

    def trust(self, digest: str, status: os.stat_result) -> None:
        """Take a file that was just read through as read through, though its times have changed."""
        with self._lock:
            self._verified[digest] = (status.st_ino, status.st_mtime_ns, status.st_size)

    def adopt(self, partial: Path, digest: str) -> Path:
        """Give what has arrived its name, once it is whole and on the disk.

        Raises
        ------
        BrokenExpertError
            Other bytes; they are removed.
        OSError
            The disk is full, say.
        """
        with partial.open("rb") as file:
            found = digest_of(file)
        if found != digest:
            partial.unlink(missing_ok=True)
            raise BrokenExpertError(
                f"expected bytes of the digest {digest[:12]}..., found {found[:12]}...: nothing of "
                "them is kept"
            )
        with replacing(self.path(digest), private=True, synced=self._synced) as temporary:
            partial.replace(temporary)
        return self.path(digest)

    def add(self, content: bytes) -> str:
        """Keep some bytes, and return their digest."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self:
            with replacing(self.path(digest), private=True, synced=self._synced) as temporary:
                temporary.write_bytes(content)
        return digest

    def remove(self, digest: str) -> None:
        """Remove a blob, if it is there."""
        with self._lock:
            self._verified.pop(digest, None)
        with contextlib.suppress(FileNotFoundError):
            self.path(digest).unlink()
