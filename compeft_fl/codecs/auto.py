"""``codec="auto"``: of the codecs that write the same values, the one that arrives first.

The time of a codec is that of encoding, of its bytes over the link, and of decoding. Sizes are
exact where that is cheap: of bit masks from the number of parameters, of Golomb codes from their
plan, of context codes by coding an update of at most 2^18 parameters, and else a sample of it,
whose size beside the sample's Golomb codes stands for the whole. Speeds are constants, measured by
``python simulations/codec_speed.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ParameterError
from compeft_fl.factored import FactoredVector

if TYPE_CHECKING:
    from compeft_fl.codecs.base import Update
    from compeft_fl.ternary import TernaryVector

__all__ = ["AUTO", "SPEEDS", "Speed", "check", "choose", "codec_of"]

AUTO: Final = "auto"
WINDOW: Final = 1 << 18  # parameters
_SAMPLED_ROWS: Final = 256  # of a matrix with long rows


class Speed(NamedTuple):
    """Nanoseconds of encoding plus decoding: for each parameter, and for each nonzero besides."""

    parameter: float
    nonzero: float

    def seconds(self, num_parameters: int, num_nonzeros: int) -> float:
        """The time that one update takes."""
        return 1e-9 * (self.parameter * num_parameters + self.nonzero * num_nonzeros)


# simulations/codec_speed.py on one core of an AMD EPYC (family 26), 2026-11-25.
SPEEDS: Final = {
    "bitmask": Speed(1.24, 0.2),
    "golomb": Speed(0.44, 8.0),
    "context": Speed(39.48, 58.8),
}


def check(codec: str, link_mbps: float | None) -> None:
    """Is this a codec's name, or "auto" with the speed of a link?

    Raises
    ------
    ParameterError
    """
    from compeft_fl import codecs

    if codec != AUTO:
        codecs.get(codec)
        return
    if (
        isinstance(link_mbps, bool)
        or not isinstance(link_mbps, (int, float))
        or not math.isfinite(link_mbps)
        or link_mbps <= 0
    ):
        raise ParameterError(
            f'expected link_mbps > 0, in Mbit/s, with codec "auto"; found {link_mbps!r}'
        )


def codec_of(update: Update, codec: str) -> str:
    """The codec of an update whose form was chosen by energy; ``codec`` is that of ternary ones.

    What is neither ternary nor low-rank signs was rounded to a power of two, and goes as steps,
    unless ``codec`` is a dense one.

    Examples
    --------
    >>> from compeft_fl import TaskVector
    >>> from compeft_fl.reduction.factorize import factorize
    >>> update = factorize(TaskVector.from_dict({"w": np.ones((4, 9), "f4")}))
    >>> codec_of(update, "golomb")
    'factored'
    """
    if isinstance(update, FactoredVector):
        return "factored"
    from compeft_fl import codecs
    from compeft_fl.codecs.dense import Dense
    from compeft_fl.ternary import TernaryVector

    dense = codec != AUTO and isinstance(codecs.get(codec), Dense)
    return codec if dense or isinstance(update, TernaryVector) else "steps"


def choose(update: Update, codec: str, link_mbps: float | None = None) -> str:
    """A codec's name: the given one, or for "auto" that with the least time over the link.

    A TaskVector has one lossless codec, "dense", and a FactoredVector "factored".

    Parameters
    ----------
    update : TernaryVector or TaskVector
    codec : str
    link_mbps : float
        The speed of the link in Mbit/s, 10^6 bits a second. Only "auto" asks for it.

    Raises
    ------
    ParameterError
        An unknown codec, or "auto" without the speed of a link.

    Examples
    --------
    >>> from compeft_fl import TaskVector, compress
    >>> values = np.outer(np.sin(np.arange(4000)), np.cos(np.arange(8))).astype("f4")
    >>> update = compress(TaskVector.from_dict({"w": values}), density=0.05)
    >>> choose(update, "auto", link_mbps=1), choose(update, "auto", link_mbps=1000)
    ('context', 'golomb')
    """
    from compeft_fl.ternary import TernaryVector

    check(codec, link_mbps)
    if codec != AUTO:
        return codec
    if not isinstance(update, TernaryVector):
        return codec_of(update, "dense")
    assert link_mbps is not None
    seconds_per_byte = 8e-6 / link_mbps
    d, nonzeros = update.num_parameters, update.num_nonzeros
    work = {name: speed.seconds(d, nonzeros) for name, speed in SPEEDS.items()}
    best, least = "bitmask", work["bitmask"] + 2 * ((d + 7) // 8) * seconds_per_byte
    if work["golomb"] >= least:
        return best
    golomb_bytes = _whole(update).golomb_bytes()
    total = work["golomb"] + golomb_bytes * seconds_per_byte
    if total < least:
        best, least = "golomb", total
    if work["context"] >= least:
        return best
    part = sample(update)
    context_bytes: float = part.context_bytes()
    if part.num_parameters < d:
        context_bytes *= golomb_bytes / max(1, part.golomb_bytes())
    total = work["context"] + context_bytes * seconds_per_byte
    return "context" if total < least else best


class Sample(NamedTuple):
    """Masks, and the matrices that they are cut into."""

    positive: Any
    negative: Any
    matrices: NDArray[np.int64]

    @property
    def num_parameters(self) -> int:
        """How many bits of the masks count."""
        return int((self.matrices[:, 0] * self.matrices[:, 1]).sum())

    def golomb_bytes(self) -> int:
        """The size of the Golomb-Rice body, but for its scales and a few bytes of headers."""
        from compeft_fl.kernels import cpu_golomb

        plan = cpu_golomb.plan_blocks(self.positive, self.negative, self.num_parameters)
        return plan.total_bytes + (int(plan.nonzeros.sum()) + 7) // 8

    def context_bytes(self) -> int:
        """The size of the context body, likewise."""
        from compeft_fl.kernels import cpu_context

        count = int(np.bitwise_count(self.positive | self.negative).sum())
        code = cpu_context.write_code(self.positive, self.negative, self.matrices, count, False)
        return (self.num_parameters + count + 7) // 8 if code is None else len(code)


def _whole(update: TernaryVector) -> Sample:
    from compeft_fl.codecs.context import matrices

    d = update.num_parameters
    return Sample(update.positive, update.negative, matrices(update.layout, 0, d))


def sample(update: TernaryVector) -> Sample:
    """At most 2^18 parameters: all, or whole tensors from the middle on, or lines of one tensor."""
    from compeft_fl.codecs.base import cut
    from compeft_fl.codecs.context import matrices

    d = update.num_parameters
    if d <= WINDOW:
        return _whole(update)
    masks = update.positive, update.negative
    offsets = update.layout.offsets
    first = int(np.searchsorted(offsets, d // 2, side="right")) - 1
    last = int(np.searchsorted(offsets, offsets[first] + WINDOW, side="right")) - 1
    start = int(offsets[first])
    if last > first:
        stop = int(offsets[last])
        shapes = matrices(update.layout, start, stop)
        return Sample(cut(masks[0], start, stop), cut(masks[1], start, stop), shapes)
    rows, columns = matrices(update.layout, start, int(offsets[first + 1]))[0].tolist()
    if columns <= rows:
        kept_rows, kept_columns = WINDOW // columns, columns
    else:
        kept_rows = min(rows, _SAMPLED_ROWS)
        kept_columns = min(columns, WINDOW // kept_rows)
    starts = range(start, start + kept_rows * columns, columns)
    if kept_columns == columns:
        ends = start, start + kept_rows * columns
        cropped = [cut(mask, *ends) for mask in masks]
    else:
        cropped = [
            _packed([cut(mask, at, at + kept_columns) for at in starts], kept_columns)
            for mask in masks
        ]
    return Sample(cropped[0], cropped[1], np.array([[kept_rows, kept_columns]], np.int64))


def _packed(pieces: list[NDArray[np.uint64]], bits: int) -> NDArray[np.uint64]:
    """Pieces of so many bits, one after the other, as one mask."""
    each = [np.unpackbits(p.view(np.uint8), count=bits, bitorder="little") for p in pieces]
    joined = np.concatenate(each)
    padded = np.zeros(-(-joined.size // 64) * 64, np.uint8)
    padded[: joined.size] = joined
    return np.packbits(padded, bitorder="little").view(np.uint64)
