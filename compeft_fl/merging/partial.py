"""An accumulator as bytes: what one server of an aggregation tree passes on to the next.

An edge server merges its clients' updates into one accumulator and sends its sums up, in float64;
the server above combines what comes in and does the same, and the root alone makes a result of it.
As sums of products of a float32 scale and a whole number of examples are mostly exact in float64,
the result is mostly the very bits of one flat server's, whatever the tree looks like.

This is a private intermediate between the servers of one operator, and no part of proto/FORMAT.md:
8 bytes per parameter for `Average` and `TaskArithmetic`, 32 for `Ties`. It is a safetensors file
with at most one tensor, ``sums``. Its metadata say, as lines of key=value, what it is: the method
and its settings, the layout's id, the version that the updates are relative to, how many updates it
stands for, their weight, and a BLAKE2b checksum of all this. Nothing of it is trusted when it is
read.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import (
    ChecksumError,
    LayoutMismatchError,
    MalformedError,
    NonFiniteBodyError,
    ParameterError,
    UpdateSizeError,
    VersionError,
)
from compeft_fl.merging.accumulators import Accumulator, Ties
from compeft_fl.task_vector import Layout
from compeft_fl.wire.messages import layout_id

__all__ = ["decode_partial", "encode_partial", "max_partial_bytes"]

_FORMAT = "compeft-fl partial sum 1"
_ENTRY = "partial"
_MAX_HEADER = 1 << 16
_MAX_COUNT = 1 << 53
_FIELDS = {"format", "method", "layout", "base_version", "count", "total_weight", "checksum"}

A = TypeVar("A", bound=Accumulator)


def encode_partial(accumulator: Accumulator, *, base_version: int = 0) -> bytes:
    """Serialise what an accumulator has taken so far; more can be added to it afterwards.

    Parameters
    ----------
    accumulator : Average, TaskArithmetic or Ties
        It may be empty, but must know its layout.
    base_version : int
        The version of the global adapter that its updates are relative to.

    Raises
    ------
    ParameterError
        No layout is known.

    Examples
    --------
    >>> import compeft_fl as cf
    >>> tau = cf.TaskVector.from_dict({"w": np.array([1, 0, -2], "f4")})
    >>> edge, root = (cf.Average(layout=tau.layout) for _ in range(2))
    >>> edge.add(tau, weight=3)
    >>> root.combine(decode_partial(encode_partial(edge), root))
    >>> root.result().values, root.count, root.total_weight
    (array([ 1.,  0., -2.], dtype=float32), 1, 3.0)
    """
    from safetensors.numpy import save

    layout = _layout_of(accumulator)
    arrays = {"sums": accumulator.sums()} if accumulator.count else {}
    told = {
        "format": _FORMAT,
        "method": repr(accumulator),
        "layout": layout_id(layout).hex(),
        "base_version": str(int(base_version)),
        "count": str(accumulator.count),
        "total_weight": accumulator.total_weight.hex(),
    }
    told["checksum"] = _checksum(told, arrays.get("sums"))
    # One entry: safetensors writes several in any order, and the same sums are the same bytes.
    blob: bytes = save(arrays, metadata={_ENTRY: _lines(told)})
    return blob


def max_partial_bytes(like: Accumulator) -> int:
    """The most bytes that another server's accumulator can have: a bound to read a socket with.

    Raises
    ------
    ParameterError
        No layout is known.
    """
    return 8 * like.columns * _layout_of(like).num_parameters + _MAX_HEADER


def decode_partial(blob: bytes, like: A, *, base_version: int | None = None) -> A:
    """Read another server's accumulator, and check every field of it.

    Parameters
    ----------
    blob : bytes
    like : Average, TaskArithmetic or Ties
        What it must be: the method, its settings and its layout. It is not changed.
    base_version : int, optional
        The version that the updates must be relative to.

    Returns
    -------
    Average, TaskArithmetic or Ties
        To `combine` with.

    Raises
    ------
    UpdateSizeError, MalformedError, ChecksumError
        Too many bytes, bytes that are no accumulator's or another method's, damaged bytes.
    LayoutMismatchError, VersionError
        Another layout, updates relative to another version.
    NonFiniteBodyError
        NaN or Inf.
    ParameterError
        ``like`` knows no layout.
    """
    layout, bound = _layout_of(like), max_partial_bytes(like)
    if len(blob) > bound:
        raise UpdateSizeError(f"expected at most {bound} bytes, found {len(blob)}")
    told, sums = _read(blob)
    if told.get("format") != _FORMAT or set(told) != _FIELDS:
        raise MalformedError(f"expected {_FORMAT!r} and its fields, found {sorted(told)[:10]}")
    if told["checksum"] != _checksum(told, sums):
        raise ChecksumError("expected the checksum of the sums, found another: damaged bytes")
    if told["method"] != repr(like):
        raise MalformedError(f"expected {like!r}, found {told['method'][:100]!r}")
    if told["layout"] != layout_id(layout).hex():
        raise LayoutMismatchError(
            f"expected layout {layout_id(layout).hex()}, found {told['layout'][:40]!r}"
        )
    count, version, total_weight = _numbers(told)
    if base_version is not None and version != base_version:
        raise VersionError(f"expected updates to version {base_version}, found {version}")
    if (count == 0) != (sums is None) or (count == 0) != (total_weight == 0):
        raise MalformedError(f"expected sums and a weight exactly with a count, found {count}")
    if sums is None:
        return like.fresh(layout)
    shape = (layout.num_parameters, like.columns)
    if sums.shape != shape or sums.dtype != np.float64:
        raise MalformedError(f"expected float64 sums {shape}, found {sums.dtype} {sums.shape}")
    if not np.isfinite(sums).all():
        raise NonFiniteBodyError("expected finite sums, found NaN or Inf")
    if isinstance(like, Ties):
        _check_votes(sums, total_weight)
    return like.with_sums(sums, count, total_weight, layout)


def _layout_of(accumulator: Accumulator) -> Layout:
    if accumulator.layout is None:
        raise ParameterError("expected an accumulator with a layout, found one without")
    return accumulator.layout


def _read(blob: bytes) -> tuple[dict[str, str], NDArray[Any] | None]:
    """The metadata, and the sums if there are any."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: dict[str, NDArray[Any]] = load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        entry = dict(header.get("__metadata__") or {}).get(_ENTRY, "")
        told = dict(line.split("=", 1) for line in entry.splitlines())
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise MalformedError(f"expected an accumulator's bytes, found others: {error}") from None
    if set(arrays) - {"sums"}:
        raise MalformedError(f"expected the sums alone, found {sorted(arrays)[:10]}")
    return told, arrays.get("sums")


def _numbers(told: dict[str, str]) -> tuple[int, int, float]:
    try:
        count, version = int(told["count"]), int(told["base_version"])
        total_weight = float.fromhex(told["total_weight"])
    except (ValueError, OverflowError):
        raise MalformedError("expected numbers in the metadata, found others") from None
    if not 0 <= count <= _MAX_COUNT or not (math.isfinite(total_weight) and total_weight >= 0):
        raise MalformedError(
            f"expected a count and a weight >= 0, found {count} and {total_weight}"
        )
    return count, version, total_weight


def _check_votes(sums: NDArray[np.float64], total_weight: float) -> None:
    """What no updates can lead to, in the sums of TIES: a result would divide by it."""
    if (sums < 0).any():
        raise MalformedError(f"expected masses and weights >= 0, found {sums.min()}")
    if ((sums[:, 0] > 0) & (sums[:, 1] <= 0)).any() or ((sums[:, 2] > 0) & (sums[:, 3] <= 0)).any():
        raise MalformedError("expected a weight behind each mass, found none")
    most = float((sums[:, 1] + sums[:, 3]).max(initial=0.0))
    if most > total_weight * (1 + 1e-9):
        raise MalformedError(
            f"expected at most the total weight {total_weight} behind a parameter, found {most}"
        )


def _lines(told: dict[str, str]) -> str:
    return "".join(f"{key}={told[key]}\n" for key in sorted(told))


def _checksum(told: dict[str, str], sums: NDArray[Any] | None) -> str:
    """BLAKE2b-128 of all that the bytes say."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_lines({key: told[key] for key in told if key != "checksum"}).encode())
    if sums is not None:
        digest.update(f"{sums.dtype} {sums.shape}\n".encode())
        digest.update(np.ascontiguousarray(sums).data)
    return digest.hexdigest()
