"""What a Flower message takes in bytes, as Flower serialises it.

Flower takes a message apart into objects (the message, its content, each record, each Array, its
chunks of 5 MiB), writes each as a head and a body, and sends those that the other side does not
have. The size of a message is the sum over its distinct objects: every record counts, and names,
data types and metadata with them.
"""

from __future__ import annotations

import copy
from typing import Any

from flwr.app import Message, RecordDict

__all__ = ["MessageSizes"]

_OTHER_RELEASE = (AttributeError, TypeError, NotImplementedError)


class MessageSizes:
    """Sizes of messages; contents that messages share are measured once.

    Examples
    --------
    >>> from flwr.app import ConfigRecord
    >>> small, large = (RecordDict({"c": ConfigRecord({"x": bytes(n)})}) for n in (10, 60))
    >>> MessageSizes().of_content(large) - MessageSizes().of_content(small)
    50
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[RecordDict, int]] = {}  # by id; it stays referenced

    def of(self, message: Message) -> int | None:
        """The bytes of a message; None where this release of Flower serialises otherwise.

        What Flower fills in when a message is pushed (the run's id) counts from then on.
        """
        try:
            if not message.has_content():
                return len(_deflated(message))
            # The head names the content by a hash, of one length whatever the content is.
            head = copy.copy(message)
            head.content = RecordDict()
            return len(_deflated(head)) + self._of_content(message.content)
        except _OTHER_RELEASE:
            return None

    def of_content(self, content: RecordDict) -> int | None:
        """The bytes of a message's content alone, which needs no run; None as `of`."""
        try:
            return self._of_content(content)
        except _OTHER_RELEASE:
            return None

    def clear(self) -> None:
        """Forget contents."""
        self._known.clear()

    def _of_content(self, content: RecordDict) -> int:
        known = self._known.get(id(content))
        if known is None:
            known = self._known[id(content)] = content, _size(content, set())
        return known[1]


def _deflated(part: Any) -> bytes:
    found: bytes = part.deflate()  # of Flower's public classes, undocumented
    return found


def _size(part: Any, seen: set[str]) -> int:
    """The bytes of an object and of those below it, each once."""
    size = len(_deflated(part))
    for name, child in (part.children or {}).items():
        if name not in seen:
            seen.add(name)
            size += _size(child, seen)
    return size
