"""The factored body, for the second reader and the second writer: FORMAT.md, "Factored body".

Written from that section alone, in plain Python; it imports nothing but the standard library and
`reference_context`, whose walk over matrices it shares.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from reference_context import Shapes, matrices


@dataclass
class Matrix:
    """The terms of one matrix: each an exponent, its integers, and 1 where a sign is -."""

    terms: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    flat: bool = False


def sides(rows: int, columns: int, flat: bool) -> tuple[int, int]:
    """S and L."""
    return (1, rows * columns) if flat else (min(rows, columns), max(rows, columns))


def bits_of(found: list[Matrix]) -> int:
    """The fewest bits, 2 or more, that hold all integers in two's complement; 0 without terms."""
    integers = [k for matrix in found for _, factors, _ in matrix.terms for k in factors]
    if not integers:
        return 0
    return next(b for b in range(2, 17) if all(-(1 << b - 1) <= k < 1 << b - 1 for k in integers))


def factor_bits(found: list[Matrix]) -> list[int]:
    """The stream `factors`."""
    width = bits_of(found)
    return [
        k >> i & 1
        for matrix in found
        for _, factors, _ in matrix.terms
        for k in factors
        for i in range(width)
    ]


def sign_bits(found: list[Matrix]) -> list[int]:
    """The stream `signs`."""
    return [bit for matrix in found for _, _, negative in matrix.terms for bit in negative]


def read(
    shapes: Shapes,
    offset: int,
    d: int,
    heads: list[int],
    exponents: list[int],
    bits: int,
    next_factor: Callable[[], int],
    next_sign: Callable[[], int],
) -> list[Matrix]:
    """The terms of each matrix, from bits that come one by one."""
    found, left = [], list(exponents)
    for (_, rows, columns), head in zip(matrices(shapes, offset, d), heads, strict=True):
        matrix = Matrix(flat=head % 2 == 1)
        s, lines = sides(rows, columns, matrix.flat)
        for _ in range(head // 2):
            factors = []
            for _ in range(s):
                k = sum(next_factor() << i for i in range(bits))
                factors.append(k - (1 << bits) if k >> bits - 1 else k)
            matrix.terms.append((left.pop(0), factors, []))
        found.append(matrix)
    for (_, rows, columns), matrix in zip(matrices(shapes, offset, d), found, strict=True):
        _, lines = sides(rows, columns, matrix.flat)
        for _, _, negative in matrix.terms:
            negative += [next_sign() for _ in range(lines)]
    return found


def values(shapes: Shapes, offset: int, d: int, found: list[Matrix]) -> list[float]:
    """The sums of all terms, parameter by parameter, each addition rounded to float32."""
    out = [0.0] * d
    for (first, rows, columns), matrix in zip(matrices(shapes, offset, d), found, strict=True):
        s, lines = sides(rows, columns, matrix.flat)
        for exponent, factors, negative in matrix.terms:
            for line in range(lines):
                for j in range(s):
                    row, column = (j, line) if matrix.flat or columns > rows else (line, j)
                    at = first - offset + (line if matrix.flat else row * columns + column)
                    step = factors[j] * 2.0**exponent
                    out[at] = rounded(out[at] + (-step if negative[line] else step))
    return out


def rounded(value: float) -> float:
    """The nearest float32: of a sum in float64 of two of them, what float32 itself would give."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
