"""The experts' gRPC service: what each call does, who may call it, and which status says no.

Statuses, as ``proto/compeft_fl/experts/v1/experts.proto`` has no other errors: UNAUTHENTICATED (no
token, a wrong or an expired one), PERMISSION_DENIED (one without the right), NOT_FOUND,
INVALID_ARGUMENT (what was sent cannot be: a file that does not decode, a name that is none),
RESOURCE_EXHAUSTED (no room), UNAVAILABLE (busy: try again), DATA_LOSS (a broken blob, which is
never sent) and FAILED_PRECONDITION (a later protocol). Each has one line that says what was
expected and what was found.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from compeft_fl.errors import (
    AccessError,
    BrokenExpertError,
    CompeftError,
    ExpertError,
    ParameterError,
    StoreFullError,
    UnavailableError,
    UnknownExpertError,
)
from compeft_fl.experts.expert import to_message
from compeft_fl.experts.names import Reference, check_digest
from compeft_fl.experts.protocol import CHUNK_BYTES, PROTOCOL, PROTOCOL_KEY
from compeft_fl.experts.store import Store, check_push
from compeft_fl.experts.tokens import Tokens
from compeft_fl.experts.v1 import experts_pb2, experts_pb2_grpc
from compeft_fl.printable import one_line

__all__ = ["ExpertsService"]

LOGGER = logging.getLogger("compeft_fl.experts")

_MAX_CHUNK: Final = 4 << 20
_MAX_PAGE: Final = 1000
_MAX_FOUND: Final = 100
_MAX_HAVE: Final = 64
_SILENT_SECONDS: Final = 60.0  # of an upload; then it is ended, and can be resumed
_SLOWEST: Final = 256  # bytes a second of an upload
_LOCAL: Final = "loopback"  # the owner of uploads where nobody has a token
_CHECK_EVERY: Final = 0.5  # seconds between two replies of a check


class ExpertsService(experts_pb2_grpc.ExpertsServicer):
    """The service over a store.

    Parameters
    ----------
    store : Store
    tokens : Tokens or None
        Who may do what; None: everybody may do all.
    max_streams : int
        Uploads and downloads at a time; one more is told to try again.
    silent_seconds : float
        After which an upload from which nothing comes, or a download of which nothing is taken, is
        ended.
    """

    def __init__(
        self, store: Store, tokens: Tokens | None, *, max_streams: int = 192,
        silent_seconds: float = _SILENT_SECONDS,
    ) -> None:  # fmt: skip
        self._store = store
        self._tokens = tokens
        self._streams = threading.BoundedSemaphore(max_streams)
        self._max_streams = max_streams
        self._watch = _Watch(silent_seconds)

    # --- who may, and what went wrong ---------------------------------------------------------

    def _caller(self, context: Any, right: str) -> str:
        """Whoever calls, with the right to; the name of the token."""
        sent = dict(context.invocation_metadata())
        protocol = str(sent.get(PROTOCOL_KEY, PROTOCOL))
        if not (protocol.isascii() and protocol.isdigit() and int(protocol[:9]) <= PROTOCOL):
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                one_line(
                    f"expected protocol {PROTOCOL}, found {protocol}: this server is older", 200
                ),
            )
        if self._tokens is None:
            return _LOCAL
        scheme, _, secret = str(sent.get("authorization", "")).partition(" ")
        token = self._tokens.find(secret if scheme.lower() == "bearer" else "")
        if right not in token.rights:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"token {token.name} may {' and '.join(token.rights)}, not {right}",
            )
        return token.name

    @contextlib.contextmanager
    def _answering(self, context: Any) -> Iterator[None]:
        """Turn this package's errors into statuses, and any other into a line of the log."""
        try:
            yield
        except CompeftError as error:
            context.abort(_status(error), one_line(error))
        except OSError as error:
            LOGGER.warning("the store: %s", error)
            text = f"the store cannot be used: {error.strerror or type(error).__name__}"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    @contextlib.contextmanager
    def _stream(self, context: Any) -> Iterator[None]:
        """One of the streams that may run at a time."""
        if not self._streams.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"busy: {self._max_streams} uploads and downloads are running",
            )
        try:
            yield
        finally:
            self._streams.release()

    # --- pushing ------------------------------------------------------------------------------

    def Resume(self, request: Any, context: Any) -> Any:  # noqa: N802
        """How much of an upload is here already."""
        with self._answering(context):
            owner = self._caller(context, "write")
            offset = self._store.uploaded(owner, request.digest.hex(), request.size)
            return experts_pb2.ResumeReply(offset=offset)

    def Push(self, requests: Iterator[Any], context: Any) -> Any:  # noqa: N802
        """Take a file, check it, and make it the next version of a name."""
        with self._answering(context), self._stream(context):
            owner = self._caller(context, "write")
            with self._watch.over(context) as heard:
                first = next(requests, None)
                if first is None or first.WhichOneof("part") != "header":
                    raise ParameterError("expected a header first, found none")
                header = first.header
                digest, size = check_digest(header.digest.hex()), header.size
                tags, metrics = check_push(
                    header.name, header.base_digest, dict(header.tags), dict(header.metrics)
                )
                if self._store.uploaded(owner, digest, size) < size or header.offset < size:
                    self._receive(requests, owner, header, heard)
            if not context.is_active():
                raise ExpertError("the caller has gone")
            expert, was_there = self._store.name(
                owner, header.name, digest, size,
                base_digest=header.base_digest, tags=tags, metrics=metrics,
            )  # fmt: skip
            LOGGER.info("%s pushed %s, %d bytes", owner, expert.reference, size)
            return experts_pb2.PushReply(expert=to_message(expert), was_there=was_there)

    def _receive(
        self, requests: Iterator[Any], owner: str, header: Any, heard: Callable[[], None]
    ) -> None:
        """Write what a caller sends behind what has come before."""
        digest = header.digest.hex()
        with self._store.upload(owner, digest, header.size, header.offset) as file:
            left, begun = header.size - header.offset, time.monotonic()
            for request in requests:
                heard()
                seconds, here = time.monotonic() - begun, file.tell() - header.offset
                if seconds > self._watch.seconds and here < _SLOWEST * seconds:
                    raise ExpertError(f"expected at least {_SLOWEST} bytes a second, found fewer")
                if request.WhichOneof("part") != "chunk" or not request.chunk:
                    raise ParameterError("expected chunks after the header, found another message")
                if len(request.chunk) > min(left, _MAX_CHUNK):
                    raise ParameterError(
                        f"expected at most {min(left, _MAX_CHUNK)} bytes, found "
                        f"{len(request.chunk)}"
                    )
                file.write(request.chunk)
                left -= len(request.chunk)
        if left:
            raise BrokenExpertError(f"expected {header.size} bytes, found {header.size - left}")

    # --- pulling ------------------------------------------------------------------------------

    def Pull(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """Send a file from an offset on, or the change that makes it of one that the caller has."""
        with (
            self._answering(context), self._stream(context), self._watch.over(context) as moved,
        ):  # fmt: skip
            self._caller(context, "read")
            expert = self._store.find(_reference(request.reference))
            header = experts_pb2.PullHeader(expert=to_message(expert))
            have = [each.hex() for each in request.have[:_MAX_HAVE]]
            if expert.digest in have:
                yield experts_pb2.PullReply(header=header)
                return
            offset = request.offset
            if request.begun.hex() == expert.digest and not offset:
                offset = min(request.begun_size, expert.size)
            if request.catch_up and not request.offset:
                old, content = self._smallest(have, expert)
                if content is not None and len(content) < expert.size - offset:
                    header.size, header.catch_up_from = len(content), bytes.fromhex(old)
                    yield experts_pb2.PullReply(header=header)
                    for at in range(0, len(content), CHUNK_BYTES):
                        moved()
                        yield experts_pb2.PullReply(chunk=content[at : at + CHUNK_BYTES])
                    end = experts_pb2.PullEnd(digest=hashlib.sha256(content).digest())
                    yield experts_pb2.PullReply(end=end)
                    return
            with self._store.open(expert) as file:
                if offset > expert.size:
                    raise ParameterError(
                        f"expected an offset of at most {expert.size}, found {offset}"
                    )
                header.size, header.offset = expert.size, offset
                yield experts_pb2.PullReply(header=header)
                file.seek(offset)
                while chunk := file.read(CHUNK_BYTES):
                    moved()
                    yield experts_pb2.PullReply(chunk=chunk)
            yield experts_pb2.PullReply(end=experts_pb2.PullEnd(digest=header.expert.digest))

    def _smallest(self, have: list[str], expert: Any) -> tuple[str, bytes | None]:
        """Of the changes from what a caller has, the smallest; looked for in the two newest."""
        found: tuple[str, bytes | None] = "", None
        for old in have[:2]:
            content = self._store.change(old, expert)
            if content is not None and (found[1] is None or len(content) < len(found[1])):
                found = old, content
        return found

    # --- looking ------------------------------------------------------------------------------

    def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The newest version of each name."""
        with self._answering(context):
            self._caller(context, "read")
            limit = min(request.limit or 100, _MAX_PAGE)
            experts = self._store.page(request.after, limit + 1)
            messages = [to_message(expert, config=False) for expert in experts[:limit]]
            return experts_pb2.ListReply(experts=messages, more=len(experts) > limit)

    def Search(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Newest versions by words, tags and base model, or by similarity."""
        with self._answering(context):
            self._caller(context, "read")
            found = self._store.search(
                request.words[:1000], dict(request.tags), request.base_model, request.like,
                min(request.limit or 20, _MAX_FOUND),
            )  # fmt: skip
            return experts_pb2.SearchReply(
                found=[
                    experts_pb2.Found(
                        expert=to_message(each.expert, config=False), similarity=each.similarity
                    )
                    for each in found
                ]
            )

    def Describe(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A version, and which versions there are."""
        with self._answering(context):
            self._caller(context, "read")
            expert = self._store.find(_reference(request.reference))
            versions = self._store.versions(expert.name)
            return experts_pb2.DescribeReply(
                expert=to_message(expert),
                versions=[to_message(each, config=False) for each in versions],
            )

    # --- removing and checking ----------------------------------------------------------------

    def Delete(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Remove a version, or all of a name."""
        with self._answering(context):
            owner = self._caller(context, "write")
            meant = Reference(request.name, request.version).checked()
            count = self._store.delete(meant.name, meant.version)
            LOGGER.info("%s deleted %s, %d versions", owner, meant, count)
            return experts_pb2.DeleteReply(versions=count)

    def Check(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """Compare every blob with its digest."""
        with self._answering(context), self._stream(context):
            self._caller(context, "read")
            waiting: list[str] = []
            said = 0.0
            checked = total = 0
            for checked, total, problems in self._store.check():
                waiting += problems
                if time.monotonic() - said > _CHECK_EVERY:
                    said = time.monotonic()
                    yield _checked(checked, total, waiting)
                    waiting = []
            yield _checked(checked, total, waiting)


def _checked(checked: int, total: int, problems: list[str]) -> Any:
    return experts_pb2.CheckReply(checked=checked, total=total, problems=problems[:_MAX_PAGE])


def _reference(message: Any) -> Reference:
    """A reference of a message, checked as a person's is."""
    return Reference(message.name, message.version, message.digest).checked()


def _status(error: CompeftError) -> Any:
    for kind, status in _STATUSES.items():
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INVALID_ARGUMENT


_STATUSES: Final = {
    AccessError: grpc.StatusCode.UNAUTHENTICATED,
    UnknownExpertError: grpc.StatusCode.NOT_FOUND,
    StoreFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BrokenExpertError: grpc.StatusCode.DATA_LOSS,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
}


class _Watch:
    """Ends streams on which nothing moves; one thread for all, which waits while there is none."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._moved: dict[Any, float] = {}
        self._lock = threading.Lock()
        self._some = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="experts-watch").start()

    @contextlib.contextmanager
    def over(self, context: Any) -> Iterator[Callable[[], None]]:
        """Watch a call; what is yielded is called when something has moved."""

        def moved() -> None:
            self._moved[context] = time.monotonic()

        with self._lock:
            moved()
            self._some.set()
        try:
            yield moved
        finally:
            with self._lock:
                del self._moved[context]

    def _watch(self) -> None:
        while True:
            self._some.wait()
            time.sleep(min(self.seconds / 4, 1.0))
            with self._lock:
                now = time.monotonic()
                for context, last in list(self._moved.items()):
                    if now - last > self.seconds:
                        context.cancel()
                if not self._moved:
                    self._some.clear()
