"""Merging adapters from files: only what means the same, and each change scaled once.

A weight below 0 takes the opposite of an adapter's change: A with 1 and B with -1 is A minus B.
Against a start of 0 the task vectors are factors of a product (`compeft_fl.adapters.factors`): the
sum of changes is then the sum in one factor, the one that starts from 0, over the mean of the
others; a number or a sign goes to that factor alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters import factors
from compeft_fl.adapters.carried import merge_carried
from compeft_fl.adapters.files import StoredUpdate
from compeft_fl.adapters.meaning import changes_base, check_known, check_same
from compeft_fl.codecs.base import Update
from compeft_fl.errors import AdapterError, LayoutError, ParameterError
from compeft_fl.merging.accumulators import Accumulator, Average, TaskArithmetic, Ties
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = [
    "METHODS",
    "AdapterMerge",
    "MergeRule",
    "check_comparable",
    "check_mergeable",
    "check_settings",
    "check_start",
    "is_by_factors",
]

METHODS: Final = ("ties", "average", "task-arithmetic")


def check_comparable(one: StoredUpdate, other: StoredUpdate, *, any_base: bool = False) -> None:
    """Raise where the tensors of two files don't mean the same; the message says in what.

    Parameters
    ----------
    one, other : StoredUpdate
    any_base : bool
        Take the names of their base models for names of one.

    Raises
    ------
    LayoutError
        Other tensors.
    AdapterError
        Another setting, another start, or other indices.
    """
    if one.update.layout != other.update.layout:
        raise LayoutError(f"are for different layouts: {_difference(one, other)}")
    check_same(one.config, other.config, any_base=any_base)
    if one.start != other.start:
        raise AdapterError(f"are relative to different starts: {one.start}, {other.start}")
    if changes_base(one.config) == "own" and not one.needs_init:
        raise AdapterError(
            f"can have different bases: init_lora_weights {one.config['init_lora_weights']!r} is "
            "not the same each time, so compress both with the one --init DIR that they have"
        )
    merge_carried([one.carried, other.carried], [1, 1])


def _difference(one: StoredUpdate, other: StoredUpdate) -> str:
    a, b = one.update.layout.tensors, other.update.layout.tensors
    text = f"{len(a)} and {len(b)} tensors"
    for ours, theirs in zip(a, b, strict=False):
        if ours != theirs:
            text = f"{ours.name} {ours.shape} {ours.dtype}"
            text += f" and {theirs.name} {theirs.shape} {theirs.dtype}"
            break
    try:
        check_same(one.config, other.config, any_base=True)
    except AdapterError as error:
        text += f"; they {error}"
    return text


class MergeRule:
    """How updates of one kind are merged: whole, or a range of tensors at a time.

    Parameters
    ----------
    method : {"ties", "average", "task-arithmetic", "lorahub"}
        "lorahub": the weighted sum of the adapters' tensors, and not of their changes: each factor
        is summed by itself, its start included (https://arxiv.org/abs/2307.13269, eq. 1).
    scaling : float
        lambda of ties and task-arithmetic.
    tie : str
        Of ties: see `compeft_fl.Ties`.
    peft_method : str
        ``"LORA"``.
    by_factors : bool
        Is the task vector the factors of a product themselves?

    Raises
    ------
    ParameterError
        A method or a setting that there is not.
    """

    def __init__(
        self, method: str, scaling: float, tie: str, peft_method: str, by_factors: bool
    ) -> None:
        self.method = method
        self._by_factors = by_factors and method != "lorahub"
        self._scaling = scaling
        self._peft_method = peft_method
        self._empty = _accumulator(method, 1.0 if self._by_factors else scaling, tie)

    def accumulator(self) -> Accumulator:
        """An empty one."""
        return self._empty.fresh()

    def signed(self, update: Update, weight: float) -> Update:
        """The update, or its opposite where the weight is below 0."""
        return update if weight > 0 else _negated(update, self._scaled(update.layout))

    def start_weight(self, weights: Sequence[float]) -> float:
        """How much the start counts beside the merged change."""
        return float(sum(weights)) if self.method == "lorahub" else 1.0

    def finished(self, merged: TaskVector, total_weight: float) -> TaskVector:
        """An accumulator's result, scaled in the factors that a number goes to; in place."""
        if not self._by_factors or self.method == "average":
            return merged
        scaled = set(self._scaled(merged.layout))
        values: Any = merged.values
        for index, (_, where) in enumerate(merged.layout.slices()):
            if index in scaled:
                values[where] *= np.float32(self._scaling)
            elif self.method == "task-arithmetic":
                values[where] /= np.float32(total_weight)
        merged.check_finite()
        return merged

    def _scaled(self, layout: Layout) -> list[int]:
        """The tensors that a number or a sign goes to, as indices."""
        every = range(len(layout.tensors))
        if not self._by_factors:
            return list(every)
        names = [tensor.name for tensor in layout.tensors]
        return [i for i in every if factors.is_scaled(self._peft_method, names[i])]


def is_by_factors(config: Mapping[str, Any], layout: Layout, start: str) -> bool:
    """Is a task vector the factors of a product themselves?

    Parameters
    ----------
    config : mapping
        The adapter's configuration.
    layout : Layout
    start : str
        The tag of `Start`.
    """
    method = str(config["peft_type"])
    return (
        not start.startswith("blake2b:")
        and factors.start_value(method) == 0
        and len(factors.groups(method, layout)) > 1
    )


class AdapterMerge:
    """A merge of files, one in memory at a time.

    Parameters
    ----------
    method : {"ties", "average", "task-arithmetic"}
    scaling : float, optional
        lambda of ties and task-arithmetic; default 1.
    tie : str, optional
        Of ties: see `compeft_fl.Ties`.
    any_base : bool
        See `check_comparable`.

    Raises
    ------
    ParameterError
        A setting that the method does not have.
    """

    def __init__(
        self,
        method: str,
        *,
        scaling: float | None = None,
        tie: str | None = None,
        any_base: bool = False,
    ) -> None:
        check_settings(method, scaling, tie)
        self._settings = method, 1.0 if scaling is None else scaling, tie or "zero"
        self._any_base = any_base
        self._first: StoredUpdate | None = None
        self._rule = MergeRule(*self._settings, "", False)
        self._sum: Accumulator = self._rule.accumulator()
        self._carried: list[Mapping[str, Any]] = []
        self._weights: list[float] = []

    @property
    def count(self) -> int:
        """How many files have been added."""
        return self._sum.count

    def check(self, stored: StoredUpdate) -> None:
        """Raise AdapterError where a file cannot be merged, whatever the others are."""
        check_mergeable(stored, self._rule.method)

    def check_with_first(self, stored: StoredUpdate) -> None:
        """Raise where a file's tensors don't mean what the first one's do: `check_comparable`."""
        if self._first is not None:
            check_comparable(self._first, stored, any_base=self._any_base)

    def add(self, stored: StoredUpdate, weight: float = 1.0) -> None:
        """Take one file's update.

        Parameters
        ----------
        weight : float
            Not 0; below it, the opposite of the update.

        Raises
        ------
        AdapterError, LayoutError
            As `check` and `check_with_first`.
        ParameterError
            A weight that is 0 or not finite.
        """
        self.check(stored)
        self.check_with_first(stored)
        if self._first is None:
            self._first = stored
            peft_method = str(stored.config["peft_type"])
            by_factors = is_by_factors(stored.config, stored.update.layout, stored.start)
            self._rule = MergeRule(*self._settings, peft_method, by_factors)
            self._sum = self._rule.accumulator()
        self._sum.add(self._rule.signed(stored.update, weight), abs(weight))
        self._carried.append(stored.carried)
        self._weights.append(weight)

    def result(self) -> StoredUpdate:
        """The merged update, as if it had been read from a file.

        Raises
        ------
        ParameterError, NonFiniteError
            As `compeft_fl.merging.accumulators.Accumulator.result`.
        """
        merged = self._sum.result()
        assert self._first is not None  # or there would be no result
        first = self._first
        merged = self._rule.finished(merged, self._sum.total_weight)
        carried = merge_carried(self._carried, self._weights)
        return StoredUpdate(merged, first.config, first.start, "dense", 0, 0, carried)


def check_settings(method: str, scaling: float | None, tie: str | None) -> None:
    """Raise ParameterError for a setting that a method does not have."""
    if tie is not None and method != "ties":
        raise ParameterError(f"--tie belongs to ties, not to {method}")
    if method in ("average", "lorahub") and scaling is not None:
        raise ParameterError(f"--scaling belongs to ties and task-arithmetic, not to {method}")


def check_mergeable(stored: StoredUpdate, method: str) -> None:
    """Raise AdapterError where a file cannot be merged by a method, whatever the others are."""
    check_known(stored.config)
    check_start(stored.config, stored.start, method)


def check_start(config: Mapping[str, Any], start: str, method: str) -> None:
    """Raise AdapterError where a method needs a start that an adapter's update is not relative to.

    Parameters
    ----------
    config : mapping
        The adapter's configuration.
    start : str
        The tag of `Start`.
    method : str
    """
    if changes_base(config) and not start.startswith("blake2b:") and method != "average":
        raise AdapterError(
            f"init_lora_weights {config['init_lora_weights']!r} takes the start out of "
            f"the base's weights, so that {method} needs it: compress with --init DIR"
        )


def _accumulator(method: str, scaling: float, tie: str) -> Accumulator:
    if method == "average":
        return Average()
    if method in ("task-arithmetic", "lorahub"):
        return TaskArithmetic(scaling)
    if method == "ties":
        return Ties(scaling, tie)
    raise ParameterError(f"expected a method among {', '.join(METHODS)}; found {method!r}")


def _negated(update: Update, indices: Sequence[int]) -> Update:
    """An update with the opposite sign in some of its tensors."""
    if isinstance(update, TernaryVector):
        where = _mask(update.layout, indices)
        a, b = update.positive, update.negative
        return TernaryVector(
            update.layout, (a & ~where) | (b & where), (b & ~where) | (a & where), update.scales
        )
    values: Any = np.array(update.values, np.float32)
    offsets = update.layout.offsets
    for index in indices:
        values[offsets[index] : offsets[index + 1]] *= -1
    return TaskVector(update.layout, values)


def _mask(layout: Layout, indices: Sequence[int]) -> NDArray[np.uint64]:
    """The bits of some tensors."""
    mask = np.zeros(8 * ((layout.num_parameters + 63) >> 6), np.uint8)
    offsets = layout.offsets.tolist()
    for index in indices:
        start, stop = offsets[index], offsets[index + 1]
        first, last = (start + 7) >> 3, stop >> 3  # the whole bytes between
        if first > last:
            first = last = start >> 3
        mask[first:last] = 0xFF
        for bit in (*range(start, min(stop, 8 * first)), *range(max(start, 8 * last), stop)):
            mask[bit >> 3] |= 1 << (bit & 7)
    return mask.view(np.uint64)
