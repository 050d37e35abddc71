"""The small files beside a checkpoint's weights: configurations and the tokenizer's.

Those that the base does not have, or has in another content, travel in the file, deflated; the
others are copied from the base's folder when a checkpoint is restored. Python code never travels.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import MalformedError
from compeft_fl.full.folders import CONFIG_FILE, INDEX_FILE, Checkpoint
from compeft_fl.printable import quoted

__all__ = ["PREFIX", "differing", "restore"]

PREFIX: Final = "file:"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,100}\.(json|txt|model|jinja)")
_NOT: Final = (CONFIG_FILE, INDEX_FILE, "adapter_config.json", "trainer_state.json")
_MOST: Final = 64 << 20  # bytes of one


def _companions(folder: Path) -> dict[str, Path]:
    """Small files of a model's folder, by name."""
    return {
        file.name: file
        for file in sorted(folder.iterdir())
        if _NAME.fullmatch(file.name)
        and file.name not in _NOT
        and file.is_file()
        and file.stat().st_size <= _MOST
    }


def differing(base: Checkpoint, finetuned: Checkpoint) -> dict[str, bytes]:
    """Deflated contents of what the base has not, or not so, by the names of carried tensors."""
    theirs = _companions(base.folder)
    found = {}
    for name, file in _companions(finetuned.folder).items():
        content = file.read_bytes()
        if name not in theirs or not _same(name, content, theirs[name].read_bytes()):
            found[PREFIX + name] = zlib.compress(content, 9)
    return found


def _same(name: str, one: bytes, other: bytes) -> bool:
    """Do two files say the same? JSON does in any order of keys."""
    if one == other:
        return True
    if not name.endswith(".json"):
        return False
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


def restore(folder: Path, base: Path, carried: Mapping[str, Any]) -> None:
    """Write the small files: those that travelled, and the base's others.

    Raises
    ------
    MalformedError
        A name or a content that `differing` would not give.
    """
    texts = {}
    for key, value in carried.items():
        name = key.removeprefix(PREFIX)
        if not _NAME.fullmatch(name) or name in _NOT:
            raise MalformedError(f"expected the name of a small file, found {quoted(name)}")
        inflater = zlib.decompressobj()
        try:
            content = inflater.decompress(bytes(value), _MOST)
        except zlib.error as error:
            raise MalformedError(f"expected deflated bytes in {quoted(key)}: {error}") from None
        if not inflater.eof:
            raise MalformedError(f"expected at most {_MOST} bytes in {quoted(key)}, found more")
        texts[name] = content
    for name, file in _companions(base).items():
        if name not in texts and not (folder / name).exists():
            shutil.copyfile(file, folder / name)
    for name, content in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
