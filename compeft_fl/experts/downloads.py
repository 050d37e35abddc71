"""Downloads: an expert's file, or the change that makes it of another, into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from compeft_fl.errors import BrokenExpertError, CompeftError, UnavailableError
from compeft_fl.experts import catch_up
from compeft_fl.experts.cache import Cache
from compeft_fl.experts.expert import Expert, from_message, reference_message
from compeft_fl.experts.names import Reference
from compeft_fl.experts.streams import Progress, Tries, cancelled, chunks_of
from compeft_fl.experts.transport import Connection
from compeft_fl.experts.v1 import experts_pb2

__all__ = ["Downloads"]


class Downloads:
    """Downloads from one server into one cache.

    Parameters
    ----------
    connection : Connection
    cache : Cache
    """

    def __init__(self, connection: Connection, cache: Cache) -> None:
        self._connection, self._cache = connection, cache
        self._stub = connection.stub

    def fetch(
        self, meant: Reference, progress: Progress | None, patience: int
    ) -> tuple[Expert, int]:  # fmt: skip
        """Download what a reference means, as often as it takes; and how many bytes it took."""
        have = [each.digest for each in self._cache.known(self._connection.server, meant.name)]
        have = [digest for digest in have if self._cache.has(digest)]
        tries, broken = Tries(patience), 0
        while True:
            try:
                return self._try_fetch(meant, have, progress, tries)
            except BrokenExpertError:  # a change, or what an earlier download has left, did not fit
                if broken:
                    raise
                broken, have = 1, []
            except UnavailableError as error:
                tries.failed(error)

    def _try_fetch(
        self, meant: Reference, have: list[str], progress: Progress | None, tries: Tries
    ) -> tuple[Expert, int]:
        begun, size = self._cache.begun(self._connection.server, meant.name)
        request = experts_pb2.PullRequest(
            reference=reference_message(meant),
            have=[bytes.fromhex(digest) for digest in have],
            catch_up=bool(have),
            begun=bytes.fromhex(begun),
            begun_size=size,
        )
        with self._connection.errors():
            call = self._stub.Pull(request, metadata=self._connection.metadata)
            with cancelled(call):
                header = next(iter(call), None)
                if header is None or header.WhichOneof("part") != "header":
                    raise BrokenExpertError("expected a header of the server's, found none")
                expert = from_message(header.header.expert)
                if expert.name != meant.name:
                    raise BrokenExpertError(f"expected {meant.name}, found {expert.name}")
                if self._cache.has(expert.digest):
                    return expert, 0
                if header.header.catch_up_from:
                    old = header.header.catch_up_from.hex()
                    return expert, self._catch_up(call, expert, old, have, header.header.size)
                if header.header.size != expert.size:
                    raise BrokenExpertError(
                        f"expected {expert.size} bytes, found {header.header.size}"
                    )
                at = header.header.offset
                return expert, self._download(call, at, expert, progress, tries)

    def _catch_up(
        self, call: Any, expert: Expert, old: str, have: list[str], size: int
    ) -> int:  # fmt: skip
        """Make a version's file of another's and what the server sends."""
        if old not in have or size > expert.size:
            raise BrokenExpertError(
                f"expected a change of what is here, found one of {old[:12]}..."
            )
        content = b"".join(chunks_of(call, size))
        try:
            made = catch_up.apply(self._cache.read(old), content)
        except CompeftError as error:
            raise BrokenExpertError(f"expected a change of {old[:12]}...: {error}") from None
        if hashlib.sha256(made).hexdigest() != expert.digest:
            raise BrokenExpertError(f"expected {expert.digest[:12]}..., found other bytes")
        self._cache.add(made)
        return len(content)

    def _download(
        self, call: Any, at: int, expert: Expert, progress: Progress | None, tries: Tries
    ) -> int:
        """Write a file to the cache, going on where an earlier try has ended.

        What the server sends from another place on than where this one ended is not read: it is
        asked anew, from there. Servers that know nothing of what is begun send from 0 on.
        """
        with self._cache.downloading(expert.digest) as file:
            if self._cache.has(expert.digest):  # another process was faster
                return 0
            self._cache.begin(self._connection.server, expert)
            offset = file.tell()
            if offset > expert.size:
                offset = 0
                file.seek(0)
            if at == offset:
                chunks = chunks_of(call, expert.size - offset)
            else:
                call.cancel()
                chunks = self._rest(expert, offset)
            for chunk in chunks:
                file.write(chunk)
                tries.heard()
                if progress is not None:
                    progress(file.tell(), expert.size)
            file.truncate()
            file.flush()
            self._cache.adopt(expert.digest)
            self._cache.ended(self._connection.server, expert.name)
            return expert.size - offset

    def _rest(self, expert: Expert, offset: int) -> Iterator[bytes]:
        """The bytes of a file from an offset on."""
        meant = Reference(expert.name, digest=expert.digest)
        request = experts_pb2.PullRequest(reference=reference_message(meant), offset=offset)
        call = self._stub.Pull(request, metadata=self._connection.metadata)
        with cancelled(call):
            header = next(iter(call), None)
            if header is None or header.header.offset != offset:
                raise BrokenExpertError(f"expected the bytes from {offset} on, found others")
            yield from chunks_of(call, expert.size - offset)
