"""Differential privacy around the mod: the bound that what leaves a node must keep.

Flower's clipping mods bound what training changed, and its wrappers put noise for that bound on the
mean. What leaves the node is another vector: a residual has been added, and values have been
rounded. So the bound is kept once more, last, on what is sent. Noise that a node adds by itself
(LocalDpMod) is for the update of one round: no residual is then added to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from numpy.typing import NDArray

from compeft_fl.codecs.dense import Dense
from compeft_fl.errors import ParameterError
from compeft_fl.exchange.records import EXCHANGE_KEY, LOGGER
from compeft_fl.task_vector import TaskVector

__all__ = ["Privacy", "check_order", "within_bound"]

_CLIPPING_NORM = "clipping_norm"  # the key under which Flower's wrappers send it
_CLIPPING = (fixedclipping_mod, adaptiveclipping_mod)
_MAX_DEPTH = 64  # of mods around a ClientApp's function
_MAX_TRIES = 8
_MARGIN = 2.0**-20


@dataclass(frozen=True)
class Privacy:
    """What differential privacy asks of a reply.

    Attributes
    ----------
    bound : float
        The greatest norm that the server allows what is sent; infinity: it does not say.
    feedback : bool
        Whether a residual is added.
    """

    bound: float = math.inf
    feedback: bool = True

    @classmethod
    def of(cls, message: Message, call_next: Callable[..., Any], feedback: bool) -> Privacy:
        """What a message, and the mods after this one, ask for."""
        mods = list(_inside(call_next))
        own_noise = any(isinstance(mod, LocalDpMod) for mod in mods)
        bound = _clipping_norm(message)
        if not math.isinf(bound) and not any(mod in _CLIPPING for mod in mods):
            LOGGER.warning(
                "CompressionMod: the server asks for updates clipped to %g (%r), and no clipping "
                "mod comes after this one: what is sent is clipped all the same",
                bound,
                _CLIPPING_NORM,
            )
        return cls(bound, feedback and not own_noise)

    def left_for(self, carried: float) -> float:
        """The bound of the Update, where tensors beside it have changed by a norm ``carried``.

        Raises
        ------
        ParameterError
            These alone are over the bound.
        """
        if carried > self.bound:
            raise ParameterError(
                f"expected changes of a norm of at most {self.bound:g}, for differential privacy; "
                f"carried tensors alone change by {carried:g}: leave them, "
                'CompressionMod(tensors={"NAME": "left"})'
            )
        return math.sqrt(self.bound**2 - carried**2)


def _clipping_norm(message: Message) -> float:
    for key, record in message.content.config_records.items():
        norm = record.get(_CLIPPING_NORM)
        if key != EXCHANGE_KEY and isinstance(norm, int | float) and norm > 0:
            return float(norm)
    return math.inf


def check_order() -> None:
    """Raise where one of Flower's mods for differential privacy comes before this one.

    Raises
    ------
    ParameterError
        It would clip, and put noise on, the bytes of an Update.
    """
    clipping = [each.__code__ for each in _CLIPPING]
    frame = sys._getframe(1)
    while frame is not None:
        name, code = None, frame.f_code
        if code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), LocalDpMod):
            name = "LocalDpMod(...)"
        elif code in clipping:
            name = code.co_name
        if name:
            raise ParameterError(
                f"expected CompressionMod before {name.partition('(')[0]}, which else gets bytes "
                f"to clip: ClientApp(mods=[CompressionMod(...), {name}])"
            )
        frame = frame.f_back  # type: ignore[assignment]


def within_bound(tau: TaskVector, bound: float, codec: Dense) -> TaskVector:
    """A task vector whose norm, as a dense codec writes it, is at most ``bound``.

    Raises
    ------
    ParameterError
        The codec's rounding alone is more than the bound.
    """
    from compeft_fl.kernels import cpu

    if math.isinf(bound):
        return tau
    values: Any = tau.values
    for _ in range(_MAX_TRIES):
        written: Any = _written(TaskVector(tau.layout, values), codec)
        norm = math.sqrt(cpu.sum_squares(written))
        if norm <= bound:
            return TaskVector(tau.layout, values)
        values = values * np.float32(bound / norm * (1 - _MARGIN))
    raise ParameterError(f"expected a codec that keeps a norm of {bound:g}, found {codec.name!r}")


def _written(tau: TaskVector, codec: Dense) -> NDArray[np.float32]:
    """The values that a dense codec's reader gets."""
    size = tau.num_parameters
    read: Any = codec.decode(codec.encode(tau, 0, size), tau.layout, 0, size).values
    values: NDArray[np.float32] = read
    return values


def _inside(call_next: Callable[..., Any]) -> Iterator[Any]:
    """The mods that come after this one: Flower keeps each in a closure around the next."""
    waiting: list[Any] = [call_next]
    for _ in range(_MAX_DEPTH):
        if not waiting:
            return
        function = waiting.pop()
        yield function
        cells = getattr(function, "__closure__", None) or ()
        waiting += [cell.cell_contents for cell in cells if callable(cell.cell_contents)]
