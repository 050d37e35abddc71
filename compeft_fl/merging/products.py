"""The mean of LoRA's products B A, and not of B and of A: brought back to the rank by an SVD.

The mean of factors is not the factors of the mean: B_1 A_1 and B_2 A_2 averaged factor by factor
also holds B_1 A_2. Here the sum of w_i B_i A_i is kept as two thin matrices, their columns and rows
one after the other, and is never multiplied out: orthogonal bases of both (QR) leave a core as
small as there are columns, whose singular value decomposition is that of the whole.

Factors of one product are many. Those are taken that lie nearest to the mean of the factors: the
change then is a small one, which compressed links can carry, and the leading ranks stay what nodes
of lower ranks know them as.

Source: FlexLoRA, https://arxiv.org/abs/2402.11505, which sends the factors of the singular value
decomposition as they are.

Where the product has directions that the mean of A hardly has, such factors would be huge. There A
is its mean, and B the best for that, by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError
from compeft_fl.parts.ranks import AXES, rank_axis
from compeft_fl.task_vector import Layout, TaskVector, is_torch

__all__ = ["ProductMean", "best_product", "factors_near"]

Matrix = NDArray[np.float64]

_KEPT: Final = 4  # columns that stay when a sum is made small again, in ranks
_COLUMNS: Final = 16  # that a sum may have, in ranks
_SMALLEST: Final = 1e-7  # singular value that counts, of the largest
_WORST: Final = 30.0  # condition of the step from one pair of factors to another

_PAIRS: Final = (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A"))


@dataclass
class _Pair:
    """One product of the adapter: where its factors lie, and the sum so far."""

    left: slice  # of B, out x rank
    right: slice  # of A, rank x in
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    rank: int
    lefts: list[Matrix] = field(default_factory=list)  # columns, times weights
    rights: list[Matrix] = field(default_factory=list)  # rows

    @property
    def both(self) -> tuple[tuple[slice, tuple[int, ...]], ...]:
        """B and A: where each lies, and its shape."""
        return (self.left, self.shapes[0]), (self.right, self.shapes[1])

    def add(self, b: Matrix, a: Matrix, weight: float) -> None:
        """Add w B A."""
        self.lefts.append(weight * b)
        self.rights.append(a)
        if sum(each.shape[1] for each in self.lefts) > _COLUMNS * self.rank:
            u, s, v = self.decomposed(_KEPT * self.rank)
            self.lefts, self.rights = [u * s], [v]

    def decomposed(self, most: int) -> tuple[Matrix, Matrix, Matrix]:
        """The sum's largest singular values, at most so many, and their vectors."""
        return best_product(np.hstack(self.lefts), np.vstack(self.rights), most)


def best_product(left: Matrix, right: Matrix, most: int) -> tuple[Matrix, Matrix, Matrix]:
    """The singular value decomposition of a product of thin matrices, without the product.

    Parameters
    ----------
    left : ndarray, shape (m, k)
    right : ndarray, shape (k, n)
    most : int
        The largest singular values, at most so many; those that are rounding alone are left out.

    Returns
    -------
    u : ndarray, shape (m, q)
    s : ndarray, shape (q,)
    v : ndarray, shape (q, n)
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, v = np.linalg.svd(r_left @ r_right.T)
    count = min(most, int(np.count_nonzero(s > _SMALLEST * s.max(initial=0.0))))
    return q_left @ u[:, :count], s[:count], v[:count] @ q_right.T


def factors_near(u: Matrix, s: Matrix, v: Matrix, near: Matrix) -> tuple[Matrix, Matrix] | None:
    """Factors of u s v, the right one as near to another as can be.

    With G = A V^T, the part of A in the row space, A - G G+ (A - G V) and u s G+ are factors of
    u s v: directions that the product does not have stay in A as they are.

    Parameters
    ----------
    u, s, v : ndarray, shapes (m, q), (q,), (q, n)
    near : ndarray, shape (r, n)
        A, with r >= q.

    Returns
    -------
    (B, A), or None
        None where A has hardly any part in the row space.
    """
    inside = near @ v.T
    scale = np.linalg.svd(inside, compute_uv=False)
    if not s.size or scale[-1] * _WORST < np.linalg.norm(near):
        return None
    inverse = np.linalg.pinv(inside)
    return (u * s) @ inverse, near - inside @ inverse @ (near - inside @ v)


class ProductMean:
    """The weighted mean of a round's products.

    Parameters
    ----------
    base : TaskVector
        The adapter that the round's updates are relative to.
    axes : mapping of str to int
        Which axis of a tensor is the rank, see `compeft_fl.parts.ranks`.

    Raises
    ------
    LayoutError
        No LoRA of linear maps: no pairs of matrices, or factors of other shapes.
    """

    def __init__(self, base: TaskVector, axes: Mapping[str, int] = AXES) -> None:
        self._base: Any = base.values
        self._total = 0.0
        self._pairs = _pairs(base.layout, axes)
        self.projected = 0  # products whose A stayed the mean of A

    def add(self, update: Any, weight: float, rank: int | None = None) -> None:
        """Count the factors that an update leads to.

        Parameters
        ----------
        update : TernaryVector or TaskVector
            Over all of the adapter.
        weight : float
        rank : int, optional
            Of its node; None: all of it.
        """
        values: Any = update.to_task_vector().values
        moved = self._base + (values.cpu().numpy() if is_torch(values) else values)
        self._total += weight
        for pair in self._pairs:
            b, a = (_matrix(moved[where], shape) for where, shape in pair.both)
            count = pair.rank if rank is None else min(rank, pair.rank)
            pair.add(b[:, :count], a[:count], weight)

    def replaced(self, change: TaskVector) -> TaskVector:
        """A mean of updates, its factors replaced by those of the mean product."""
        values: Any = change.values
        found = np.array(values, np.float32)
        for pair in self._pairs:
            u, s, v = pair.decomposed(pair.rank)
            base = [_matrix(self._base[where], shape) for where, shape in pair.both]
            mean = [_matrix(found[where], shape) for where, shape in pair.both]
            factors = factors_near(u, s / self._total, v, base[1] + mean[1])
            if factors is None:
                near = base[1] + mean[1]
                self.projected += 1
                factors = (u * (s / self._total)) @ (v @ np.linalg.pinv(near)), near
            for where, old, new in zip((pair.left, pair.right), base, factors, strict=True):
                found[where] = (new - old).reshape(-1)
        return TaskVector(change.layout, found)


def _matrix(values: NDArray[np.float32], shape: tuple[int, ...]) -> Matrix:
    return values.reshape(shape).astype(np.float64)


def _pairs(layout: Layout, axes: Mapping[str, int]) -> list[_Pair]:
    """The products of an adapter."""
    places = {tensor.name: (tensor, where) for tensor, where in layout.slices()}
    found = []
    for name, (tensor, where) in places.items():
        partner = next((name.replace(a, b) for b, a in _PAIRS if a in name), None)
        if partner is None or rank_axis(name, tensor.shape, axes) is None:
            continue
        if partner not in places:
            raise LayoutError(f"expected {partner!r} beside {name!r}, found none of that name")
        other, there = places[partner]
        shapes = other.shape, tensor.shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0]:
            raise LayoutError(
                f"expected matrices out x rank and rank x in, found {shapes[0]} and {shapes[1]} "
                f"in {partner!r} and {name!r}"
            )
        found.append(_Pair(there, where, shapes, tensor.shape[0]))
    if not found:
        raise LayoutError("expected LoRA's factors lora_A and lora_B, found none to multiply")
    return found
