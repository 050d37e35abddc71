"""The uplink: a client's updates, compressed with error feedback.

Source: Seide et al., "1-Bit SGD" (2014); Karimireddy et al., https://arxiv.org/abs/1901.09847.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.disk.arrays import release
from compeft_fl.errors import LayoutError, ParameterError
from compeft_fl.factored import FactoredVector
from compeft_fl.reduction.quality import Quality
from compeft_fl.reduction.rates import on_host_memory
from compeft_fl.reduction.rules import ENERGY, Reduction, quality_of
from compeft_fl.task_vector import TaskVector, is_torch
from compeft_fl.ternary import TernaryVector

__all__ = ["AT_RISK", "RESIDUAL_DECAY", "ErrorFeedback", "check_decay", "within"]

RESIDUAL_DECAY = 0.9
_PIECE = 1 << 20  # values at a time
AT_RISK = 10.0  # a residual so many times an update: it is not being sent, it piles up


def check_decay(decay: float) -> None:
    """Raise ParameterError unless 0 <= decay <= 1."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ParameterError(f"expected a residual decay in [0, 1], found {decay!r}")


class ErrorFeedback:
    """Compress task vectors one after the other; what was not sent is added to the next.

    Parameters
    ----------
    density : float or "auto"
        In (0, 1]: the greatest share of parameters that is sent. "auto": what keeps ``energy``.
    scale : "norm", "mean" or float
        See `compeft_fl.compress`. "mean" is the least-squares choice, with which the residual
        shrinks most.
    residual : ndarray of float32, shape (d,), optional
        What earlier rounds have left; None: nothing.
    support : "best" or "fixed"
        See `compeft_fl.compress`.
    decay : float
        In [0, 1]: the part of the residual that is added to the next task vector. 1: all of it.
    factored, energy
        See `compeft_fl.reduction.Reduction`.

    Attributes
    ----------
    residual : ndarray of float32, shape (d,), or None
        tau + decay * residual - what was sent, after each `compress`.
    pressure : float
        ||residual|| / ||tau||, after each `compress`: how much waits, in updates. It settles at a
        few units where the method works. Where it grows from round to round, more comes in than
        goes out, the run is at risk, and a higher density, a lower decay, or a smaller local
        learning rate is asked for; `AT_RISK` is where the logs begin to warn.
    quality : Quality or None
        Of what was sent, against tau + decay * residual, after each `compress`.

    Notes
    -----
    Why the decay is 0.9 by default: a residual is older than the adapter that it is added to. With
    a decay of 1, what one coordinate was owed long ago is sent in full when its turn comes, past
    the target that all clients share; on heavy-tailed targets that ends far off, or never ends.
    With 0.9 a residual counts for about ten rounds, time enough for a tenth of the parameters to
    have their turn, and what it holds is at most ten updates. With ternary updates the
    default federation ends at a loss 0.01 above the first version's, which had a decay of 1.
    Figures: ``simulations/results/``, support.md and learning_today.md.
    """

    def __init__(
        self,
        density: float | str = 0.1,
        scale: str | float = "mean",
        residual: NDArray[np.float32] | None = None,
        *,
        support: str = "best",
        decay: float = RESIDUAL_DECAY,
        factored: bool = False,
        energy: float = ENERGY,
    ) -> None:
        check_decay(decay)
        self.reduction = Reduction(density, scale, support, factored, energy)
        self.residual, self.decay = residual, decay
        self.pressure = 0.0
        self.quality: Quality | None = None

    @classmethod
    def of(
        cls, reduction: Reduction, residual: NDArray[np.float32] | None, decay: float
    ) -> ErrorFeedback:
        """The same with what is sent as a `Reduction` says."""
        made = cls(residual=residual, decay=decay)
        made.reduction = reduction
        return made

    def compress(
        self, tau: TaskVector, bound: float = math.inf, *, consume: bool = False
    ) -> TernaryVector | TaskVector:
        """C(tau + decay * residual), of which the residual is then what is left.

        Parameters
        ----------
        tau : TaskVector
        bound : float
            The greatest norm of what is sent, for differential privacy: the scale is lowered to
            it, after the residual was added.
        consume : bool
            The memory of ``tau`` is free to use, and becomes the residual's: its values are others
            afterwards. For numpy's alone.

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
        total, length = tau, _norm(tau.values)
        if self.residual is not None:
            if self.residual.shape != (tau.num_parameters,):
                raise LayoutError(
                    f"expected a residual of {tau.num_parameters} values, "
                    f"found {self.residual.shape}"
                )
            values: Any = tau.values
            rest: Any = self.residual
            if is_torch(values):
                import torch

                rest = torch.from_numpy(self.residual).to(values.device)
                total = TaskVector(tau.layout, values + float(self.decay) * rest)
            else:
                into = values if consume else np.empty_like(values)
                total = TaskVector(tau.layout, _sum(values, rest, self.decay, into))
        sent = within(self.reduction(total), bound)
        self.quality = quality_of(total, sent)
        self.residual = _difference(total, sent, own=consume or total is not tau)
        self.pressure = _norm(self.residual) / length if length else 0.0
        return sent


def within(update: TernaryVector | TaskVector, bound: float) -> TernaryVector | TaskVector:
    """The update with its scale lowered, where its norm is over a bound.

    That of low-rank signs is lowered to a power of two of what it was.

    Raises
    ------
    ParameterError
        A bound on what has no scale.
    """
    if math.isinf(bound):
        return update
    if isinstance(update, FactoredVector):
        while (norm := _norm(update.values)) > bound:
            update = update.halved(max(1, math.floor(math.log2(norm / bound))) if bound else 150)
        return update
    if not isinstance(update, TernaryVector):
        raise ParameterError("expected no bound on the norm of an update in bits a parameter")
    number = update.num_nonzeros
    if not number or float(update.scales[0]) * math.sqrt(number) <= bound:
        return update
    scale = np.float32(bound / math.sqrt(number))
    if float(scale) * math.sqrt(number) > bound:
        scale = np.nextafter(scale, np.float32(0))
    return update.with_scales(scale)


def _norm(values: Any) -> float:
    """The Euclidean norm, on the device of the values."""
    if is_torch(values):
        from compeft_fl.kernels import torch_ops as kernels
    else:
        from compeft_fl.kernels import cpu as kernels  # type: ignore[no-redef]
    return math.sqrt(kernels.sum_squares(values))


def _sum(
    values: NDArray[np.float32], rest: NDArray[np.float32], decay: float, into: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Values + decay * rest, piece by piece, so that nothing of their size is made beside it."""
    for start in range(0, values.size, _PIECE):
        piece = slice(start, start + _PIECE)
        np.add(values[piece], float(decay) * rest[piece], out=into[piece])
        release(rest)
    return into


def _difference(
    total: TaskVector, sent: TernaryVector | TaskVector, *, own: bool = False
) -> NDArray[np.float32]:
    """What is left of ``total``, on the CPU; in its own memory where that is free to use."""
    values: Any = total.values
    if not isinstance(sent, TernaryVector | FactoredVector):  # made on the CPU
        held: Any = on_host_memory(total).values
        less: NDArray[np.float32] = held - sent.values
        return less
    if is_torch(values):
        rest: NDArray[np.float32] = (values - sent.to_task_vector().values).cpu().numpy()
        return rest
    from compeft_fl.kernels import cpu

    left: NDArray[np.float32] = values if own else values.copy()
    if isinstance(sent, FactoredVector):
        for where, piece in sent.pieces():
            left[where] -= piece
        return left
    cpu.add_ternary(left, sent.positive, sent.negative, sent.scales, sent.bounds, -1.0)
    return left
