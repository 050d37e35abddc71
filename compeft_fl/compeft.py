"""ComPEFT's Algorithm 1: keep the top-k magnitudes, their signs, and one scale.

Source: Yadav et al., "ComPEFT", https://arxiv.org/abs/2311.13171, section 3. The scale rule "mean"
is STC's (Sattler et al., https://arxiv.org/abs/1903.02891); "norm" keeps the vector's length.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from compeft_fl.errors import ParameterError
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

__all__ = [
    "SCALE_RULES",
    "SUPPORTS",
    "check_density",
    "check_scale",
    "check_support",
    "compress",
    "keep_top_k",
]

SCALE_RULES = ("norm", "mean")
SUPPORTS = ("fixed", "best")


def compress(
    tau: TaskVector,
    density: float = 0.05,
    scale: str | float = "norm",
    support: str = "fixed",
) -> TernaryVector:
    """Compress a task vector to a sparse ternary one (Algorithm 1).

    Parameters
    ----------
    tau : TaskVector, d parameters
    density : float
        In (0, 1]. The k = max(1, int(density * d)) largest magnitudes over all tensors are kept; of
        equal ones the lower index; a zero never is.
    scale : "norm", "mean" or float
        The magnitude of what is kept. A number alpha: alpha * sigma(tau), the standard deviation
        over all d entries (section 3.2, step 3). "norm": ||tau|| / sqrt(k), which needs no tuning.
        "mean": the mean magnitude of the kept. (A scale that is validated on data:
        `compeft_fl.tuning.tune`.)
    support : "fixed" or "best"
        "fixed": exactly those k, as the paper has it. "best": the density is a bound and not a
        quota; of the largest k' <= k those that keep most energy, (sum of their magnitudes)^2 / k',
        which is the greatest cosine to ``tau`` that signs and one scale can have. Where few entries
        are large and the rest is noise, "fixed" sends the noise at full scale. One vector on its
        own is compressed as the paper says by default; a federation, whose errors come back with
        each round, takes "best".

    Returns
    -------
    TernaryVector
        On the device of ``tau``.

    Raises
    ------
    ParameterError
        A density or a scale out of its range, or an unknown support.
    NonFiniteError
        NaN or Inf in ``tau``; the message names the tensor.

    Examples
    --------
    >>> tau = TaskVector.from_dict({"w": np.array([3, -1, 0.5, -5], "f4")})
    >>> compress(tau, density=0.5, scale="mean").to_task_vector().values
    array([ 4.,  0.,  0., -4.], dtype=float32)
    >>> tau = TaskVector.from_dict({"w": np.array([3, 1e-8, 0, -5], "f4")})
    >>> compress(tau, density=0.75, scale="mean", support="best").to_task_vector().values
    array([ 4.,  0.,  0., -4.], dtype=float32)
    """
    check_scale(scale)
    kept = keep_top_k(tau, density, support)
    return kept.with_scales(scale_of(tau, kept, scale))


def check_density(density: float) -> None:
    """Raise ParameterError unless 0 < density <= 1."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ParameterError(f"expected a density in (0, 1], found {density!r}")


def check_scale(scale: str | float) -> None:
    """Raise ParameterError unless ``scale`` is a rule's name or a number > 0."""
    if scale == "validated":
        raise ParameterError('scale "validated" needs a metric: use compeft_fl.tuning.tune')
    if isinstance(scale, str):
        if scale not in SCALE_RULES:
            raise ParameterError(f'expected scale "norm", "mean" or a number, found {scale!r}')
    elif isinstance(scale, bool) or not (scale > 0 and math.isfinite(scale)):
        raise ParameterError(f"expected a finite scale > 0, found {scale!r}")


def check_support(support: str) -> None:
    """Raise ParameterError unless ``support`` is "fixed" or "best"."""
    if support not in SUPPORTS:
        raise ParameterError(f'expected support "fixed" or "best", found {support!r}')


def keep_top_k(tau: TaskVector, density: float, support: str = "fixed") -> TernaryVector:
    """Steps 1 and 2 of Algorithm 1: the signs of the largest magnitudes, with scale 1.

    Raises
    ------
    ParameterError, NonFiniteError
        As `compress`.
    """
    check_density(density)
    check_support(support)
    if tau.num_parameters == 0:
        raise ParameterError("expected a task vector with parameters, found none")
    k = max(1, int(density * tau.num_parameters))
    selection = _selection(tau)
    select = selection.select_best if support == "best" else selection.select_top_k
    masks = select(tau.values, k)
    if masks is None:
        tau.check_finite()
        raise AssertionError("the kernel found a value that is not finite; check_finite did not")
    return TernaryVector(tau.layout, masks[0], masks[1], 1.0)


def scale_of(tau: TaskVector, kept: TernaryVector, scale: str | float) -> float:
    """Step 3 of Algorithm 1: the one magnitude of what is kept."""
    kernels, num_kept = _kernels(tau), kept.num_nonzeros
    if num_kept == 0:
        return 0.0
    if scale == "norm":
        value = math.sqrt(kernels.sum_squares(tau.values) / num_kept)
    elif scale == "mean":
        value = kernels.sum_kept(tau.values, *kept.masks) / num_kept
    else:
        value = float(scale) * standard_deviation(tau)
    if value > float(np.finfo(np.float32).max):
        raise ParameterError(f"expected a scale that float32 holds, found {value}")
    return value


def standard_deviation(tau: TaskVector) -> float:
    """sigma(tau) over all d entries, with Bessel's correction, in float64.

    Raises
    ------
    ParameterError
        Fewer than two parameters.
    """
    d, kernels = tau.num_parameters, _kernels(tau)
    if d < 2:
        raise ParameterError(f"expected at least 2 parameters for a standard deviation, found {d}")
    mean = kernels.sum_values(tau.values) / d
    return math.sqrt(max(0.0, (kernels.sum_squares(tau.values) - d * mean * mean) / (d - 1)))


def _kernels(tau: TaskVector) -> Any:
    """The kernels for the device that the vector lives on."""
    module: ModuleType
    if is_torch(tau.values):
        from compeft_fl.kernels import torch_ops as module
    else:
        from compeft_fl.kernels import cpu as module
    return module


def _selection(tau: TaskVector) -> Any:
    """The kernels that find the largest magnitudes, likewise."""
    module: ModuleType
    if is_torch(tau.values):
        from compeft_fl.kernels import torch_ops as module
    else:
        from compeft_fl.kernels import cpu_select as module
    return module
