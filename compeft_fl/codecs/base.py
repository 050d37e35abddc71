"""What a codec is: one body of the wire format, to and from a range of an update's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ScaleCountError, ScaleError
from compeft_fl.factored import FactoredVector
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = ["Codec", "Part", "Update", "check_scales", "paste"]

Update = TernaryVector | TaskVector


@dataclass(frozen=True)
class Part:
    """A decoded body: parameters ``start .. stop`` of a layout.

    ``masks`` and ``scales`` for a ternary body, ``factored`` for a whole update of terms, else
    ``values`` (float32).
    """

    start: int
    stop: int
    masks: tuple[Any, Any] | None = None
    scales: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None
    factored: FactoredVector | None = None


class Codec(ABC):
    """A body of the format. Codecs hold no state: one object serves all threads.

    Attributes
    ----------
    name : str
        The registry's key, and what ``encode(update, codec=...)`` takes.
    field : str
        The field of the protobuf ``Update`` that holds the body. Several codecs may write one field
        (dense in three data types); the first that is registered reads it.
    ternary : bool
        The body holds masks and scales; otherwise a float32 value for each parameter.
    """

    name: ClassVar[str]
    field: ClassVar[str]
    ternary: ClassVar[bool] = True

    @abstractmethod
    def encode(self, update: Update, start: int, stop: int) -> Any:
        """The protobuf body for parameters ``start .. stop`` of the update.

        Raises
        ------
        ParameterError
            An update that this codec does not write.
        """

    @abstractmethod
    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """The parameters ``start .. stop``; every field of the body is checked.

        Raises
        ------
        WireError
            What proto/FORMAT.md lists under "What a decoder rejects".
        """

    @abstractmethod
    def max_body_bytes(self, num_parameters: int) -> int:
        """An upper bound for the body's size, by which writers cut updates into parts."""


def check_scales(scales: Any, layout: Layout) -> NDArray[np.float32]:
    """A body's scales as an array, shape (1,) or (number of tensors,).

    Raises
    ------
    ScaleCountError, ScaleError
    """
    if len(scales) not in {1, len(layout.tensors)}:
        raise ScaleCountError(
            f"expected 1 scale or {len(layout.tensors)}, one per tensor; found {len(scales)}"
        )
    array = np.array(scales, dtype=np.float32)
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if bad.size:
        raise ScaleError(
            f"expected finite scales >= 0, found {array[bad[0]]} at index {int(bad[0])}"
        )
    return array


def masks_of_range(update: TernaryVector, start: int, stop: int) -> tuple[Any, Any]:
    """The masks of parameters ``start .. stop``, counted from ``start``."""
    if (start, stop) == (0, update.num_parameters):
        return update.masks
    return cut(update.positive, start, stop), cut(update.negative, start, stop)


def cut(mask: NDArray[np.uint64], start: int, stop: int) -> NDArray[np.uint64]:
    """Bits ``start .. stop`` of a mask, as words of their own."""
    first, shift, count = start >> 6, np.uint64(start & 63), stop - start
    size = (count + 63) >> 6
    words = np.zeros(size + 1, np.uint64)
    source = mask[first : first + size + 1]
    words[: source.size] = source
    if shift:
        words[:-1] = (words[:-1] >> shift) | (words[1:] << (np.uint64(64) - shift))
    if count & 63:
        words[size - 1] &= (np.uint64(1) << np.uint64(count & 63)) - np.uint64(1)
    return words[:size]


def paste(mask: NDArray[np.uint64], words: NDArray[np.uint64], start: int) -> None:
    """Set the bits of ``words`` in a mask from bit ``start`` on."""
    first, shift = start >> 6, np.uint64(start & 63)
    mask[first : first + words.size] |= words << shift
    if shift:
        rest = mask[first + 1 : first + 1 + words.size]
        rest |= (words >> (np.uint64(64) - shift))[: rest.size]
