"""Hostile files and folders through every command: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import seal, valid
from safetensors.numpy import save_file
from test_hostile_work import FLOOR, zeros

from compeft_fl.adapters import folders
from compeft_fl.adapters.files import PARTS_MAGIC
from compeft_fl.cli.main import UNEXPECTED, main
from compeft_fl.codecs.base import Codec
from compeft_fl.wire import messages

ESCAPE = "\x1b[2J\x9b1m\u202e\x07"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def update(config=LORA, name="m.lora_A.weight", start="0"):
    """A small valid adapter's update, as a message to change."""
    message = valid()
    message.layout.tensors[0].name = name
    message.layout.tensors[1].name = "m.lora_B.weight"
    text = config if isinstance(config, str) else json.dumps(config)
    message.metadata["adapter_config"], message.metadata["start"] = text, start
    return message


def shaped(shape):
    message = update()
    message.layout.tensors.add(name="m.lora_A.more", shape=shape, dtype=1)
    return message


def many(parts):
    blobs = [seal(part) for part in parts]
    return PARTS_MAGIC + b"".join(len(blob).to_bytes(8, "little") + blob for blob in blobs)


def empty():
    message = update()
    del message.layout.tensors[:]
    message.num_parameters = 0
    message.golomb.Clear()
    message.golomb.block_size = 256
    return message


CONFIG = {"adapter_config": json.dumps(LORA), "start": "0"}
FILES = {
    "digits": lambda: update('{"peft_type": "LORA", "r": %s}' % ("9" * 5000)),
    "surrogate": lambda: update('{"peft_type": "LORA", "x": "\\ud800"}'),
    "deep": lambda: update('{"peft_type": "LORA", "x": %s}' % ("[" * 30 + "]" * 30)),
    "deeper": lambda: update('{"peft_type": "LORA", "x": %s}' % ("[" * 100_000)),
    "method": lambda: update({"peft_type": f"LORA{ESCAPE}"}),
    "a long method": lambda: update({"peft_type": "L" * 100_000}),
    "name": lambda: update(name=f"m.lora_A{ESCAPE}.weight"),
    "nul": lambda: update(name="m.lora_A.weight\0"),
    "dims": lambda: shaped([1] * 100),
    "zero": lambda: shaped([0, 2**63]),
    "zero of one more": lambda: shaped([3, 0, 2**61]),
    "empty": empty,
    "start": lambda: update(start=ESCAPE),
    "a start that is none": lambda: update(start="blake2b:" + "0" * 10**6),
    "parts": lambda: many(zeros(FLOOR, 25 * FLOOR, i * FLOOR, CONFIG) for i in range(25)),
    "empty parts": lambda: many([zeros(0, 4, 0, CONFIG)] * 20_000),
    "no parts": lambda: PARTS_MAGIC,
    "a part cut off": lambda: PARTS_MAGIC + b"\xff" * 12,
    "padding": lambda: zeros(25 * FLOOR, metadata={**CONFIG, "x": "x" * 500_000}),
    "no metadata": lambda: zeros(4),
    "nothing": lambda: b"",
}


@pytest.fixture
def hostile(tmp_path, request):
    """A hostile file, its own name hostile too."""
    made = FILES[request.param]()
    file = tmp_path / f"h{ESCAPE}\n\udcff.compeft"
    file.write_bytes(made if isinstance(made, bytes) else seal(made))
    return file


def check_one_line(capsys, *arguments, expected=2):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == expected, out + err
    assert (out + err).replace("\n", "").isprintable()
    if code:
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("compeft-fl")
        assert f": error: {UNEXPECTED}" not in err, err
        assert len(err) < 1500
    return out + err


@pytest.mark.parametrize("hostile", FILES, indirect=True)
@pytest.mark.parametrize("command", ["inspect", "decompress", "merge", "similarity"])
def test_a_hostile_file_is_one_line(hostile, command, request, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    arguments = {
        "inspect": [hostile, "--tensors"],
        "decompress": [hostile, "-o", output],
        "merge": [hostile, hostile, "--method", "ties", "-o", output],
        "similarity": [hostile, hostile],
    }[command]
    shows = "start" in request.node.callspec.params["hostile"]  # what says no more than a text
    only = command in {"inspect", "similarity"}
    check_one_line(capsys, command, *arguments, expected=0 if shows and only else 2)
    assert sorted(tmp_path.iterdir()) == [hostile]


def folder_of(path, config=LORA, tensors=None, metadata=None):
    path.mkdir(parents=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / folders.CONFIG_FILE).write_text(text)
    arrays = {"m.lora_A.w": np.ones((2, 4), np.float32)} if tensors is None else tensors
    save_file(arrays, path / folders.WEIGHTS_FILE, metadata)
    return path


def raw(path, header, data=b""):
    folder_of(path)
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    (path / folders.WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(shape, size=0, dtype="F32"):
    return {"m.lora_A.w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


FOLDERS = {
    "digits": lambda path: folder_of(path, '{"peft_type": "LORA", "r": %s}' % ("9" * 5000)),
    "surrogate": lambda path: folder_of(path, '{"peft_type": "LORA", "x": "\\udfff"}'),
    "method": lambda path: folder_of(path, {"peft_type": ESCAPE}),
    "name": lambda path: folder_of(path, tensors={f"m.lora_A{ESCAPE}": np.ones(3, np.float32)}),
    "dims": lambda path: raw(path, tensor([1] * 100, 4), bytes(4)),
    "zero": lambda path: raw(path, tensor([0, 2**63])),
    "too many": lambda path: raw(path, tensor([2**40], 4), bytes(4)),
    "length": lambda path: raw(path, b"{" * 10_000),
    "half": lambda path: raw(path, b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "no tensors": lambda path: folder_of(path, tensors={}),
    "not finite": lambda path: folder_of(
        path, tensors={"m.lora_A.w": np.array([1, np.nan], np.float32)}
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_folder_is_one_line(kind, tmp_path, capsys):
    folder = FOLDERS[kind](tmp_path / f"f{ESCAPE}")
    check_one_line(capsys, "compress", folder, "-o", tmp_path / "out.compeft")
    assert sorted(tmp_path.iterdir()) == [folder]
    good = folder_of(tmp_path / "good")
    check_one_line(capsys, "compress", good, "--init", folder, "-o", tmp_path / "out.compeft")
    assert not (tmp_path / "out.compeft").exists()


def test_names_that_a_terminal_acts_on_are_shown_escaped(tmp_path, capsys):
    good = folder_of(tmp_path / f"good{ESCAPE}\n")
    file = tmp_path / f"good{ESCAPE}\n\udcff.compeft"
    shown = check_one_line(capsys, "compress", good, "-o", file, expected=0)
    assert "good\\x1b[2J\\x9b1m\\u202e\\x07\\n\\udcff.compeft" in shown
    again = tmp_path / f"again{ESCAPE}"
    shown = check_one_line(capsys, "decompress", file, "-o", again, expected=0)
    assert "again\\x1b" in shown
    check_one_line(capsys, "inspect", tmp_path / f"none{ESCAPE}")
    check_one_line(capsys, f"no-command{ESCAPE}\n")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    good = folder_of(tmp_path / "good")
    file, out = tmp_path / "a.compeft", tmp_path / "made" / "of" / "three"
    assert main(["compress", str(good), "-o", str(file)]) == 0
    capsys.readouterr()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_save_tensors", full)
        assert "No space left" in check_one_line(capsys, "decompress", file, "-o", out)
        assert not (tmp_path / "made").exists()
        out.mkdir(parents=True)
        (out / folders.CONFIG_FILE).write_text("old")
        check_one_line(capsys, "decompress", file, "-o", out, "--force")
        assert [each.name for each in out.iterdir()] == [folders.CONFIG_FILE]
        assert (out / folders.CONFIG_FILE).read_text() == "old"
    assert main(["decompress", str(file), "-o", str(out), "--force"]) == 0
    assert {each.name for each in out.iterdir()} == {folders.CONFIG_FILE, folders.WEIGHTS_FILE}


def test_a_fault_of_the_program_is_a_line_too(monkeypatch, capsys, tmp_path):
    file = tmp_path / "a.compeft"
    file.write_bytes(seal(update()))

    def broken(*arguments, **options):
        raise ZeroDivisionError(f"of{ESCAPE}\nits own")

    monkeypatch.setattr(Codec, "decode", broken)
    for codec in ("Golomb",):
        monkeypatch.setattr(f"compeft_fl.codecs.golomb.{codec}.decode", broken)
    assert main(["inspect", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{UNEXPECTED} ZeroDivisionError: of\\x1b[2J" in err
    monkeypatch.setenv("COMPEFT_FL_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(file)])


def in_little_memory(arguments, mebibytes):
    """Run a command in a process with so much address space beyond what it has after imports."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from compeft_fl.cli.main import main\n"
        "import numba, numpy, safetensors.numpy, compeft_fl as cf\n"
        "v = cf.TaskVector.from_dict({'w': numpy.ones(512, 'f4')})\n"
        "cf.decode(cf.encode(cf.compress(v, 0.1))).to_task_vector()\n"
        "held = int(Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        f"limit = held + {mebibytes << 20}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["parts", "padding", "empty parts"])
def test_commands_take_no_memory_for_what_they_reject(kind, tmp_path):
    assert resource.getpagesize() == 4096
    made = FILES[kind]()
    file = tmp_path / "h.compeft"
    file.write_bytes(made if isinstance(made, bytes) else seal(made))
    done = in_little_memory(["decompress", file, "-o", tmp_path / "out"], 60)
    assert done.returncode == 2, done.stderr
    assert "not enough memory" not in done.stderr
    assert "expected" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_adapter_of_zeros_is_valid(tmp_path):
    """110 bytes for 2^24 parameters: shown in the memory of its masks, restored in a few passes."""
    message = zeros(FLOOR, metadata=CONFIG)
    message.layout.tensors[0].name = "lora_A"
    file = tmp_path / "zeros.compeft"
    file.write_bytes(seal(message))
    done = in_little_memory(["inspect", "--tensors", file], 60)
    assert done.returncode == 0, done.stderr
    assert "16,777,216" in done.stdout
    done = in_little_memory(["similarity", file, file], 60)
    assert done.returncode == 0, done.stderr
    done = in_little_memory(["decompress", file, "-o", tmp_path / "out"], 260)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / folders.WEIGHTS_FILE).stat().st_size > 4 * FLOOR
    done = in_little_memory(["decompress", file, "-o", tmp_path / "more"], 40)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not enough memory" in done.stderr
    assert not (tmp_path / "more").exists()
    larger = zeros(FLOOR + 1, metadata=CONFIG)
    file.write_bytes(seal(larger))
    assert main(["inspect", str(file)]) == 2
    assert main(["inspect", str(file), "--max-parameters", str(FLOOR + 1)]) == 0


@pytest.mark.long
def test_a_hundred_thousand_tensors_are_shown(tmp_path, capsys):
    message = zeros(1, metadata=CONFIG)
    for index in range(100_000):
        message.layout.tensors.add(name=f"m.{index}.lora_A", shape=[1], dtype=1)
    message.num_parameters = 100_001
    message.golomb.block_nonzeros[:] = [0]
    file = tmp_path / "many.compeft"
    file.write_bytes(seal(message))
    assert messages.inspect(file.read_bytes()).num_parameters == 100_001
    assert main(["inspect", "--tensors", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100_000
    assert Path(file).stat().st_size < 4_000_000


def test_many_large_files_are_in_memory_one_at_a_time(tmp_path):
    message = zeros(FLOOR, metadata=CONFIG)
    message.layout.tensors[0].name = "lora_A"
    names = [tmp_path / f"{index}.compeft" for index in range(40)]
    for name in names:
        name.write_bytes(seal(message))
    done = in_little_memory(["inspect", *names], 60)  # all at once would be 160 MiB
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("16,777,216") == 40
