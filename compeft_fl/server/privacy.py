"""Differential privacy around a strategy: the orders of Flower's wrappers and mods that hold.

A wrapper clips ordinary arrays and puts noise on their mean, so it must see ordinary arrays:
`Compressed` goes around it. The other way round it would see Updates, and count replies as usable
that are not, which makes its noise too small.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from compeft_fl.errors import ParameterError

__all__ = ["check_clippable", "check_mods", "check_outermost", "mods_hint", "wrapped"]

_WRAPPERS: Final = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
_CLIPS_HERE: Final = (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
_SMALLEST: Final = 1e-15  # a norm whose square float32 holds
_MODS: Final = r"(fixedclipping_mod|adaptiveclipping_mod|LocalDpMod)"
_ORDER: Final = re.compile(
    _MODS + r" expects exactly one (ArrayRecord|ConfigRecord)|expected CompressionMod before "
    r"(fixedclipping_mod|adaptiveclipping_mod|LocalDpMod)"
)
_NO_NORM: Final = re.compile(_MODS + r" requires the key 'clipping_norm'")


def wrapped(strategy: Any) -> Any:
    """The strategy inside Flower's wrappers for differential privacy, if it is in any."""
    while isinstance(strategy, _WRAPPERS):
        strategy = strategy.strategy
    return strategy


def check_outermost(strategy: Strategy) -> None:
    """Raise where one of Flower's wrappers for differential privacy calls this strategy.

    Raises
    ------
    ParameterError
        With the order that works.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_locals.get("self") is strategy:
        frame = frame.f_back
    caller = frame.f_locals.get("self") if frame is not None else None
    if isinstance(caller, _WRAPPERS):
        name, inner = type(caller).__name__, type(strategy).__name__
        raise ParameterError(
            f"expected a strategy of ordinary arrays inside {name}, found {inner}, whose messages "
            f"are compressed: clipping and noise would not hold; this order works: "
            f"Compressed({name}(FedAvg(...), ...))"
        )


def check_clippable(strategy: Strategy, norm_of_change: Callable[[], float]) -> None:
    """Raise for an update by whose norm a wrapper that clips on the server would divide by 0.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
    norm_of_change : callable
        Gives the norm of what the update changes, in the precision of the arrays.

    Raises
    ------
    ParameterError
    """
    if not isinstance(strategy, _CLIPS_HERE):
        return
    norm = norm_of_change()
    if norm < _SMALLEST:
        raise ParameterError(
            f"expected an update that changes something, which {type(strategy).__name__} can clip, "
            f"found one of norm {norm:.3g}"
        )


def mods_hint(reason: str) -> str:
    """What to do about an error reply of one of Flower's mods for differential privacy."""
    found = _ORDER.search(reason)
    if found and found[1]:
        return f"; put CompressionMod first: ClientApp(mods=[CompressionMod(...), {found[1]}])"
    found = _NO_NORM.search(reason)
    if found:
        wrapper = "Adaptive" if found[1].startswith("adaptive") else "Fixed"
        return (
            f"; on the server, this order works: Compressed(DifferentialPrivacyClientSide{wrapper}"
            "Clipping(FedAvg(...), ...))"
        )
    return ""


def check_mods(reasons: Iterable[str]) -> None:
    """Raise where all replies of a round failed because mods do not go together.

    Raises
    ------
    ParameterError
        With the reason of the first: the next rounds would be no better.
    """
    reasons = list(reasons)
    if reasons and all(_ORDER.search(each) or _NO_NORM.search(each) for each in reasons):
        raise ParameterError(f"no node could train: {reasons[0]}")
