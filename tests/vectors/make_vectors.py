"""Write the golden files of the update format: tests/vectors/*.compeft and manifest.json.

Golden files pin the bytes: they were written once, and a change that makes them differ is a change
of the format. No test runs this script, and it overwrites nothing unless told to with ``--force``;
with ``--add`` it writes the files of cases that are new, and the manifest with them.

    python tests/vectors/make_vectors.py [--add | --force]

Each case of the manifest says how its input was made (`make_input` repeats it from the seed), how
it was encoded, and what it decodes to. Whole updates were written by compeft_fl.encode, and only if
tests/reference_encoder.py writes the same bytes; parts by tests/reference_encoder.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import reference_encoder  # noqa: E402
import reference_factored  # noqa: E402

MANIFEST = HERE / "manifest.json"

# Tensors: name, shape, data type at home, and the density of nonzeros in it.
LORA = [
    ["base.layer.0.lora_A.weight", [4, 96], "f32", 0.05],
    ["base.layer.0.lora_B.weight", [96, 4], "f32", 0.02],
    ["base.layer.1.lora_A.weight", [4, 96], "f16", 0.3],
    ["base.layer.1.lora_B.weight", [96, 4], "bf16", 0.1],
]
ODD = [  # a scalar, tensors without parameters, an empty name, names that are not ASCII
    ["", [], "f32", 1.0],
    ["empty", [0, 2**40], "f16", 0.0],
    ["größe ∑", [7, 1, 19], "bf16", 0.2],
    ["also empty", [3, 0], "f32", 0.0],
    ["last", [123], "f32", 0.4],
]
FEW = [["w", [30_000], "f32", 0.0004]]
UNEVEN = [["thick", [3_000], "f32", 0.6], ["thin", [9_000], "f32", 0.003]]
STRIPES = [[f"stripe.{i}", [256], "f32", (0.9, 0.002)[i % 2]] for i in range(24)]
MIDDLE = [["w", [128, 128], "f32", 0.01]]
WIDE = [["conv", [5, 7, 60], "f32", 0.2], ["w", [270, 272], "bf16", 0.05]]  # indices over 255
RANKS = [
    ["a.lora_A.weight", [8, 200], "f32", 0.1],
    ["a.lora_B.weight", [200, 8], "f32", 0.05],
    ["b.lora_A.weight", [8, 200], "f32", 0.2],
    ["b.bias", [31], "f16", 0.5],
]
METADATA = {"adapter_config": '{"r": 4, "peft_type": "LORA"}', "empty": "", "": "no key", "Ä": "ö"}

CASES: list[dict[str, Any]] = [
    {"name": "golomb", "codec": "golomb", "tensors": LORA, "scales": [0.0123]},
    {"name": "golomb-by-id", "codec": "golomb", "tensors": LORA, "scales": [0.0123],
     "layout_by_id": True, "base_version": 300},
    {"name": "golomb-scales", "codec": "golomb", "tensors": LORA,
     "scales": [0.5, 0.0, 3e-38, 7.25]},
    {"name": "golomb-metadata", "codec": "golomb", "tensors": LORA, "scales": [1.0],
     "base_version": 2**64 - 1, "metadata": METADATA},
    {"name": "golomb-odd-layout", "codec": "golomb", "tensors": ODD, "scales": [2.0]},
    {"name": "golomb-few", "codec": "golomb", "tensors": FEW, "scales": [0.25]},
    {"name": "golomb-uneven", "codec": "golomb", "tensors": UNEVEN, "scales": [0.25, 0.75]},
    {"name": "golomb-stripes", "codec": "golomb", "tensors": STRIPES, "scales": [1e-6]},
    {"name": "golomb-middle", "codec": "golomb", "tensors": MIDDLE, "scales": [1.5]},
    {"name": "golomb-zero", "codec": "golomb", "tensors": [["w", [5_000], "f32", 0.0]],
     "scales": [0.0]},
    {"name": "golomb-full", "codec": "golomb", "tensors": [["w", [1_111], "f32", 1.0]],
     "scales": [0.125]},
    {"name": "golomb-one", "codec": "golomb", "tensors": [["w", [1], "f32", 1.0]], "scales": [1.0]},
    {"name": "golomb-no-parameters", "codec": "golomb", "tensors": [["w", [0], "f32", 0.0]],
     "scales": [0.0]},
    {"name": "bitmask", "codec": "bitmask", "tensors": LORA, "scales": [0.0123]},
    {"name": "bitmask-by-id", "codec": "bitmask", "tensors": ODD, "scales": [1, 2, 3, 4, 5],
     "layout_by_id": True, "base_version": 1},
    {"name": "bitmask-zero", "codec": "bitmask", "tensors": [["w", [65], "f32", 0.0]],
     "scales": [0.0]},
    {"name": "bitmask-full", "codec": "bitmask", "tensors": [["w", [64], "f32", 1.0]],
     "scales": [0.5], "metadata": {"note": "all set"}},
    {"name": "dense", "codec": "dense", "tensors": ODD},
    {"name": "dense-by-id", "codec": "dense", "tensors": LORA, "layout_by_id": True,
     "base_version": 127},
    {"name": "dense-fp16", "codec": "dense-fp16", "tensors": LORA},
    {"name": "dense-bf16", "codec": "dense-bf16", "tensors": LORA, "metadata": {"k": "v"}},
    {"name": "parts-golomb", "codec": "golomb", "tensors": LORA, "scales": [0.5, 0.0, 3e-38, 7.25],
     "base_version": 9, "parts": [[0, 384], [384, 900], [900, 1536]]},
    {"name": "parts-mixed", "codec": ["bitmask", "golomb"], "tensors": LORA, "scales": [2.0],
     "layout_by_id": True, "metadata": {"note": "the first alone"},
     "parts": [[0, 333], [333, 1536]]},
    {"name": "parts-dense", "codec": ["dense", "dense-bf16", "dense-fp16"], "tensors": ODD,
     "parts": [[0, 1], [1, 134], [134, 257]]},
    {"name": "context", "codec": "context", "tensors": LORA, "scales": [0.0123]},
    {"name": "context-by-id", "codec": "context", "tensors": RANKS, "scales": [0.5, 0.25, 0.0, 1.0],
     "rank_one": True, "layout_by_id": True, "base_version": 300},
    {"name": "context-odd-layout", "codec": "context", "tensors": ODD, "scales": [2.0]},
    {"name": "context-wide", "codec": "context", "tensors": WIDE, "scales": [0.25]},
    {"name": "context-few", "codec": "context", "tensors": FEW, "scales": [0.25]},
    {"name": "context-zero", "codec": "context", "tensors": [["w", [5_000], "f32", 0.0]],
     "scales": [0.0]},
    {"name": "context-full", "codec": "context", "tensors": [["w", [11, 101], "f32", 1.0]],
     "scales": [0.125]},
    {"name": "context-flat", "codec": "context", "tensors": [["w", [40, 9], "f32", 0.5]],
     "scales": [0.125]},
    {"name": "context-no-parameters", "codec": "context", "tensors": [["w", [0], "f32", 0.0]],
     "scales": [0.0]},
    {"name": "parts-context", "codec": ["context", "context", "golomb"], "tensors": LORA,
     "scales": [2.0], "parts": [[0, 500], [500, 1152], [1152, 1536]]},
    {"name": "steps", "codec": "steps", "tensors": RANKS, "exponent": -12},
    {"name": "steps-by-id", "codec": "steps", "tensors": LORA, "exponent": 3,
     "layout_by_id": True, "base_version": 300},
    {"name": "steps-wide", "codec": "steps", "tensors": WIDE, "exponent": -149},
    {"name": "steps-large", "codec": "steps", "tensors": RANKS, "exponent": 104, "bits": 24},
    {"name": "steps-zero", "codec": "steps", "tensors": [["w", [5_000], "f32", 0.0]],
     "exponent": 0},
    {"name": "steps-no-parameters", "codec": "steps", "tensors": [["w", [0], "f32", 0.0]],
     "exponent": 0},
    {"name": "parts-steps", "codec": ["steps", "steps", "dense"], "tensors": LORA,
     "exponent": -3, "parts": [[0, 500], [500, 1152], [1152, 1536]]},
    {"name": "factored", "codec": "factored", "tensors": RANKS, "terms": [2, 1, 0, -1]},
    {"name": "factored-by-id", "codec": "factored", "tensors": LORA, "terms": [1, 3, -2, 1],
     "rest": [0.0123], "layout_by_id": True, "base_version": 300},
    {"name": "factored-odd-layout", "codec": "factored", "tensors": ODD, "terms": [1, 2, -1],
     "rest": [0.5, 1.0, 0.0, 2.0, 3e-38]},
    {"name": "factored-wide", "codec": "factored", "tensors": WIDE, "terms": [2, 1], "bits": 16},
    {"name": "factored-many", "codec": "factored", "tensors": [["w", [3, 40], "f32", 0.0]],
     "terms": [255], "bits": 2},
    {"name": "factored-zero", "codec": "factored", "tensors": [["w", [5_000], "f32", 0.0]],
     "terms": [0]},
    {"name": "parts-factored", "codec": ["factored", "dense", "factored"], "tensors": LORA,
     "terms": [2, 1, 0, 3], "rest": [2.0], "parts": [[0, 384], [384, 1152], [1152, 1536]]},
]  # fmt: skip


def size_of(shape: list[int]) -> int:
    """The product of a shape."""
    size = 1
    for length in shape:
        size *= length
    return size


def to_float32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def make_input(case: dict[str, Any]) -> list[int] | list[float]:
    """The case's input, again: signs (-1, 0, 1) where it has scales, values where it has none.

    Only ``random.Random.random`` is used, whose numbers are the same in all versions of Python.
    With "rank_one", sign and density are products of what a row and what a column has, and one sign
    in eight is turned. With "exponent", values are steps of 2^exponent, each further one half as
    likely, or of up to so many "bits". With "terms", values are sums of so many terms, see
    `make_terms`.
    """
    if "terms" in case:
        found, signs = make_terms(case)
        shapes = [tuple(shape) for _, shape, _, _ in case["tensors"]]
        sums = reference_factored.values(shapes, 0, sum(map(size_of, shapes)), found)
        if "rest" not in case:
            return sums
        scales = [to_float32(scale) for scale in case["rest"]]
        each = [s for s, shape in zip(scales, shapes, strict=False) for _ in range(size_of(shape))]
        return [
            reference_factored.rounded(value + sign * scale)
            for value, sign, scale in zip(
                sums, signs, each if len(scales) > 1 else scales * len(sums), strict=True
            )
        ]
    rng = random.Random(case["seed"])
    if case.get("rank_one"):
        signs = []
        for _, shape, _, density in case["tensors"]:
            rows, columns = ([rng.random() - 0.5 for _ in range(n)] for n in (shape[0], shape[-1]))
            for i in range(size_of(shape)):
                product = rows[i // shape[-1]] * columns[i % shape[-1]]
                kept, turned = rng.random() < 16 * density * abs(product), rng.random() < 0.125
                signs.append((-1 if (product < 0) != turned else 1) if kept else 0)
        return signs
    if "scales" in case:
        signs = []
        for _, shape, _, density in case["tensors"]:
            for _ in range(size_of(shape)):
                kept, negative = rng.random() < density, rng.random() < 0.5
                signs.append((-1 if negative else 1) if kept else 0)
        return signs
    if "exponent" in case:
        steps = []
        for _, shape, _, density in case["tensors"]:
            for _ in range(size_of(shape)):
                kept, negative, magnitude = rng.random() < density, rng.random() < 0.5, 1
                if "bits" in case:
                    magnitude += int(rng.random() * (2 ** case["bits"] - 1))
                while "bits" not in case and rng.random() < 0.5:
                    magnitude += 1
                q = (-magnitude if negative else magnitude) if kept else 0
                steps.append(q * 2.0 ** case["exponent"])
        return steps
    d = sum(size_of(shape) for _, shape, _, _ in case["tensors"])
    values = [to_float32((rng.random() - 0.5) * 2.0 ** -(i % 30)) for i in range(d)]
    values[:5] = [-0.0, 1.00390625, 1.01171875, 65504.0, -1.0]  # ties of bfloat16, float16's last
    return values


def make_terms(case: dict[str, Any]) -> tuple[list[reference_factored.Matrix], list[int]]:
    """The case's terms for each tensor that has parameters, and the signs of what is beside them.

    So many "terms" each, flat ones where the number is negative; integers of so many "bits", of 5
    where it does not say.
    """
    rng = random.Random(case["seed"])
    found, signs, bits = [], [], case.get("bits", 5)
    filled = [shape for _, shape, _, _ in case["tensors"] if size_of(shape)]
    for shape, count in zip(filled, case["terms"], strict=True):
        columns = shape[-1] if shape else 1
        matrix = reference_factored.Matrix(flat=count < 0)
        s, lines = reference_factored.sides(size_of(shape) // columns, columns, matrix.flat)
        for _ in range(abs(count)):
            factors = [int(rng.random() * 2**bits) - 2 ** (bits - 1) for _ in range(s)]
            exponent = int(rng.random() * 40) - 30
            negative = [int(rng.random() < 0.5) for _ in range(lines)]
            matrix.terms.append((exponent, factors, negative))
        found.append(matrix)
    for _, shape, _, density in case["tensors"]:
        for _ in range(size_of(shape)):
            kept, minus = rng.random() < density, rng.random() < 0.5
            signs.append((-1 if minus else 1) if kept else 0)
    return found, signs


def factored_of(case: dict[str, Any], layout: Any, ternary: Any) -> Any:
    """The case's terms as the package has them; ``ternary`` makes signs and scales a vector."""
    import numpy as np

    from compeft_fl.factored import FactoredVector, Terms

    found, signs = make_terms(case)
    terms = [
        Terms(
            np.array([factors for _, factors, _ in matrix.terms], np.int16),
            np.array([exponent for exponent, _, _ in matrix.terms], np.int32),
            np.array([negative for _, _, negative in matrix.terms], np.bool_),
            matrix.flat,
        )
        if matrix.terms
        else None
        for matrix in found
    ]
    return FactoredVector(layout, terms, ternary(signs) if "rest" in case else None)


def digest_of(content: list[int] | list[float], scales: list[float] | None) -> str:
    """SHA-256 of what an update says, parameter by parameter.

    Ternary: the text "index:+" or "index:-" of each nonzero in order, one a line. Dense: the values
    as little-endian float32.
    """
    if scales is not None:
        signs = enumerate(content)
        text = "".join(f"{index}:{'+' if sign > 0 else '-'}\n" for index, sign in signs if sign)
        return hashlib.sha256(text.encode()).hexdigest()
    return hashlib.sha256(b"".join(struct.pack("<f", value) for value in content)).hexdigest()


def as_decoded(codec: str, values: list[float]) -> list[float]:
    """Values after the rounding of a dense codec."""
    if codec in ("dense", "steps", "factored"):
        return values
    if codec == "dense-fp16":
        return [struct.unpack("<e", struct.pack("<e", value))[0] for value in values]
    return [struct.unpack("<f", b"\0\0" + reference_encoder.bfloat16(value))[0] for value in values]


def reference_parts(case: dict[str, Any]) -> list[bytes]:
    """The case as tests/reference_encoder.py writes it: one message for each of its parts."""
    content = make_input(case)
    tensors = [(name, tuple(shape), dtype) for name, shape, dtype, _ in case["tensors"]]
    codecs = case["codec"] if isinstance(case["codec"], list) else [case["codec"]]
    blobs = []
    for i, (start, stop) in enumerate(case.get("parts", [[0, len(content)]])):
        codec = codecs[i % len(codecs)]
        if codec == "factored":
            body = reference_encoder.factored(*terms_within(case, start, stop))
        else:
            body = reference_encoder.body_of(
                codec, content[start:stop], case.get("scales"), tensors, start
            )
        blobs.append(
            reference_encoder.message(
                tensors,
                stop - start,
                body,
                layout_by_id=case.get("layout_by_id", False),
                offset=start,
                base_version=case.get("base_version", 0),
                metadata=None if i else case.get("metadata"),
            )
        )
    return blobs


def terms_within(
    case: dict[str, Any], start: int, stop: int
) -> tuple[list[reference_factored.Matrix], tuple[list[int], list[float]] | None]:
    """What `reference_encoder.factored` takes, of the whole tensors in start .. stop."""
    found, signs = make_terms(case)
    inside, first = [], 0
    filled = [size_of(shape) for _, shape, _, _ in case["tensors"] if size_of(shape)]
    for size, matrix in zip(filled, found, strict=True):
        if start <= first < stop:
            inside.append(matrix)
        first += size
    if "rest" not in case:
        return inside, None
    return inside, (signs[start:stop], case["rest"])


def package_blob(case: dict[str, Any]) -> bytes:
    """The case as compeft_fl writes it."""
    import numpy as np

    from compeft_fl import Layout, TaskVector, TernaryVector, encode
    from compeft_fl.task_vector import TensorSpec

    layout = Layout(
        TensorSpec(name, tuple(shape), dtype) for name, shape, dtype, _ in case["tensors"]
    )
    content = make_input(case)
    update: TaskVector | TernaryVector

    def ternary(signs: list[int], scales: str) -> TernaryVector:
        masks = []
        for wanted in (1, -1):
            bits = np.zeros(64 * ((len(signs) + 63) // 64), np.uint8)
            bits[: len(signs)] = [sign == wanted for sign in signs]
            masks.append(np.packbits(bits, bitorder="little").view(np.uint64))
        return TernaryVector(layout, masks[0], masks[1], np.array(case[scales], np.float32))

    if "scales" in case:
        update = ternary(content, "scales")  # type: ignore[arg-type]
    elif "terms" in case:
        update = factored_of(case, layout, lambda signs: ternary(signs, "rest"))
    else:
        update = TaskVector(layout, np.array(content, np.float32))
    return encode(
        update,
        case["codec"],
        layout_by_id=case.get("layout_by_id", False),
        base_version=case.get("base_version", 0),
        metadata=case.get("metadata"),
    )


def write_case(case: dict[str, Any], write: Any) -> dict[str, Any]:
    """Write a case's files; return its entry of the manifest."""
    blobs = reference_parts(case)
    if "parts" not in case:
        package = package_blob(case)
        if package != blobs[0]:
            sys.exit(f"{case['name']}: compeft_fl and the reference encoder write different bytes")
    codecs = case["codec"] if isinstance(case["codec"], list) else [case["codec"]]
    content = make_input(case)
    if "scales" not in case:
        decoded: list[float] = []
        for i, (start, stop) in enumerate(case.get("parts", [[0, len(content)]])):
            decoded += as_decoded(codecs[i % len(codecs)], content[start:stop])
        content = decoded
    files = []
    for i, blob in enumerate(blobs):
        name = f"{case['name']}.{i}.compeft" if len(blobs) > 1 else f"{case['name']}.compeft"
        write(HERE / name, blob)
        files.append(name)
    tensors = [(name, tuple(shape), dtype) for name, shape, dtype, _ in case["tensors"]]
    return {
        **case,
        "files": files,
        "layout_id": reference_encoder.layout_id(tensors).hex(),
        "num_parameters": len(content),
        "num_nonzeros": sum(value != 0 for value in content),
        "digest": digest_of(content, case.get("scales")),
    }


def main() -> None:
    """Write all golden files, or say which of them is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="overwrite the files that are there")
    parser.add_argument("--add", action="store_true", help="write those of new cases alone")
    options = parser.parse_args()
    force = options.force
    for index, case in enumerate(CASES):
        case["seed"] = 20_231_113 + index
    pending: dict[Path, bytes] = {}
    entries = [write_case(case, pending.__setitem__) for case in CASES]
    manifest = {"about": __doc__.strip(), "digest": digest_of.__doc__.strip(), "cases": entries}
    pending[MANIFEST] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    if options.add:
        old = {case["name"]: case for case in json.loads(MANIFEST.read_bytes())["cases"]}
        if [old[case["name"]] for case in entries if case["name"] in old] != list(old.values()):
            sys.exit("expected the cases that are there, found others: nothing written")
        for path in [path for path in pending if path != MANIFEST and path.exists()]:
            if pending.pop(path) != path.read_bytes():
                sys.exit(f"{path.name} would have other bytes: nothing written")
        force = True
    there = sorted(path.name for path in pending if path.exists())
    if there and not force:
        sys.exit(f"{len(there)} files are there already ({there[0]}, ...): nothing written")
    for path, data in pending.items():
        path.write_bytes(data)
    print(f"wrote {len(pending)} files, {sum(map(len, pending.values()))} bytes, to {HERE}")


if __name__ == "__main__":
    main()
