"""Factored: outer products of small integers and signs, and ternary values beside them.

For changes of low rank, as those of a LoRA are: of the same bytes more of their energy than ternary
values keep. What to write is found by `compeft_fl.reduction.factorize`; here it becomes bytes,
losslessly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.codecs.base import Codec, Part, Update
from compeft_fl.codecs.context import matrices
from compeft_fl.codecs.golomb import Golomb, check_bits
from compeft_fl.errors import (
    FactorBitsError,
    ParameterError,
    ScaleError,
    StepRangeError,
    TermCountError,
)
from compeft_fl.factored import (
    HIGHEST,
    LOWEST,
    MAX_SCALE,
    MAX_TERMS,
    FactoredVector,
    Terms,
    add_all,
    shapes_of,
)
from compeft_fl.task_vector import Layout
from compeft_fl.ternary import TernaryVector

LEAST_BITS, MOST_BITS = 2, 16  # of a factor
_GOLOMB = Golomb()


class Factored(Codec):
    """Low-rank signs, of a `compeft_fl.factored.FactoredVector`; a ternary one has no terms."""

    name, field, ternary = "factored", "factored", False

    def encode(self, update: Update, start: int, stop: int) -> Any:
        """See `Codec.encode`.

        Raises
        ------
        ParameterError
            A dense vector; parameters that end within a tensor that has terms; terms that take more
            bytes than float32 does.
        """
        from compeft_fl.wire.v1 import update_pb2

        if isinstance(update, TernaryVector):
            return update_pb2.Factored(rest=_GOLOMB.encode(update, start, stop))
        if not isinstance(update, FactoredVector):
            raise ParameterError(
                "expected a FactoredVector or a TernaryVector for codec 'factored': "
                "factorize() first"
            )
        body = update_pb2.Factored()
        terms = _within(update, start, stop)
        found = [each for each in terms if each is not None and each.count]
        if found:
            body.terms.extend(0 if t is None else 2 * t.count + t.flat for t in terms)
            body.exponents.extend(int(e) for each in found for e in each.exponents)
            factors = np.concatenate([each.factors.ravel() for each in found])
            body.bits = _bits_of(factors)
            body.factors = _packed(factors, body.bits)
            negative = np.concatenate([each.negative.ravel() for each in found])
            body.signs = np.packbits(negative, bitorder="little").tobytes()
        if update.rest is not None:
            body.rest.CopyFrom(_GOLOMB.encode(update.rest, start, stop))
        if body.ByteSize() > self.max_body_bytes(stop - start):
            raise ParameterError(
                "expected terms that take fewer bytes than dense values, found more"
            )
        return body

    def decode(self, body: Any, layout: Layout, start: int, stop: int, device: Any = None) -> Part:
        """See `Codec.decode`. The values of a whole update are made when they are asked for."""
        shapes = [(int(rows), int(columns)) for rows, columns in matrices(layout, start, stop)]
        terms = _read(body, shapes)
        rest = None
        if body.HasField("rest"):
            rest = _GOLOMB.decode(body.rest, layout, start, stop)
            if rest.scales.size and rest.scales.max() > MAX_SCALE:  # type: ignore[union-attr]
                raise ScaleError(
                    f"expected scales of at most 2^126 beside terms, found {rest.scales.max()}"  # type: ignore[union-attr]
                )
        if (start, stop) == (0, layout.num_parameters):
            beside = None
            if rest is not None:
                assert rest.masks is not None
                positive, negative = rest.masks
                if device is not None:
                    from compeft_fl.kernels import torch_ops

                    positive, negative = torch_ops.upload(positive, negative, device)
                beside = TernaryVector(layout, positive, negative, rest.scales)
            return Part(start, stop, factored=FactoredVector(layout, terms, beside, device))
        values = np.zeros(stop - start, np.float32)
        add_all(values, shapes, terms)
        if rest is not None:
            _add_rest(values, rest, layout)
        return Part(start, stop, values=values)

    def max_body_bytes(self, num_parameters: int) -> int:
        """See `Codec.max_body_bytes`: a longer one is not written."""
        return 4 * num_parameters + _GOLOMB.max_body_bytes(num_parameters)


def _within(update: FactoredVector, start: int, stop: int) -> list[Terms | None]:
    """The terms of the tensors in parameters ``start .. stop``.

    Of a tensor that these cover in part there must be none.
    """
    found: list[Terms | None] = []
    first = 0
    for shape, each in zip(update.shapes, update.terms, strict=True):
        last = first + shape[0] * shape[1]
        covered = min(last, stop) - max(first, start)
        if covered > 0:
            if covered < last - first and each is not None and each.count:
                raise ParameterError(
                    f"expected parts of whole tensors with codec 'factored', found {start} .. "
                    f"{stop}, which cuts one of {last - first} parameters"
                )
            found.append(each)
        first = last
    return found


def _bits_of(factors: NDArray[np.int16]) -> int:
    """The least bits that hold all factors, with their signs."""
    largest = max(int(factors.max()), -int(factors.min()) - 1)
    return max(LEAST_BITS, largest.bit_length() + 1)


def _packed(factors: NDArray[np.int16], bits: int) -> bytes:
    places = np.arange(bits, dtype=np.int16)
    each = (factors[:, None] >> places) & np.int16(1)
    return np.packbits(each.astype(np.uint8), bitorder="little").tobytes()


def _unpacked(data: bytes, count: int, bits: int) -> NDArray[np.int16]:
    each = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    weights = np.left_shift(np.int64(1), np.arange(bits))
    weights[-1] = -weights[-1]
    return (each.reshape(count, bits) @ weights).astype(np.int16)


def _read(body: Any, shapes: Sequence[tuple[int, int]]) -> list[Terms | None]:
    """The terms of each matrix, all fields checked."""
    heads = list(body.terms) or [0] * len(shapes)
    if len(heads) != len(shapes):
        raise TermCountError(
            f"expected {len(shapes)} numbers of terms, one per tensor; found {len(heads)}"
        )
    counts = [head >> 1 for head in heads]
    if counts and max(counts) > MAX_TERMS:
        raise TermCountError(f"expected at most {MAX_TERMS} terms, found {max(counts)}")
    total = sum(counts)
    if len(body.exponents) != total:
        raise TermCountError(f"expected {total} exponents, found {len(body.exponents)}")
    exponents = np.array(body.exponents, np.int64)
    wrong = (exponents < LOWEST) | (exponents > HIGHEST)
    if wrong.any():
        raise StepRangeError(
            f"expected exponents in {LOWEST} .. {HIGHEST}, found {exponents[wrong][0]}"
        )
    least, most = (LEAST_BITS, MOST_BITS) if total else (0, 0)
    if not least <= body.bits <= most:
        raise FactorBitsError(f"expected {least} .. {most} bits a factor, found {body.bits}")
    sizes = [shapes_of(*shape, bool(head & 1)) for shape, head in zip(shapes, heads, strict=True)]
    num_factors = sum(n * size for n, (size, _) in zip(counts, sizes, strict=True))
    num_signs = sum(n * lines for n, (_, lines) in zip(counts, sizes, strict=True))
    check_bits("factors", body.factors, num_factors * body.bits)
    check_bits("signs", body.signs, num_signs)
    if not total:
        return [None] * len(shapes)
    factors = _unpacked(body.factors, num_factors, body.bits)
    packed = np.frombuffer(body.signs, np.uint8)
    negative = np.unpackbits(packed, count=num_signs, bitorder="little").view(np.bool_)
    found: list[Terms | None] = []
    at = first = line = 0
    for head, n, (size, lines) in zip(heads, counts, sizes, strict=True):
        if not n:
            found.append(None)
            continue
        found.append(
            Terms(
                factors[first : first + n * size].reshape(n, size),
                exponents[at : at + n].astype(np.int32),
                negative[line : line + n * lines].reshape(n, lines),
                bool(head & 1),
            )
        )
        at, first, line = at + n, first + n * size, line + n * lines
    return found


def _add_rest(values: NDArray[np.float32], rest: Part, layout: Layout) -> None:
    from compeft_fl.kernels import cpu

    assert rest.masks is not None
    assert rest.scales is not None
    bounds = np.array([0, values.size], np.int64)
    if rest.scales.size > 1:
        bounds = np.clip(layout.offsets, rest.start, rest.stop) - rest.start
    cpu.add_ternary(values, *rest.masks, rest.scales, bounds)
