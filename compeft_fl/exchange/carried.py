"""The tensors beside the task vector: carried densely, both ways, where they have changed.

A state is split into what is trained, which `compeft_fl.task_vector` makes one flat vector of, and
an `Apart`: all other tensors, and where they stand. Server and node hold the same one, by version
and digest. It crosses as one Array of safetensors' bytes, tensors named by their place in the
state; the plan, which says what stands where, goes with the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import LayoutError, MalformedError, NonFiniteError, ResyncError
from compeft_fl.merging.carried import same
from compeft_fl.parts.ranks import AXES, leading, rank_axis
from compeft_fl.parts.tensor_policy import LEFT, TRAINED, TensorPolicy, is_variance

__all__ = ["Apart", "Place", "Versions", "check_like", "follow_apart"]

_PLAN: Final = "compeft_fl carried 1"  # the plan's key in safetensors' metadata
_OVERHEAD: Final = 256  # bytes of safetensors' header for a tensor, and for all of them, at most

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands that is not trained.

    Attributes
    ----------
    position : int
        Among all tensors of the state.
    name : str
    left : bool
        Personal: it goes down, and not up.
    """

    position: int
    name: str
    left: bool = False


@dataclass(frozen=True)
class Apart:
    """What of a state is not trained.

    Attributes
    ----------
    places : tuple of Place
        By position.
    wide : frozenset of str
        Trained tensors that are float64 at home; as part of the task vector they are float32.
    values : mapping of str to ndarray
        Of each place.
    version : int
    """

    places: tuple[Place, ...] = ()
    wide: frozenset[str] = frozenset()
    values: State = field(default_factory=dict)
    version: int = 0

    @classmethod
    def of(cls, state: State, policy: TensorPolicy) -> Apart:
        """The tensors of a state that a policy does not train.

        Raises
        ------
        LayoutError
            As `TensorPolicy.kinds`.
        NonFiniteError
            NaN or Inf in a carried tensor, which could not be averaged.
        """
        kinds = policy.kinds(state)
        state = {
            n: value.astype(value.dtype.newbyteorder("="), copy=False) for n, value in state.items()
        }
        places = tuple(
            Place(position, name, kinds[name] == LEFT)
            for position, name in enumerate(state)
            if kinds[name] != TRAINED
        )
        wide = {n for n, kind in kinds.items() if kind == TRAINED and state[n].dtype == np.float64}
        apart = cls(places, frozenset(wide), {place.name: state[place.name] for place in places})
        for place in places:
            if not place.left:
                _check_finite(place.name, state[place.name])
        return apart

    def __bool__(self) -> bool:
        """Is there anything that a task vector alone does not say?"""
        return bool(self.places or self.wide)

    @property
    def carried(self) -> dict[str, NDArray[Any]]:
        """What nodes send back: all places but those that are left."""
        return {p.name: self.values[p.name] for p in self.places if not p.left}

    def is_left(self, name: str) -> bool:
        """Is this one of the personal tensors?"""
        return any(place.left for place in self.places if place.name == name)

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        return sum(value.nbytes for value in self.values.values())

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the plan and all values."""
        digest = hashlib.blake2b(self._plan().encode(), digest_size=16)
        for place in self.places:
            value = self.values[place.name]
            digest.update(f"{value.dtype.str}{value.shape}".encode())
            digest.update(value.tobytes())
        return digest.digest()

    def trained(self, state: State) -> dict[str, NDArray[Any]]:
        """A state's trained tensors, as the task vector has them: without float64."""
        return {
            name: value.astype(np.float32) if name in self.wide else value
            for name, value in state.items()
            if name not in self.values
        }

    def whole(self, trained: State) -> dict[str, NDArray[Any]]:
        """Trained tensors and all others, in the state's order and data types.

        Raises
        ------
        LayoutError
            Trained tensors of other names or another number than the places are for.
        """
        names = iter(trained)
        at = {place.position: place.name for place in self.places}
        size = len(trained) + len(at)
        if max(at, default=0) >= max(size, 1) or self.values.keys() & trained.keys():
            raise LayoutError(
                f"expected {len(at)} carried tensors beside {len(trained)} trained ones, "
                f"found places or names of others"
            )
        state: dict[str, NDArray[Any]] = {}
        for position in range(size):
            name = at.get(position)
            if name is not None:
                state[name] = self.values[name]
            else:
                name = next(names)
                wide = name in self.wide
                state[name] = trained[name].astype(np.float64) if wide else trained[name]
        return state

    def with_values(self, values: State) -> Apart:
        """The same places with other values; for names that are not given, the same values."""
        return Apart(self.places, self.wide, {**self.values, **values}, self.version)

    def cut(self, rank: int, axes: Mapping[str, int] = AXES) -> Apart:
        """The part of a lower rank: factors among the values are cut to it.

        Raises
        ------
        LayoutError
            See `compeft_fl.parts.ranks.rank_axis`.
        """
        values = {}
        for name, value in self.values.items():
            axis = rank_axis(name, value.shape, axes)
            values[name] = value if axis is None else leading(value, axis, rank)
        return replace(self, values=values)

    def to_bytes(self, names: Iterable[str] | None = None) -> bytes:
        """Some of the values; None: all, and the plan."""
        from safetensors.numpy import save

        wanted = set(self.values if names is None else names)
        tensors = {
            str(place.position): np.asarray(self.values[place.name], order="C")
            for place in self.places
            if place.name in wanted
        }
        return save(tensors, None if names is not None else {_PLAN: self._plan()})

    @classmethod
    def from_bytes(cls, blob: bytes, version: int) -> Apart:
        """What the other side holds, from `to_bytes` of all.

        Raises
        ------
        MalformedError
            Bytes that say no such thing.
        """
        from safetensors import SafetensorError

        try:
            length = int.from_bytes(blob[:8], "little")
            metadata = json.loads(blob[8 : 8 + length]).get("__metadata__", {})
            plan = json.loads(metadata[_PLAN])
            places = tuple(Place(*_checked(*entry)) for entry in plan["places"])
            wide = frozenset(str(name) for name in plan["wide"])
            found = _load(blob)
            values = {place.name: found.pop(str(place.position)) for place in places}
        except (
            SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError,
        ) as error:  # fmt: skip
            raise MalformedError(
                f"expected carried tensors and their plan, found other bytes: {error!r}"
            ) from None
        if found or len(values) != len(places) or len({p.position for p in places}) != len(places):
            raise MalformedError("expected each carried tensor once, and no other")
        return cls(tuple(sorted(places, key=lambda p: p.position)), wide, values, version)

    def read(self, blob: bytes, *, finite: bool = True) -> dict[str, NDArray[Any]]:
        """Some values that the other side says are others now; nothing of them is trusted.

        Raises
        ------
        MalformedError, LayoutError, NonFiniteError
            Other bytes; tensors, shapes or data types that are not this one's; NaN or Inf.
        """
        from safetensors import SafetensorError

        most = self.num_bytes + _OVERHEAD * (len(self.places) + 1)
        if len(blob) > most:
            raise MalformedError(
                f"expected at most {most} bytes of carried tensors, found {len(blob)}"
            )
        try:
            found = _load(blob)
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise MalformedError(f"expected carried tensors, found other bytes: {error}") from None
        named = {str(place.position): place for place in self.places}
        values = {}
        for key, value in found.items():
            place = named.get(key)
            if place is None:
                raise LayoutError(f"expected no tensor at position {key[:20]}, found one")
            old = self.values[place.name]
            if (value.dtype, value.shape) != (old.dtype, old.shape):
                raise LayoutError(
                    f"expected {old.dtype} of shape {old.shape}, found {value.dtype} of shape "
                    f"{value.shape} in tensor {place.name!r}"
                )
            if value.dtype == np.bool_ and (value.view(np.uint8) > 1).any():
                raise MalformedError(f"expected Booleans of 0 and 1 in tensor {place.name!r}")
            if finite:
                _check_finite(place.name, value)
                if is_variance(place.name) and value.dtype.kind == "f":
                    value = np.maximum(value, 0)  # noise for privacy may have made it negative
            values[place.name] = value
        return values

    def _plan(self) -> str:
        places = [[place.position, place.name, place.left] for place in self.places]
        return json.dumps({"places": places, "wide": sorted(self.wide)}, separators=(",", ":"))


class Versions:
    """The server's end: an `Apart` in versions, and which of its tensors changed when."""

    def __init__(self, apart: Apart) -> None:
        self.version = 0
        self.apart = apart
        self.digest = apart.digest
        self._changed = dict.fromkeys(apart.values, 0)  # the version in which each did last
        # Of this version, by the rank of the node (0: all), and by what it has:
        self._cuts: dict[int, tuple[Apart, bytes]] = {}
        self._blobs: dict[tuple[int, int | None], bytes] = {}

    def advance(self, apart: Apart) -> None:
        """Make a version of other values, where any is another.

        Raises
        ------
        LayoutError
            Other places than before.
        """
        if (apart.places, apart.wide) != (self.apart.places, self.apart.wide):
            raise LayoutError("expected the same tensors to be carried as before, found others")
        changed = [
            name for name, value in apart.values.items() if not same(value, self.apart.values[name])
        ]
        if not changed:
            return
        self.version += 1
        self._changed |= dict.fromkeys(changed, self.version)
        self.apart, self.digest = apart, apart.digest
        self._blobs.clear()
        self._cuts.clear()

    def of_rank(self, rank: int, axes: Mapping[str, int] = AXES) -> tuple[Apart, bytes]:
        """What a node of a rank holds, and its digest; 0: all."""
        if not rank:
            return self.apart, self.digest
        if rank not in self._cuts:
            cut = self.apart.cut(rank, axes)
            self._cuts[rank] = cut, cut.digest
        return self._cuts[rank]

    def lacking(self, version: int, rank: int = 0, axes: Mapping[str, int] = AXES) -> bytes | None:
        """What a node at ``version`` needs, None: nothing; all for a version that never was."""
        if not self.apart or version == self.version:
            return None
        known = version if 0 <= version < self.version else None
        if (rank, known) not in self._blobs:
            names = None
            if known is not None:
                names = [name for name, changed in self._changed.items() if changed > known]
            self._blobs[rank, known] = self.of_rank(rank, axes)[0].to_bytes(names)
        return self._blobs[rank, known]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, beside the values, for `restore`."""
        return {"version": self.version, "changed": dict(self._changed)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        changed = dict(state.get("changed", {}))
        if changed.keys() == self._changed.keys():
            self.version = int(state["version"])
            self._changed = {str(name): int(version) for name, version in changed.items()}
        self._blobs.clear()
        self._cuts.clear()


def check_like(state: State, wanted: State) -> None:
    """Raise LayoutError, with the tensor's name, where names or shapes differ."""
    for name in [*wanted, *state]:
        if name not in state:
            raise LayoutError(f"expected tensor {name!r}, found none of that name")
        if name not in wanted:
            raise LayoutError(f"expected {len(wanted)} tensors, found also {name!r}")
        if state[name].shape != wanted[name].shape:
            raise LayoutError(
                f"expected shape {wanted[name].shape}, found {state[name].shape} in tensor {name!r}"
            )


def follow_apart(held: Apart | None, blob: bytes | None, version: int, digest: bytes) -> Apart:
    """A node's end: what it holds, once it has what it lacked; the server's bit for bit.

    Raises
    ------
    ResyncError
        It lacks what the bytes build on, or the digest differs.
    """
    try:
        if blob is None or not _has_plan(blob):
            if held is None:
                raise ResyncError("this node has no carried tensors of this federation")
            # What is left may be anything; the digest says whether it is the server's.
            values = {} if blob is None else held.read(blob, finite=False)
            found = held
            if values or version != held.version:
                found = replace(held.with_values(values), version=version)
        else:
            found = Apart.from_bytes(blob, version)
    except (MalformedError, LayoutError) as error:
        raise ResyncError(f"{type(error).__name__}: {error}") from None
    if found.digest != digest:
        raise ResyncError(
            f"expected digest {digest.hex()} of carried tensors, found {found.digest.hex()}"
        )
    return found


def _has_plan(blob: bytes) -> bool:
    return _PLAN.encode() in blob[: 8 + int.from_bytes(blob[:8], "little")]


def _load(blob: bytes) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    found: dict[str, NDArray[Any]] = load(blob)
    return found


def _checked(position: Any, name: Any, left: Any) -> tuple[int, str, bool]:
    if type(position) is not int or position < 0 or not isinstance(name, str):
        raise ValueError(f"a place is {position!r}, {name!r}")
    return position, name, bool(left)


def _check_finite(name: str, value: NDArray[Any]) -> None:
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise NonFiniteError(f"expected finite values, found NaN or Inf in tensor {name!r}")
