"""The context body, for the second reader and the second writer: FORMAT.md, "Context body".

Written from that section alone, in plain Python and with its names; it imports nothing but the
standard library. The model is one class; whether a decision is read or written is up to the coder
that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

Shapes = list[tuple[int, ...]]

ONE = 1 << 24  # logits: 24 bits after the point
S = [round(65536 / (1 + math.exp(12 - k / 4))) for k in range(97)]
START_PAIR = 150 << 16


def within(low: int, x: int, high: int) -> int:
    """x, but no less than low and no more than high."""
    return low if x < low else high if x > high else x


def bounded(x: int) -> int:
    """A weight in its range."""
    return -134217728 if x < -134217728 else 134217728 if x > 134217728 else x  # 2^27


def squash(z: int) -> int:
    """A logit's probability in 65536ths."""
    u = within(0, z + 12 * ONE, 24 * ONE - 1)
    k, f = u >> 22, u % (1 << 22)
    return S[k] + ((S[k + 1] - S[k]) * f >> 22)


# --- the walk ---------------------------------------------------------------------------------


def matrices(shapes: Shapes, offset: int, d: int) -> Iterator[tuple[int, int, int]]:
    """(first parameter, rows, columns) of each tensor that offset .. offset + d covers."""
    start = 0
    for shape in shapes:
        size = math.prod(shape)
        first, last = max(start, offset), min(start + size, offset + d)
        if last - first == size and size:
            columns = shape[-1] if shape else 1
            yield first, size // columns, columns
        elif last > first:
            yield first, last - first, 1
        start += size


class Model:
    """What writer and reader both keep. ``decide(p, bit)`` codes a decision and returns it."""

    def __init__(self, n_all: int, d: int, flat: bool, decide: Callable[[int, Any], int]) -> None:
        self.flat, self.decide = flat, decide
        wanted = n_all * 65536 // max(1, d)
        logits = range(-12 * ONE, 12 * ONE + 1, 1 << 20)
        self.z0 = next((z for z in logits if squash(z) >= wanted), 12 * ONE)
        self.column: list[int] = []
        self.table = [[0] * 16 for _ in range(16)]
        self.refined = [[squash((2 * b - 95) << 21) << 12, 0] for b in range(96)]
        self.agreed = [[squash((2 * b + 1) << 22) << 12, 0] for b in range(32)]
        self.pair: dict[tuple[int, int], int] = {}  # what is not in it is START_PAIR
        self.turn: dict[tuple[int, int], int] = {}  # ... is 0
        self.s = -1
        self.line, self.n = 0, 0
        self.recent: list[tuple[int, int]] = []

    def start_matrix(self, s: int) -> None:
        """What begins again."""
        self.column = [0] * s
        if s == self.s:
            for key, weight in self.pair.items():
                self.pair[key] = START_PAIR + ((weight - START_PAIR) >> 2)
            for key, weight in self.turn.items():
                self.turn[key] = weight >> 2
        else:
            self.pair, self.turn = {}, {}
        self.s = s

    @staticmethod
    def move(counter: list[int], hit: int) -> None:
        """Bring a counter nearer to what was seen."""
        counter[0] += (hit * (1 << 28) - counter[0]) * (65536 // (counter[1] + 8)) >> 16
        counter[1] = min(counter[1] + 1, 255)

    def nonzero(self, j: int, bit: Any = None) -> int:
        """Whether the line's parameter j is nonzero; ``bit`` says so to a writer."""
        if self.flat:
            return self.decide(32768, bit)
        a, m, i = j % 256, min(self.n, 16), self.line
        c = j if self.s <= 16 else j * 16 // self.s
        r = min(self.n, 15)
        z = self.z0 + self.column[j] + self.table[r][c]
        pair, pairs = self.pair, [(a, b) for b, _ in self.recent]
        z += sum([pair.get(each, START_PAIR) for each in pairs])
        guess = squash(z)
        refined = self.refined[within(0, (z >> 22) + 48, 95)]
        p = within(1, guess + (refined[0] >> 12) >> 1, 65535)
        bit = self.decide(p, bit)
        error = bit * 65536 - guess
        self.column[j] = bounded(self.column[j] + (error * max(82, 93388 // (i + 76)) >> 4))
        self.table[r][c] = bounded(self.table[r][c] + error * 16)
        change = error * (max(36, 668400 // (i + 400)) * (2048 // (m + 8)) >> 8) >> 4
        for each in pairs:
            pair[each] = bounded(pair.get(each, START_PAIR) + change)
        self.move(refined, bit)
        return bit

    def sign(self, j: int, sign: Any = None) -> int:
        """+1 or -1; ``sign`` says it to a writer."""
        if self.flat:
            hit = self.decide(32768, sign == 1)
            return 1 if hit else -1
        a, m, i = j % 256, min(self.n, 16), self.line
        z = sum([self.turn.get((a, b), 0) * s for b, s in self.recent])
        agreed = self.agreed[min(abs(z) >> 23, 31)]
        p = within(1, agreed[0] >> 12, 65535) if z != 0 else 32768
        hit = self.decide(p, (sign == 1) == (z >= 0))
        sign = 1 if (hit == 1) == (z >= 0) else -1
        if z != 0:
            self.move(agreed, hit)
        error = (65536 if sign == 1 else 0) - squash(z)
        change = error * (max(1156, 1267266 // (i + 182)) * (7168 // (m + 28)) >> 8) >> 4
        for b, s in self.recent:
            self.turn[a, b] = bounded(self.turn.get((a, b), 0) + change * s)
        return sign

    def walk(
        self, shapes: Shapes, offset: int, d: int, left: int, known: dict[int, int] | None = None
    ) -> dict[int, int]:
        """Parameter -> sign of the nonzeros; ``known`` tells them to a writer."""
        found: dict[int, int] = {}
        for first, rows, columns in matrices(shapes, offset, d):
            s = min(rows, columns)
            if left == 0:
                break
            self.start_matrix(s)
            for self.line in range(max(rows, columns)):
                self.recent, self.n = [], 0
                for j in range(s):
                    if left == 0:
                        return found
                    row, column = (j, self.line) if columns > rows else (self.line, j)
                    index = first + row * columns + column
                    told = None if known is None else known.get(index, 0)
                    if not self.nonzero(j, None if told is None else int(told != 0)):
                        continue
                    found[index] = self.sign(j, told)
                    slot = self.n % 16
                    self.recent[slot : slot + 1] = [(j % 256, found[index])]
                    self.n += 1
                    left -= 1
        return found


# --- the range coder --------------------------------------------------------------------------


class Reader:
    """Decisions from a code."""

    def __init__(self, code: bytes) -> None:
        self.code, self.taken = code, 0
        self.value, self.range = 0, 1 << 32
        for _ in range(4):
            self.take()

    def take(self) -> None:
        """The next byte, or 0 after the last."""
        byte = self.code[self.taken] if self.taken < len(self.code) else 0
        self.value = self.value * 256 + byte
        self.taken += 1

    def decide(self, p: int, _told: Any) -> int:
        """One decision."""
        bound = self.range * p >> 16
        if self.value < bound:
            self.range, result = bound, 1
        else:
            self.value, self.range, result = self.value - bound, self.range - bound, 0
        while self.range < 1 << 24:
            self.range *= 256
            self.take()
        return result


class Writer:
    """Decisions to a code: ``low`` is kept whole, however long it gets."""

    def __init__(self) -> None:
        self.low, self.range, self.times = 0, 1 << 32, 0

    def decide(self, p: int, told: Any) -> int:
        """One decision."""
        bound = self.range * p >> 16
        if told:
            self.range = bound
        else:
            self.low, self.range = self.low + bound, self.range - bound
        while self.range < 1 << 24:
            self.range *= 256
            self.low *= 256
            self.times += 1
        return int(bool(told))

    def code(self) -> bytes:
        """The code, ended."""
        return (-(-self.low >> 24)).to_bytes(self.times + 1, "big").rstrip(b"\0")


def write(signs: list[int], shapes: Shapes, offset: int, flat: bool | None = None) -> Any:
    """(flat, code) of parameters offset ..., given as -1, 0 and 1; flat as a writer chooses."""
    d, known = len(signs), {offset + i: sign for i, sign in enumerate(signs) if sign}

    def code_of(kind: bool) -> bytes:
        writer = Writer()
        Model(len(known), d, kind, writer.decide).walk(shapes, offset, d, len(known), known)
        return writer.code()

    if flat is not None:
        return flat, code_of(flat)
    learned = code_of(False)
    flat = len(learned) > (d + len(known) + 7) // 8
    return flat, code_of(True) if flat else learned


def read(
    code: bytes, shapes: Shapes, offset: int, d: int, count: int, flat: bool
) -> tuple[dict[int, int], int, int]:
    """The signs by parameter, how many bytes the code may have, and the value at its end."""
    reader = Reader(code)
    signs = Model(count, d, flat, reader.decide).walk(shapes, offset, d, count)
    return signs, reader.taken - 3, reader.value
