"""The uplink: a client's updates, compressed with error feedback.

Source: Seide et al., "1-Bit SGD" (2014); Karimireddy et al., https://arxiv.org/abs/1901.09847.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.compeft import check_density, check_scale, compress
from compeft_fl.errors import LayoutError
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """Compress task vectors one after the other; what was not sent is added to the next.

    Parameters
    ----------
    density : float
        In (0, 1]: the share of parameters that is sent.
    scale : "norm", "mean" or float
        See `compeft_fl.compress`. "mean" is the least-squares choice, with which the residual
        shrinks most.
    residual : ndarray of float32, shape (d,), optional
        What earlier rounds have left; None: nothing.

    Attributes
    ----------
    residual : ndarray of float32, shape (d,), or None
        tau + residual - what was sent, after each `compress`.
    """

    def __init__(
        self,
        density: float = 0.1,
        scale: str | float = "mean",
        residual: NDArray[np.float32] | None = None,
    ) -> None:
        check_density(density)
        check_scale(scale)
        self.density, self.scale, self.residual = density, scale, residual

    def compress(self, tau: TaskVector) -> TernaryVector:
        """C(tau + residual), of which the residual is then what is left.

        Raises
        ------
        LayoutError
            A residual of another length than the task vector.
        NonFiniteError
            NaN or Inf; the residual stays as it was.

        Examples
        --------
        >>> feedback = ErrorFeedback(density=0.5)
        >>> feedback.compress(TaskVector.from_dict({"w": np.array([3, 1], "f4")})).num_nonzeros
        1
        >>> feedback.residual
        array([0., 1.], dtype=float32)
        """
        total = tau
        if self.residual is not None:
            if self.residual.shape != (tau.num_parameters,):
                raise LayoutError(
                    f"expected a residual of {tau.num_parameters} values, "
                    f"found {self.residual.shape}"
                )
            values: Any = tau.values
            if is_torch(values):
                import torch

                rest = torch.from_numpy(self.residual).to(values.device)
                total = TaskVector(tau.layout, values + rest)
            else:
                total = TaskVector(tau.layout, values + self.residual)
        sent = compress(total, self.density, self.scale)
        self.residual = _difference(total, sent)
        return sent


def _difference(total: TaskVector, sent: TernaryVector) -> NDArray[np.float32]:
    """What is left of ``total``, on the CPU."""
    values: Any = total.values
    if is_torch(values):
        rest: NDArray[np.float32] = (values - sent.to_task_vector().values).cpu().numpy()
        return rest
    from compeft_fl.kernels import cpu

    left: NDArray[np.float32] = values.copy()
    cpu.add_ternary(left, sent.positive, sent.negative, sent.scales, sent.bounds, -1.0)
    return left
