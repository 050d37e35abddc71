"""Data and a language model that the package carries, and the scripts that made them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from compeft_fl.errors import ConfigError

__all__ = ["LANGUAGE_MODEL", "path"]

LANGUAGE_MODEL: Final = "debian-lm"
"""The name of the embedded language model, and of its folder here."""


def path(name: str) -> Path:
    """Return where an embedded file or folder lies.

    An app bundle of Flower's leaves out what is neither Python nor JSON. The installed package's
    is taken then.

    Raises
    ------
    ConfigError
        Where it is in no folder that Python imports from.

    Examples
    --------
    >>> path("debian-section.jsonl").is_file()
    True
    """
    own = Path(__file__).parent
    for folder in (own, *(Path(entry, "compeft_fl", "app", "embedded") for entry in sys.path)):
        if (folder / name).exists():
            return folder / name
    raise ConfigError(
        f"expected {name} in the installed package, found it nowhere on Python's path: install "
        "compeft-fl from its wheel or its repository"
    )
