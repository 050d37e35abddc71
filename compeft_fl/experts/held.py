"""Experts as a pool holds them in memory: as Golomb-Rice streams, as bit masks, or dense.

Streams take what the bytes of a file take, a third of a bit a parameter at density 0.05; masks take
two bits, whatever the density, and are what merges are computed from. Both are written into a model
nonzero by nonzero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters import StoredUpdate
from compeft_fl.adapters.live import Kind, Ternary
from compeft_fl.codecs.base import Update
from compeft_fl.errors import ParameterError
from compeft_fl.merging.accumulators import TIE_RULES
from compeft_fl.task_vector import TaskVector
from compeft_fl.ternary import TernaryVector, num_words

__all__ = ["RULES", "Held", "Recipe"]

RULES: Final = ("average", "task-arithmetic", "ties", "lorahub")
OVERHEAD: Final = 2048
"""Bytes of an expert beside its arrays: Python's objects, as tracemalloc counts them, and more."""

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Recipe:
    """A merged expert: whose it is and how, computed each time from its members' compressed form.

    Attributes
    ----------
    members : tuple of (str, float)
        Names in the pool, or references in the store, with their weights. A weight below 0 takes
        the opposite of a member's change.
    method : {"average", "task-arithmetic", "ties", "lorahub"}
        As `compeft_fl.adapters.merge.MergeRule` has them.
    scaling : float, optional
        lambda of ties and task-arithmetic; default 1.
    tie : str, optional
        Of ties: see `compeft_fl.Ties`.

    Raises
    ------
    ParameterError
        No members, an unknown method, or a setting that it does not have.
    """

    members: tuple[tuple[str, float], ...]
    method: str = "average"
    scaling: float | None = None
    tie: str | None = None

    def __post_init__(self) -> None:
        if self.method not in RULES:
            raise ParameterError(
                f"expected a method among {', '.join(RULES)}; found {self.method!r}"
            )
        if self.tie is not None and (self.method != "ties" or self.tie not in TIE_RULES):
            raise ParameterError(
                f"expected a tie among {', '.join(TIE_RULES)}, of ties; found {self.tie!r} of "
                f"{self.method}"
            )
        if self.scaling is not None and self.method in ("average", "lorahub"):
            raise ParameterError(f"expected no scaling of {self.method}, found {self.scaling}")
        if not self.members:
            raise ParameterError("expected members to merge, found none")
        for name, weight in self.members:
            if not np.isfinite(weight):
                raise ParameterError(f"expected a finite weight of {name!r}, found {weight}")

    @classmethod
    def of(cls, members: Mapping[str, float], method: str = "average", **settings: Any) -> Recipe:
        """From a mapping of names to weights."""
        return cls(tuple((name, float(w)) for name, w in members.items()), method, **settings)

    def to_json(self) -> dict[str, Any]:
        """What is kept beside a merged expert: everything that makes it again."""
        found = dataclasses.asdict(self)
        found["members"] = [{"expert": name, "weight": weight} for name, weight in self.members]
        return {key: value for key, value in found.items() if value is not None}


class Held:
    """One expert in memory.

    Parameters
    ----------
    stored : StoredUpdate
    kind : Kind
    config : dict
        The adapter's configuration; one object for all that share it.
    """

    __slots__ = ("_dense", "_masks", "_scales", "_streams", "carried", "config", "kind")

    def __init__(self, stored: StoredUpdate, kind: Kind, config: dict[str, Any]) -> None:
        from compeft_fl.kernels.cpu_write import PackedStreams

        self.kind, self.config, self.carried = kind, config, stored.carried
        self._streams: PackedStreams | None = None
        self._masks: tuple[Words, Words] | None = None
        self._dense: NDArray[Any] | None = None
        update = stored.update
        if isinstance(update, TernaryVector):
            self._masks = update.positive, update.negative
            self._scales = update.scales
        else:
            self._dense = np.asarray(update.to_task_vector().values, np.float32)
            self._scales = np.zeros(0, np.float32)

    @property
    def is_dense(self) -> bool:
        """Does it have a value for each parameter?"""
        return self._dense is not None

    @property
    def form(self) -> str:
        """``"streams"``, ``"masks"`` or ``"dense"``."""
        if self._masks is not None:
            return "masks"
        return "dense" if self.is_dense else "streams"

    @property
    def nbytes(self) -> int:
        """The memory that it takes, without what it shares with others."""
        size = OVERHEAD + self._scales.nbytes
        size += sum(int(tensor.nbytes) for tensor in self.carried.values())
        if self._masks is not None:
            size += sum(mask.nbytes for mask in self._masks)
        if self._streams is not None:
            size += self._streams.nbytes
        return size + (self._dense.nbytes if self._dense is not None else 0)

    @property
    def masks_bytes(self) -> int:
        """The memory of its masks, whether it has them now or not."""
        return 0 if self.is_dense else 16 * num_words(self.kind.layout.num_parameters)

    def pack(self) -> bool:
        """From masks to streams, and from float32 to float16, where that is smaller and the same.

        Returns
        -------
        bool
            Whether anything has changed.
        """
        from compeft_fl.kernels import cpu_golomb
        from compeft_fl.kernels.cpu_write import PackedStreams

        if self._dense is not None and self._dense.dtype == np.float32:
            with np.errstate(over="ignore"):
                half = self._dense.astype(np.float16)
            if np.array_equal(half, self._dense):  # what is on a grid of 11 bits
                self._dense = half
                return True
        if self._masks is None:
            return False
        if self._streams is None:
            plan = cpu_golomb.plan_blocks(*self._masks, self.kind.layout.num_parameters)
            if plan.total_bytes >= self.masks_bytes:
                return False
            self._streams = PackedStreams.of(cpu_golomb.write_streams(*self._masks, plan))
        self._masks = None
        return True

    def unpack(self) -> None:
        """Keep the masks, from now on."""
        if not self.is_dense:
            self._masks = self._read_masks()

    def _read_masks(self) -> tuple[Words, Words]:
        from compeft_fl.kernels import cpu_golomb

        if self._masks is not None:
            return self._masks
        packed = self._streams
        assert packed is not None
        positive, negative, overrun = cpu_golomb.read_words(
            self.kind.layout.num_parameters, packed.level, packed.nonzeros.astype(np.int64),
            packed.rice, packed.quotients, packed.remainders, packed.signs,
        )  # fmt: skip
        assert overrun < 0  # these streams are our own
        return positive, negative

    def update(self) -> Update:
        """The expert's update; masks or values are the expert's own."""
        if self._dense is not None:
            return TaskVector(self.kind.layout, self._dense.astype(np.float32, copy=False))
        return TernaryVector(self.kind.layout, *self._read_masks(), self._scales)

    def ternary(self) -> Ternary:
        """What writes a ternary expert into a model."""
        from compeft_fl.kernels import cpu_write

        streams = self._streams

        def into(target: cpu_write.Target) -> None:
            if streams is not None:
                cpu_write.write_streams(streams, target)
            else:
                cpu_write.write_masks(*self._read_masks(), target)

        # A copy: what is broadcast is read-only, and torch warns of that.
        scales = np.array(np.broadcast_to(self._scales, len(self.kind.layout.tensors)), np.float32)
        return Ternary(scales, into, self._read_masks)

    def stored(self) -> StoredUpdate:
        """The expert as if it had been read from a file."""
        codec = "dense" if self.is_dense else "golomb"
        return StoredUpdate(self.update(), self.config, self.kind.start, codec, 0, 0, self.carried)

    def on_device(self, _index: int, where: slice, device: Any) -> Any:
        """One tensor's values of a dense expert, as a tensor of torch."""
        import torch

        assert self._dense is not None
        return torch.from_numpy(self._dense[where]).to(device).float()
