"""The steps body, for the second reader and the second writer: FORMAT.md, "Steps body".

Written from that section alone, in plain Python and with its names; it imports nothing but the
standard library and `reference_context`, whose section it refers to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reference_context import Model, Reader, Shapes, Writer, bounded, matrices, squash, within


class Steps:
    """What writer and reader both keep. ``decide(p, bit)`` codes a decision and returns it."""

    def __init__(self, n_all: int, d: int, decide: Callable[[int, Any], int]) -> None:
        kept = Model(n_all, d, False, decide)
        self.z0, self.refined, self.agreed, self.move = (
            kept.z0, kept.refined, kept.agreed, kept.move,
        )  # fmt: skip
        self.decide = decide
        self.near = [[0, 0] for _ in range(128)]
        self.more = [[1 << 27, 0] for _ in range(128)]
        self.octave = [[1 << 27, 0] for _ in range(24)]
        self.turn: dict[tuple[int, int], int] = {}  # what is not in it is 0

    def walk(
        self, shapes: Shapes, offset: int, d: int, left: int, known: dict[int, int] | None = None
    ) -> dict[int, int]:
        """Parameter -> integer, where it is not 0; ``known`` tells them to a writer."""
        found: dict[int, int] = {}
        before = -1
        for first, rows, columns in matrices(shapes, offset, d):
            s = min(rows, columns)
            self.column, self.above = [0] * s, [0] * s
            same = s == before
            self.turn = {key: weight >> 2 for key, weight in self.turn.items() if same}
            before, self.full = s, 0
            for self.line in range(max(rows, columns)):
                self.recent: list[tuple[int, int]] = []
                self.n, self.beside = 0, 0
                for j in range(s):
                    if left == 0:
                        return found
                    row, column = (j, self.line) if columns > rows else (self.line, j)
                    index = first + row * columns + column
                    q = None if known is None else known.get(index, 0)
                    m = 0
                    if self.nonzero(j, q):
                        sign = self.sign(j, q)
                        m = self.magnitude(j, q)
                        found[index] = sign * m
                        if j < 64 and self.n < 16:
                            self.recent.append((j, sign))
                        self.n += 1
                        left -= 1
                    self.above[j] = self.beside = m
                self.full = 1 if 2 * self.n >= s else 0
        return found

    def nonzero(self, j: int, q: int | None) -> int:
        """Whether the line's parameter j is nonzero."""
        u, b, n, i = min(self.above[j], 3), min(self.beside, 3), self.n, self.line
        f = sum((4 * n >= j, 2 * n >= j, 4 * n >= 3 * j)) if j else 0
        near = self.near[32 * u + 8 * b + 2 * f + self.full]
        z = self.z0 + self.column[j] + near[0]
        guess = squash(z)
        refined = self.refined[within(0, (z >> 22) + 48, 95)]
        p = within(1, guess + (refined[0] >> 12) >> 1, 65535)
        bit = self.decide(p, None if q is None else int(q != 0))
        error = bit * 65536 - guess
        self.column[j] = bounded(self.column[j] + (error * max(100, 93388 // (i + 40)) >> 4))
        near[0] = bounded(near[0] + (error * max(512, 65536 // (near[1] + 8)) >> 7))
        near[1] = min(near[1] + 1, 255)
        self.move(refined, bit)
        return bit

    def sign(self, j: int, q: int | None) -> int:
        """+1 or -1."""
        seen = self.recent if j < 64 else []
        m, i = len(seen), self.line
        z = sum(self.turn.get((j, b), 0) * s for b, s in seen)
        agreed = self.agreed[min(abs(z) >> 23, 31)]
        p = within(1, agreed[0] >> 12, 65535) if z != 0 else 32768
        hit = self.decide(p, None if q is None else int((q > 0) == (z >= 0)))
        sign = 1 if (hit == 1) == (z >= 0) else -1
        if z != 0:
            self.move(agreed, hit)
        error = (65536 if sign == 1 else 0) - squash(z)
        change = error * max(400, 300000 // (i + 182)) * (448 // (m + 28)) >> 12
        for b, s in seen:
            self.turn[j, b] = bounded(self.turn.get((j, b), 0) + change * s)
        return sign

    def magnitude(self, j: int, q: int | None) -> int:
        """1 or more."""
        size = None if q is None else abs(q)
        u, b = min(self.above[j], 3), min(self.beside, 3)
        c = 32 * max(u, b) + (16 if u + b > 3 else 0)
        for m in range(1, 15):
            if not self.counted(self.more[c + m], None if size is None else int(size > m)):
                return m
        rest, e = None if size is None else size - 14, 0
        while e < 24:
            hit = self.counted(self.octave[e], None if rest is None else int(rest >= 2 ** (e + 1)))
            if not hit:
                break
            e += 1
        r = 1
        for k in reversed(range(e)):
            r = 2 * r + self.decide(32768, None if rest is None else rest >> k & 1)
        return 14 + r

    def counted(self, counter: list[int], bit: int | None) -> int:
        """A decision with the probability of a counter, which learns from it."""
        hit = self.decide(within(32, counter[0] >> 12, 65504), bit)
        self.move(counter, hit)
        return hit


def write(integers: list[int], shapes: Shapes, offset: int) -> bytes:
    """The code of the integers of parameters offset ... ."""
    known = {offset + i: q for i, q in enumerate(integers) if q}
    writer = Writer()
    d = len(integers)
    Steps(len(known), d, writer.decide).walk(shapes, offset, d, len(known), known)
    return writer.code()


def read(
    code: bytes, shapes: Shapes, offset: int, d: int, count: int
) -> tuple[dict[int, int], int, int]:
    """The integers by parameter, how many bytes the code may have, and the value at its end."""
    reader = Reader(code)
    found = Steps(count, d, reader.decide).walk(shapes, offset, d, count)
    return found, reader.taken - 3, reader.value
