"""A store of experts in a folder: blobs, their index, and what is checked before either grows.

::

    STORE/
      .lock               held by the process that has the store open
      index.sqlite        names, versions, and what is said of them
      blobs/DIGEST        the files
      partial/...         uploads that have not ended
      tokens.json         who may do what, if anybody but this machine may

A version is named in this order: its bytes are on the disk under their digest, they have been
decoded, the index has committed. A kill in between leaves bytes without a name, which the next
start removes; it never leaves a name without its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from compeft_fl.disk.atomic import PRIVATE_FOLDER, locked
from compeft_fl.errors import (
    BrokenExpertError,
    CompeftError,
    ExpertError,
    ParameterError,
    StoreFullError,
    UnavailableError,
)
from compeft_fl.experts import catch_up
from compeft_fl.experts.admission import MAX_PARAMETERS, Facts, admit
from compeft_fl.experts.blobs import Blobs, digest_of
from compeft_fl.experts.expert import Expert, Found
from compeft_fl.experts.index import Index
from compeft_fl.experts.names import (
    Reference,
    check_digest,
    check_metrics,
    check_name,
    check_tags,
)

__all__ = ["Limits", "Store", "check_push"]

_KEPT_PARTIAL_SECONDS: Final = 24 * 3600.0
_MAX_BASE_DIGEST: Final = 128
_MAX_CATCH_UP_BYTES: Final = 64 << 20  # of the files between which a change is looked for
_KEPT_CHANGES: Final = 64


class Limits:
    """What a store lets callers do.

    Parameters
    ----------
    max_expert_bytes : int
        Of one file.
    max_parameters : int
        Of one expert.
    max_bytes : int
        Of all files together.
    max_uploads : int
        That have begun and not ended, of one caller.
    """

    def __init__(
        self,
        max_expert_bytes: int = 1 << 30,
        max_parameters: int = MAX_PARAMETERS,
        max_bytes: int = 1 << 40,
        max_uploads: int = 64,
    ) -> None:
        self.max_expert_bytes = max_expert_bytes
        self.max_parameters = max_parameters
        self.max_bytes = max_bytes
        self.max_uploads = max_uploads


class Store:
    """A store of experts; threads share it, and one process at a time has it open.

    Parameters
    ----------
    folder : Path
        Is made where it is missing.
    limits : Limits, optional
    tidy : bool
        Remove what a kill has left: bytes without a name, and uploads of long ago.

    Raises
    ------
    ExpertError
        Another process has it open, or its index is none of ours.
    """

    def __init__(self, folder: Path, limits: Limits | None = None, *, tidy: bool = True) -> None:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        self.folder = folder
        self.limits = limits or Limits()
        self._held = contextlib.ExitStack()
        try:
            self._held.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            raise ExpertError(f"{folder}: another process has this store open") from None
        try:
            self._blobs = Blobs(folder)
            self._index = Index(folder / "index.sqlite")
        except BaseException:
            self._held.close()
            raise
        self._num_bytes = self._index.num_bytes()  # of all blobs: reading it takes long
        self._naming = threading.Lock()  # a blob and its name come, or go, together
        self._decoding = threading.Semaphore(2)  # whole experts in memory at a time
        self._uploading: set[str] = set()  # names of partial files that somebody is at
        self._changes: dict[tuple[str, str], bytes | None] = {}
        if tidy:
            self._tidy()

    def close(self) -> None:
        """Let another process open it."""
        self._index.close()
        self._held.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tidy(self) -> None:
        """Remove what a kill has left: bytes without a name, and uploads of long ago."""
        named = self._index.digests()
        for digest in list(self._blobs):
            if digest not in named:
                self._blobs.remove(digest)
        for hidden in (self.folder / "blobs").glob(".*.tmp"):
            hidden.unlink(missing_ok=True)
        self._drop_old_uploads()

    def _drop_old_uploads(self) -> None:
        now = time.time()
        for partial in self._blobs.partials():
            with contextlib.suppress(FileNotFoundError):
                if now - partial.stat().st_mtime > _KEPT_PARTIAL_SECONDS:
                    partial.unlink()

    # --- pushing ------------------------------------------------------------------------------

    def uploaded(self, owner: str, digest: str, size: int) -> int:
        """How many bytes of a file are here already; all of them where it has a name.

        Raises
        ------
        StoreFullError
            No file of such a size is taken.
        """
        check_digest(digest)
        if not 0 < size <= self.limits.max_expert_bytes:
            raise StoreFullError(
                f"expected a file of 1 to {self.limits.max_expert_bytes} bytes, found {size}"
            )
        if self._is_whole(digest):
            return size
        try:
            return min(size, self._partial(owner, digest).stat().st_size)
        except FileNotFoundError:
            return 0

    def _is_whole(self, digest: str) -> bool:
        """Has a file a name, and is it what its digest says? One that is not is pushed again."""
        try:
            if not self._index.has(digest):
                return False
            self._blobs.open(digest).close()
            return True
        except (FileNotFoundError, BrokenExpertError):
            return False

    def _partial(self, owner: str, digest: str) -> Path:
        return self._blobs.partial(f"{hashlib.sha256(owner.encode()).hexdigest()[:16]}-{digest}")

    @contextlib.contextmanager
    def _alone_with(self, partial: Path) -> Iterator[None]:
        """One at a time writes an upload, or names it."""
        with self._naming:
            if partial.name in self._uploading:
                raise UnavailableError("busy: another upload of this file is running")
            self._uploading.add(partial.name)
        try:
            yield
        finally:
            with self._naming:
                self._uploading.remove(partial.name)

    @contextlib.contextmanager
    def upload(self, owner: str, digest: str, size: int, offset: int) -> Iterator[BinaryIO]:
        """A file to write a caller's bytes to, from an offset on; what was written stays.

        Raises
        ------
        StoreFullError
            More than the limits allow, or than there is room for; also while it is written.
        ExpertError
            An offset beyond what is here.
        UnavailableError
            The same upload is running.
        """
        limits = self.limits
        if not self._index.has(digest) and self._num_bytes + size > limits.max_bytes:
            raise StoreFullError(
                f"the store is full: {limits.max_bytes} bytes, of which {size} are not left"
            )
        partial = self._partial(owner, digest)
        with self._alone_with(partial):
            self._drop_old_uploads()
            begun = {each.name for each in self._blobs.partials()} - {partial.name}
            others = [name for name in begun if name.startswith(partial.name[:16])]
            if len(others) >= limits.max_uploads:
                raise StoreFullError(
                    f"expected at most {limits.max_uploads} uploads that have begun, found "
                    f"{len(others) + 1}: end one, or wait a day"
                )
            try:
                handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                with os.fdopen(handle, "r+b") as file:
                    if offset > file.seek(0, os.SEEK_END):
                        raise ExpertError(
                            f"expected an offset of at most {file.tell()}, found {offset}"
                        )
                    file.truncate(offset)
                    file.seek(offset)
                    yield file
            except OSError as error:  # what has arrived would keep a full disk full
                partial.unlink(missing_ok=True)
                text = error.strerror or str(error)
                raise StoreFullError(f"the store cannot keep it: {text}") from None

    def name(
        self, owner: str, name: str, digest: str, size: int, *, base_digest: str = "",
        tags: Mapping[str, str] | None = None, metrics: Mapping[str, float] | None = None,
    ) -> tuple[Expert, bool]:  # fmt: skip
        """Check what a caller has uploaded, and make it the next version of a name.

        Returns
        -------
        expert : Expert
        was_there : bool
            The newest version is just this one: a caller who has not heard of it asks twice.

        Raises
        ------
        CompeftError
            A file that does not decode, or what `check_push` refuses; nothing of it is kept.
        StoreFullError
            The disk is full.
        UnavailableError
            An upload of this file is running.
        """
        tags, metrics = check_push(name, base_digest, tags or {}, metrics or {})
        partial = self._partial(owner, digest)
        with self._alone_with(partial):
            try:
                here = self._blobs.path(digest) if self._is_whole(digest) else partial
                facts = self._admitted(here, digest, size)
                expert = Expert(
                    name=name, version=0, digest=digest, size=size, base_model=facts.base_model,
                    base_digest=base_digest, config=facts.config, tags=tags, metrics=metrics,
                    created=time.time(), num_parameters=facts.num_parameters,
                    density=facts.density, codec=facts.codec, start=facts.start,
                    layout_id=facts.layout_id,
                )  # fmt: skip
                with self._naming:
                    if not self._is_whole(digest):
                        self._num_bytes += 0 if self._index.has(digest) else size
                        self._blobs.adopt(partial, digest)
                    there = self._newest(name)
                    if there is not None and _is_same(there, expert):
                        return there, True
                    try:
                        return self._index.add(expert, facts.sketch), False
                    except CompeftError:
                        if not self._index.has(digest):
                            self._blobs.remove(digest)
                        self._num_bytes = self._index.num_bytes()
                        raise
            except OSError as error:
                text = error.strerror or str(error)
                raise StoreFullError(f"the store cannot keep it: {text}") from None
            finally:
                partial.unlink(missing_ok=True)

    def _admitted(self, file: Path, digest: str, size: int) -> Facts:
        """What a file says, once its bytes are what they should be, and decode."""
        with file.open("rb") as opened:
            found = digest_of(opened)
            if (found, opened.tell()) != (digest, size):
                raise BrokenExpertError(
                    f"expected {size} bytes of the digest {digest[:12]}..., found "
                    f"{opened.tell()} of {found[:12]}...: nothing of them is kept"
                )
            os.fsync(opened.fileno())  # while others are named: their turn would wait for the disk
        with self._decoding:
            return admit(file, self.limits.max_parameters)

    def _newest(self, name: str) -> Expert | None:
        try:
            return self._index.find(Reference(name))
        except ExpertError:
            return None

    # --- pulling ------------------------------------------------------------------------------

    def find(self, reference: Reference) -> Expert:
        """The version that a reference means; UnknownExpertError where there is none."""
        check_name(reference.name)
        return self._index.find(reference)

    def open(self, expert: Expert) -> BinaryIO:
        """A version's file, its bytes compared with its digest.

        Raises
        ------
        BrokenExpertError
            The disk has lost it, or has other bytes.
        """
        try:
            return self._blobs.open(expert.digest)
        except FileNotFoundError:
            raise BrokenExpertError(
                f"{expert.reference}: its file is gone from the store: push it again"
            ) from None

    def change(self, old: str, expert: Expert) -> bytes | None:
        """What makes a version of another, by its digest; None where the whole is no larger."""
        if expert.codec != "steps" or not self._index.has(old):
            return None
        key = (old, expert.digest)
        if key not in self._changes:
            paths = [self._blobs.path(digest) for digest in key]
            if sum(path.stat().st_size for path in paths) > _MAX_CATCH_UP_BYTES:
                return None
            with self._decoding:
                if key not in self._changes:
                    contents = []
                    for digest in key:
                        with self._blobs.open(digest) as file:
                            contents.append(file.read())
                    while len(self._changes) >= _KEPT_CHANGES:
                        self._changes.pop(next(iter(self._changes)))
                    self._changes[key] = catch_up.change(*contents)
        return self._changes.get(key)

    # --- looking ------------------------------------------------------------------------------

    def page(self, after: str, limit: int) -> list[Expert]:
        """The newest version of each name after one, by name."""
        return self._index.page(after, limit)

    def versions(self, name: str) -> list[Expert]:
        """The versions of a name, the newest first."""
        return self._index.versions(name)

    def search(
        self, words: str = "", tags: Mapping[str, str] | None = None, base_model: str = "",
        like: str = "", limit: int = 20,
    ) -> list[Found]:  # fmt: skip
        """Newest versions by words, tags and base model; by similarity to ``like`` where given."""
        tags = check_tags(tags or {})
        if not like:
            found = self._index.search(words, tags, base_model, limit)
            return [Found(expert) for expert in found]
        if words.strip():
            raise ParameterError("expected words or a name to be like, found both")
        given = self.find(Reference.parse(like))
        near = self._index.like(given, tags, base_model, limit)
        return [Found(expert, similarity) for expert, similarity in near]

    # --- removing and checking ----------------------------------------------------------------

    def delete(self, name: str, version: int = 0) -> int:
        """Remove a version, or all of a name, and the blobs that nothing else needs.

        Raises
        ------
        UnknownExpertError
        """
        check_name(name)
        with self._naming:
            count, unused = self._index.remove(name, version)
            for digest in unused:
                self._blobs.remove(digest)
                for key in [key for key in self._changes if digest in key]:
                    self._changes.pop(key, None)
            self._num_bytes = self._index.num_bytes()
            return count

    def check(self) -> Iterator[tuple[int, int, list[str]]]:
        """Compare every blob with its digest: how many were read, of how many, what was found."""
        named = sorted(self._index.digests())
        yield 0, len(named), self._index.check()
        for count, digest in enumerate(named, 1):
            problems = []
            try:
                self._blobs.open(digest, again=True).close()
            except FileNotFoundError:
                if self._index.has(digest):  # it was not deleted meanwhile
                    problems.append(f"blob {digest[:12]}...: missing")
            except (BrokenExpertError, OSError) as error:
                problems.append(f"blob {digest[:12]}...: {error}")
            yield count, len(named), problems
        with self._naming:
            dangling = [digest for digest in self._blobs if not self._index.has(digest)]
        yield len(named), len(named), [f"blob {each[:12]}...: has no name" for each in dangling]


def check_push(
    name: str, base_digest: str, tags: Mapping[str, str], metrics: Mapping[str, float]
) -> tuple[dict[str, str], dict[str, float]]:
    """Check what a caller says of a version, before its bytes are taken.

    Raises
    ------
    ParameterError
    """
    check_name(name)
    if len(base_digest) > _MAX_BASE_DIGEST or not base_digest.isprintable():
        raise ParameterError(
            f"expected a base's digest of at most {_MAX_BASE_DIGEST} printable characters, found "
            f"{len(base_digest)}"
        )
    return check_tags(tags), check_metrics(metrics)


def _is_same(one: Expert, other: Expert) -> bool:
    """Would a push of the second be no news after the first?"""
    return all(
        getattr(one, key) == getattr(other, key)
        for key in ("digest", "base_digest", "tags", "metrics")
    )
