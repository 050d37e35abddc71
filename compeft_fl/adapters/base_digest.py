"""A digest of a base model's weights, by samples: is the model here the one that an adapter is for?

An adapter fits every base model of its shapes, and is of use on one alone. Comparing all weights
takes minutes; a few of each tensor tell two models apart in well under a second, since whatever is
fine-tuned further moves all of its tensors. It is no protection against somebody who changes
weights on purpose: they can leave the sampled ones as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.disk.atomic import replacing
from compeft_fl.errors import AdapterError, ParameterError
from compeft_fl.printable import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "BASE_DIGEST_BYTES",
    "BASE_FILE",
    "base_digest",
    "base_digest_under",
    "check_base",
    "note_base",
    "noted_base",
]

BASE_DIGEST_BYTES: Final = 16
BASE_FILE: Final = "base.json"
"""In an adapter folder, beside PEFT's files: which base model it was trained on."""

_SAMPLES: Final = 32  # of each tensor
_INT8_STEP: Final = 16


def base_digest(model: nn.Module) -> bytes:
    """16 bytes that stand for a base model's weights: BLAKE2b-128 of samples of each tensor.

    The same for float32 and bfloat16, in which one checkpoint is loaded here and there: samples are
    rounded to bfloat16. (Not so float16, where values are rounded twice.) Quantised tensors give
    their codes and the kind of quantisation, so that a model in 4 bits is another base than the
    same in bfloat16: what an adapter learns on it makes up for its rounding too. Heads are left out
    (transformers' ``base_model``), since they depend on the task.

    Parameters
    ----------
    model : torch.nn.Module
        As it was loaded, before an adapter is put on it, and before its first use: bitsandbytes
        then packs 4-bit weights anew on some CPUs.

    Returns
    -------
    bytes
        `BASE_DIGEST_BYTES` of them.

    Raises
    ------
    ParameterError
        A PEFT model, or one without values (on torch's meta device).

    Examples
    --------
    >>> import torch
    >>> ones = torch.nn.Linear(3, 2)
    >>> for parameter in ones.parameters():
    ...     _ = torch.nn.init.ones_(parameter)
    >>> first = base_digest(ones)
    >>> base_digest(ones.to(torch.bfloat16)) == first
    True
    >>> _ = torch.nn.init.constant_(ones.weight, 1.5)
    >>> base_digest(ones) == first
    False
    """
    if hasattr(model, "peft_config"):
        raise ParameterError("expected a base model without an adapter, found a PEFT model")
    trunk = getattr(model, "base_model", model)  # transformers' models without their head
    return _digest(dict(trunk.named_parameters()))


def base_digest_under(model: Any) -> bytes:
    """`base_digest` of the model under a PEFT model's adapters, which are left out.

    Raises
    ------
    ParameterError
        Weights that an adapter is merged into, or without values.
    """
    if any(getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise ParameterError("expected a base model beside its adapter, found it merged")
    base = model.get_base_model()
    trunk = getattr(base, "base_model", base)
    own = getattr(model.base_model, "prefix", None)  # of the names of a method's parameters
    found = {}
    for name, parameter in trunk.named_parameters():
        parts = name.split(".")
        if "modules_to_save" in parts or (own and any(part.startswith(own) for part in parts)):
            continue
        found[".".join(p for p in parts if p not in ("base_layer", "original_module"))] = parameter
    return _digest(found)


def _digest(parameters: Mapping[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=BASE_DIGEST_BYTES)
    for name, parameter in sorted(parameters.items()):
        kind, samples = _sampled(name, parameter)
        digest.update(f"{name} {kind}\n".encode())
        digest.update(samples)
    return digest.digest()


def note_base(folder: Path, digest: bytes, *, quantization: str = "") -> None:
    """Write into an adapter folder on which base model the adapter was trained.

    Parameters
    ----------
    folder : Path
    digest : bytes
        Of `base_digest`.
    quantization : str
        How the base was quantised, for who loads it: ``4bit``, ``8bit`` or nothing.
    """
    told = {"base_digest": digest.hex(), "quantization": quantization}
    with replacing(folder / BASE_FILE) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def noted_base(folder: Path) -> tuple[bytes, str] | None:
    """What `note_base` has written: digest and quantisation; None: nothing.

    Raises
    ------
    AdapterError
        A file that says something else.
    """
    file = folder / BASE_FILE
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        digest, quantization = bytes.fromhex(told["base_digest"]), told["quantization"]
        if len(digest) != BASE_DIGEST_BYTES or quantization not in ("", "4bit", "8bit"):
            raise ValueError("no digest, or no quantization that there is")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{file}: expected the digest of a base: {one_line(error)}") from None
    return digest, quantization


def check_base(folder: Path, digest: bytes) -> None:
    """Raise AdapterError where an adapter folder is for another base model than that of `digest`.

    A folder that says nothing of its base is taken as it is.
    """
    noted = noted_base(folder)
    if noted is not None and noted[0] != digest:
        quantized = f" in {noted[1]}" if noted[1] else ""
        raise AdapterError(
            f"{folder}: expected the base model that the adapter was trained on, digest "
            f"{noted[0].hex()}{quantized}, found another, digest {digest.hex()}: give the same "
            "weights, in the same quantization"
        )


def _sampled(name: str, parameter: Any) -> tuple[str, bytes]:
    """What a tensor is, and bytes of some of its values."""
    import torch

    values: Tensor = parameter.detach()
    if values.is_meta:
        raise ParameterError(f"expected a base model with its values, found none in {name}")
    flat = values.reshape(-1)
    count = min(_SAMPLES, flat.numel())
    where = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).round().long()
    chosen = flat[where.to(flat.device)].cpu()
    if values.is_floating_point():
        rounded = chosen.to(torch.float32).to(torch.bfloat16).to(torch.float32)
        return f"{tuple(values.shape)}", rounded.numpy().astype("<f4").tobytes()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        # Codes only: scales are computed in another order on another device.
        nested = "nested" if getattr(state, "nested", False) else "plain"
        kind = f"{state.quant_type} {state.blocksize} {nested} {tuple(state.shape)}"
        return kind, chosen.numpy().tobytes()
    # bitsandbytes' int8: halves of a step round up here and down there, so sixteenths tell.
    coarse = torch.div(chosen.to(torch.int32) + _INT8_STEP // 2, _INT8_STEP, rounding_mode="floor")
    return f"{values.dtype} {tuple(values.shape)}", coarse.numpy().astype("<i4").tobytes()
