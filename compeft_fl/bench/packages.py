"""Packages that only comparisons need, imported where they are used.

bitsandbytes and mergekit are kept out of the environment: PEFT imports bitsandbytes into every
process where it finds it, and mergekit asks for other releases than Flower. ``make peers`` puts
both, without what they declare, into ``build/peers`` of a clone; they need torch and little else.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import compeft_fl
from compeft_fl.errors import MissingPackageError

__all__ = ["PEERS_FOLDER", "checkout", "load", "why_missing"]

PEERS_FOLDER: Final = "build/peers"
_HOW: Final = {
    "numcodecs": "pip install 'compeft-fl[bench]'",
    "bitsandbytes": "make peers, or pip install bitsandbytes",
    "mergekit": "make peers",
}


def checkout() -> Path | None:
    """The clone that this package runs from; None where it is installed as a wheel."""
    root = Path(compeft_fl.__file__).resolve().parent.parent
    return root if (root / "simulations").is_dir() else None


def why_missing(package: str) -> str | None:
    """Why a package cannot be used and how to get it; None where it can."""
    if _find(package):
        return None
    return f"needs {package}, which is not installed: {_HOW[package]}"


def load(module: str) -> ModuleType:
    """Import a module of an optional package.

    Raises
    ------
    MissingPackageError
        The package is not installed; the message says how to get it.
    """
    package = module.partition(".")[0]
    if reason := why_missing(package):
        raise MissingPackageError(f"{module} {reason}")
    if module in sys.modules:  # asked for with every array: below, all loggers are told of it
        return sys.modules[module]
    # bitsandbytes warns there that a faster matrix product of another package is not at hand.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    # The folder is searched for this import alone, so that PEFT does not find bitsandbytes.
    folder = str((checkout() or Path()) / PEERS_FOLDER)
    sys.path.append(folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
        log.setLevel(level)


def _find(package: str) -> bool:
    """Is the package installed, or in the folder of ``make peers``?"""
    if package in sys.modules or importlib.util.find_spec(package):
        return True
    root = checkout()
    return root is not None and (root / PEERS_FOLDER / package).is_dir()
