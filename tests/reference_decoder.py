"""A second reader of the update format, written from proto/FORMAT.md alone: slow and obvious.

It imports nothing but the standard library (and `reference_protobuf` and `reference_context`, which
are its own) and parses the protobuf bytes itself, so that the package's decoder and the
specification can be checked against something that shares no code with them. Sections are named
after those of FORMAT.md. Where FORMAT.md lets a reader choose, it rejects.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass, field

import reference_context
import reference_factored
import reference_steps
from reference_protobuf import (
    BYTES,
    FIXED32,
    FaultError,
    Fields,
    bytes_of,
    floats_of,
    malformed,
    number_of,
    numbers_of,
    only,
    read_fields,
    text_of,
    unusual,
)


@dataclass
class Update:
    """What an update says. ``signs`` (parameter -> +1 or -1) or ``values`` is None, by its kind."""

    tensors: list[tuple[str, tuple[int, ...], str]]
    layout_id: bytes
    num_parameters: int
    offset: int
    base_version: int
    metadata: dict[str, str]
    body: str
    scales: list[float] = field(default_factory=list)
    signs: dict[int, int] | None = None
    values: list[float] | None = None

    def dense(self) -> list[float]:
        """The values of all parameters that the update covers."""
        if self.values is not None:
            return self.values
        out = [0.0] * self.num_parameters
        for index, sign in (self.signs or {}).items():
            out[index - self.offset] = sign * self.scale_of(index)
        return out

    def scale_of(self, index: int) -> float:
        """The scale of one parameter of the flattened layout."""
        if len(self.scales) == 1:
            return self.scales[0]
        end = 0
        for tensor, scale in zip(self.tensors, self.scales, strict=True):
            end += size_of(tensor[1])
            if index < end:
                return scale
        raise AssertionError("a position past the layout's end")


# --- Layout, layout id ------------------------------------------------------------------------

DTYPES = {1: "f32", 2: "f16", 3: "bf16"}
Tensors = list[tuple[str, tuple[int, ...], str]]


def size_of(shape: tuple[int, ...]) -> int:
    """The product of a shape; of one that is too large, some number over 2^62."""
    if 0 in shape:
        return 0
    size = 1
    for length in shape:
        size *= length
        if size > 1 << 62:
            break
    return size


def read_layout(data: bytes) -> Tensors:
    """A Layout message."""
    tensors: Tensors = []
    for wire, value in ((wire, value) for number, wire, value in read_fields(data) if number == 1):
        if wire != BYTES:
            raise unusual(f"a tensor of wire type {wire}")
        fields = read_fields(value)
        dtype = number_of(fields, 3, 32)
        if dtype not in DTYPES:
            raise FaultError(
                "DTypeError", f"tensor {len(tensors)} has dtype {dtype}, not 1, 2 or 3"
            )
        shape = tuple(numbers_of(fields, 2))
        if len(shape) > 32:
            raise malformed("a shape of more than 32 lengths")
        if 0 in shape and math.prod(length for length in shape if length) > 1 << 56:
            raise malformed("a tensor without parameters whose other lengths are too large")
        tensors.append((text_of(fields, 1), shape, DTYPES[dtype]))
    if len({name for name, _, _ in tensors}) < len(tensors):
        raise malformed("two tensors of one name")
    if parameters_of(tensors) > 1 << 62:
        raise malformed("a layout of more than 2^62 parameters")
    return tensors


def parameters_of(tensors: Tensors) -> int:
    """How many parameters a layout has."""
    return sum(size_of(shape) for _, shape, _ in tensors)


def write_varint(value: int) -> bytes:
    """The shortest varint."""
    out = b""
    while value > 127:
        out += bytes([128 + value % 128])
        value //= 128
    return out + bytes([value])


def id_of(tensors: Tensors) -> bytes:
    """The layout id."""
    codes = {name: code for code, name in DTYPES.items()}
    out = b""
    for name, shape, dtype in tensors:
        text, dims = name.encode("utf-8"), b"".join(map(write_varint, shape))
        tensor = b""
        if text:
            tensor += b"\x0a" + write_varint(len(text)) + text
        if dims:
            tensor += b"\x12" + write_varint(len(dims)) + dims
        tensor += bytes([0x18, codes[dtype]])
        out += b"\x0a" + write_varint(len(tensor)) + tensor
    return hashlib.blake2b(out, digest_size=16).digest()


# --- Bits -------------------------------------------------------------------------------------


class Bits:
    """A stream of bits, read from the front."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self.at = name, data, 0

    def next(self) -> int:
        """The next bit."""
        if self.at >= 8 * len(self.data):
            raise FaultError("StreamLengthError", f"{self.name} ends after {self.at} bits")
        bit = (self.data[self.at >> 3] >> (self.at & 7)) & 1
        self.at += 1
        return bit

    def end(self) -> None:
        """Nothing but zeros up to the last byte's end, and no further bytes."""
        expected = (self.at + 7) // 8
        if len(self.data) != expected:
            sizes = f"{len(self.data)} bytes, not {expected}"
            raise FaultError("StreamLengthError", f"{self.name} has {sizes} for {self.at} bits")
        while self.at < 8 * len(self.data):
            if self.next():
                raise FaultError("PaddingError", f"{self.name} has a set bit {self.at - 1}")


# --- Ternary bodies ---------------------------------------------------------------------------


def read_scales(fields: Fields, tensors: Tensors) -> list[float]:
    """Field 1 of both ternary bodies."""
    scales = floats_of(fields, 1)
    if len(scales) != 1 and len(scales) != len(tensors):
        raise FaultError("ScaleCountError", f"{len(scales)} scales for {len(tensors)} tensors")
    for i, scale in enumerate(scales):
        if not (math.isfinite(scale) and scale >= 0):
            raise FaultError("ScaleError", f"scale {i} is {scale}")
    return scales


def read_golomb(data: bytes, update: Update) -> None:
    """Golomb-Rice body."""
    fields = read_fields(data)
    update.scales = read_scales(fields, update.tensors)
    d, size = update.num_parameters, number_of(fields, 2, 32)
    if size not in [1 << level for level in range(8, 25)]:
        raise FaultError("BlockSizeError", f"a block size of {size}")
    nonzeros, rice = numbers_of(fields, 3, 32), bytes_of(fields, 4)
    blocks = (d + size - 1) // size
    if len(nonzeros) != blocks or len(rice) != blocks:
        counts = f"{len(nonzeros)} block_nonzeros, {len(rice)} rice_parameters"
        raise FaultError("BlockCountError", f"{counts} for {blocks} blocks")
    quotients = Bits("quotients", bytes_of(fields, 5))
    remainders = Bits("remainders", bytes_of(fields, 6))
    signs = Bits("signs", bytes_of(fields, 7))
    update.signs = {}
    for block in range(blocks):
        start = block * size
        parameters = min(size, d - start)
        n, b = nonzeros[block], rice[block]
        if b > 24:
            raise FaultError("RiceParameterError", f"b = {b} in block {block}")
        if n > parameters:
            raise FaultError("BlockNonzerosError", f"{n} of {parameters} nonzeros in block {block}")
        position = -1
        for _ in range(n):
            quotient = 0
            while quotients.next() == 0:
                quotient += 1
            remainder = sum(remainders.next() << i for i in range(b))
            position += (quotient << b) + remainder + 1
            if position >= parameters:
                raise FaultError("PositionError", f"position {position} of block {block}")
            update.signs[update.offset + start + position] = -1 if signs.next() else 1
    for stream in (quotients, remainders, signs):
        stream.end()


def read_bitmask(data: bytes, update: Update) -> None:
    """Bit masks."""
    fields = read_fields(data)
    update.scales = read_scales(fields, update.tensors)
    masks = []
    for number, name in ((2, "positive"), (3, "negative")):
        mask = bytes_of(fields, number)
        expected = (update.num_parameters + 7) // 8
        if len(mask) != expected:
            raise FaultError("StreamLengthError", f"{name} has {len(mask)} bytes, not {expected}")
        stream = Bits(name, mask)
        masks.append([stream.next() for _ in range(update.num_parameters)])
        stream.end()
    update.signs = {}
    for i, (positive, negative) in enumerate(zip(*masks, strict=True)):
        if positive and negative:
            raise FaultError("MaskOverlapError", f"parameter {update.offset + i} is in both masks")
        if positive or negative:
            update.signs[update.offset + i] = 1 if positive else -1


def read_context(data: bytes, update: Update) -> None:
    """Context body."""
    fields = read_fields(data)
    update.scales = read_scales(fields, update.tensors)
    count, flat, code = number_of(fields, 2), number_of(fields, 3) != 0, bytes_of(fields, 4)
    d = update.num_parameters
    if count > d:
        raise FaultError("NonzeroCountError", f"{count} nonzeros of {d} parameters")
    if code and code[-1] == 0:
        raise FaultError("CodeEndError", "the last byte of the code is 0")
    shapes = [shape for _, shape, _ in update.tensors]
    update.signs, most, value = reference_context.read(code, shapes, update.offset, d, count, flat)
    if len(code) > most:
        raise FaultError("StreamLengthError", f"a code of {len(code)} bytes, not {most} at most")
    if len(update.signs) < count:
        raise FaultError("NonzeroCountError", f"{len(update.signs)} nonzeros, not {count}")
    if value >= 1 << 24:
        raise FaultError("CodeEndError", f"the code ends {value} above the range's low end")


def read_steps(data: bytes, update: Update) -> None:
    """Steps body."""
    fields = read_fields(data)
    count, code = number_of(fields, 2), bytes_of(fields, 3)
    exponent = signed(number_of(fields, 1))
    d = update.num_parameters
    if not -149 <= exponent <= 104:
        raise FaultError("StepRangeError", f"the exponent is {exponent}")
    if count > d:
        raise FaultError("NonzeroCountError", f"{count} nonzeros of {d} parameters")
    if code and code[-1] == 0:
        raise FaultError("CodeEndError", "the last byte of the code is 0")
    shapes = [shape for _, shape, _ in update.tensors]
    found, most, value = reference_steps.read(code, shapes, update.offset, d, count)
    if len(code) > most:
        raise FaultError("StreamLengthError", f"a code of {len(code)} bytes, not {most} at most")
    if len(found) < count:
        raise FaultError("NonzeroCountError", f"{len(found)} nonzeros, not {count}")
    if value >= 1 << 24:
        raise FaultError("CodeEndError", f"the code ends {value} above the range's low end")
    if max(map(abs, found.values()), default=0) >= 1 << 24:
        raise FaultError("StepRangeError", "an integer of 2^24 or more")
    values = [0.0] * d
    for index, q in found.items():
        values[index - update.offset] = q * 2.0**exponent
    update.values = values


def signed(zigzag: int) -> int:
    """The sint32 that a varint stands for."""
    zigzag &= 0xFFFFFFFF
    return zigzag >> 1 if zigzag % 2 == 0 else -(zigzag >> 1) - 1


def read_factored(data: bytes, update: Update) -> None:
    """Factored body."""
    fields = read_fields(data)
    shapes, d = [shape for _, shape, _ in update.tensors], update.num_parameters
    covered = list(reference_context.matrices(shapes, update.offset, d))
    heads = [head & 0xFFFFFFFF for head in numbers_of(fields, 1)] or [0] * len(covered)
    if len(heads) != len(covered):
        raise FaultError("TermCountError", f"{len(heads)} numbers of terms, not {len(covered)}")
    if any(head // 2 > 255 for head in heads):
        raise FaultError("TermCountError", "more than 255 terms")
    exponents = [signed(value) for value in numbers_of(fields, 2)]
    count = sum(head // 2 for head in heads)
    if len(exponents) != count:
        raise FaultError("TermCountError", f"{len(exponents)} exponents of {count} terms")
    if any(not -149 <= exponent <= 96 for exponent in exponents):
        raise FaultError("StepRangeError", f"exponents {exponents}")
    bits = number_of(fields, 3, 32)
    if not (2 <= bits <= 16 if count else bits == 0):
        raise FaultError("FactorBitsError", f"{bits} bits")
    factors = Bits("factors", bytes_of(fields, 4))
    signs = Bits("signs", bytes_of(fields, 5))
    found = reference_factored.read(
        shapes, update.offset, d, heads, exponents, bits, factors.next, signs.next
    )
    factors.end()
    signs.end()
    update.values = reference_factored.values(shapes, update.offset, d, found)
    rest = only(fields, 6, BYTES)
    if rest is not None:
        beside = Update(
            update.tensors, update.layout_id, d, update.offset, update.base_version, {}, "golomb"
        )
        read_golomb(rest, beside)
        if max(beside.scales, default=0.0) > 2.0**126:
            raise FaultError("ScaleError", "a scale over 2^126 beside terms")
        for i, value in enumerate(beside.dense()):
            update.values[i] = reference_factored.rounded(update.values[i] + value)


# --- Dense body -------------------------------------------------------------------------------


def read_dense(data: bytes, update: Update) -> None:
    """Dense body."""
    fields = read_fields(data)
    dtype, values = number_of(fields, 1, 32), bytes_of(fields, 2)
    if dtype not in DTYPES:
        raise FaultError("DTypeError", f"the body has dtype {dtype}, not 1, 2 or 3")
    width = 4 if DTYPES[dtype] == "f32" else 2
    if len(values) != width * update.num_parameters:
        raise FaultError(
            "StreamLengthError", f"{len(values)} bytes for {update.num_parameters} values"
        )
    if DTYPES[dtype] == "bf16":
        values = b"".join(b"\0\0" + values[i : i + 2] for i in range(0, len(values), 2))
    code = "<e" if DTYPES[dtype] == "f16" else "<f"
    update.values = [item[0] for item in struct.iter_unpack(code, values)]
    for i, value in enumerate(update.values):
        if not math.isfinite(value):
            raise FaultError("NonFiniteBodyError", f"parameter {update.offset + i} is {value}")


BODIES = {
    8: ("golomb", read_golomb),
    9: ("bitmask", read_bitmask),
    10: ("dense", read_dense),
    11: ("context", read_context),
    12: ("steps", read_steps),
    13: ("factored", read_factored),
}


# --- Checksum, the message --------------------------------------------------------------------


def decode(blob: bytes, layout: Tensors | None = None, *, part: bool = False) -> Update:
    """Read one message.

    ``layout`` is the one that the update must be for, if there is such. Unless ``part``, the update
    must cover its layout.
    """
    if len(blob) > (1 << 31) - 1:
        raise FaultError("UpdateSizeError", f"{len(blob)} bytes")
    if len(blob) < 5 or blob[-5] != 0x7D:
        raise FaultError("ChecksumError", "no field 15 at the end")
    (crc,) = struct.unpack("<I", blob[-4:])
    if crc != zlib.crc32(blob[:-5]):
        raise FaultError("ChecksumError", f"{crc:08x}, not {zlib.crc32(blob[:-5]):08x}")
    fields = read_fields(blob[:-5])
    for number, wire, value in fields:
        if number == 15:
            if wire != FIXED32 or value == b"\0\0\0\0":
                raise unusual("a field 15 that a library does not see before the last five bytes")
            raise malformed("a field 15 before the last five bytes")

    metadata = {}
    for number, wire, value in fields:
        if number == 6:
            if wire != BYTES:
                raise unusual(f"metadata of wire type {wire}")
            entry = read_fields(value)
            if any(key not in (1, 2) for key, _, _ in entry):
                raise unusual("an entry of metadata with other fields than key and value")
            metadata[text_of(entry, 1)] = text_of(entry, 2)

    inline, by_id = only(fields, 1, BYTES), only(fields, 2, BYTES)
    if inline is not None and by_id is not None:
        raise unusual("a layout and a layout id")
    if inline is None and by_id is None:
        raise FaultError("UnknownLayoutError", "neither a layout nor a layout id")
    if inline is not None:
        tensors = read_layout(inline)
        if layout is not None and tensors != layout:
            raise FaultError("LayoutMismatchError", "another layout than expected")
    else:
        if len(by_id) != 16:
            raise malformed(f"a layout id of {len(by_id)} bytes")
        if layout is None or by_id != id_of(layout):
            raise FaultError("UnknownLayoutError", f"layout {by_id.hex()} is not known")
        tensors = layout

    bodies = [item for item in fields if item[0] in BODIES]
    if not bodies:
        raise FaultError("MissingBodyError", "no body, or none that this reader knows")
    if len(bodies) > 1:
        raise unusual(f"{len(bodies)} bodies")
    number, wire, data = bodies[0]
    if wire != BYTES:
        raise unusual(f"a body of wire type {wire}")

    name, read_body = BODIES[number]
    d, offset, total = number_of(fields, 3), number_of(fields, 4), parameters_of(tensors)
    if offset > total or d > total - offset:
        raise FaultError("LayoutMismatchError", f"{offset} + {d} parameters of {total}")
    if not part and (offset, d) != (0, total):
        raise FaultError("CoverageError", f"{offset} .. {offset + d} of {total} parameters")
    if layout is None and d > max(1 << 24, len(blob) << 13):
        raise FaultError("ImplausibleSizeError", f"{d} parameters in {len(blob)} bytes")
    update = Update(tensors, id_of(tensors), d, offset, number_of(fields, 5), metadata, body=name)
    read_body(data, update)
    return update
