"""What a store of experts reads of callers, and a client of servers, for `simulations/fuzz.py`."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fuzz_targets import Target, _change_field, change_fields, mutated, resealed
from google.protobuf.message import DecodeError

from compeft_fl.adapters import Adapter, save_folder
from compeft_fl.adapters.files import PARTS_MAGIC, parts_of
from compeft_fl.errors import BrokenExpertError, CompeftError, MalformedError
from compeft_fl.experts import catch_up
from compeft_fl.experts.cache import Cache
from compeft_fl.experts.downloads import Downloads
from compeft_fl.experts.expert import from_message
from compeft_fl.experts.names import Reference
from compeft_fl.experts.packing import packed
from compeft_fl.experts.service import ExpertsService
from compeft_fl.experts.store import Limits, Store
from compeft_fl.experts.v1 import experts_pb2

_SEPARATOR = b"\0<next>\0"  # between the messages of one input
_REQUESTS = {
    "Resume": experts_pb2.ResumeRequest,
    "Push": experts_pb2.PushRequest,
    "Pull": experts_pb2.PullRequest,
    "List": experts_pb2.ListRequest,
    "Search": experts_pb2.SearchRequest,
    "Describe": experts_pb2.DescribeRequest,
    "Delete": experts_pb2.DeleteRequest,
    "Check": experts_pb2.CheckRequest,
}


class RefusedError(CompeftError):
    """A call that the service has ended with a status."""


def expert_targets(folder: Path) -> list[Target]:
    """Calls of a client, replies of a server, and changes from one version to another."""
    blobs = _blobs(folder)
    return [_calls(folder / "store", blobs), _replies(folder / "cache", blobs), _changes(blobs)]


def _blobs(folder: Path) -> list[bytes]:
    """Two versions of an adapter, as a store keeps them, and a third that is compressed."""
    rng = np.random.default_rng(5)
    shapes = {"A": (2, 24), "B": (24, 2)}
    state = {
        f"base_model.model.l.lora_{key}.weight": rng.standard_normal(shape).astype(np.float32)
        for key, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "tiny"}
    moved = {name: values + np.float32(0.01) * (values > 1) for name, values in state.items()}
    found = []
    for name, tensors in (("one", state), ("two", moved)):
        save_folder(Adapter(config, tensors), folder / name)
        found.append(packed(folder / name, folder).file.read_bytes())
    made = packed(folder / "two", folder, folder / "one", density=0.2)
    return [*found, made.file.read_bytes()]


# --- what a server reads ----------------------------------------------------------------------


class _Context:
    """What a call knows of its caller; a status ends it."""

    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def abort(self, code: Any, details: str) -> None:
        if not details or "\n" in details or not details.isprintable():
            raise AssertionError(f"{code}: {details!r} is not one line")
        raise RefusedError(f"{code.name}")

    def is_active(self) -> bool:
        return True

    def cancel(self) -> None:
        raise AssertionError("a call was taken for silent")


def _calls(folder: Path, blobs: list[bytes]) -> Target:
    store = Store(folder, Limits(max_bytes=1 << 20, max_parameters=1 << 16))
    service = ExpertsService(store, None)
    valid = list(_valid_calls(blobs))
    for _, messages in valid[:3]:
        service.Push(iter(messages), _Context([]))

    def make(source: random.Random) -> bytes:
        name, messages = source.choice(valid)
        parts = []
        for message in messages:
            copy = type(message).FromString(message.SerializeToString())
            if source.random() < 0.5:
                for _ in range(source.randint(1, 3)):
                    _change_field(copy, source)
            if name == "Push" and copy.WhichOneof("part") == "chunk" and source.random() < 0.3:
                copy.chunk = resealed(copy.chunk, source) if copy.chunk[5:] else b""
            part = copy.SerializeToString()
            parts.append(mutated(part, source) if source.random() < 0.1 else part)
        if name == "Push" and source.random() < 0.5:
            _agree(parts)
        return name.encode() + b" " + _SEPARATOR.join(parts)

    def read(content: bytes) -> object:
        name, _, rest = content.partition(b" ")
        kind = _REQUESTS[name.decode()]
        try:
            messages = [kind.FromString(part) for part in rest.split(_SEPARATOR)]
        except (DecodeError, UnicodeDecodeError, ValueError) as error:  # gRPC answers for us
            raise MalformedError(str(error)) from None
        context = _Context([("compeft-experts-protocol", "1")])
        call = getattr(service, name.decode())
        replies = call(iter(messages) if name == b"Push" else messages[0], context)
        found = list(replies) if name in (b"Pull", b"Check") else [replies]
        return [reply.SerializeToString() for reply in found]

    return Target("experts, a call", make, read, share=0.4)


def _valid_calls(blobs: list[bytes]) -> Iterator[tuple[str, list[Any]]]:
    for blob in blobs:
        digest = hashlib.sha256(blob).digest()
        header = experts_pb2.PushHeader(
            name="one", digest=digest, size=len(blob), tags={"task": "x"}, metrics={"m": 1.0}
        )
        yield (
            "Push",
            [experts_pb2.PushRequest(header=header), experts_pb2.PushRequest(chunk=blob)],
        )
    reference = experts_pb2.Reference(name="one", version=1)
    have = [hashlib.sha256(blob).digest() for blob in blobs]
    yield "Resume", [experts_pb2.ResumeRequest(digest=have[0], size=len(blobs[0]))]
    yield "Pull", [experts_pb2.PullRequest(reference=reference, offset=9)]
    yield (
        "Pull",
        [experts_pb2.PullRequest(
            reference=experts_pb2.Reference(name="one", version=2), have=have[:1], catch_up=True
        )],
    )  # fmt: skip
    begun = experts_pb2.PullRequest(reference=reference, begun=have[0], begun_size=9)
    yield "Pull", [begun]
    yield "List", [experts_pb2.ListRequest(after="a", limit=3)]
    yield "Search", [experts_pb2.SearchRequest(words="one x", tags={"task": "x"}, limit=3)]
    yield "Search", [experts_pb2.SearchRequest(like="one", base_model="tiny")]
    yield "Describe", [experts_pb2.DescribeRequest(reference=reference)]
    yield "Delete", [experts_pb2.DeleteRequest(name="two", version=1)]
    yield "Check", [experts_pb2.CheckRequest()]


def _agree(parts: list[bytes]) -> None:
    """Make a push's header say what its chunk is, as a hostile caller would."""
    with contextlib.suppress(DecodeError, UnicodeDecodeError, ValueError):
        header, chunk = (experts_pb2.PushRequest.FromString(part) for part in parts)
        header.header.digest = hashlib.sha256(chunk.chunk).digest()
        header.header.size = len(chunk.chunk)
        parts[0] = header.SerializeToString()


# --- what a client reads ----------------------------------------------------------------------


def _replies(folder: Path, blobs: list[bytes]) -> Target:
    cache = Cache(folder, 1 << 20)
    replies: list[Any] = []

    class Call:
        def __init__(self) -> None:
            self._left = iter(list(replies))

        def __iter__(self) -> Iterator[Any]:
            return self._left

        def cancel(self) -> None:
            pass

    connection: Any = SimpleNamespace(
        server="127.0.0.1:1",
        stub=SimpleNamespace(Pull=lambda request, metadata: Call()),
        metadata=[],
        errors=contextlib.nullcontext,
    )
    downloads = Downloads(connection, cache)
    old, new = blobs[:2]
    valid = [_served(new, 2), _caught_up(old, new)]

    def make(source: random.Random) -> bytes:
        parts = []
        for message in source.choice(valid):
            copy = experts_pb2.PullReply.FromString(message)
            if source.random() < 0.4:
                _change_field(copy, source)
            parts.append(copy.SerializeToString())
        if source.random() < 0.2:
            at = source.randrange(len(parts))
            parts[at:at] = source.choice(([], [parts[at]], [mutated(parts[at], source)]))
        if source.random() < 0.1:
            del parts[source.randrange(len(parts))]
        return _SEPARATOR.join(parts)

    def read(content: bytes) -> object:
        try:
            replies[:] = [
                experts_pb2.PullReply.FromString(part) for part in content.split(_SEPARATOR)
            ]
        except (DecodeError, UnicodeDecodeError, ValueError) as error:  # gRPC answers for us
            raise MalformedError(str(error)) from None
        cache.add(old)
        header = replies[0].header.expert if replies else None
        if header is not None:
            with contextlib.suppress(CompeftError):  # what a client is known to have
                cache.remember("127.0.0.1:1", from_message(_expert(old, 1)), newest=True)
        try:
            expert, _ = downloads.fetch(Reference("one"), None, 1)
            if hashlib.sha256(cache.read(expert.digest)).hexdigest() != expert.digest:
                raise AssertionError("bytes other than the digest's were kept")
            return expert
        finally:
            for digest in cache.digests():
                cache.path(digest).unlink()

    return Target("experts, a server's replies", make, read, share=0.4)


def _expert(blob: bytes, version: int) -> Any:
    return experts_pb2.Expert(
        name="one", version=version, digest=hashlib.sha256(blob).digest(), size=len(blob),
        config='{"peft_type": "LORA"}', tags={"task": "x"}, layout_id=bytes(16),
    )  # fmt: skip


def _served(blob: bytes, version: int) -> list[bytes]:
    header = experts_pb2.PullHeader(expert=_expert(blob, version), size=len(blob))
    end = experts_pb2.PullEnd(digest=hashlib.sha256(blob).digest())
    half = len(blob) // 2
    messages = [
        experts_pb2.PullReply(header=header), experts_pb2.PullReply(chunk=blob[:half]),
        experts_pb2.PullReply(chunk=blob[half:]), experts_pb2.PullReply(end=end),
    ]  # fmt: skip
    return [message.SerializeToString() for message in messages]


def _caught_up(old: bytes, new: bytes) -> list[bytes]:
    content = catch_up.change(old, new)
    assert content is not None
    header = experts_pb2.PullHeader(
        expert=_expert(new, 2), size=len(content), catch_up_from=hashlib.sha256(old).digest()
    )
    messages = [experts_pb2.PullReply(header=header), experts_pb2.PullReply(chunk=content)]
    return [message.SerializeToString() for message in messages]


def _changes(blobs: list[bytes]) -> Target:
    old, new = blobs[:2]
    content = catch_up.change(old, new)
    assert content is not None
    valid = list(parts_of(content))

    def make(source: random.Random) -> bytes:
        if source.random() < 0.2:
            return mutated(content, source)
        parts = list(valid)
        at = source.randrange(len(parts))
        changed = change_fields if source.random() < 0.5 else resealed
        parts[at] = changed(parts[at], source)
        return PARTS_MAGIC + b"".join(len(x).to_bytes(8, "little") + x for x in parts)

    def read(data: bytes) -> object:
        made = catch_up.apply(old, data)
        if hashlib.sha256(made).digest() != hashlib.sha256(new).digest():
            raise BrokenExpertError("a change to something else")
        return made

    return Target("experts, a change", make, read, share=0.4)
