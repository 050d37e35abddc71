"""Imports of large packages in two thirds of their time.

Python looks for garbage whenever many objects are new. What modules hold is none: with torch,
transformers and peft it would be looked through dozens of times, and again when a process ends.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["at_once"]

_MANY = 200  # new modules, below which nothing is gained


@contextmanager
def at_once() -> Iterator[None]:
    """Look for no garbage while what is large is imported, nor among it later.

    Where few modules are new, as in a second call, nothing is put aside for good.

    Examples
    --------
    >>> with at_once():
    ...     import json
    """
    if not gc.isenabled():
        yield
        return
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) >= known + _MANY:
            gc.freeze()
        gc.enable()
