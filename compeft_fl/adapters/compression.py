"""An adapter to an update, read piece by piece: what ``compeft-fl compress`` does.

With a start, all tensors are one task vector: 4 bytes a parameter, and next to nothing beside it.
Without one, each factor of a product (`compeft_fl.adapters.factors`) is compressed by itself, one
after the other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl import codecs
from compeft_fl.adapters import factors
from compeft_fl.adapters.carried import carried_names
from compeft_fl.adapters.folders import Adapter
from compeft_fl.adapters.meaning import changes_base
from compeft_fl.adapters.starts import resized_start, shapes_of, tag_of
from compeft_fl.adapters.weights import float32_pieces
from compeft_fl.codecs.base import Update
from compeft_fl.compeft import compress
from compeft_fl.errors import AdapterError
from compeft_fl.factored import FactoredVector, Terms
from compeft_fl.reduction.factorize import factorize
from compeft_fl.reduction.quality import Quality
from compeft_fl.task_vector import Layout, TaskVector
from compeft_fl.ternary import TernaryVector

__all__ = ["CompressedAdapter", "compress_adapter", "keep_adapter"]


@dataclass(frozen=True)
class CompressedAdapter:
    """What a file holds of an adapter.

    Attributes
    ----------
    update : TernaryVector or TaskVector
    start : str
        The tag of `compeft_fl.adapters.Start`.
    carried : dict
        Tensors that are kept as they are.
    quality : Quality
        Of the update, against the task vector.
    effect : float or None
        Of an update without a start whose tensors are factors: the cosine between the changes of
        the weights, before and after; where one module has most of the parameters, the product of
        its factors' cosines, which is near it. None: the same as the task vector's, or not known.
    """

    update: Update
    start: str
    carried: dict[str, Any]
    quality: Quality
    effect: float | None = None


def compress_adapter(
    adapter: Adapter,
    init: Adapter | None = None,
    *,
    density: float = 0.05,
    scale: str | float = "norm",
    support: str = "fixed",
    factored: bool = False,
) -> CompressedAdapter:
    """Compress an adapter's task vector.

    Parameters
    ----------
    adapter : Adapter
    init : Adapter, optional
        The adapter as it was before training; see `compeft_fl.adapters.start_of`.
    density, scale, support
        As for `compeft_fl.compress`; without ``init``, of each factor by itself.
    factored : bool
        Low-rank signs in as many bits, see `compeft_fl.reduction.factorize.factorize`.

    Raises
    ------
    AdapterError, LayoutError
        As `start_of`; factors that were taken out of the base's weights (PiSSA) and no start.
    ParameterError, NonFiniteError
        As `compeft_fl.compress`.
    """
    source = _Source(adapter, init)
    if init is None and changes_base(adapter.config):
        raise AdapterError(
            f"init_lora_weights {adapter.config['init_lora_weights']!r} takes the start out of the "
            "base's weights, and what is lost of it is lost of the base: give the adapter as it "
            "was before training with --init DIR, or keep all with --codec dense"
        )
    layout = source.layout
    everything = list(range(len(layout.tensors)))
    parts = [everything] if init is not None else factors.groups(adapter.method, layout)
    qualities = []
    terms: list[Terms | None] = [None] * len(layout.tensors)
    words = (layout.num_parameters + 63) >> 6
    masks = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
    scales = np.zeros(len(layout.tensors), np.float32)
    for indices in parts:
        tau = source.task_vector(indices)
        if tau.num_parameters == 0:
            continue
        tau.check_finite()
        if factored:
            found = factorize(tau, density)
            qualities.append(Quality.of(tau, found))
            filled = [index for index in indices if layout.sizes[index]]
            for index, each in zip(filled, found.terms, strict=True):
                terms[index] = each
            if found.rest is None:
                continue
            kept = found.rest
        else:
            kept = compress(tau, density, scale, support)
            qualities.append(Quality.of_compressed(tau, kept))
        scales[indices] = kept.scales[0]
        if indices == everything:
            masks = kept.positive, kept.negative
        else:
            for to, of in zip(masks, (kept.positive, kept.negative), strict=True):
                _place(of, tau.layout, to, layout, indices)
        del tau
    one = scales[:1] if len(set(scales.tolist())) == 1 else scales
    ternary = TernaryVector(layout, *masks, one)
    update: TernaryVector | FactoredVector = ternary
    if factored:
        has = [each for each, size in zip(terms, layout.sizes, strict=True) if size]
        update = FactoredVector(layout, has, ternary if ternary.num_nonzeros else None)
    effect = None
    if init is None and len(parts) > 1:
        modules = _modules(adapter.method, layout)
        if max(sum(layout.sizes[i] for _, i in found) for found in modules) <= max(
            _SMALL, layout.num_parameters // 16
        ):
            pairs = _factor_pairs(adapter, update, modules)
            effect = factors.effect_cosine(adapter.method, pairs)
        else:  # too large to be held twice
            effect = math.prod(quality.cosine for quality in qualities)
    quality = sum(qualities, Quality(0.0, 0.0, 0.0))
    return CompressedAdapter(update, source.tag, source.carried(), quality, effect)


def keep_adapter(
    adapter: Adapter, init: Adapter | None = None, codec: str = "dense"
) -> CompressedAdapter:
    """An adapter's whole task vector, for one of the dense codecs.

    Raises
    ------
    AdapterError, LayoutError
        As `start_of`.
    NonFiniteError
        A value that is not finite.
    """
    source = _Source(adapter, init)
    tau = source.task_vector(range(len(source.layout.tensors)))
    tau.check_finite()
    quality = Quality(0.0, 0.0, 0.0)
    writer = codecs.get(codec)
    for tensor, where in tau.layout.slices():
        for start in range(where.start, where.stop, _PIECE):
            stop = min(where.stop, start + _PIECE)
            layout = Layout([type(tensor)(tensor.name, (stop - start,), tensor.dtype)])
            piece = TaskVector(layout, tau.values[start:stop])
            body = writer.encode(piece, 0, stop - start)
            read: Any = writer.decode(body, layout, 0, stop - start).values
            quality += Quality.of(piece, TaskVector(layout, read))
    return CompressedAdapter(tau, source.tag, source.carried(), quality)


_PIECE = 1 << 20
_SMALL = 1 << 16  # parameters of a module whose change is computed, whatever the adapter's size


class _Source:
    """An adapter and its start, read tensor by tensor."""

    def __init__(self, adapter: Adapter, init: Adapter | None) -> None:
        self._adapter = adapter
        self._init = None if init is None else resized_start(adapter.config, init)
        start = None if self._init is None else self._init.state
        self._carried = carried_names(adapter.state, start)
        tensors = shapes_of(adapter.state)
        self.layout = Layout.of({n: t for n, t in tensors.items() if n not in self._carried})
        if self.layout.num_parameters == 0:
            raise AdapterError("expected floats of 16 or 32 bits to compress, found none")
        self.tag, self._value = tag_of(adapter.config, self.layout, self._init, self._carried)
        self._digest = hashlib.blake2b(digest_size=16)

    def carried(self) -> dict[str, Any]:
        return {name: self._adapter.state[name] for name in sorted(self._carried)}

    def task_vector(self, indices: Sequence[int]) -> TaskVector:
        """What fine-tuning changed in some of the tensors."""
        tensors = [self.layout.tensors[index] for index in indices]
        layout = Layout(tensors)
        values = np.empty(layout.num_parameters, np.float32)
        for tensor, where in layout.slices():
            part = values[where]
            for start, piece in float32_pieces(self._adapter.state, tensor.name):
                part[start : start + piece.size] = piece
            if self._init is None:
                if self._value:
                    part -= np.float32(self._value)
                continue
            for start, piece in float32_pieces(self._init.state, tensor.name):
                part[start : start + piece.size] -= piece
                self._digest.update(piece.astype("<f4", copy=False).tobytes())
        if self._init is not None:
            self.tag = f"blake2b:{self._digest.hexdigest()}"
        return TaskVector(layout, values)


def _place(
    of: NDArray[np.uint64],
    part: Layout,
    to: NDArray[np.uint64],
    layout: Layout,
    indices: Sequence[int],
) -> None:
    """Copy the bits of some tensors from their own mask to their places in the whole one."""
    source, target = of.view(np.uint8), to.view(np.uint8)
    offsets = layout.offsets
    for index, (_, where) in zip(indices, part.slices(), strict=True):
        for start in range(where.start, where.stop, _PIECE):
            stop = min(where.stop, start + _PIECE)
            bits = _bits(source, start, stop)
            at = int(offsets[index]) + start - where.start
            shifted = np.zeros((at & 7) + bits.size, np.uint8)
            shifted[at & 7 :] = bits
            packed = np.packbits(shifted, bitorder="little")
            target[at >> 3 : (at >> 3) + packed.size] |= packed


def _bits(mask: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.uint8]:
    """The bits ``start .. stop`` of a mask, each as a byte."""
    bits = np.unpackbits(mask[start >> 3 : (stop + 7) >> 3], bitorder="little")
    return bits[start & 7 : (start & 7) + stop - start]


def _modules(method: str, layout: Layout) -> list[list[tuple[str, int]]]:
    """Per module, its tensors: names without the module's, and indices into the layout's."""
    places: dict[str, list[tuple[str, int]]] = {}
    for index, tensor in enumerate(layout.tensors):
        parts = tensor.name.split(".")
        factor = factors.factor_of(method, tensor.name)
        at = parts.index(factor) if factor in parts else len(parts)
        places.setdefault(".".join(parts[:at]), []).append((".".join(parts[at:]), index))
    return list(places.values())


def _factor_pairs(
    adapter: Adapter,
    update: TernaryVector | FactoredVector,
    modules: list[list[tuple[str, int]]],
) -> Iterator[tuple[factors.Factors, factors.Factors]]:
    """Per module, its factors as they are and as the update has them."""
    values_of = _factored_values(update) if isinstance(update, FactoredVector) else _signs(update)
    for found in modules:
        before, after = {}, {}
        for key, index in found:
            tensor = update.layout.tensors[index]
            values = np.empty(tensor.size, np.float32)
            for at, piece in float32_pieces(adapter.state, tensor.name):
                values[at : at + piece.size] = piece
            before[key] = values.reshape(tensor.shape)
            after[key] = values_of(index).reshape(tensor.shape)
        yield before, after


def _signs(update: TernaryVector) -> Callable[[int], NDArray[np.float32]]:
    """The values of a tensor of ternary ones, by its index."""
    positive, negative = (mask.view(np.uint8) for mask in (update.positive, update.negative))
    offsets = update.layout.offsets.tolist()
    scales = np.broadcast_to(update.scales, len(update.layout.tensors))

    def values_of(index: int) -> NDArray[np.float32]:
        signs = _bits(positive, offsets[index], offsets[index + 1]).astype(np.float32)
        signs -= _bits(negative, offsets[index], offsets[index + 1])
        signs *= scales[index]
        return signs

    return values_of


def _factored_values(update: FactoredVector) -> Callable[[int], NDArray[np.float32]]:
    """The values of a tensor of terms, by its index."""
    offsets = update.layout.offsets

    def values_of(index: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = update.values[offsets[index] : offsets[index + 1]]
        return values

    return values_of
