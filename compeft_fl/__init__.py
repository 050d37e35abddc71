"""compeft-fl: ComPEFT-compressed federated updates of PEFT adapters, over Flower.

>>> import numpy as np
>>> import compeft_fl as cf
>>> tau = cf.TaskVector.from_dict({"w": np.array([3, -1, 0.5, -5], "f4")})
>>> blob = cf.encode(cf.compress(tau, density=0.5))
>>> cf.decode(blob).to_task_vector().values
array([ 4.198214,  0.      ,  0.      , -4.198214], dtype=float32)

The library is imported light: torch, transformers and peft are loaded only where they are used.
"""

from __future__ import annotations

from pathlib import Path as _Path

# `strategies` here is a symbolic link to the folder beside this package. Flower leaves links out of
# an app's bundle: there the folder itself is found.
if not (_Path(__file__).parent / "strategies").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from compeft_fl import codecs, errors
from compeft_fl.compeft import compress
from compeft_fl.merging.accumulators import Average, TaskArithmetic, Ties, merge
from compeft_fl.task_vector import Layout, TaskVector, TensorSpec
from compeft_fl.ternary import TernaryVector
from compeft_fl.wire.messages import decode, encode

__all__ = [
    "Average",
    "Layout",
    "TaskArithmetic",
    "TaskVector",
    "TensorSpec",
    "TernaryVector",
    "Ties",
    "codecs",
    "compress",
    "decode",
    "encode",
    "errors",
    "merge",
]

__version__ = "0.1.0"
