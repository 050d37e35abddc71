"""Task vectors of low rank, and some noise."""

from __future__ import annotations

import numpy as np

import compeft_fl as cf

SHAPES = {"a": (8, 90), "b": (90, 8), "bias": (40,), "conv": (6, 5, 4), "none": (0, 3), "s": ()}


def drawn(seed=0, shapes=SHAPES):
    """A task vector of low rank and some noise."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape)
        if len(shape) == 2 and 0 not in shape:
            noise = noise / 3 + np.outer(rng.standard_normal(shape[0]), rng.normal(size=shape[1]))
        state[name] = (noise * 1e-3).astype("f4")
    return cf.TaskVector.from_dict(state)
