"""What a pushed file must be before it gets a name: decoded whole, and each field looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters import files
from compeft_fl.adapters.meaning import base_model
from compeft_fl.errors import ExpertError
from compeft_fl.experts.expert import MAX_CONFIG
from compeft_fl.experts.sketches import sketch, ternary
from compeft_fl.printable import quoted
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.layouts import layout_id
from compeft_fl.wire.opening import PLAUSIBLE_PARAMETERS, PLAUSIBLE_PER_BYTE

__all__ = ["MAX_PARAMETERS", "Facts", "admit", "check_start"]

MAX_PARAMETERS: Final = 1 << 28  # of an expert: 1 GiB where it has a value for each
_MAX_BASE: Final = 300  # characters of a base model's name
_DIGEST: Final = "blake2b:"
_HEX: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Facts:
    """What a file says, once all of it has been read.

    Attributes
    ----------
    config : dict
    base_model : str
    start, codec : str
    num_parameters : int
    density : float
        The share of parameters that are not 0.
    layout_id : str
        32 hexadecimal digits.
    sketch : ndarray of int8, shape (2048,)
    """

    config: dict[str, Any]
    base_model: str
    start: str
    codec: str
    num_parameters: int
    density: float
    layout_id: str
    sketch: NDArray[np.int8]


def admit(file: Path, max_parameters: int = MAX_PARAMETERS) -> Facts:
    """Read a ``.compeft`` file whole, as whoever pulls it will.

    Raises
    ------
    WireError, AdapterError, ExpertError
        Whatever a reader would reject, more parameters than are allowed, and what no index holds.
    """
    plausible = max(PLAUSIBLE_PARAMETERS, PLAUSIBLE_PER_BYTE * file.stat().st_size)
    stored = files.read_update(file, max_parameters=min(max_parameters, plausible))
    update = stored.update
    check_start(stored.start)
    base = base_model(stored.config)
    if len(base) > _MAX_BASE or not base.isprintable():
        raise ExpertError(
            f"expected a base model's name of at most {_MAX_BASE} printable characters, found "
            f"{quoted(base)}"
        )
    size = len(str(stored.config))
    if size > MAX_CONFIG // 2:
        raise ExpertError(
            f"expected at most {MAX_CONFIG // 2} characters of configuration, found {size}"
        )
    if isinstance(update, TernaryVector):
        density = update.density
    else:
        values: Any = update.to_task_vector().values
        density = int(np.count_nonzero(values)) / update.num_parameters
    return Facts(
        config=stored.config,
        base_model=base,
        start=stored.start,
        codec=stored.codec,
        num_parameters=update.num_parameters,
        density=density,
        layout_id=layout_id(update.layout).hex(),
        sketch=sketch(ternary(update)),
    )


def check_start(start: str) -> None:
    """Raise ExpertError for what no start's tag is."""
    known = start in ("", "0", "1")
    digest = start.removeprefix(_DIGEST)
    if not known and (len(digest) != 32 or digest == start or not set(digest) <= _HEX):
        raise ExpertError(f'expected a start "0", "1" or "blake2b:DIGEST", found {quoted(start)}')
