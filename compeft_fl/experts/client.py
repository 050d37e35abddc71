"""Experts from a server and a cache: push, pull, list, search, describe, delete, check.

>>> from compeft_fl.experts import ExpertClient
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from compeft_fl.adapters import Adapter
from compeft_fl.adapters.base_digest import BASE_DIGEST_BYTES, note_base
from compeft_fl.errors import (
    AdapterError,
    ExpertError,
    ParameterError,
    UnavailableError,
    UnknownExpertError,
)
from compeft_fl.experts.blobs import digest_of
from compeft_fl.experts.cache import Cache, default_folder, parse_size
from compeft_fl.experts.downloads import Downloads
from compeft_fl.experts.expert import Expert, Found, from_message, reference_message
from compeft_fl.experts.names import Reference, check_metrics, check_name, check_tags
from compeft_fl.experts.packing import StoredExpert, packed
from compeft_fl.experts.streams import FIRST_PATIENCE, Progress, Tries, sending
from compeft_fl.experts.transport import Connection, read_certificate
from compeft_fl.experts.v1 import experts_pb2
from compeft_fl.printable import printable

__all__ = ["DEFAULT_CACHE_BYTES", "ExpertClient", "PulledExpert"]

_LOGGER = logging.getLogger("compeft_fl.experts")

SERVER_VARIABLE: Final = "COMPEFT_FL_EXPERTS_SERVER"
TOKEN_VARIABLE: Final = "COMPEFT_FL_EXPERTS_TOKEN"
CA_VARIABLE: Final = "COMPEFT_FL_EXPERTS_CA"
DEFAULT_SERVER: Final = "127.0.0.1:8191"
DEFAULT_CACHE_BYTES: Final = 8 << 30

START_TAGS: Final = {"role": "start"}
_START_PREFIX: Final = "start-"  # and the digest of a start's values: its name in a store
_HEX: Final = re.compile(f"[0-9a-f]{{{2 * BASE_DIGEST_BYTES}}}")  # a base's digest
_CALL_SECONDS: Final = 60.0  # for a call that is no stream
_LONGEST_START_PREFIX: Final = (
    "start-"  # and the digest of a start's values: the name it has in a store
)
_MOST_PROBLEMS: Final = 10_000


_Experts = list[Expert]  # `ExpertClient.list` hides the name of the type
_Found = list[Found]
_Texts = list[str]


class PulledExpert(StoredExpert):
    """An expert whose file is in the cache of this machine.

    Attributes
    ----------
    expert : Expert
    path : Path
        The ``.compeft`` file. It may be evicted when others are pulled: read it now, or pull again.
    start : PulledExpert or None
        The adapter before training, where the update is relative to one.
    from_cache : bool
        No byte of it was fetched now.
    transferred : int
        Bytes of it that were fetched now: the file's, or those of a change to it.
    """

    def __init__(
        self, expert: Expert, path: Path, start: PulledExpert | None, transferred: int
    ) -> None:
        super().__init__(path, start)
        self.expert = expert
        self.path = path
        self.start = start
        self.transferred = transferred

    def adapter(self) -> Adapter:
        """The adapter: its start and what training changed; a start is what it is.

        Raises
        ------
        AdapterError
            It is relative to a start that nobody has pushed.
        """
        is_start = self.expert.tags.get("role") == START_TAGS["role"]
        return self.as_start() if is_start else super().adapter()

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads, with the base that it is for.

        Raises
        ------
        AdapterError
            As `adapter`; or a folder that holds something, without ``force``.
        """
        super().save(folder, force=force)
        digest, _, quantization = self.expert.base_digest.partition(":")
        if _HEX.fullmatch(digest):
            kind = quantization if quantization in ("4bit", "8bit") else ""
            note_base(Path(folder), bytes.fromhex(digest), quantization=kind)

    def check_base(self, digest: bytes) -> None:
        """Raise AdapterError where this is for another base model than that of a digest.

        An expert that says nothing of its base's weights is taken as it is.

        Parameters
        ----------
        digest : bytes
            `compeft_fl.adapters.base_digest.base_digest` of the model.
        """
        expected = self.expert.base_digest.partition(":")[0]
        if expected and expected != digest.hex():
            raise AdapterError(
                f"{self.expert.reference}: expected the base model that it was trained on "
                f"({printable(self.expert.base_model, 80)}, digest {printable(expected, 40)}), "
                f"found another, digest {digest.hex()}"
            )

    @property
    def from_cache(self) -> bool:
        """Was no byte of it fetched now?"""
        return self.transferred == 0

    def __repr__(self) -> str:
        return f"PulledExpert({self.expert.reference}, {self.expert.digest[:12]})"


class ExpertClient:
    """A client of a server of experts; threads may share it.

    Parameters
    ----------
    server : str, optional
        HOST:PORT. Default: COMPEFT_FL_EXPERTS_SERVER, or 127.0.0.1:8191.
    token : str, optional
        Default: COMPEFT_FL_EXPERTS_TOKEN.
    ca : path or bytes, optional
        The certificate (PEM) of the authority that the server's is from: TLS; ``"system"``: any
        that this system trusts. Default: COMPEFT_FL_EXPERTS_CA, or plain text.
    cache : path, optional
        Default: COMPEFT_FL_EXPERTS_CACHE, or ~/.cache/compeft_fl/experts.
    cache_bytes : int or str
        What the cache may take: ``"2 GiB"``.
    offline : bool
        Ask no server: what is in the cache is all there is.

    Raises
    ------
    ParameterError
        An address, a token or a certificate that is none.
    StoreFullError
        A cache that cannot be made.

    Examples
    --------
    >>> import tempfile
    >>> from compeft_fl.experts.serving import running
    >>> with running(Path(tempfile.mkdtemp())) as server:
    ...     with ExpertClient(server.address, cache=tempfile.mkdtemp()) as client:
    ...         client.list()
    []
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        token: str | None = None,
        ca: str | os.PathLike[str] | bytes | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | str = DEFAULT_CACHE_BYTES,
        offline: bool = False,
    ) -> None:
        self.server = server or os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
        token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        ca = (os.environ.get(CA_VARIABLE) or None) if ca is None else ca
        authority = ca if isinstance(ca, bytes) or ca is None else read_certificate(os.fspath(ca))
        self._connection = Connection(self.server, token, authority)
        self._stub = self._connection.stub
        folder = default_folder() if cache is None else Path(cache).absolute()
        self._cache = Cache(folder, parse_size(cache_bytes))
        self._downloads = Downloads(self._connection, self._cache)
        self._offline = offline

    def close(self) -> None:
        """End the connection; the cache stays."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- pulling ------------------------------------------------------------------------------

    def pull(self, reference: str, *, progress: Progress | None = None) -> PulledExpert:
        """Get an expert into the cache, or find it there.

        Parameters
        ----------
        reference : str
            ``NAME`` (the newest version), ``NAME@VERSION`` or ``NAME@DIGEST`` (at least 12 digits).
            A whole digest that is in the cache asks nobody.
        progress : callable, optional
            Is told how many bytes are here, of how many.

        Raises
        ------
        UnknownExpertError
            The server has no such expert; or it is not in the cache, and the server is away.
        UnavailableError
            The server is away, or stopped: what has come is kept, and the next pull goes on there.
        AccessError, BrokenExpertError, StoreFullError, ParameterError
        """
        meant = Reference.parse(reference)
        known = self._cache.recall(self.server, meant)
        fixed = len(meant.digest) == 64 or bool(meant.version)
        here = known is not None and self._cache.has(known.digest)
        if known is not None and here and (fixed or self._offline):
            return self._pulled(known, 0)
        if self._offline:
            raise UnknownExpertError(f"{reference}: not in the cache, and no server is asked")
        try:
            expert, transferred = self._downloads.fetch(
                meant, progress, 1 if here else FIRST_PATIENCE
            )
        except UnavailableError as error:
            if known is not None and here:
                _LOGGER.warning(
                    "%s is that of the cache, %s: %s", reference, known.reference, error
                )
                return self._pulled(known, 0)
            raise
        self._cache.remember(self.server, expert, newest=not (meant.version or meant.digest))
        return self._pulled(expert, transferred)

    def _pulled(self, expert: Expert, transferred: int) -> PulledExpert:
        """What was pulled, with the start that it is relative to."""
        self._cache.touch(expert.digest)
        kind, colon, digest = expert.start.partition(":")
        start = None
        if colon and kind == "blake2b":
            with contextlib.suppress(UnknownExpertError):  # whoever has it may give it
                start = self.pull(_START_PREFIX + digest)
        return PulledExpert(expert, self._cache.path(expert.digest), start, transferred)

    # --- pushing ------------------------------------------------------------------------------

    def push(
        self,
        source: str | os.PathLike[str] | bytes,
        name: str,
        *,
        init: str | os.PathLike[str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        base_digest: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Expert:
        """Make the next version of a name.

        Parameters
        ----------
        source : path or bytes
            An adapter folder, which is compressed first; a ``.compeft`` file; or one's bytes.
        name : str
        init : path, optional
            The adapter before training, a folder: the update is relative to it. It is pushed as
            well, once, under a name of its own (``start-`` and its digest).
        tags, metrics : mapping, optional
        base_digest : str
            Of the base model's weights.
        progress : callable, optional
            Is told how many bytes the server has, of how many.
        **options
            Of a folder: as `compeft_fl.experts.packing.packed`.

        Returns
        -------
        Expert
            With its version; the newest one where it is just this already.

        Raises
        ------
        ParameterError, AdapterError
            What cannot be pushed.
        ExpertError
            What the server refuses, or a server that is away.
        """
        check_name(name)
        told = check_tags(tags or {}), check_metrics(metrics or {})
        with tempfile.TemporaryDirectory(prefix="compeft-fl-") as folder:
            made = packed(source, Path(folder), init, **options)
            if made.start is not None:
                self._push_start(made.start)
            base = base_digest or made.base_digest
            return self._push_file(made.file, name, *told, base, progress)

    def _push_start(self, file: Path) -> None:
        """Push an adapter before training, unless the server has it."""
        with file.open("rb") as opened:
            digest = digest_of(opened)
        name = _START_PREFIX + file.stem
        try:
            if self.describe(f"{name}@{digest}"):
                return
        except UnknownExpertError:
            self._push_file(file, name, START_TAGS, {}, "", None)

    def _push_file(
        self, file: Path, name: str, tags: dict[str, str], metrics: dict[str, float],
        base_digest: str, progress: Progress | None,
    ) -> Expert:  # fmt: skip
        with file.open("rb") as opened:
            digest, size = digest_of(opened), opened.tell()
            header = experts_pb2.PushHeader(
                name=name, digest=bytes.fromhex(digest), size=size, base_digest=base_digest,
                tags=tags, metrics=metrics,
            )  # fmt: skip
            tries = Tries()
            while True:
                try:
                    with self._connection.errors():
                        asked = experts_pb2.ResumeRequest(digest=header.digest, size=size)
                        offset = self._call("Resume", asked).offset
                        if offset > size:
                            raise ExpertError(f"expected an offset in the file, found {offset}")
                        if offset > header.offset:
                            tries.heard()
                        header.offset = offset
                        sent = sending(opened, header, progress)
                        reply = self._stub.Push(
                            sent, metadata=self._connection.metadata, timeout=None
                        )
                        return from_message(reply.expert)
                except UnavailableError as error:
                    tries.failed(error)

    # --- looking ------------------------------------------------------------------------------

    def _call(self, name: str, request: Any) -> Any:
        if self._offline:
            raise UnavailableError(f"{self.server}: no server is asked (offline)")
        call = getattr(self._stub, name)
        return call(request, metadata=self._connection.metadata, timeout=_CALL_SECONDS)

    def _ask(self, name: str, request: Any) -> Any:
        """A call that may be made again where there was no answer."""
        tries = Tries()
        while True:
            try:
                with self._connection.errors():
                    return self._call(name, request)
            except UnavailableError as error:
                if self._offline:
                    raise
                tries.failed(error)

    def list(self, after: str = "", limit: int = 0) -> list[Expert]:
        """The newest version of each name, by name; from one on, and so many, where given."""
        found: list[Expert] = []
        while True:
            want = min(limit - len(found), 500) if limit else 500
            reply = self._ask("List", experts_pb2.ListRequest(after=after, limit=want))
            found += [from_message(each) for each in reply.experts]
            if not reply.more or not reply.experts or (limit and len(found) >= limit):
                return found
            after = found[-1].name

    def search(
        self, words: str = "", *, tags: Mapping[str, str] | None = None, base_model: str = "",
        like: str = "", limit: int = 20,
    ) -> _Found:  # fmt: skip
        """Newest versions that have all the words, tags and the base model.

        Parameters
        ----------
        words : str
            Their beginnings suffice.
        tags : mapping, optional
        base_model : str
        like : str
            A reference: by similarity of signs to it, the most alike first, in place of words.
        limit : int
            At most 100.
        """
        request = experts_pb2.SearchRequest(
            words=words, tags=dict(tags or {}), base_model=base_model, like=like, limit=limit
        )
        return [
            Found(
                from_message(each.expert),
                each.similarity if each.HasField("similarity") else None,
            )
            for each in self._ask("Search", request).found
        ]

    def describe(self, reference: str) -> tuple[Expert, _Experts]:
        """A version, and all versions of its name, the newest first."""
        request = experts_pb2.DescribeRequest(
            reference=reference_message(Reference.parse(reference))
        )
        reply = self._ask("Describe", request)
        return from_message(reply.expert), [from_message(each) for each in reply.versions]

    def delete(self, reference: str) -> int:
        """Remove a version, or all of a name where none is given; how many are gone."""
        meant = Reference.parse(reference)
        if meant.digest:
            raise ParameterError("expected NAME or NAME@VERSION to delete, found a digest")
        request = experts_pb2.DeleteRequest(name=meant.name, version=meant.version)
        return int(self._ask("Delete", request).versions)

    def check(self, progress: Progress | None = None) -> tuple[int, _Texts]:
        """Have the server compare every file with its digest: how many, and what it found."""
        problems: _Texts = []
        checked = 0
        with self._connection.errors():
            call = self._stub.Check(experts_pb2.CheckRequest(), metadata=self._connection.metadata)
            for reply in call:
                problems += [printable(each) for each in reply.problems]
                del problems[_MOST_PROBLEMS:]
                checked = reply.checked
                if progress is not None:
                    progress(reply.checked, reply.total)
        return checked, problems
