"""Task vectors: what fine-tuning changed, as one flat vector over an adapter's named tensors.

A *state* is what ``get_peft_model_state_dict`` returns: names to tensors, torch's or numpy's. Its
order is the flattening order. Vectors live in numpy on the CPU; where a state's tensors live on
another device, the vector stays there as a torch tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, NonFiniteError
from compeft_fl.printable import quoted

if TYPE_CHECKING:
    import torch

    State = Mapping[str, torch.Tensor | NDArray[Any]]
    Values = NDArray[np.float32] | torch.Tensor

__all__ = ["Layout", "TaskVector", "TensorSpec"]

_DTYPE_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_MAX_PARAMETERS = 1 << 62  # so that int64 arithmetic on positions cannot overflow
MAX_DIMENSIONS = 32  # what every array library takes
_MAX_BESIDE_ZERO = 1 << 56  # of a tensor without parameters: its strides are numbers too


def is_torch(array: Any) -> bool:
    """Is this a torch tensor? (Asked without importing torch.)"""
    return hasattr(array, "detach")


def on_host(array: Any) -> bool:
    """Can numpy reach this array's memory?"""
    return not is_torch(array) or array.device.type == "cpu"


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of an adapter: its shape, and the data type that it has at home.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : {"f32", "f16", "bf16"}
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "f32"

    @property
    def size(self) -> int:
        """How many parameters the tensor has; any number past 2^62 stands for too many."""
        if 0 in self.shape:
            return 0
        size = 1
        for length in self.shape:  # a hostile shape has a product of millions of digits
            size *= length
            if size > _MAX_PARAMETERS:
                break
        return size


def _check_spec(tensor: TensorSpec) -> None:
    """Raise LayoutError for a tensor that no array library could hold."""
    if not isinstance(tensor.name, str):
        raise LayoutError(f"expected a tensor's name, found {quoted(tensor.name)}")
    if tensor.dtype not in _DTYPE_NAMES.values():
        raise LayoutError(
            f"expected f32, f16 or bf16, found {quoted(tensor.dtype)} in {quoted(tensor.name)}"
        )
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise LayoutError(
            f"expected at most {MAX_DIMENSIONS} dimensions, found {len(tensor.shape)} "
            f"in {quoted(tensor.name)}"
        )
    if any(not 0 <= length < 1 << 64 for length in tensor.shape):
        raise LayoutError(
            f"expected lengths in 0 .. 2^64 - 1, found {tensor.shape} in {quoted(tensor.name)}"
        )
    if 0 in tensor.shape and math.prod(filter(None, tensor.shape)) > _MAX_BESIDE_ZERO:
        raise LayoutError(
            f"expected lengths of at most 2^56 in all beside a 0, found {tensor.shape} "
            f"in {quoted(tensor.name)}"
        )
    if not tensor.name.isascii() and any("\ud800" <= c <= "\udfff" for c in tensor.name):
        raise LayoutError(f"expected names that UTF-8 can hold, found {quoted(tensor.name)}")


class Layout:
    """The order in which an adapter's tensors make up one flat vector.

    Parameters
    ----------
    tensors : iterable of TensorSpec
        In flattening order, each row-major; names differ.

    Raises
    ------
    LayoutError
        Two tensors of one name, a negative dimension, more than 32 dimensions, more parameters than
        2^62, or an unknown data type.

    Examples
    --------
    >>> layout = Layout([TensorSpec("a", (2, 3)), TensorSpec("b", (4,))])
    >>> layout.num_parameters
    10
    """

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        by_name: dict[str, TensorSpec] = {}
        for tensor in tensors:  # checked one by one: a hostile list ends at its first fault
            if tensor.name in by_name:
                raise LayoutError(f"expected each name once, found {quoted(tensor.name)} twice")
            _check_spec(tensor)
            by_name[tensor.name] = tensor
        self.tensors = tuple(by_name.values())
        self.sizes = tuple(tensor.size for tensor in self.tensors)
        self.num_parameters = sum(self.sizes)
        if self.num_parameters > _MAX_PARAMETERS:
            raise LayoutError("expected at most 2^62 parameters, found more")
        self._hash = hash(self.tensors)

    @classmethod
    def of(cls, state: State) -> Layout:
        """The layout of a state.

        Raises
        ------
        LayoutError
            A tensor that is not float32, float16 or bfloat16.
        """
        tensors = []
        for name, tensor in state.items():
            dtype = str(tensor.dtype).rpartition(".")[2]
            if dtype not in _DTYPE_NAMES:
                raise LayoutError(
                    f"expected float32, float16 or bfloat16, found {dtype} in tensor {quoted(name)}"
                )
            shape = tuple(int(length) for length in tensor.shape)
            tensors.append(TensorSpec(name, shape, _DTYPE_NAMES[dtype]))
        return cls(tensors)

    @functools.cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each tensor starts in the flat vector, and where the last ends; shape (n + 1,)."""
        return np.cumsum([0, *self.sizes], dtype=np.int64)

    def slices(self) -> Iterator[tuple[TensorSpec, slice]]:
        """Each tensor with its place in the flat vector."""
        start = 0
        for tensor, size in zip(self.tensors, self.sizes, strict=True):
            yield tensor, slice(start, start + size)
            start += size

    def tensor_at(self, index: int) -> TensorSpec:
        """The tensor that holds parameter ``index`` of the flat vector."""
        return self.tensors[int(np.searchsorted(self.offsets, index, side="right")) - 1]

    def check(self, state: State) -> None:
        """Raise LayoutError, with the tensor's name, where a state's names or shapes differ."""
        names = [tensor.name for tensor in self.tensors]
        for name in names:
            if name not in state:
                raise LayoutError(f"expected tensor {quoted(name)}, found none of that name")
        if len(state) != len(names):
            extra = sorted(set(state) - set(names))
            raise LayoutError(f"expected {len(names)} tensors, found also {quoted(extra[0])}")
        for tensor in self.tensors:
            shape = tuple(state[tensor.name].shape)
            if shape != tensor.shape:
                raise LayoutError(
                    f"expected shape {tensor.shape}, found {shape} in tensor {quoted(tensor.name)}"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.tensors == other.tensors

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Layout({len(self.tensors)} tensors, {self.num_parameters} parameters)"


class TaskVector:
    """tau = theta_ft - theta_init over all tensors of an adapter (ComPEFT section 2.1).

    Parameters
    ----------
    layout : Layout
    values : ndarray or torch tensor of float32, shape (layout.num_parameters,)

    Raises
    ------
    LayoutError
        Values of another length.
    """

    def __init__(self, layout: Layout, values: Values) -> None:
        if tuple(values.shape) != (layout.num_parameters,):
            raise LayoutError(
                f"expected values of shape ({layout.num_parameters},), found {tuple(values.shape)}"
            )
        if is_torch(values) and on_host(values):
            values = values.detach().numpy()  # type: ignore[union-attr]
        if isinstance(values, np.ndarray):
            values = np.ascontiguousarray(values, dtype=np.float32)
        self.layout = layout
        self.values: Values = values

    @property
    def num_parameters(self) -> int:
        """d, the length of the vector."""
        return self.layout.num_parameters

    @classmethod
    def zeros(cls, layout: Layout) -> TaskVector:
        """The task vector of no change, on the CPU."""
        return cls(layout, np.zeros(layout.num_parameters, np.float32))

    @classmethod
    def from_dict(cls, state: State) -> TaskVector:
        """A state as one flat float32 vector, on the device of its tensors.

        Raises
        ------
        LayoutError
            A data type that adapters do not have.
        """
        layout = Layout.of(state)
        if any(not on_host(tensor) for tensor in state.values()):
            import torch

            parts = [torch.as_tensor(tensor).detach().reshape(-1) for tensor in state.values()]
            device = next(part.device for part in parts if part.device.type != "cpu")
            return cls(layout, torch.cat([part.to(device, torch.float32) for part in parts]))
        values = np.empty(layout.num_parameters, np.float32)
        for tensor, where in layout.slices():
            values[where] = _as_float32(state[tensor.name]).reshape(-1)
        return cls(layout, values)

    @classmethod
    def between(cls, initial: State, finetuned: State) -> TaskVector:
        """What fine-tuning changed: finetuned - initial, in float32, ordered as ``initial``.

        Raises
        ------
        LayoutError
            The states' names or shapes differ; the message names the tensor.

        Examples
        --------
        >>> tau = TaskVector.between({"w": np.zeros(3, "f4")}, {"w": np.array([1, 0, -2], "f4")})
        >>> tau.values
        array([ 1.,  0., -2.], dtype=float32)
        """
        start = cls.from_dict(initial)
        start.layout.check(finetuned)
        end = cls.from_dict({name: finetuned[name] for name in initial})
        return cls(start.layout, end.values - start.values)

    def apply(self, state: State) -> dict[str, Any]:
        """The state plus this vector: the same names, shapes, data types and kinds of tensor.

        The sum is formed in float32 (of a float64 tensor in float64), and then rounded to each
        tensor's own type.

        Raises
        ------
        LayoutError
            The state's names or shapes differ from the layout's.
        """
        self.layout.check(state)
        changed: dict[str, Any] = {}
        by_name = {tensor.name: where for tensor, where in self.layout.slices()}
        for name, tensor in state.items():
            part: Any = self.values[by_name[name]].reshape(tuple(tensor.shape))
            if is_torch(tensor):
                import torch

                part = torch.as_tensor(part).to(tensor.device)
                exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                changed[name] = (tensor.detach().to(exact) + part).to(tensor.dtype)  # type: ignore[union-attr]
            else:
                if is_torch(part):
                    part = part.cpu().numpy()
                start = tensor if tensor.dtype == np.float64 else _as_float32(tensor)
                changed[name] = (start + part).astype(tensor.dtype)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """The vector cut into its named tensors, as float32 views."""
        return {
            tensor.name: self.values[where].reshape(tensor.shape)
            for tensor, where in self.layout.slices()
        }

    def to_task_vector(self) -> TaskVector:
        """Itself: what a dense update decodes to."""
        return self

    def check_finite(self) -> None:
        """Raise NonFiniteError, with the tensor's name, where a value is NaN or Inf."""
        values: Any = self.values
        finite = values.isfinite().cpu().numpy() if is_torch(values) else np.isfinite(values)
        if not finite.all():
            index = int(np.argmin(finite))
            name = self.layout.tensor_at(index).name
            raise NonFiniteError(
                f"expected finite values, found {float(values[index])} in tensor {quoted(name)} "
                f"(parameter {index} of the vector)"
            )

    def __repr__(self) -> str:
        return f"TaskVector({self.layout!r})"


def _as_float32(tensor: Any) -> NDArray[np.float32]:
    """A tensor of the CPU as a float32 array."""
    if is_torch(tensor):
        tensor = tensor.detach().float().numpy()
    return np.asarray(tensor, dtype=np.float32)
