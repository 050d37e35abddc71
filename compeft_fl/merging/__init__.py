"""Merge rules as streaming accumulators, the majority of signs, and accumulators as bytes."""

from __future__ import annotations

from compeft_fl.merging.accumulators import Accumulator, Average, TaskArithmetic, Ties, merge

__all__ = ["Accumulator", "Average", "TaskArithmetic", "Ties", "merge"]
