"""Experts on a grid, and the change from one version to another, which is a few small integers.

A version that keeps all of an adapter stands on a grid: each tensor's values are at most 1,023
steps of a power of two (`compeft_fl.exchange.grid.Grid.coarse`), so 11 bits a parameter or fewer,
and the difference of two versions is exact. Whoever has one version is sent that difference, in
the body `Steps` of the format, and writes the other version's file from it: the same bytes, which
their digest proves, or the whole file is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters.files import CARRIED_MAGIC, PARTS_MAGIC, parts_of
from compeft_fl.errors import BrokenExpertError, CompeftError, LayoutError
from compeft_fl.exchange.grid import Grid
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.wire.messages import iter_parts
from compeft_fl.wire.opening import Opened, open_update

__all__ = ["apply", "change", "grid_options", "on_grid"]

_CODEC = "steps"


def on_grid(tau: TaskVector) -> TaskVector:
    """A task vector with each tensor rounded to 1,023 steps of its own, or fewer."""
    values: Any = tau.values
    rounded, _ = Grid.of(values).coarse(values, tau.layout)
    return TaskVector(tau.layout, rounded)


def grid_options(tau: TaskVector) -> dict[str, Any]:
    """How a vector on a grid is encoded: cut where the step changes from tensor to tensor.

    The cuts follow from the values alone, so two who encode the same values write the same bytes.
    """
    from compeft_fl.kernels import cpu_steps  # compiles; and vLLM's workers fall over llvmlite

    values: Any = tau.values
    cuts, last = [], None
    for _, where in tau.layout.slices():
        piece: NDArray[np.float32] = values[where]
        if not piece.any():
            continue
        exponent = cpu_steps.common_exponent(piece)
        if last is not None and exponent != last:
            cuts.append(where.start)
        last = exponent
    return {"cuts": cuts, "layout_once": True}


def change(old: bytes, new: bytes) -> bytes | None:
    """What makes one file's bytes of another's; None where it is no smaller, or there is none.

    Raises
    ------
    WireError
        Bytes that are no file of an update.
    """
    if old.startswith(CARRIED_MAGIC) or new.startswith(CARRIED_MAGIC):
        return None
    opened = [open_update(parts_of(content)) for content in (old, new)]
    if any(each.codec != _CODEC for each in opened) or opened[0].layout != opened[1].layout:
        return None
    metadata = opened[1].metadata
    before, after = (_values(each) for each in opened)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = after - before
        if not np.array_equal(before + moved, after):
            return None
    try:
        content = _encoded(TaskVector(opened[1].layout, moved), metadata, layout_by_id=True)
    except CompeftError:  # too far apart for integers of 24 bits
        return None
    return content if len(content) < len(new) else None


def apply(old: bytes, content: bytes) -> bytes:
    """The file's bytes that a change makes of another's.

    Raises
    ------
    WireError, LayoutError, BrokenExpertError, ParameterError
        Bytes that are no change of this file.
    """
    opened = open_update(parts_of(old))
    layout: Layout = opened.layout
    moved = open_update(parts_of(content), layout=layout)
    if moved.codec != _CODEC or opened.codec != _CODEC:
        raise BrokenExpertError(
            f"expected a change of steps, found codec {moved.codec} to {opened.codec}"
        )
    metadata = moved.metadata
    with np.errstate(over="ignore", invalid="ignore"):
        values = _values(opened) + _values(moved)
    if not np.isfinite(values).all():
        raise LayoutError("expected a change to finite values, found one to others")
    return _encoded(TaskVector(layout, values), metadata)


def _values(opened: Opened) -> NDArray[np.float32]:
    values: Any = opened.decode().to_task_vector().values
    return values  # type: ignore[no-any-return]


def _encoded(tau: TaskVector, metadata: Mapping[str, str], *, layout_by_id: bool = False) -> bytes:
    """The bytes that `compeft_fl.adapters.files.write_update` writes of a vector on a grid."""
    options = grid_options(tau)
    parts = list(iter_parts(tau, _CODEC, metadata=metadata, layout_by_id=layout_by_id, **options))
    if len(parts) == 1:
        return parts[0]
    return PARTS_MAGIC + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
