"""Dense values in float32, float16 or bfloat16: the baselines, and what a snapshot is sent in."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.base import Codec, Part, Update
from compeft_fl.errors import DTypeError, NonFiniteBodyError, ParameterError, StreamLengthError
from compeft_fl.task_vector import Layout, is_torch

__all__ = ["Dense", "DenseBFloat16", "DenseFloat16", "narrowed"]


class Dense(Codec):
    """float32: lossless."""

    name, field, ternary = "dense", "dense", False
    dtype: ClassVar[str] = "DTYPE_F32"

    def encode(self, update: Update, start: int, stop: int) -> Any:
        """See `Codec.encode`."""
        from compeft_fl.wire.v1 import update_pb2

        dense: Any = update.to_task_vector().values[start:stop]
        values: NDArray[np.float32] = dense.cpu().numpy() if is_torch(dense) else dense
        data = _to_bytes(self.dtype, values)
        if not np.isfinite(values).all():
            update.to_task_vector().check_finite()
        return update_pb2.Dense(dtype=self.dtype, values=data)

    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """See `Codec.decode`. Any data type is read, whichever codec wrote it."""
        from compeft_fl.wire.v1 import update_pb2

        if body.dtype not in update_pb2.DType.values() or body.dtype == 0:
            raise DTypeError(f"expected a data type 1, 2 or 3 in dense, found {body.dtype}")
        dtype = update_pb2.DType.Name(body.dtype)
        expected = (stop - start) * _SIZES[dtype]
        if len(body.values) != expected:
            raise StreamLengthError(
                f"expected {expected} bytes of {dtype} values for {stop - start} parameters, "
                f"found {len(body.values)}"
            )
        values = _from_bytes(dtype, body.values)
        finite = np.isfinite(values)
        if not finite.all():
            index = start + int(np.argmin(finite))
            name = layout.tensor_at(index).name
            raise NonFiniteBodyError(
                f"expected finite values, found {values[index - start]} in tensor {name!r} "
                f"(parameter {index})"
            )
        if device is not None:
            import torch

            return Part(start, stop, values=torch.from_numpy(values).to(device))  # type: ignore[arg-type]
        return Part(start, stop, values=values)

    def max_body_bytes(self, num_parameters: int) -> int:
        """See `Codec.max_body_bytes`."""
        return num_parameters * _SIZES[self.dtype] + 64


class DenseFloat16(Dense):
    """float16: half the size; values beyond 65504 are an error."""

    name = "dense-fp16"
    dtype = "DTYPE_F16"


class DenseBFloat16(Dense):
    """bfloat16: half the size, float32's range."""

    name = "dense-bf16"
    dtype = "DTYPE_BF16"


_SIZES = {"DTYPE_F32": 4, "DTYPE_F16": 2, "DTYPE_BF16": 2}


def narrowed(dtype: str, values: NDArray[np.float32]) -> bytes:
    """Little-endian values of type ``F32``, ``F16`` or ``BF16``, rounded to nearest even.

    Raises
    ------
    ParameterError
        A magnitude that the type does not hold, or that no type does.
    """
    if not np.isfinite(values).all():
        raise ParameterError("expected finite values, found others")
    return _to_bytes(f"DTYPE_{dtype}", values)


def _to_bytes(dtype: str, values: NDArray[np.float32]) -> bytes:
    """Little-endian values, rounded to nearest even."""
    if dtype == "DTYPE_F32":
        return values.astype("<f4", copy=False).tobytes()
    if dtype == "DTYPE_F16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all() and np.isfinite(values).all():
            raise ParameterError(
                f"expected magnitudes that float16 holds (<= 65504), found {np.abs(values).max()}"
            )
        return half.tobytes()
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    if (rounded & np.uint64(0x7FFF)).max(initial=0) >= 0x7F80 and np.isfinite(values).all():
        raise ParameterError(
            f"expected magnitudes that bfloat16 holds, found {np.abs(values).max()}"
        )
    return rounded.astype("<u2").tobytes()


def _from_bytes(dtype: str, data: bytes) -> NDArray[np.float32]:
    """The values as float32, which holds all three types exactly."""
    if dtype == "DTYPE_F32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if dtype == "DTYPE_F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
