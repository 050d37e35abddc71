"""A second writer of the update format: plain Python, brute force, step by step as FORMAT.md.

It imports nothing but the standard library, and `reference_context`, which is its own. It tries
every block size and every Rice parameter and writes the protobuf bytes by hand, so that what the
package's encoder chooses and writes can be compared with it byte for byte. It is far too slow for
real updates.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Any

import reference_context
import reference_factored
import reference_steps

Tensors = list[tuple[str, tuple[int, ...], str]]  # name, shape, "f32" | "f16" | "bf16"

DTYPES = {"f32": 1, "f16": 2, "bf16": 3}
BLOCK_SIZES = [1 << level for level in range(8, 25)]
RICE_PARAMETERS = range(25)


# --- protobuf ---------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(field: int, value: int) -> bytes:
    """A varint field; nothing where it has its default, 0."""
    return varint(field << 3) + varint(value) if value else b""


def bytes_field(field: int, value: bytes, always: bool = False) -> bytes:
    """A length-delimited field; nothing where it is empty, unless it is a member of a oneof."""
    return varint(field << 3 | 2) + varint(len(value)) + value if value or always else b""


# --- the messages -----------------------------------------------------------------------------


def layout_bytes(tensors: Tensors) -> bytes:
    """The deterministic serialisation of a Layout."""
    out = b""
    for name, shape, dtype in tensors:
        tensor = bytes_field(1, name.encode())
        tensor += bytes_field(2, b"".join(varint(length) for length in shape))
        tensor += number_field(3, DTYPES[dtype])
        out += bytes_field(1, tensor, always=True)
    return out


def layout_id(tensors: Tensors) -> bytes:
    """The 16 bytes that stand for a layout."""
    return hashlib.blake2b(layout_bytes(tensors), digest_size=16).digest()


def message(
    tensors: Tensors,
    num_parameters: int,
    body: tuple[int, bytes],
    *,
    layout_by_id: bool = False,
    offset: int = 0,
    base_version: int = 0,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """A whole Update around a body, which is given as its field number and its bytes."""
    if layout_by_id:
        out = bytes_field(2, layout_id(tensors), always=True)
    else:
        out = bytes_field(1, layout_bytes(tensors), always=True)
    out += number_field(3, num_parameters)
    out += number_field(4, offset)
    out += number_field(5, base_version)
    for key, value in sorted((metadata or {}).items(), key=lambda item: item[0].encode()):
        entry = bytes_field(1, key.encode(), always=True)
        entry += bytes_field(2, value.encode(), always=True)
        out += bytes_field(6, entry, always=True)
    out += bytes_field(body[0], body[1], always=True)
    return seal(out)


def seal(serialised: bytes) -> bytes:
    """Append field 15."""
    return serialised + b"\x7d" + struct.pack("<I", zlib.crc32(serialised))


# --- the bodies -------------------------------------------------------------------------------


def pack_bits(bits: list[int]) -> bytes:
    """Bits to bytes, LSB first, zeros up to the last byte's end."""
    digits = "".join(["01"[bit] for bit in reversed(bits)])
    return int("0" + digits, 2).to_bytes((len(bits) + 7) // 8, "little")


def scales_field(scales: list[float]) -> bytes:
    """Field 1 of both ternary bodies."""
    return bytes_field(1, b"".join(struct.pack("<f", scale) for scale in scales))


def gaps_of(block: list[int]) -> list[int]:
    """Before each nonzero of a block, how many zeros stand since the last one or the start."""
    gaps, zeros = [], 0
    for sign in block:
        if sign == 0:
            zeros += 1
        else:
            gaps.append(zeros)
            zeros = 0
    return gaps


def cost(gaps: list[int], b: int) -> int:
    """How many bits the gaps take in quotients and remainders."""
    return sum([gap >> b for gap in gaps]) + len(gaps) * (b + 1)


def best_rice(gaps: list[int]) -> int:
    """The b with the fewest bits; of equal ones the smallest."""
    longest = max(gaps, default=0).bit_length()  # more are remainders of nothing but zeros
    return min(RICE_PARAMETERS[: longest + 1], key=lambda b: (cost(gaps, b), b))


def golomb_tables(signs: list[int], block_size: int) -> tuple[list[list[int]], list[int]]:
    """The gaps of each block, and its best Rice parameter."""
    blocks = [signs[at : at + block_size] for at in range(0, len(signs), block_size)]
    gaps = [gaps_of(block) for block in blocks]
    return gaps, [best_rice(block) for block in gaps]


def golomb_with(signs: list[int], scales: list[float], block_size: int) -> bytes:
    """The GolombTernary of a vector of -1, 0 and 1 with blocks of one given size."""
    gaps, rice = golomb_tables(signs, block_size)
    quotients: list[int] = []
    remainders: list[int] = []
    for block, b in zip(gaps, rice, strict=True):
        for gap in block:
            quotients += [0] * (gap >> b) + [1]
            remainders += [gap >> i & 1 for i in range(b)]
    return (
        scales_field(scales)
        + number_field(2, block_size)
        + bytes_field(3, b"".join(varint(len(block)) for block in gaps))
        + bytes_field(4, bytes(rice))
        + bytes_field(5, pack_bits(quotients))
        + bytes_field(6, pack_bits(remainders))
        + bytes_field(7, pack_bits([int(sign < 0) for sign in signs if sign]))
    )


def golomb(signs: list[int], scales: list[float]) -> tuple[int, bytes]:
    """The shortest GolombTernary over all block sizes; of equal ones the smallest blocks."""
    return 8, min((golomb_with(signs, scales, size) for size in BLOCK_SIZES), key=len)


def bitmask(signs: list[int], scales: list[float]) -> tuple[int, bytes]:
    """The BitmaskTernary of a vector of -1, 0 and 1."""
    return 9, (
        scales_field(scales)
        + bytes_field(2, pack_bits([int(sign > 0) for sign in signs]))
        + bytes_field(3, pack_bits([int(sign < 0) for sign in signs]))
    )


def bfloat16(value: float) -> bytes:
    """A float32 rounded to its upper half, to nearest, of two equally near ones the even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def dense(values: list[float], dtype: str) -> tuple[int, bytes]:
    """The Dense body."""
    pack = {
        "f32": lambda value: struct.pack("<f", value),
        "f16": lambda value: struct.pack("<e", value),
        "bf16": bfloat16,
    }[dtype]
    data = b"".join(pack(value) for value in values)
    return 10, number_field(1, DTYPES[dtype]) + bytes_field(2, data)


def context(
    signs: list[int], scales: list[float], tensors: Tensors, offset: int = 0
) -> tuple[int, bytes]:
    """The ContextTernary of a vector of -1, 0 and 1 from parameter offset of a layout."""
    flat, code = reference_context.write(signs, [shape for _, shape, _ in tensors], offset)
    count = sum(sign != 0 for sign in signs)
    return 11, (
        scales_field(scales)
        + number_field(2, count)
        + number_field(3, int(flat))
        + bytes_field(4, code)
    )


def steps(values: list[float], tensors: Tensors, offset: int = 0) -> tuple[int, bytes]:
    """The Steps of values on a grid, by the largest power of two that divides them all."""
    units = [int(value * 2.0**149) for value in values]  # exact: float64 holds it
    zeros = [(unit & -unit).bit_length() - 1 for unit in units if unit]
    exponent = min(zeros) - 149 if zeros else 0
    integers = [unit >> (exponent + 149) for unit in units]
    code = reference_steps.write(integers, [shape for _, shape, _ in tensors], offset)
    count = sum(q != 0 for q in integers)
    return 12, number_field(1, zigzag(exponent)) + number_field(2, count) + bytes_field(3, code)


def zigzag(value: int) -> int:
    """A sint32 as the varint that stands for it."""
    return 2 * value if value >= 0 else -2 * value - 1


def factored(
    found: list[reference_factored.Matrix], rest: tuple[list[int], list[float]] | None = None
) -> tuple[int, bytes]:
    """The Factored of the terms of each matrix, and of signs and scales beside them."""
    body = b""
    if any(matrix.terms for matrix in found):
        heads = [2 * len(matrix.terms) + (1 if matrix.flat else 0) for matrix in found]
        body += bytes_field(1, b"".join(varint(head) for head in heads))
        exponents = [exponent for matrix in found for exponent, _, _ in matrix.terms]
        body += bytes_field(2, b"".join(varint(zigzag(exponent)) for exponent in exponents))
        body += number_field(3, reference_factored.bits_of(found))
        body += bytes_field(4, pack_bits(reference_factored.factor_bits(found)))
        body += bytes_field(5, pack_bits(reference_factored.sign_bits(found)))
    if rest is not None:
        body += bytes_field(6, golomb(*rest)[1], always=True)
    return 13, body


BODIES = {
    "golomb": golomb,
    "bitmask": bitmask,
    "dense": lambda values, _scales: dense(values, "f32"),
    "dense-fp16": lambda values, _scales: dense(values, "f16"),
    "dense-bf16": lambda values, _scales: dense(values, "bf16"),
}


def body_of(
    codec: str, content: list[Any], scales: Any, tensors: Tensors, offset: int = 0
) -> tuple[int, bytes]:
    """A codec's body, as its field number and its bytes; two codecs ask for the layout."""
    if codec == "context":
        return context(content, scales, tensors, offset)
    if codec == "steps":
        return steps(content, tensors, offset)
    return BODIES[codec](content, scales)
