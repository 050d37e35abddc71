"""Streams of chunks between a client and a server, and how long a client goes on asking."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final

from compeft_fl.errors import BrokenExpertError, UnavailableError
from compeft_fl.experts.protocol import CHUNK_BYTES
from compeft_fl.experts.v1 import experts_pb2

__all__ = ["FIRST_PATIENCE", "PATIENCE", "Progress", "Tries", "cancelled", "chunks_of", "sending"]

Progress = Callable[[int, int], object]
"""Is told how many bytes are there, of how many."""

PATIENCE: Final = 6  # tries in a row that bring no byte, of a server that has answered before
FIRST_PATIENCE: Final = 3  # of one that has not
_AT_ONCE: Final = 0.02  # seconds before a try that follows one which has brought something
_WAIT: Final = 0.2  # seconds before others, doubled each time, up to
_LONGEST_WAIT: Final = 3.0


class Tries:
    """How long a client goes on asking: until so many tries in a row have brought nothing."""

    def __init__(self, patience: int = FIRST_PATIENCE) -> None:
        self._patience = patience
        self._failed = 0
        self._heard = False

    def heard(self) -> None:
        """Something has come."""
        self._failed, self._patience, self._heard = 0, PATIENCE, True

    def failed(self, error: UnavailableError) -> None:
        """Wait before the next try; raise the error where it was the last."""
        self._failed += 1
        if self._failed >= self._patience or not error.again:
            raise error
        time.sleep(_AT_ONCE if self._heard else min(_LONGEST_WAIT, _WAIT * 2**self._failed))
        self._heard = False


@contextlib.contextmanager
def cancelled(call: Any) -> Iterator[None]:
    """End a stream that is not read to its end."""
    try:
        yield
    finally:
        call.cancel()


def chunks_of(call: Any, size: int) -> Iterator[bytes]:
    """The chunks of a stream, which are so many bytes together."""
    left = size
    for reply in call:
        if reply.WhichOneof("part") == "end":
            break
        if not reply.chunk or len(reply.chunk) > left:
            raise BrokenExpertError(f"expected {left} bytes more, found {len(reply.chunk)}")
        left -= len(reply.chunk)
        yield reply.chunk
    if left:
        raise BrokenExpertError(f"expected {size} bytes, found {size - left}: cut off")


def sending(file: BinaryIO, header: Any, progress: Progress | None) -> Iterator[Any]:
    """The messages of a push."""
    yield experts_pb2.PushRequest(header=header)
    file.seek(header.offset)
    while chunk := file.read(CHUNK_BYTES):
        yield experts_pb2.PushRequest(chunk=chunk)
        if progress is not None:
            progress(file.tell(), header.size)
