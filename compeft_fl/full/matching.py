"""What becomes of each tensor of a fine-tuned checkpoint, by what the base has in its place.

- *trained*: floats of training that the base has too. They make up the task vector. Of a tensor
  that has grown by rows (a vocabulary with added tokens) the rows that the base has; the further
  ones are carried.
- *carried*: what the base does not have, or has in another shape (a new head), and what a sign and
  a scale make no sense of (integers, statistics, float64) where it differs. Bit for bit.
- *as the base has it*: the same, where it does not differ. Nothing of it is in a file.
- *tied*: the copy of another tensor under a second name. Once in a file.

Tensors that only the base has are no part of the fine-tuned model, and are left out: a head that
was thrown away. ``save_pretrained`` puts a model's prefix (``bert.``) before names or leaves it
out, as there is a head or none: names are compared with and without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from compeft_fl.adapters.carried import carried_names
from compeft_fl.adapters.weights import StoredTensor
from compeft_fl.errors import AdapterError
from compeft_fl.full.folders import Checkpoint, ShardedTensors
from compeft_fl.printable import quoted
from compeft_fl.task_vector import Layout, TensorSpec

__all__ = ["Names", "Plan", "check_layout", "rows_name"]

_DTYPES: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_LOOKED_AT: Final = 4096  # values of two tensors that are compared before all are


@dataclass(frozen=True)
class Names:
    """How names of the fine-tuned checkpoint become those of the base.

    Attributes
    ----------
    strip, add : str
        A prefix to take off, or to put before, where the base has no tensor of the name itself.
    """

    strip: str = ""
    add: str = ""

    @classmethod
    def between(cls, finetuned: Iterable[str], base: Mapping[str, Any]) -> Names:
        """The prefix that gives most names a counterpart in the base."""
        missing = [name for name in finetuned if name not in base]
        candidates = [cls()]
        candidates += [cls(strip=f"{p}.") for p in sorted({n.partition(".")[0] for n in missing})]
        candidates += [cls(add=f"{p}.") for p in sorted({n.partition(".")[0] for n in base})]
        return max(candidates, key=lambda names: sum(names.of(n, base) in base for n in missing))

    def of(self, name: str, base: Mapping[str, Any]) -> str:
        """The name that a tensor has in the base, if it is there."""
        if name in base:
            return name
        if self.strip and name.startswith(self.strip):
            return name.removeprefix(self.strip)
        return self.add + name


@dataclass(frozen=True)
class Plan:
    """What becomes of each tensor.

    Attributes
    ----------
    layout : Layout
        Of the trained tensors, by name; of one that has grown, the rows that the base has.
    base_names : dict of str to str
        Of each trained tensor, and of each that is as the base has it.
    grown : dict of str to tuple of int
        The whole shape of each trained tensor that has grown.
    carried : list of str
    as_base : list of str
    tied : dict of str to str
        The name of the tensor that each is a copy of, which comes before it.
    reshaped : list of str
        Those of ``carried`` that the base has in another shape.
    missing : list of str
        The base's tensors that the fine-tuned model has not.
    names : Names
    """

    layout: Layout
    base_names: dict[str, str]
    names: Names
    grown: dict[str, tuple[int, ...]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    as_base: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, base: Checkpoint, finetuned: Checkpoint) -> Plan:
        """Compare two checkpoints.

        Raises
        ------
        AdapterError
            More parameters of the fine-tuned checkpoint without a counterpart than with one: it is
            of another base. The message names the first tensor.
        """
        ours, theirs = finetuned.state.tensors, base.state.tensors
        names = Names.between(ours, theirs)
        tied = _tied(finetuned.state)
        policy = carried_names(finetuned.state)
        plan = cls(Layout([]), {}, names, tied=tied)
        specs: list[TensorSpec] = []
        alone: list[str] = []  # without a counterpart
        for name, tensor in ours.items():
            if name in tied:
                continue
            there = names.of(name, theirs)
            known = theirs.get(there)
            if name in policy:
                if known is not None and _equal(finetuned.state, name, base.state, there):
                    plan.as_base.append(name)
                    plan.base_names[name] = there
                else:
                    plan.carried.append(name)
                continue
            if known is None or not _fits(tensor, known):
                plan.carried.append(name)
                alone.append(name)
                if known is not None:
                    plan.reshaped.append(name)
                continue
            plan.base_names[name] = there
            specs.append(TensorSpec(name, known.shape, _DTYPES[tensor.stored_dtype]))
            if tensor.shape != known.shape:
                plan.grown[name] = tensor.shape
        layout = Layout(specs)
        without = sum(ours[name].size for name in alone)
        if without > layout.num_parameters or not layout.num_parameters:
            first = alone[0] if alone else next(iter(ours))
            there = names.of(first, theirs)
            found = f"shape {theirs[there].shape}" if there in theirs else "none of that name"
            raise AdapterError(
                f"{finetuned.folder} is no fine-tuning of {base.folder}: expected {quoted(first)} "
                f"of shape {ours[first].shape} there, found {found}"
            )
        missing = set(theirs) - {names.of(name, theirs) for name in ours}
        if missing:  # the copy of another is in no file of its own
            missing -= set(_tied(base.state))
        return cls(
            layout, plan.base_names, names, plan.grown, plan.carried, plan.as_base, tied,
            plan.reshaped, sorted(missing),
        )  # fmt: skip


def rows_name(name: str, first: int) -> str:
    """Under which the further rows of a tensor that has grown are carried."""
    return f"{name}[{first}:]"


def _fits(tensor: StoredTensor, known: StoredTensor) -> bool:
    """Has the base the same shape, or the first rows of it, in floats?"""
    if known.stored_dtype not in _DTYPES or not math.prod(known.shape):
        return False
    grown = len(tensor.shape) > 1 and tensor.shape[1:] == known.shape[1:]
    return tensor.shape == known.shape or (grown and tensor.shape[0] > known.shape[0])


def _tied(state: ShardedTensors) -> dict[str, str]:
    """Matrices that are the copy of one before: an output layer that is the input's embedding."""
    found: dict[str, str] = {}
    firsts: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    for name, tensor in state.tensors.items():
        if len(tensor.shape) < 2 or tensor.stored_dtype not in _DTYPES:
            continue
        head = _head(state, name)
        if head == head[:1] * len(head):  # zeros: many are, and are no copies
            continue
        same = firsts.setdefault((tensor.stored_dtype, tensor.shape, head), [])
        for other in same:
            if _equal(state, name, state, other):
                found[name] = other
                break
        else:
            same.append(name)
    return found


def _head(state: ShardedTensors, name: str) -> bytes:
    for _, piece in state.pieces(name, _LOOKED_AT):
        return piece.tobytes()
    return b""


def _equal(one: ShardedTensors, name: str, other: ShardedTensors, there: str) -> bool:
    """Are two tensors the same, bit for bit?"""
    a, b = one.tensors[name], other.tensors[there]
    if (a.stored_dtype, a.shape) != (b.stored_dtype, b.shape):
        return False
    return all(x == y for x, y in zip(one.raw(name), other.raw(there), strict=True))


def check_layout(layout: Layout, base: ShardedTensors, names: Names) -> dict[str, str]:
    """The base's name of each tensor of a file's layout.

    Raises
    ------
    AdapterError
        The base has no such tensor, or one of another shape; the message names it.
    """
    found = {}
    for tensor in layout.tensors:
        there = names.of(tensor.name, base)
        known = base.tensors.get(there)
        if known is None or known.shape != tensor.shape or known.stored_dtype not in _DTYPES:
            what = f"shape {known.shape}" if known is not None else "none of that name"
            raise AdapterError(
                f"expected the base with which the file was made, with {quoted(tensor.name)} of "
                f"shape {tensor.shape}; found {what}"
            )
        found[tensor.name] = there
    return found
