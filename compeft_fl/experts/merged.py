"""A merged expert, tensor by tensor, from its members as they are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters.carried import merge_carried
from compeft_fl.adapters.merge import MergeRule, check_start, is_by_factors
from compeft_fl.codecs.base import Update, cut
from compeft_fl.errors import AdapterError
from compeft_fl.experts.held import Held, Recipe
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = ["Merged"]

Floats = NDArray[np.float32]


class Merged:
    """What a recipe makes; no tensor but the one that is asked for is ever dense.

    Parameters
    ----------
    recipe : Recipe
    members : sequence of (Held, float)
        With their weights, in the recipe's order.
    unpacked : callable
        Takes a member, and keeps its masks where there is room for them.

    Attributes
    ----------
    kind, config, carried
        As `Held` has them.
    start_weight : float
        How much the start counts beside the merged change.

    Raises
    ------
    AdapterError
        Members of different starts, or a start that the method needs.
    """

    def __init__(
        self,
        recipe: Recipe,
        members: Sequence[tuple[Held, float]],
        unpacked: Callable[[Held], Held],
    ) -> None:
        first = members[0][0]
        if any(held.kind != first.kind for held, _ in members):
            raise AdapterError(
                "expected members of one start, found others: what one adds to its start, another "
                "may have in it"
            )
        check_start(first.config, first.kind.start, recipe.method)
        self.kind, self.config = first.kind, first.config
        self._rule = MergeRule(
            recipe.method,
            1.0 if recipe.scaling is None else recipe.scaling,
            recipe.tie or "zero",
            str(first.config["peft_type"]),
            is_by_factors(first.config, first.kind.layout, first.kind.start),
        )
        weights = [weight for _, weight in members]
        self.start_weight = self._rule.start_weight(weights)
        used = [(held, weight) for held, weight in members if weight != 0]
        self._updates = [(unpacked(held).update(), weight) for held, weight in used]
        counted = used or [(held, 1.0) for held, _ in members]
        self.carried: dict[str, Any] = merge_carried(
            [held.carried for held, _ in counted], [weight for _, weight in counted]
        )
        # A majority is elected over all tensors.
        self._whole = self._merge(self._updates) if used and recipe.tie == "majority" else None

    def change(self, index: int, where: slice) -> Floats:
        """The merged change of one tensor, at its place in the flat vector."""
        if not self._updates:
            return np.zeros(where.stop - where.start, np.float32)
        if self._whole is not None:
            return self._whole[where]
        return self._merge([(_part(update, index, where), w) for update, w in self._updates])

    def on_device(self, index: int, where: slice, device: Any) -> Any:
        """`change`, as a tensor of torch."""
        import torch

        return torch.from_numpy(self.change(index, where)).to(device)

    def values(self) -> Floats:
        """The merged change of all tensors."""
        values = np.empty(self.kind.layout.num_parameters, np.float32)
        for index, (_, where) in enumerate(self.kind.layout.slices()):
            values[where] = self.change(index, where)
        return values

    def _merge(self, parts: Sequence[tuple[Update, float]]) -> Floats:
        total = self._rule.accumulator()
        for update, weight in parts:
            total.add(self._rule.signed(update, weight), abs(weight))
        merged: Any = self._rule.finished(total.result(), total.total_weight).values
        values: Floats = merged
        return values


def _part(update: Update, index: int, where: slice) -> Update:
    """One tensor's part of an update, as an update of its own."""
    layout = Layout([update.layout.tensors[index]])
    if isinstance(update, TaskVector):
        return TaskVector(layout, update.values[where])
    scale = update.scales[index if update.scales.size > 1 else 0]
    positive = cut(update.positive, where.start, where.stop)
    negative = cut(update.negative, where.start, where.stop)
    return TernaryVector(layout, positive, negative, scale)
