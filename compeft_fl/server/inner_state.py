"""What a Flower strategy remembers from round to round, for a checkpoint: no pickle, data only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from compeft_fl.exchange.records import to_arrays, to_state
from compeft_fl.server.bounds import ReplyBounds

__all__ = ["InnerState", "restore_state", "state_of"]

_BOUNDS_KEY = "compeft_fl.bounds"  # no attribute has such a name


class InnerState:
    """What a checkpoint keeps of a wrapped strategy: its arrays (momentum, say) and numbers.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
    bounds : ReplyBounds
        Are kept beside it.
    """

    def __init__(self, strategy: Strategy, bounds: ReplyBounds) -> None:
        self._strategy, self._bounds = strategy, bounds

    def state(self) -> dict[str, Any]:
        """See `state_of`."""
        return {**state_of(self._strategy), _BOUNDS_KEY: self._bounds.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        others = dict(state)
        self._bounds.restore(others.pop(_BOUNDS_KEY, {}))
        restore_state(self._strategy, others)


def state_of(strategy: Strategy) -> dict[str, Any]:
    """A strategy's attributes that are arrays, collections of arrays, or plain numbers and text.

    FedAdam's moments and FedAvgM's momentum are such; settings are kept too, and are the same when
    the strategy is made again. Functions and other objects are left out.
    """
    kept = {name: _plain(value) for name, value in vars(strategy).items()}
    return {name: value for name, value in kept.items() if value is not None}


def restore_state(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a strategy, made with the same settings, what `state_of` found."""
    for name, value in state.items():
        setattr(strategy, name, _original(value))


def _plain(value: Any) -> Any:
    """The value tagged with what it was; None for what is not kept."""
    if isinstance(value, ArrayRecord):
        return {"ArrayRecord": to_state(value)}
    if isinstance(value, np.ndarray | bool | int | float | str):
        return {"value": value}
    if isinstance(value, dict) and _all_arrays(value.values()):
        return {"dict": {name: np.asarray(each) for name, each in value.items()}}
    if isinstance(value, list | tuple) and _all_arrays(value):
        return {type(value).__name__: {str(i): np.asarray(each) for i, each in enumerate(value)}}
    return None


def _all_arrays(values: Collection[Any]) -> bool:
    """Arrays, or the scalars that numpy makes of arrays without dimensions."""
    return bool(values) and all(isinstance(each, np.ndarray | np.generic) for each in values)


def _original(tagged: Mapping[str, Any]) -> Any:
    ((kind, value),) = tagged.items()
    if kind == "ArrayRecord":
        return to_arrays(value)
    if kind == "list":
        return list(value.values())
    if kind == "tuple":
        return tuple(value.values())
    return value
