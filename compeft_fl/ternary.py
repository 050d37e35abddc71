"""Sparse ternary vectors as two bit masks, and their algebra by AND, XOR and popcount.

ComPEFT section 3.3: with one bit per parameter for +scale and one for -scale, 64 parameters of two
vectors meet in a handful of machine instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.task_vector import Layout, TaskVector, is_torch

if TYPE_CHECKING:
    import torch

    Words = NDArray[np.uint64]
    Masks = Words | torch.Tensor

__all__ = ["TernaryVector", "num_words", "pack", "unpack"]


def num_words(num_parameters: int) -> int:
    """How many 64-bit words a mask over ``num_parameters`` bits takes."""
    return (num_parameters + 63) >> 6


class TernaryVector:
    """A vector over a layout whose entries are 0 or +-scale.

    Parameters
    ----------
    layout : Layout
    positive, negative : ndarray of uint64, shape (ceil(d / 64),)
        Bit ``i & 63`` of word ``i >> 6`` belongs to parameter i; no bit is set in both, none after
        the last parameter. On another device: torch tensors of uint8 with the same bytes.
    scales : array of float32, shape (1,) or (number of tensors,)
        Not negative; one for the whole vector, or one per tensor of the layout.

    Raises
    ------
    LayoutError
        Masks of another length than the layout's.
    ParameterError
        Scales that are not finite, negative, or of another number.
    """

    def __init__(self, layout: Layout, positive: Masks, negative: Masks, scales: Any) -> None:
        words = num_words(layout.num_parameters)
        for mask in (positive, negative):
            expected = 8 * words if is_torch(mask) else words
            if tuple(mask.shape) != (expected,):
                raise LayoutError(f"expected a mask of {expected}, found {tuple(mask.shape)}")
        scales = np.atleast_1d(np.asarray(scales, dtype=np.float32))
        if scales.shape not in {(1,), (len(layout.tensors),)}:
            raise ParameterError(
                f"expected 1 scale or {len(layout.tensors)}, one per tensor; found {scales.shape}"
            )
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise ParameterError(f"expected finite scales >= 0, found {scales.min()}")
        self.layout = layout
        self.masks: tuple[Masks, Masks] = (positive, negative)
        self.scales: NDArray[np.float32] = scales

    @classmethod
    def from_task_vector(cls, tau: TaskVector) -> TernaryVector:
        """A task vector that is ternary already: each tensor's entries are 0 or +-one scale.

        Raises
        ------
        ParameterError
            A tensor with two different magnitudes: `compress` it instead.

        Examples
        --------
        >>> tau = TaskVector.from_dict({"w": np.array([0.5, 0, -0.5], "f4")})
        >>> TernaryVector.from_task_vector(tau).scales
        array([0.5], dtype=float32)
        """
        tau.check_finite()
        dense: Any = tau.values
        values: NDArray[np.float32] = dense.cpu().numpy() if is_torch(dense) else dense
        scales = []
        for tensor, where in tau.layout.slices():
            magnitudes = np.unique(np.abs(values[where]))
            magnitudes = magnitudes[magnitudes > 0]
            if magnitudes.size > 1:
                raise ParameterError(
                    f"expected one magnitude in tensor {tensor.name!r}, found {magnitudes.size}"
                )
            scales.append(float(magnitudes[0]) if magnitudes.size else 0.0)
        used = {scale for scale in scales if scale > 0}
        if len(used) <= 1:
            scales = [used.pop() if used else 0.0]
        return cls(tau.layout, pack(values > 0), pack(values < 0), scales)

    @property
    def positive(self) -> Words:
        """The mask of +scale, on the CPU."""
        return self._host(0)

    @property
    def negative(self) -> Words:
        """The mask of -scale, on the CPU."""
        return self._host(1)

    def _host(self, which: int) -> Words:
        mask: Any = self.masks[which]
        words: Words = mask.cpu().numpy().view(np.uint64) if is_torch(mask) else mask
        return words

    @property
    def num_parameters(self) -> int:
        """d, the length of the vector."""
        return self.layout.num_parameters

    @property
    def num_nonzeros(self) -> int:
        """How many entries are not 0 (where a scale is 0, marked entries count all the same)."""
        return int(np.bitwise_count(self.positive | self.negative).sum())

    @property
    def density(self) -> float:
        """The share of entries that are not 0."""
        return self.num_nonzeros / max(1, self.num_parameters)

    def nonzeros_by_tensor(self) -> NDArray[np.int64]:
        """How many entries of each tensor are not 0; shape (number of tensors,)."""
        marked = self.positive | self.negative
        return _count_by_range(marked, self.layout.offsets).astype(np.int64)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Where each scale's range of parameters starts, and where the last ends."""
        if self.scales.size == 1:
            return np.array([0, self.num_parameters], np.int64)
        return self.layout.offsets

    def with_scales(self, scales: Any) -> TernaryVector:
        """The same signs with other scales; the masks are shared."""
        return TernaryVector(self.layout, *self.masks, scales)

    def to_task_vector(self) -> TaskVector:
        """The dense vector, float32, on the device of the masks."""
        if is_torch(self.masks[0]):
            from compeft_fl.kernels import torch_ops

            masks: Any = self.masks
            dense = torch_ops.to_dense(masks, self.scales, self.layout.sizes)
            return TaskVector(self.layout, dense)
        from compeft_fl.kernels import cpu

        values = np.zeros(self.num_parameters, np.float32)
        cpu.add_ternary(values, self.positive, self.negative, self.scales, self.bounds)
        return TaskVector(self.layout, values)

    # The algebra. a and b agree where both are + or both are -; they oppose where one is + and one
    # is -.

    def _counts(self, other: TernaryVector) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per range of one scale in both: how many entries agree, and how many oppose."""
        if self.layout != other.layout:
            raise LayoutError(f"expected {self.layout!r}, found {other.layout!r}")
        a, b = (self.positive, self.negative), (other.positive, other.negative)
        bounds = self.bounds if self.scales.size > 1 else other.bounds
        agree = _count_by_range((a[0] & b[0]) | (a[1] & b[1]), bounds)
        oppose = _count_by_range((a[0] & b[1]) | (a[1] & b[0]), bounds)
        return agree, oppose

    def _squared_norm(self) -> float:
        counts = _count_by_range(self.positive | self.negative, self.bounds)
        return float(counts @ self.scales.astype(np.float64) ** 2)

    def dot(self, other: TernaryVector) -> float:
        """The inner product, in float64.

        Raises
        ------
        LayoutError
            Another layout.
        """
        agree, oppose = self._counts(other)
        products = self.scales.astype(np.float64) * other.scales.astype(np.float64)
        return float(((agree - oppose) * products).sum())

    def squared_distance(self, other: TernaryVector) -> float:
        """The squared Euclidean distance, in float64."""
        agree, oppose = self._counts(other)
        mine, theirs = self.scales.astype(np.float64), other.scales.astype(np.float64)
        bounds = self.bounds if self.scales.size > 1 else other.bounds
        only_mine = _count_by_range(self.positive | self.negative, bounds) - agree - oppose
        only_theirs = _count_by_range(other.positive | other.negative, bounds) - agree - oppose
        return float(
            (
                agree * (mine - theirs) ** 2
                + oppose * (mine + theirs) ** 2
                + only_mine * mine**2
                + only_theirs * theirs**2
            ).sum()
        )

    def distance(self, other: TernaryVector) -> float:
        """The Euclidean distance."""
        return float(np.sqrt(self.squared_distance(other)))

    def hamming_distance(self, other: TernaryVector) -> int:
        """In how many entries the signs differ, 0 counted as a sign of its own."""
        if self.layout != other.layout:
            raise LayoutError(f"expected {self.layout!r}, found {other.layout!r}")
        differ = (self.positive ^ other.positive) | (self.negative ^ other.negative)
        return int(np.bitwise_count(differ).sum())

    def cosine(self, other: TernaryVector) -> float:
        """The cosine of the angle between the vectors; 0 where one of them is 0."""
        norms = self._squared_norm() * other._squared_norm()
        return self.dot(other) / float(np.sqrt(norms)) if norms > 0 else 0.0

    def sign_agreement(self, other: TernaryVector) -> float:
        """Of the entries that are not 0 in both, the share of one sign; NaN if there are none."""
        agree, oppose = self._counts(other)
        both = agree.sum() + oppose.sum()
        return float(agree.sum() / both) if both else float("nan")

    def __repr__(self) -> str:
        return f"TernaryVector({self.layout!r}, {self.num_nonzeros} nonzeros)"


def pack(mask: NDArray[np.bool_]) -> Words:
    """A mask of booleans as words."""
    packed = np.zeros(8 * num_words(mask.size), np.uint8)
    packed[: (mask.size + 7) >> 3] = np.packbits(mask, bitorder="little")
    return packed.view(np.uint64)


def unpack(mask: Words, size: int) -> NDArray[np.bool_]:
    """A mask of words as so many booleans."""
    return np.unpackbits(mask.view(np.uint8), count=size, bitorder="little").view(np.bool_)


def _count_by_range(mask: Words, bounds: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many bits are set in each range bounds[t] .. bounds[t + 1]."""
    before = np.zeros(mask.size + 1, np.int64)
    np.cumsum(np.bitwise_count(mask), out=before[1:], dtype=np.int64)
    word, bit = bounds >> 6, (bounds & 63).astype(np.uint64)
    partial = np.append(mask, np.uint64(0))[word] & ((np.uint64(1) << bit) - np.uint64(1))
    counts: NDArray[np.float64] = np.diff(before[word] + np.bitwise_count(partial)).astype(float)
    return counts
