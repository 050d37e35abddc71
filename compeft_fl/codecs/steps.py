"""Steps: whole multiples of one power of two, arithmetically coded with contexts.

What a vector on a grid has moved between two of its versions is such a vector of small integers
(`compeft_fl.exchange.downlink`): it costs what the change is worth, and not how many versions it
took. Lossless, or refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.base import Codec, Part, Update
from compeft_fl.codecs.context import matrices
from compeft_fl.errors import (
    CodeEndError,
    NonzeroCountError,
    ParameterError,
    StepRangeError,
    StreamLengthError,
)
from compeft_fl.task_vector import Layout, is_torch

LOWEST, HIGHEST = -149, 104  # exponents with which float32 holds every integer below 2^24


class Steps(Codec):
    """Below the entropy of independent integers, at tens of millions of parameters a second."""

    name, field, ternary = "steps", "steps", False

    def encode(self, update: Update, start: int, stop: int) -> Any:
        """See `Codec.encode`.

        Raises
        ------
        ParameterError
            Values that are no multiples below 2^24 of one power of two, or so far apart that the
            code would be larger than they are.
        """
        from compeft_fl.kernels import cpu_steps
        from compeft_fl.wire.v1 import update_pb2

        dense: Any = update.to_task_vector().values[start:stop]
        values: NDArray[np.float32] = dense.cpu().numpy() if is_torch(dense) else dense
        exponent = cpu_steps.common_exponent(values)
        if exponent is None:
            update.to_task_vector().check_finite()
            raise ParameterError(
                "expected multiples below 2^24 of one power of two for codec 'steps', "
                "found values that are none"
            )
        exponent = min(exponent, HIGHEST)  # of powers of two beyond 2^104
        values, count = np.ascontiguousarray(values), int(np.count_nonzero(values))
        code = cpu_steps.write_code(values, exponent, matrices(update.layout, start, stop), count)
        if code is None:
            raise ParameterError("expected integers of fewer than 32 bits in the mean, found more")
        return update_pb2.Steps(exponent=exponent, num_nonzeros=count, code=code)

    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """See `Codec.decode`. The values are made on the CPU, and copied to another device."""
        from compeft_fl.kernels import cpu_steps

        count, size = body.num_nonzeros, stop - start
        if not LOWEST <= body.exponent <= HIGHEST:
            raise StepRangeError(
                f"expected an exponent in {LOWEST} .. {HIGHEST}, found {body.exponent}"
            )
        if count > size:
            raise NonzeroCountError(f"expected at most {size} nonzeros, found {count}")
        if body.code.endswith(b"\0"):
            raise CodeEndError("expected a code whose last byte is not 0, found one that ends on 0")
        tensors = matrices(layout, start, stop)
        values, length, found, largest, end = cpu_steps.read_code(
            body.code, body.exponent, tensors, count
        )
        if len(body.code) > length:
            raise StreamLengthError(
                f"expected at most {length} bytes of code for {size} parameters, "
                f"found {len(body.code)}"
            )
        if found < count:
            raise NonzeroCountError(f"expected {count} nonzeros in code, found {found}")
        if end >= cpu_steps.CODE_END:
            raise CodeEndError(
                "expected the code to end on the first multiple of 2^24 in its range, found "
                f"{end} above the range's low end"
            )
        if largest > cpu_steps.MAX_MAGNITUDE:
            raise StepRangeError(
                f"expected integers of at most {cpu_steps.MAX_MAGNITUDE}, found {largest}"
            )
        if device is not None:
            import torch

            return Part(start, stop, values=torch.from_numpy(values).to(device))  # type: ignore[arg-type]
        return Part(start, stop, values=values)

    def max_body_bytes(self, num_parameters: int) -> int:
        """See `Codec.max_body_bytes`: a longer code is not written."""
        return 4 * num_parameters + 64
