"""What is done with each tensor of an adapter or of a whole model: trained, carried or left.

- *trained*: floats of training. They make up the task vector, and are compressed.
- *carried*: all else that must come along: statistics (BatchNorm's running mean and variance),
  counters, indices, masks. They go as they are, bit for bit, and are averaged densely.
- *left*: personal tensors. Nodes get them as the server has them, and send nothing back.

Names and data types decide; a person's rules come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.errors import LayoutError, ParameterError

if TYPE_CHECKING:
    from compeft_fl.task_vector import State

__all__ = ["CARRIED", "LEFT", "TRAINED", "TensorPolicy", "is_statistic", "is_variance"]

TRAINED: Final = "trained"
CARRIED: Final = "carried"
LEFT: Final = "left"

_KINDS: Final = (TRAINED, CARRIED, LEFT)
_TRAINING: Final = ("float32", "float16", "bfloat16")
_WIDE: Final = "float64"
_EXACT: Final = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
)  # fmt: skip
_STATISTIC_PREFIXES: Final = ("running_", "moving_")  # torch's, and those of Keras
_STATISTICS: Final = ("num_batches_tracked",)
_STATISTICS_FOLDER: Final = "batch_stats"  # flax's


class TensorPolicy:
    """Says of each tensor what is done with it.

    Without a rule: float32, float16 and bfloat16 are trained, but for statistics by name
    (``running_*``, ``moving_*``, ``num_batches_tracked``, all under ``batch_stats``), which are
    carried; integers and Booleans are carried. float64 is carried where it stands beside tensors
    that are trained, and trained where it is all there is to train (scikit-learn's models): its
    task vector is then float32, and is added in float64.

    Parameters
    ----------
    rules : mapping of str to {"trained", "carried", "left"}, optional
        Patterns of names, as a shell has them (``*``, ``?``, ``[abc]``); the first that matches
        holds.

    Raises
    ------
    ParameterError
        Rules that are none.

    Examples
    --------
    >>> import numpy as np
    >>> policy = TensorPolicy({"head.*": "left"})
    >>> policy.kinds({"w": np.zeros(2, "f4"), "head.b": np.zeros(2, "f4"), "n": np.array(3)})
    {'w': 'trained', 'head.b': 'left', 'n': 'carried'}
    """

    def __init__(self, rules: Mapping[str, str] | None = None) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise ParameterError(
                f"expected rules as a mapping from patterns to kinds, found {type(rules).__name__}"
            )
        self.rules: dict[str, str] = dict(rules or {})
        for pattern, kind in self.rules.items():
            if not isinstance(pattern, str) or kind not in _KINDS:
                raise ParameterError(
                    f"expected patterns to {', '.join(_KINDS)}; found {pattern!r}: {kind!r}"
                )

    @classmethod
    def of(cls, given: TensorPolicy | Mapping[str, str] | None) -> TensorPolicy:
        """A policy, from what a person may give for one."""
        return given if isinstance(given, TensorPolicy) else cls(given)

    def rule(self, name: str) -> str | None:
        """What the rules say of a name; None: nothing."""
        for pattern, kind in self.rules.items():
            if fnmatchcase(name, pattern):
                return kind
        return None

    def kinds(self, state: State) -> dict[str, str]:
        """Each tensor's kind, in the state's order.

        Raises
        ------
        LayoutError
            A rule trains what is no float, or a tensor is of a data type that cannot be sent; the
            message names it.
        """
        unnamed = _unnamed_statistics(state)
        found: dict[str, str | None] = {}
        for name, tensor in state.items():
            dtype = _dtype(tensor)
            if dtype not in (*_TRAINING, _WIDE, *_EXACT):
                raise LayoutError(
                    f"expected floats of up to 64 bits, integers or Booleans, found {dtype} in "
                    f"tensor {name!r}"
                )
            kind = self.rule(name)
            if kind is None and (dtype in _EXACT or name in unnamed or is_statistic(name)):
                kind = CARRIED
            if kind == TRAINED and dtype in _EXACT:
                raise LayoutError(f"expected floats to train, found {dtype} in tensor {name!r}")
            if kind is None and dtype in _TRAINING:
                kind = TRAINED
            found[name] = kind
        narrow = any(
            kind == TRAINED and _dtype(state[name]) != _WIDE for name, kind in found.items()
        )
        wide = CARRIED if narrow else TRAINED
        return {name: wide if kind is None else kind for name, kind in found.items()}

    def __repr__(self) -> str:
        return f"TensorPolicy({self.rules})"


def is_statistic(name: str) -> bool:
    """Is this the name of something that is counted or measured during training, not trained?"""
    *folders, last = name.replace("/", ".").split(".")
    return (
        last.startswith(_STATISTIC_PREFIXES) or last in _STATISTICS or _STATISTICS_FOLDER in folders
    )


def is_variance(name: str) -> bool:
    """Is this the name of a measured variance, which is not negative?"""
    return is_statistic(name) and name.rpartition(".")[2].endswith(("var", "variance"))


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def _unnamed_statistics(state: State) -> set[str]:
    """BatchNorm's mean and variance in a state without names, ``ArrayRecord(list of arrays)``.

    Its counter, an integer scalar, comes right after them, two vectors of one length.
    """
    if any(name != str(index) for index, name in enumerate(state)):
        return set()
    tensors: list[Any] = list(state.values())
    found = set()
    for index in range(2, len(tensors)):
        mean, variance, counter = tensors[index - 2 : index + 1]
        if (
            tuple(counter.shape) == ()
            and _dtype(counter) == "int64"
            and len(mean.shape) == 1
            and tuple(mean.shape) == tuple(variance.shape)
            and {_dtype(mean), _dtype(variance)} <= {*_TRAINING, _WIDE}
        ):
            found |= {str(index - 2), str(index - 1)}
    return found
