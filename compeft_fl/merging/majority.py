"""The direction in which most of a round's updates point, parameter by parameter, as two bit masks.

Each update has one vote per parameter that it moves: its sign. Scales and numbers of examples have
none, so that no client can shout. The votes are counted in bit planes, 2 log2(n) bits per
parameter for n updates, and compared with masks: no dense vector anywhere.

Source: the majority vote of signs, Bernstein et al., https://arxiv.org/abs/1810.05291.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.task_vector import Layout, TaskVector, is_torch
from compeft_fl.ternary import TernaryVector, num_words, pack, unpack

__all__ = ["Agreement", "SignMajority", "signs_of"]

Words = NDArray[np.uint64]

_FIRST_PLANES = 4  # counts up to 15


def signs_of(update: TernaryVector | TaskVector) -> TernaryVector:
    """An update's signs alone: scale 1; what a scale of 0 makes 0 is left out.

    Examples
    --------
    >>> tau = TaskVector.from_dict({"w": np.array([0.5, 0, -3], "f4")})
    >>> signs_of(tau).to_task_vector().values
    array([ 1.,  0., -1.], dtype=float32)
    """
    if isinstance(update, TaskVector):
        dense: Any = update.values
        values = dense.cpu().numpy() if is_torch(dense) else dense
        return TernaryVector(update.layout, pack(values > 0), pack(values < 0), 1.0)
    masks = update.positive, update.negative
    if not update.scales.all():
        spread = np.broadcast_to(update.scales > 0, (len(update.bounds) - 1,))
        moved = pack(np.repeat(spread, np.diff(update.bounds)))
        masks = masks[0] & moved, masks[1] & moved
    return TernaryVector(update.layout, *masks, 1.0)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an update's signs compare with a direction; of several rounds, the sums of each.

    Attributes
    ----------
    agree, oppose : float
        Parameters that both move, the same way and the other.
    norms : float
        The product of the Euclidean norms of both vectors of signs.
    """

    agree: float = 0.0
    oppose: float = 0.0
    norms: float = 0.0

    @property
    def cosine(self) -> float:
        """In -1 .. 1; 0 where one of the two is 0."""
        return (self.agree - self.oppose) / self.norms if self.norms > 0 else 0.0

    @property
    def deviations(self) -> float:
        """How many standard deviations the agreement is above that of unrelated signs."""
        both = self.agree + self.oppose
        return (self.agree - self.oppose) / math.sqrt(both) if both > 0 else 0.0

    @property
    def chance(self) -> float:
        """The standard deviation of the cosine between unrelated signs at the same places."""
        return math.sqrt(self.agree + self.oppose) / self.norms if self.norms > 0 else 1.0

    def after(self, earlier: Agreement, share: float) -> Agreement:
        """Return the sums with a share of what was found in earlier rounds."""
        return Agreement(
            self.agree + share * earlier.agree,
            self.oppose + share * earlier.oppose,
            self.norms + share * earlier.norms,
        )


class SignMajority:
    """Counts votes on the sign of each parameter; O(d) bits whatever the number of updates.

    Parameters
    ----------
    layout : Layout
        What all updates are for.

    Attributes
    ----------
    count : int
        How many updates have a vote.

    Examples
    --------
    >>> rows = [[1, 1, 0], [1, -1, 0], [2, -1, -1]]
    >>> taus = [TaskVector.from_dict({"w": np.array(row, "f4")}) for row in rows]
    >>> majority = SignMajority(taus[0].layout)
    >>> for tau in taus:
    ...     majority.add(tau)
    >>> majority.direction().to_task_vector().values
    array([ 1., -1., -1.], dtype=float32)
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.count = 0
        words = num_words(layout.num_parameters)
        self._plus: Words = np.zeros((words, _FIRST_PLANES), np.uint64)
        self._minus: Words = np.zeros((words, _FIRST_PLANES), np.uint64)
        self._leads: tuple[Words, Words, Words, Words] | None = None
        self._num_decided = 0

    def add(self, update: TernaryVector | TaskVector) -> None:
        """Give an update its vote.

        Raises
        ------
        LayoutError
            Another layout.
        """
        from compeft_fl.kernels import cpu_vote

        signs = self._signs(update)
        planes = self._plus.shape[1]
        if self.count + 1 >= 1 << planes:
            self._plus = np.pad(self._plus, ((0, 0), (0, 2)))
            self._minus = np.pad(self._minus, ((0, 0), (0, 2)))
        cpu_vote.add(self._plus, signs.positive)
        cpu_vote.add(self._minus, signs.negative)
        self.count += 1
        self._leads = None

    def remove(self, update: TernaryVector | TaskVector) -> None:
        """Take back the vote of an update that was added.

        Raises
        ------
        LayoutError
            Another layout.
        ParameterError
            Nothing has been added.
        """
        from compeft_fl.kernels import cpu_vote

        signs = self._signs(update)
        if not self.count:
            raise ParameterError("expected an update that was added, found none at all")
        cpu_vote.remove(self._plus, signs.positive)
        cpu_vote.remove(self._minus, signs.negative)
        self.count -= 1
        self._leads = None

    def direction(self) -> TernaryVector:
        """The sign that more updates have, with scale 1; 0 where as many are + as are -."""
        plus, _, minus, _ = self._compared()
        return TernaryVector(self.layout, plus, minus, 1.0)

    def cosine(self, update: TernaryVector | TaskVector, *, voted: bool = True) -> float:
        """The cosine between an update's signs and the direction of the others; see `compare`."""
        return self.compare(update, voted=voted).cosine

    def compare(
        self,
        update: TernaryVector | TaskVector,
        *,
        voted: bool = True,
        within: NDArray[np.bool_] | None = None,
    ) -> Agreement:
        """An update's signs against the direction of the others.

        Where its entries differ in size, each also counts as much as its size, and what says less
        agreement holds: honest signs in many tiny entries hide no few large ones.

        Parameters
        ----------
        update : TernaryVector or TaskVector
        voted : bool
            It was added: its own vote is left out of the direction, for where few updates move a
            parameter each agrees with itself.
        within : ndarray of bool, shape (d,), optional
            The parameters that this update could move; the direction elsewhere does not count.

        Returns
        -------
        Agreement

        Raises
        ------
        LayoutError
            Another layout.
        """
        signs = self._signs(update)
        plus, far_plus, minus, far_minus = self._compared()
        up, down = signs.positive, signs.negative
        decided = self._num_decided if within is None else _count((plus | minus) & pack(within))
        if voted:
            # Without this update's own +, the others' lead is one less: a lead of one is gone, and
            # where there was none they are for -.
            with_it = (up & far_plus) | (down & far_minus)
            against = (up & ~plus) | (down & ~minus)
            even = _count((up | down) & ~(plus | minus))
            decided += even - _count(up & plus & ~far_plus) - _count(down & minus & ~far_minus)
        else:
            with_it = (up & plus) | (down & minus)
            against = (up & minus) | (down & plus)
        norms = math.sqrt(float(_count(up | down)) * float(decided))
        by_signs = Agreement(_count(with_it), _count(against), norms)
        if isinstance(update, TernaryVector) and update.scales.size == 1:
            return by_signs
        by_size = _by_size(update, with_it, against, decided)
        return min(by_signs, by_size, key=lambda each: each.cosine)

    def _signs(self, update: TernaryVector | TaskVector) -> TernaryVector:
        if update.layout != self.layout:
            raise LayoutError(f"expected {self.layout!r}, found {update.layout!r}")
        return signs_of(update)

    def _compared(self) -> tuple[Words, Words, Words, Words]:
        """Where + leads by 1 and by 2, and where - does."""
        from compeft_fl.kernels import cpu_vote

        if self._leads is None:
            plus = cpu_vote.leads(self._plus, self._minus)
            minus = cpu_vote.leads(self._minus, self._plus)
            self._num_decided = _count(plus[0] | minus[0])
            self._leads = (*plus, *minus)
        return self._leads


def _by_size(
    update: TernaryVector | TaskVector, with_it: Words, against: Words, decided: int
) -> Agreement:
    """Agreement by magnitudes, on the scale of as many entries of one size as they are worth."""
    dense: Any = update.to_task_vector().values
    values = np.abs(dense.cpu().numpy() if is_torch(dense) else dense).astype(np.float64)
    largest = values.max(initial=0.0)
    if not largest > 0:
        return Agreement()
    values /= largest  # whose squares are numbers, then
    total, squares = values.sum(), np.square(values).sum()
    worth = total * total / squares  # 1 for one large entry, all of them for equal ones
    shares = (float(values[unpack(mask, values.size)].sum()) for mask in (with_it, against))
    agree, oppose = (worth * share / total for share in shares)
    return Agreement(agree, oppose, math.sqrt(worth * decided))


def _count(mask: Words) -> int:
    return int(np.bitwise_count(mask).sum())
