"""What a test puts aside from garbage collection, and what was put aside before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_aside_as_before() -> Iterator[None]:
    """Whatever is put aside meanwhile is garbage's again, and what was put aside before is not."""
    before = gc.get_freeze_count()
    yield
    gc.unfreeze()
    if before:
        gc.freeze()
