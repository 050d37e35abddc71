"""Adapters whose tensors are factors of one product: what each is, and what the product is.

LoRA's change of a weight is B A, LoHa's (w1_a w1_b) * (w2_a w2_b), LoKr's the Kronecker product of
w1 and w2, AdaLoRA's B (E A), IA3's one vector. Against a start of 0 the task vector is the factors
themselves, random ones included. Then

- a factor that is lost takes the whole product with it, so each factor is compressed by itself;
- a number times the task vector is that number once for each factor in the product, so one factor
  alone is scaled: the one that starts from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.task_vector import Layout

__all__ = ["METHODS", "effect_cosine", "factor_of", "groups", "is_scaled", "start_value"]

Factors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Method:
    """A PEFT method whose start is known without a folder.

    Attributes
    ----------
    start : int
        What its task vector is relative to.
    marks : tuple of str
        Parts of tensors' names begin with one of these.
    scaled : tuple of str
        The factors that a number is multiplied to; of several that are there, all are summands.
    """

    start: int
    marks: tuple[str, ...]
    scaled: tuple[str, ...]


METHODS: Final[Mapping[str, _Method]] = {
    "LORA": _Method(
        0,
        ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        ("lora_B", "lora_embedding_A"),
    ),
    "ADALORA": _Method(0, ("lora_A", "lora_B", "lora_E"), ("lora_E",)),
    "LOHA": _Method(0, ("hada_",), ("hada_w2_b",)),
    "LOKR": _Method(0, ("lokr_",), ("lokr_w1", "lokr_w1_a")),
    "IA3": _Method(1, ("ia3_l",), ("ia3_l",)),
}


def start_value(method: str) -> int | None:
    """What a method's task vector is relative to where no start is given; None: not known."""
    known = METHODS.get(method)
    return None if known is None else known.start


def factor_of(method: str, name: str) -> str | None:
    """Which factor a tensor is, by its name: ``"lora_B"``; None: none of this method's."""
    marks = METHODS[method].marks if method in METHODS else ()
    return next((part for part in name.split(".") if part.startswith(marks)), None)


def is_scaled(method: str, name: str) -> bool:
    """Is this tensor the factor to multiply where the whole change is to be multiplied?"""
    return factor_of(method, name) in METHODS[method].scaled


def groups(method: str, layout: Layout) -> list[list[int]]:
    """The tensors of each factor, as indices into the layout's."""
    found: dict[str, list[int]] = {}
    for index, tensor in enumerate(layout.tensors):
        found.setdefault(factor_of(method, tensor.name) or "", []).append(index)
    return list(found.values())


# --- the product ------------------------------------------------------------------------------


def effect_cosine(method: str, modules: Iterable[tuple[Factors, Factors]]) -> float | None:
    """The cosine between the changes of the weights that two sets of factors make.

    Parameters
    ----------
    method : str
    modules : iterable of pairs of factors
        Per module, its factors before and after, by names without the module's.

    Returns
    -------
    float or None
        None where the factors are no product that is known here. A module's own scaling
        (``alpha_pattern``) is not counted.
    """
    inner = _INNER.get(method)
    if inner is None:
        return None
    totals = [0.0, 0.0, 0.0]
    for ours, theirs in modules:
        try:
            parts = inner(ours, theirs), inner(ours, ours), inner(theirs, theirs)
        except (KeyError, ValueError):  # a variant of other factors or shapes
            return None
        totals = [total + part for total, part in zip(totals, parts, strict=True)]
    norms = math.sqrt(totals[1]) * math.sqrt(totals[2])
    return totals[0] / norms if norms > 0 else 0.0


def _matrix(values: NDArray[np.float32], *, rank_last: bool) -> NDArray[np.float64]:
    """A factor as a matrix, of a convolution also: out x rank, or rank x in."""
    shape = (-1, values.shape[1]) if rank_last else (values.shape[0], -1)
    if rank_last and values.size != values.shape[0] * values.shape[1]:
        raise ValueError("expected a factor of a linear map")
    return values.reshape(shape).astype(np.float64)


def _inner_of_products(
    a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64], d: NDArray[np.float64]
) -> float:
    """The inner product of A B and C D, by matrices as small as the rank."""
    return float(((a.T @ c) * (b @ d.T)).sum())


def _lora(x: Factors, y: Factors) -> float:
    total = 0.0
    names = set(x)
    for left, right in (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A")):
        left, right = (key + ".weight" if key + ".weight" in x else key for key in (left, right))
        if left in x:
            a, c = (_matrix(f[left], rank_last=True) for f in (x, y))
            b, d = (_matrix(f[right], rank_last=False) for f in (x, y))
            if a.shape[1] != b.shape[0]:
                raise ValueError("expected factors of one rank")
            total += _inner_of_products(a, b, c, d)
            names -= {left, right}
    if "lora_B.bias" in x:
        total += float(x["lora_B.bias"].astype(np.float64) @ y["lora_B.bias"])
        names.discard("lora_B.bias")
    if names:
        raise ValueError(f"expected LoRA's factors, found also {names}")
    return total


def _adalora(x: Factors, y: Factors) -> float:
    a, c = (_matrix(f["lora_B"], rank_last=True) for f in (x, y))
    b, d = (
        _matrix(f["lora_A"], rank_last=False) * f["lora_E"].reshape(-1, 1).astype(np.float64)
        for f in (x, y)
    )
    return _inner_of_products(a, b, c, d)


def _lokr(x: Factors, y: Factors) -> float:
    return float((_lokr_half(x, "1") * _lokr_half(y, "1")).sum()) * float(
        (_lokr_half(x, "2") * _lokr_half(y, "2")).sum()
    )


def _lokr_half(f: Factors, which: str) -> NDArray[np.float64]:
    whole, a, b = f"lokr_w{which}", f"lokr_w{which}_a", f"lokr_w{which}_b"
    if whole in f:
        return f[whole].astype(np.float64)
    left, right = f[a].astype(np.float64), f[b].astype(np.float64)
    if which == "2" and "lokr_t2" in f:
        return np.asarray(np.einsum("ijkl,ip,jr->prkl", f["lokr_t2"], left, right))
    return np.asarray(left @ right)


def _loha(x: Factors, y: Factors) -> float:
    if "hada_t1" in x:
        ours, theirs = (_loha_weights(f, slice(None)) for f in (x, y))
        return float((ours * theirs).sum())
    rows, total = x["hada_w1_a"].shape[0], 0.0
    step = max(1, (1 << 20) // max(1, x["hada_w1_b"].shape[1]))
    for start in range(0, rows, step):  # the change itself is as large as the base's weight
        where = slice(start, start + step)
        total += float((_loha_weights(x, where) * _loha_weights(y, where)).sum())
    return total


def _loha_weights(f: Factors, rows: slice) -> NDArray[np.float64]:
    halves = []
    for which in "12":
        a, b = (f[f"hada_w{which}_{end}"].astype(np.float64) for end in "ab")
        if f"hada_t{which}" in f:
            halves.append(np.einsum("ijkl,jr,ip->prkl", f[f"hada_t{which}"], b, a))
        else:
            halves.append(a[rows] @ b)
    return np.asarray(halves[0] * halves[1])


_INNER: Final[Mapping[str, Callable[[Factors, Factors], float]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "LOKR": _lokr,
    "LOHA": _loha,
}
