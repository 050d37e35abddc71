"""What a codec of the benchmarks is: a flat vector to bytes and back, the layout being known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from compeft_fl.errors import (
    LayoutError,
    NonFiniteBodyError,
    ParameterError,
    StreamLengthError,
)
from compeft_fl.task_vector import Layout, TaskVector

__all__ = ["Floats", "PeerCodec", "Reader"]

Floats = NDArray[np.float32]


class PeerCodec(ABC):
    """A codec of the benchmarks, with the one setting that its family has.

    Attributes
    ----------
    name : str
        The family, or ``family@density`` where it has densities: the key in tables.
    family, source : str
        The family's name, and the paper or project that it follows.
    biased : bool
        Whether it is used with error feedback in rounds.
    lossless : bool
        Whether the float32 values come back bit for bit.
    densities : tuple of float
        Those of the default set; empty where the codec sends every parameter.
    density : float
        The share of parameters that is sent.
    package : str
        An optional package that it needs, or "".
    """

    family: str
    source: ClassVar[str]
    biased: ClassVar[bool] = False
    lossless: bool = False
    densities: ClassVar[tuple[float, ...]] = ()
    package: ClassVar[str] = ""

    def __init__(self) -> None:
        self.name = self.family
        self.density = 1.0

    def at(self, density: float) -> Self:
        """The same codec at another density.

        Raises
        ------
        ParameterError
            A density outside (0, 1], or a codec without one.
        """
        from compeft_fl.compeft import check_density

        if not self.densities:
            raise ParameterError(f"expected {self.family!r} without a density, found {density!r}")
        check_density(density)
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.density, other.name = density, f"{self.family}@{density:g}"
        return other

    def encode(self, values: Floats, layout: Layout, seed: int = 0) -> bytes:
        """Everything that a receiver needs who knows the layout.

        Parameters
        ----------
        values : ndarray of float32, shape (layout.num_parameters,)
        layout : Layout
        seed : int
            Of codecs that round at random; the others ignore it.

        Raises
        ------
        LayoutError, NonFiniteError
            Values of another length; NaN or Inf.
        ParameterError
            No values at all, or values that the codec's data type does not hold.
        MissingPackageError
        """
        tau = TaskVector(layout, values)
        if not layout.num_parameters:
            raise ParameterError("expected a task vector with parameters, found none")
        tau.check_finite()
        return self._encode(np.asarray(tau.values), layout, seed)

    def decode(self, blob: bytes, layout: Layout) -> Floats:
        """The values, shape (layout.num_parameters,); what is not sent is 0.

        Raises
        ------
        WireError
            Bytes that this codec cannot have written for this layout.
        MissingPackageError
        """
        values = self._decode(blob, layout)
        if values.shape != (layout.num_parameters,):
            raise LayoutError(f"expected {layout.num_parameters} values, found {values.shape}")
        if not np.isfinite(values).all():
            raise NonFiniteBodyError("expected finite values, found NaN or Inf")
        return values

    @abstractmethod
    def _encode(self, values: Floats, layout: Layout, seed: int) -> bytes:
        """The bytes of finite values of the right length."""

    @abstractmethod
    def _decode(self, blob: bytes, layout: Layout) -> Floats:
        """The values of bytes that are not trusted."""

    def __repr__(self) -> str:
        return f"<peer codec {self.name}>"


class Reader:
    """Takes arrays off the front of some bytes, and says where they are too few or too many."""

    def __init__(self, blob: bytes) -> None:
        self._blob, self._at = blob, 0

    @property
    def left(self) -> int:
        """How many bytes have not been taken."""
        return len(self._blob) - self._at

    def array(self, dtype: DTypeLike, count: int) -> NDArray[Any]:
        """The next ``count`` numbers.

        Raises
        ------
        StreamLengthError
            Fewer bytes than that.
        """
        size = np.dtype(dtype).itemsize * count
        if size > self.left:
            raise StreamLengthError(f"expected {size} bytes at {self._at}, found {self.left}")
        found = np.frombuffer(self._blob, dtype, count, self._at)
        self._at += size
        return found

    def end(self) -> None:
        """Raise StreamLengthError where bytes are left."""
        if self.left:
            raise StreamLengthError(f"expected {self._at} bytes, found {len(self._blob)}")
