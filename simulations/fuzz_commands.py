"""Files, folders and the commands that read them, for `simulations/fuzz.py`.

A command is the one that users type, called in this process: it does its work, or prints one line
and gives exit code 2. Whatever it reads, nothing that a terminal acts on is printed, and nothing
half-written is left.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_targets import Target, change_fields, changed_json, mutated, other_arrays, resealed, text

import compeft_fl as cf
from compeft_fl.adapters import carried, files, folders
from compeft_fl.cli.main import UNEXPECTED, main
from compeft_fl.errors import CompeftError
from compeft_fl.runs.scenario import Scenario
from compeft_fl.wire.messages import encode_parts, seal
from compeft_fl.wire.v1 import update_pb2

_CONFIG = {
    "peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8,
    "target_modules": ["query", "value"], "use_rslora": False, "rank_pattern": {}, "bias": "none",
}  # fmt: skip
_NAMES = ("m.query.lora_A.weight", "m.query.lora_B.weight")
_BOUNDARY = b"\n<weights>\n"  # between a folder's two files, in one input
_SCENARIO = """\
[run]
rounds = 3
strategy = "ties"
density = 0.1
peft.r = 8
peft-options = '{"bias": "none"}'
[simulation]
num-supernodes = 10
client-resources-num-cpus = 1
"""


class RefusedError(CompeftError):
    """A command gave exit code 2 and one line."""


class MisbehavedError(Exception):
    """A command did what none may do."""


def file_targets(folder: Path) -> list[Target]:
    """Files and what is in them, and each command on them."""
    folder.mkdir(parents=True, exist_ok=True)
    make = _maker_of_files()
    file, output = folder / "h.compeft", folder / "out"
    original = folder / "original.compeft"
    original.write_bytes(valid_files()[0])

    def read_file(content: bytes) -> object:
        file.write_bytes(content)
        return files.read_update(file)

    def on_file(*arguments: str) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            file.write_bytes(content)
            return run([*arguments], output)

        return read

    hostile, good, out = str(file), str(original), str(output)
    return [
        Target("a .compeft file", make, read_file),
        Target("an adapter_config.json", _make_config, _read_config, share=0.5),
        Target("a scenario file", _make_scenario, _reader_of_scenarios(folder), share=0.2),
        Target("compeft-fl inspect", make, on_file("inspect", "--tensors", hostile), share=0.4),
        Target("compeft-fl decompress", make, on_file("decompress", hostile, "-o", out), share=0.4),
        Target(
            "compeft-fl merge", make,
            on_file("merge", good, hostile, hostile, "--method", "ties", "-o", out), share=0.4,
        ),
        Target("compeft-fl similarity", make, on_file("similarity", good, hostile), share=0.4),
        Target("compeft-fl compress", _maker_of_folders(), _compressor(folder), share=0.4),
    ]  # fmt: skip


def run(arguments: list[str], output: Path) -> object:
    """Run a command line; `RefusedError` where it says that it cannot be done."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    shown = out.getvalue() + err.getvalue()
    if not shown.replace("\n", "").isprintable():
        raise MisbehavedError(f"printed what a terminal acts on: {shown!r}")
    if code == 0:
        _clear(output)
        return shown
    line = err.getvalue()
    if code != 2 or line.count("\n") != 1 or out.getvalue() or f"error: {UNEXPECTED}" in line:
        raise MisbehavedError(f"exit code {code}: {shown}")
    if output.exists():
        raise MisbehavedError(f"left {sorted(output.rglob('*'))} behind: {line}")
    raise RefusedError(line)


def _clear(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def valid_files() -> list[bytes]:
    """Adapters as files: of each kind of body, and in parts."""
    layout = cf.Layout([cf.TensorSpec(_NAMES[0], (4, 30)), cf.TensorSpec(_NAMES[1], (30, 4))])
    values = np.random.default_rng(4).standard_normal(layout.num_parameters).astype(np.float32)
    tau = cf.TaskVector(layout, values)
    update = cf.compress(tau, 0.2)
    told = {"adapter_config": json.dumps(_CONFIG), "start": "0"}
    found = [
        cf.encode(tau if codec.startswith("dense") else update, codec, metadata=told)
        for codec in ("golomb", "bitmask", "context", "dense")
    ]
    front = carried.to_bytes({"m.query.counter": np.arange(5)})
    told["carried"] = carried.digest(front)
    beside = files.CARRIED_MAGIC + len(front).to_bytes(8, "little") + front
    found.append(beside + cf.encode(update, "golomb", metadata=told))
    del told["carried"]
    return [*found, _framed(encode_parts(update, "bitmask", metadata=told, max_body_bytes=4110))]


def _framed(parts: list[bytes]) -> bytes:
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return files.PARTS_MAGIC + framed


def _maker_of_files() -> Callable[[random.Random], bytes]:
    blobs = valid_files()

    def make(source: random.Random) -> bytes:
        blob, kind = source.choice(blobs), source.random()
        if kind < 0.1 or (blob.startswith(files.PARTS_MAGIC) and kind < 0.4):
            return mutated(blob, source)
        if blob.startswith(files.CARRIED_MAGIC):
            front, rest = files._front(blob)
            changed = source.choice((mutated(front, source), front, b""))
            length = source.choice((len(changed), len(changed), len(front), 0, 2**63))
            rest = change_fields(rest, source) if kind < 0.5 else rest
            return files.CARRIED_MAGIC + length.to_bytes(8, "little") + changed + rest
        if blob.startswith(files.PARTS_MAGIC):
            parts = list(files.parts_of(blob))
            at = source.randrange(len(parts))
            if kind < 0.6:
                parts = source.choices(parts, k=source.randint(0, 5))
            else:
                parts[at] = change_fields(parts[at], source)
            return _framed(parts)
        if kind < 0.25:
            return resealed(blob, source)
        if kind < 0.6:
            return change_fields(blob, source)
        message: Any = update_pb2.Update.FromString(blob[:-5])
        if kind < 0.7:
            message.metadata["start"] = source.choice(("1", "", "blake2b:00", "\x1b[2J", "0" * 999))
        elif kind < 0.8:
            tensor = source.choice(message.layout.tensors)
            tensor.name = source.choice(("", "\0", "\x1b[2J", "\u202e", "a" * 5000, _NAMES[0]))
        else:
            message.metadata["adapter_config"] = _config_text(source).encode(
                errors="replace"
            ).decode()  # fmt: skip
        return seal(message.SerializeToString())

    return make


def _config_text(source: random.Random) -> str:
    kind = source.random()
    plain = json.dumps(_CONFIG)
    if kind < 0.2:
        return text(mutated(plain.encode(), source))
    if kind < 0.3:
        return re.sub(r"\d+", source.choice(("9" * 5000, "1e999", "-0", "NaN")), plain, count=1)
    if kind < 0.4:
        return plain.replace("none", source.choice(("\\ud800", "\\u001b[2J", "\\u0000")))
    if kind < 0.45:
        depth = source.choice((15, 25, 1000, 100_000))
        return plain.replace("{}", "[" * depth + "]" * depth)
    return json.dumps(changed_json(_CONFIG, source))


def _make_config(source: random.Random) -> bytes:
    return _config_text(source).encode(errors="replace")


def _read_config(content: bytes) -> object:
    config = folders.parse_config(content.decode(errors="replace"))
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


def _make_scenario(source: random.Random) -> bytes:
    if source.random() < 0.5:
        return mutated(_SCENARIO.encode(), source)
    values = (
        "9" * 5000, "1e999", "nan", '"\\u001b[2J"', "[" * 5000, "{}", "1979-05-27", "-1", "",
        "0x" + "f" * 5000, '"\\u0000"', '"auto"', "1" + "0" * 400, '"{\\"a\\": 1}"',
    )  # fmt: skip

    def other(found: re.Match[str]) -> str:
        return f"= {source.choice(values)}" if source.random() < 0.15 else found[0]

    return re.sub(r"= \S+", other, _SCENARIO).encode()


def _reader_of_scenarios(folder: Path) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        file = folder / "scenario.toml"
        file.write_bytes(content)
        lines = content.decode(errors="surrogateescape").splitlines()
        with contextlib.suppress(CompeftError):  # as they are typed on a command line
            Scenario.load(None, [line.replace(" = ", "=") for line in lines if "=" in line])
        return Scenario.load(file)

    return read


def _maker_of_folders() -> Callable[[random.Random], bytes]:
    """The two files of an adapter folder as one input."""
    from safetensors.numpy import save

    arrays: dict[str, Any] = {name: np.ones((4, 30), np.float32) for name in _NAMES}
    weights = save(arrays, {"format": "pt"})
    length = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]

    def make(source: random.Random) -> bytes:
        config, stored, kind = json.dumps(_CONFIG).encode(), weights, source.random()
        if kind < 0.3:
            config = _make_config(source)
        elif kind < 0.5:
            stored = mutated(weights, source)
        elif kind < 0.8:
            told = json.dumps(changed_json(header, source)).encode()
            stored = len(told).to_bytes(8, "little") + told + data
        else:
            stored = save(other_arrays(arrays, source))
        return config + _BOUNDARY + stored

    return make


def _compressor(folder: Path) -> Callable[[bytes], object]:
    adapter, output = folder / "adapter", folder / "made.compeft"
    adapter.mkdir(exist_ok=True)

    def read(content: bytes) -> object:
        config, _, stored = content.partition(_BOUNDARY)
        (adapter / folders.CONFIG_FILE).write_bytes(config)
        (adapter / folders.WEIGHTS_FILE).write_bytes(stored)
        return run(["compress", str(adapter), "-o", str(output), "--density", "0.3"], output)

    return read


def memory_folders() -> Iterator[str]:
    """Where files cost no disk."""
    if os.access("/dev/shm", os.W_OK):
        yield "/dev/shm"
