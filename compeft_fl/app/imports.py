"""Imports of large packages in little more than half of their time.

Python looks for garbage whenever many objects are new. What modules hold is none: with torch,
transformers and peft it would be looked through dozens of times, and again when a process ends.
And PEFT imports bitsandbytes where that is installed, whose kernels for CPUs ask torch for its
compiler, hundreds of modules, before anybody calls them.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["at_once", "import_peft"]

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


def import_peft() -> None:
    """Import PEFT; functions that are compiled meanwhile are so when they are first called.

    Raises
    ------
    ImportError
        Where PEFT or torch is not installed.
    """
    import torch

    with at_once():
        compiler: Callable[..., Any] = torch.compile
        torch.compile = functools.partial(_compiled_later, compiler)
        try:
            import peft  # noqa: F401
        finally:
            torch.compile = compiler


def _compiled_later(compiler: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """Return what `torch.compile` returns, for a function without having compiled it yet."""
    if model is None:
        return functools.partial(_compiled_later, compiler, **options)
    if not isinstance(model, types.FunctionType):
        return compiler(model, **options)
    compiled = functools.cache(lambda: compiler(model, **options))

    @functools.wraps(model)
    def first_compiled(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return first_compiled
