"""Low-rank signs on other devices: `cpu_factored` on torch tensors, with the same results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compeft_fl.kernels.cpu_factored import _BITS, _SWEEPS, Term, finished, quantised

__all__ = ["add_terms", "find_term", "subtract", "to_integers"]


def to_integers(values: Tensor, lowest: int) -> tuple[Tensor, int]:
    """See `cpu_factored.to_integers`."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    exponent = max(math.frexp(largest)[1] - _BITS, lowest) if largest else lowest
    # In two factors: a power of two can be beyond float64 where what it makes is not.
    scaled = values.double() * 2.0 ** (-exponent // 2) * 2.0 ** (-exponent - -exponent // 2)
    return scaled.round().float(), exponent


def find_term(left: Tensor) -> Term | None:
    """See `cpu_factored.find_term`."""
    exact = left.double()
    squares = (exact * exact).sum(dim=1).cpu().numpy()
    row = int(squares.argmax())
    if not squares[row]:
        return None
    negative = exact[row] < 0
    length = exact.shape[1]
    for _ in range(_SWEEPS):
        products = _products(exact, negative)
        factors, exponent = quantised(products / length)
        weights = torch.from_numpy(factors.astype(np.float64)).to(left.device)
        better = weights @ exact < 0
        if torch.equal(better, negative):
            break
        negative = better
    else:
        products = _products(exact, negative)
    return finished(products, factors, exponent, negative.cpu().numpy(), length)


def _products(exact: Tensor, negative: Tensor) -> NDArray[np.float64]:
    signs = torch.where(negative, -1.0, 1.0).double()
    products: NDArray[np.float64] = (exact @ signs).cpu().numpy()
    return products


def subtract(left: Tensor, term: Term) -> None:
    """See `cpu_factored.subtract`."""
    factors, exponent, negative, _ = term
    steps = np.ldexp(factors.astype(np.float32), exponent)
    signs = np.where(negative, np.float32(-1), np.float32(1))
    add_terms(left, -steps[None], (signs < 0)[None], by_line=False)


def add_terms(out: Tensor, steps: Any, negative: NDArray[np.bool_], by_line: bool) -> None:
    """See `cpu_factored.add_terms`."""
    for factors, minus in zip(steps, negative, strict=True):
        step = torch.from_numpy(np.ascontiguousarray(factors)).to(out.device)
        signs = torch.where(torch.from_numpy(minus).to(out.device), -1.0, 1.0).float()
        out += signs[:, None] * step if by_line else step[:, None] * signs
