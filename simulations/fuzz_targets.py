"""What `simulations/fuzz.py` fuzzes: readers of bytes from elsewhere, and inputs for them.

Inputs are valid ones with changed bytes, and, since a hostile sender computes checksums too, with
changed bytes or fields under a checksum that is right.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import compeft_fl as cf
from compeft_fl import codecs
from compeft_fl.errors import CompeftError, UnknownLayoutError
from compeft_fl.exchange import node_state
from compeft_fl.exchange.records import to_arrays
from compeft_fl.exchange.replica import Replica
from compeft_fl.merging import partial
from compeft_fl.merging.partial import decode_partial, encode_partial
from compeft_fl.reduction.factorize import factorize
from compeft_fl.server import checkpoint
from compeft_fl.server.checkpoint import Checkpoint, CheckpointFolder
from compeft_fl.wire.messages import seal
from compeft_fl.wire.v1 import update_pb2

LAYOUT = cf.Layout([cf.TensorSpec("a", (30, 7)), cf.TensorSpec("b", (501,), "bf16")])
METHODS = (cf.Average, cf.TaskArithmetic, cf.Ties)
_CHECKSUM_BYTES = 5  # the last of an update: a field's tag and a CRC-32
NASTY = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, -0.5, float("nan"), float("inf"), "", "x",
    "-1", "1e9", "9" * 5000, "\x1b[2J",
    "\0", 10**400, [], [[]], {}, {"": "no such"}, {"items": []}, {"items": [["w", 1]]},
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader, and what makes an input for it from a seeded source of randomness.

    ``share`` is how many inputs it gets for each of the target of a codec.
    """

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    share: float = 1.0


def valid_updates(codec: str) -> list[bytes]:
    """Updates of one codec, with the layout in them and by its id."""
    values = np.random.default_rng(0).standard_normal(LAYOUT.num_parameters).astype(np.float32)
    tau = cf.TaskVector(LAYOUT, values)
    update: Any = cf.compress(tau, 0.2).with_scales([0.5, 0.25])
    if codec == "factored":
        update = factorize(tau, 0.3)
    more: dict[str, Any] = {"metadata": {"key": "value"}, "base_version": 3}
    return [cf.encode(update, codec, layout_by_id=by_id, **more) for by_id in (False, True)]


def read_update(blob: bytes) -> object:
    """All the ways in which an update is read: with the layout that it names, and a known one."""
    with contextlib.suppress(CompeftError):
        cf.decode(blob, layout=LAYOUT)
    accumulator = cf.Ties(layout=LAYOUT)
    with contextlib.suppress(CompeftError):
        accumulator.add(blob)
        accumulator.result()
    try:
        return cf.decode(blob)
    except UnknownLayoutError:
        return cf.decode(blob, layout=LAYOUT)


def mutated(original: bytes, source: random.Random) -> bytes:
    """Some bits flipped, and bytes replaced, cut out, doubled, or put in."""
    data = bytearray(original)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        length = source.choice((1, 1, 2, 4, 8, source.randint(1, 64)))
        kind = source.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[at : at + length] = source.randbytes(len(data[at : at + length]))
        elif kind == 2:
            data[at : at + length] = b""
        elif kind == 3:
            data[at:at] = source.choice((source.randbytes(length), bytes(length), b"\xff" * length))
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            data = data[:at]
    return bytes(data)


def resealed(blob: bytes, source: random.Random) -> bytes:
    """An update with changed bytes under a checksum that is right."""
    return seal(mutated(blob[:-_CHECKSUM_BYTES], source))


def change_fields(blob: bytes, source: random.Random) -> bytes:
    """An update with changed fields under a checksum that is right."""
    message = update_pb2.Update.FromString(blob[:-_CHECKSUM_BYTES])
    for _ in range(source.randint(1, 3)):
        _change_field(message, source)
    return seal(message.SerializeToString())


def update_targets() -> list[Target]:
    """One for each codec of the registry."""
    targets = []
    for name in codecs.names():
        blobs = valid_updates(name)

        def make(source: random.Random, blobs: list[bytes] = blobs) -> bytes:
            blob, kind = source.choice(blobs), source.random()
            if kind < 0.2:
                return mutated(blob, source)
            return resealed(blob, source) if kind < 0.4 else change_fields(blob, source)

        targets.append(Target(f"update, {name}", make, read_update))
    return targets


def state_target(folder: Path) -> Target:
    """A node's state file."""
    from safetensors.numpy import save

    file = node_state.StateFile(folder)
    size = LAYOUT.num_parameters
    values = np.random.default_rng(1).standard_normal((3, size)).astype(np.float32)
    with file.locked():
        replica = Replica(LAYOUT, values[0], 4)
        file.save(node_state.NodeState(LAYOUT, replica, values[1], b"3", values[2], b"4"))
    original = file.path.read_bytes()
    arrays = {"shared": values[0], "residual": values[1], "next_residual": values[2]}
    layout = [(t.name, t.shape, t.dtype) for t in LAYOUT.tensors]

    def make(source: random.Random) -> bytes:
        if source.random() < 0.3:
            return mutated(original, source)
        told = {"layout": json.dumps(layout), "version": "4", "taken": "33", "trained": "34"}
        key = source.choice(sorted(told))
        kind = source.randrange(3)
        if kind == 0:
            told[key] = json.dumps(changed_json(json.loads(told[key]), source))
        elif kind == 1:
            told[key] = text(mutated(told[key].encode(), source))
        told["format"] = node_state._FORMAT
        held = other_arrays(arrays, source) if kind == 2 else arrays
        told["checksum"] = node_state._checksum(told, held)
        return bytes(save(held, metadata=told))

    def read(content: bytes) -> object:
        file.path.write_bytes(content)
        return file.load()

    return Target("a node's state", make, read, share=0.4)


def checkpoint_target(folder: Path) -> Target:
    """A server's checkpoint."""
    from safetensors.numpy import save

    checkpoints = CheckpointFolder(folder)
    shared = np.ones(6, np.float32)
    checkpoints.save(
        Checkpoint(
            server_round=2,
            arrays=to_arrays({"w": shared.reshape(2, 3)}),
            exchange={
                "version": 1, "federation": "f", "shared": shared, "log": {1: b"delta"},
                "nodes": {"7": [1, "33"]},
            },
            strategy={"momentum": {"value": shared}},
            history={"train": {"1": {"loss": 0.5}}},
            random_state=random.Random(0).getstate(),
        )
    )  # fmt: skip
    (path,) = checkpoints.files()
    original = path.read_bytes()
    header = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])
    outline = json.loads(header["__metadata__"]["told"])
    from safetensors.numpy import load

    tensors = load(original)

    def make(source: random.Random) -> bytes:
        if source.random() < 0.3:
            return mutated(original, source)
        outlined, held = json.dumps(changed_json(outline, source)), tensors
        kind = source.randrange(3)
        if kind == 0:
            outlined = text(mutated(json.dumps(outline).encode(), source))
        elif kind == 1:
            held = other_arrays(tensors, source)
        checksum = checkpoint._checksum(outlined, held)
        told = {"format": checkpoint._FORMAT, "told": outlined, "checksum": checksum}
        return bytes(save(held, metadata=told))

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return checkpoints.load()

    return Target("a checkpoint", make, read, share=0.4)


def partial_targets() -> list[Target]:
    """Partial sums of each method of merging, as an aggregation tree passes them on."""
    from safetensors.numpy import save

    targets = []
    for method in METHODS:
        like = method(layout=LAYOUT)
        edge = method(layout=LAYOUT)
        for blob in valid_updates("golomb"):
            edge.add(blob, weight=3)
        original = encode_partial(edge, base_version=7)
        told, sums = partial._read(original)
        assert sums is not None

        def make(
            source: random.Random, original: bytes = original, told: dict[str, str] = told,
            sums: Any = sums,
        ) -> bytes:  # fmt: skip
            if source.random() < 0.3:
                return mutated(original, source)
            changed, held = dict(told), {"sums": sums}
            if source.randrange(2):
                key = source.choice(sorted(set(told) - {"checksum"}))
                nasty = source.choice((text(mutated(told[key].encode(), source)), "", "nan"))
                changed[key] = nasty.replace("\n", " ")
            else:
                held = other_arrays(held, source)
            changed["checksum"] = partial._checksum(changed, held.get("sums"))
            return bytes(save(held, metadata={partial._ENTRY: partial._lines(changed)}))

        def read(content: bytes, like: Any = like, method: Any = method) -> object:
            root = method(layout=LAYOUT)
            root.combine(decode_partial(content, like))
            return root.result() if root.count else None

        targets.append(Target(f"partial sum, {method.__name__}", make, read, share=0.4))
    return targets


def _change_field(message: Any, source: random.Random) -> None:
    """Change one field of a protobuf message, at any depth, whatever the message is."""
    fields = message.ListFields()
    if not fields:
        return
    field, value = source.choice(fields)
    is_message = field.type == field.TYPE_MESSAGE
    if source.random() < 0.05 or (is_message and field.message_type.GetOptions().map_entry):
        message.ClearField(field.name)
    elif hasattr(value, "__len__") and not isinstance(value, bytes | str):  # repeated
        at = source.randrange(len(value))
        if source.random() < 0.2:
            del value[at]
        elif is_message:
            _change_field(value[at], source)
        else:
            with contextlib.suppress(ValueError, OverflowError):  # beyond the field's range
                value[at] = _other_scalar(value[at], source)
    elif is_message:
        _change_field(value, source)
    else:
        with contextlib.suppress(ValueError, OverflowError):
            setattr(message, field.name, _other_scalar(value, source))


def _other_scalar(value: Any, source: random.Random) -> Any:
    if isinstance(value, bytes):
        return mutated(value, source)
    if isinstance(value, str):
        return text(mutated(value.encode(), source))
    if isinstance(value, float):
        return source.choice((0.0, -value, 2 * value, float("nan"), float("inf"), 3e38, 1e-45))
    near = (value + 1, max(0, value - 1), value ^ 1 << source.randrange(32))
    return source.choice((*near, 0, 2**31, 2**32 - 1, 10**9, 2**62, 2**64 - 1))


def text(data: bytes) -> str:
    """Bytes as a text that a safetensors header can hold."""
    return data.decode("utf-8", errors="replace")


def changed_json(value: Any, source: random.Random) -> Any:
    """A JSON value with something in it replaced, dropped or doubled, at any depth."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(sorted(value))
        rest = {each: inner for each, inner in value.items() if each != key}
        kept = source.random() < 0.9
        return {**rest, key: changed_json(value[key], source)} if kept else rest
    if isinstance(value, list) and value and source.random() < 0.9:
        at = source.randrange(len(value))
        new = source.choice(([changed_json(value[at], source)], [], [value[at]] * 2))
        return [*value[:at], *new, *value[at + 1 :]]
    return source.choice(NASTY)


def other_arrays(arrays: dict[str, Any], source: random.Random) -> dict[str, Any]:
    """One of the arrays gone, renamed, cut, of another type, or with a value that is none."""
    name = source.choice(sorted(arrays))
    rest = {each: array for each, array in arrays.items() if each != name}
    array = arrays[name]
    kind = source.randrange(6)
    if kind == 0:
        return rest
    if kind == 1:
        return {**rest, "other": array}
    if kind == 2:
        return {**rest, name: array[: source.randrange(len(array))].copy()}
    if kind == 3:
        return {**rest, name: array.astype(source.choice((np.float64, np.int32, np.float16)))}
    if kind == 4:
        return {**rest, name: array.reshape(1, *array.shape)}
    if array.dtype.kind != "f":
        return {**rest, name: np.zeros(0, array.dtype)}
    broken = array.copy()
    value = source.choice((float("nan"), float("inf"), -1.0, 3e38))
    broken.flat[source.randrange(max(1, broken.size))] = value
    return {**rest, name: broken}
