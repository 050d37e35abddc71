"""A round's replies as a strategy is given them: they can be walked over more than once.

A Flower strategy of a user's own may count the replies, log them, or sort them, before it hands
them on to the rule that merges them, or afterwards. The rules of this package read a stream, and
keep nothing. `Replies` serves both: where nobody else looks, replies go by one at a time; where
somebody does, they are kept, their arrays in a temporary file beyond a limit.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from compeft_fl.errors import ParameterError
from compeft_fl.server.intake import Reply

__all__ = ["MOD_FAILED_PRECONDITION", "Replies", "SizedArrays"]

MOD_FAILED_PRECONDITION = 6  # Flower's ErrorCode for mods, which it does not export

_MEMORY_BYTES = 64 << 20  # of kept arrays; what is more lies in a file
_SMALL = 1 << 10  # arrays that are not worth a place in it


class Replies(Sequence[Message]):
    """The replies to a round's messages, in the order in which they come.

    As Flower's list of them: it can be walked over, counted and indexed, as often as one likes.
    Replies are waited for when somebody asks for them. What is no reply at all (a second one to
    the same message) is left out; one without content is an error reply.

    Parameters
    ----------
    arrivals : iterator of Reply
    keep : bool
        Keep them also where `read` is first to pass: somebody may look afterwards.

    Notes
    -----
    Kept messages are a few kB each; their arrays are read from a temporary file when asked for.
    """

    def __init__(self, arrivals: Iterator[Reply], *, keep: bool) -> None:
        self._arrivals, self._keep, self._passed = arrivals, keep, False
        self._kept: list[Reply] = []
        self._places: dict[int, int] = {}  # in `_kept`, by the ids of its messages
        self._shelf: _Shelf | None = None

    def read(self) -> Iterator[Reply]:
        """All that has come, for this package's own stages."""
        if self._keep or self._kept:
            return self._walk()
        self._check_not_passed()
        self._passed = True
        return self._arrivals

    def rest(self) -> Iterator[Reply]:
        """What nobody has read: all of the kept, and those that still come."""
        return self._arrivals if self._passed else self._walk()

    def find(self, message: Message) -> Reply | None:
        """What is known of a message that was walked over."""
        place = self._places.get(id(message))
        return None if place is None else self._kept[place]

    def __iter__(self) -> Iterator[Message]:
        self._look()
        return (reply.message for reply in self._walk() if _is_shown(reply))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        return list(self)[index]

    def _look(self) -> None:
        """Somebody wants to see replies: from now on they are kept."""
        if not self._keep:
            self._check_not_passed()
            self._keep = True

    def _check_not_passed(self) -> None:
        if self._passed:
            raise ParameterError(
                "expected to walk over the replies before they are merged, found them gone: "
                "take list(replies) first"
            )

    def _walk(self) -> Iterator[Reply]:
        index = 0
        while index < len(self._kept) or self._pull():
            yield self._kept[index]
            index += 1

    def _pull(self) -> bool:
        """Wait for one more reply, and keep it; whether there was one."""
        reply = next(self._arrivals, None)
        if reply is None:
            return False
        message = reply.message
        if message.has_content():
            self._shelf = self._shelf or _Shelf()
            message.content = self._shelf.lighter(message.content)
        elif not message.has_error() and reply.question is not None:
            error = Error(MOD_FAILED_PRECONDITION, reply.problem or "")
            message = Message(error, reply_to=reply.question)
        self._places[id(message)] = len(self._kept)
        self._kept.append(replace(reply, message=message))
        return True


def _is_shown(reply: Reply) -> bool:
    """Whether it is a message that a strategy can look at."""
    message = reply.message
    return message.has_error() or (message.has_content() and not reply.is_second)


class _Shelf:
    """Where the arrays of kept replies lie."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # with the last array that lies there

    def lighter(self, content: RecordDict) -> RecordDict:
        """The same content, the data of its arrays on the shelf."""
        return RecordDict(
            {
                key: _filled(ArrayRecord(), {n: self._shelved(each) for n, each in record.items()})
                if isinstance(record, ArrayRecord)
                else record
                for key, record in content.items()
            }
        )

    def read(self, position: int, size: int) -> bytes:
        """What lies there."""
        self._file.seek(position)
        return self._file.read(size)

    def _shelved(self, array: Array) -> Array:
        if len(array.data) <= _SMALL:
            return array
        position = self._file.seek(0, 2)
        try:
            self._file.write(array.data)
        except OSError:  # a full disk: it stays in memory
            self._file.truncate(position)
            return array
        return _ShelvedArray(array, self, position)


class _ShelvedArray(Array):
    """An Array whose data are read when they are asked for."""

    def __init__(self, array: Array, shelf: _Shelf, position: int) -> None:
        self.dtype, self.shape, self.stype = array.dtype, array.shape, array.stype
        self._shelf, self._position, self._size = shelf, position, len(array.data)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """See `flwr.app.Array`."""
        return self._shelf.read(self._position, self._size)

    def slice_array(self) -> Any:
        """See `flwr.app.Array`, which keeps what this gives for another time."""
        chunks = super().slice_array()
        self.__dict__.pop("_chunks", None)
        return chunks

    def __reduce__(self) -> Any:
        return Array, (self.dtype, self.shape, self.stype, self.data)


class SizedArrays(ArrayRecord):
    """An ordinary ArrayRecord that knows what it took, or takes, on the wire.

    ``count_bytes()`` is what a strategy's own accounting of bytes asks; all else is as ever.

    Parameters
    ----------
    arrays : flwr.app.ArrayRecord
    num_bytes : callable
        Gives them; called when somebody asks.
    """

    def __init__(self, arrays: ArrayRecord, num_bytes: Callable[[], int]) -> None:
        super().__init__()
        _filled(self, arrays)
        self.__dict__["_num_bytes"] = num_bytes

    def count_bytes(self) -> int:
        """The bytes on the wire, of the Updates that stand for these arrays."""
        found: int = self.__dict__["_num_bytes"]()
        return found

    def __reduce__(self) -> Any:
        return ArrayRecord, (dict(self),)


def _filled(record: ArrayRecord, arrays: Mapping[str, Array]) -> ArrayRecord:
    """The record with these very objects; its constructor makes others."""
    for name, array in arrays.items():
        record[name] = array
    return record


# Flower writes a class's name into the bytes of its objects.
_ShelvedArray.__qualname__ = Array.__qualname__
SizedArrays.__qualname__ = ArrayRecord.__qualname__
