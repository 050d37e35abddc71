"""Every error that this package raises on purpose, in one tree.

::

    CompeftError
    ├── ParameterError          an argument out of its range (also a ValueError)
    ├── LayoutError             tensors that do not fit a layout (also a ValueError)
    ├── NonFiniteError          NaN or Inf where numbers are needed (also a ValueError)
    ├── AdapterError            an adapter folder or file that cannot be used
    ├── ConfigError             a key or a value of the ready-made app
    ├── StateError              a node's or a server's state on disk that cannot be used
    ├── ResyncError             a node lacks what a message builds on
    ├── NoUsableReplyError      a run in which no reply was of any use
    ├── MissingPackageError     an optional package that is not installed
    ├── ExpertError             an expert, or a store of experts, that cannot be used
    │   ├── UnknownExpertError      a name or a version that the store does not have
    │   ├── AccessError             no token, a wrong or expired one, or one without the right
    │   ├── UnavailableError        the server is away, stopped, busy, or speaks another way
    │   ├── StoreFullError          no room: on the disk, or within the bounds of a store
    │   └── BrokenExpertError       bytes other than their digest says
    └── WireError               bytes that a decoder rejects (also a ValueError)
        ├── ChecksumError           the CRC-32 is missing or differs
        ├── MalformedError          not a protobuf Update, or a field that cannot be
        ├── MissingBodyError        an Update without a body that this version knows
        ├── UnknownLayoutError      a layout id that the reader does not know
        ├── LayoutMismatchError     a layout other than expected, or too small for the update
        ├── VersionError            relative to another version of the global adapter
        ├── CoverageError           covers other parameters than expected
        ├── UpdateSizeError         too large for one message
        ├── ImplausibleSizeError    claims far more parameters than its bytes can carry
        ├── DTypeError              a data type that the format does not have
        ├── ScaleError              a scale that is negative, infinite or NaN
        ├── ScaleCountError         neither one scale nor one per tensor
        ├── BlockSizeError          a block size that is no power of two in 2^8 .. 2^24
        ├── BlockCountError         a table without exactly one entry per block
        ├── BlockNonzerosError      more nonzeros in a block than it has parameters
        ├── RiceParameterError      a Rice parameter over 24
        ├── PositionError           a nonzero past the end of its block
        ├── StreamLengthError       a stream too short or too long
        ├── PaddingError            set bits after the end of a stream
        ├── NonzeroCountError       another number of nonzeros than the body says, or than can be
        ├── CodeEndError            an arithmetic code that does not end as a writer ends it
        ├── StepRangeError          steps beyond what float32 holds
        ├── TermCountError          another number of terms than the tensors have, or can have
        ├── FactorBitsError         factors of a width that the format does not have
        ├── MaskOverlapError        a parameter that is both positive and negative
        └── NonFiniteBodyError      NaN or Inf in a dense body

A server can set one client's update aside with ``except CompeftError``; a program that wants to
know why looks at the class, and a person reads the message: what was expected, what was found,
and where.
"""

from __future__ import annotations

from compeft_fl.printable import MAX_TEXT, printable

__all__ = [
    "AccessError",
    "AdapterError",
    "BlockCountError",
    "BlockNonzerosError",
    "BlockSizeError",
    "BrokenExpertError",
    "ChecksumError",
    "CodeEndError",
    "CompeftError",
    "ConfigError",
    "CoverageError",
    "DTypeError",
    "ExpertError",
    "FactorBitsError",
    "ImplausibleSizeError",
    "LayoutError",
    "LayoutMismatchError",
    "MalformedError",
    "MaskOverlapError",
    "MissingBodyError",
    "MissingPackageError",
    "NoUsableReplyError",
    "NonFiniteBodyError",
    "NonFiniteError",
    "NonzeroCountError",
    "PaddingError",
    "ParameterError",
    "PositionError",
    "ResyncError",
    "RiceParameterError",
    "ScaleCountError",
    "ScaleError",
    "StateError",
    "StepRangeError",
    "StoreFullError",
    "StreamLengthError",
    "TermCountError",
    "UnavailableError",
    "UnknownExpertError",
    "UnknownLayoutError",
    "UpdateSizeError",
    "VersionError",
    "WireError",
]


class CompeftError(Exception):
    """The root of the tree.

    A text can quote what a stranger wrote: whatever it is, it is kept short and without characters
    that a terminal acts on, so that every log and every command may show it.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(
                printable(argument, MAX_TEXT, keep="\n") if isinstance(argument, str) else argument
                for argument in arguments
            )
        )


class ParameterError(CompeftError, ValueError):
    """An argument out of its range: a density, a scale, a weight, a codec's name."""


class LayoutError(CompeftError, ValueError):
    """Tensors that do not fit a layout: a missing name, another shape, another length."""


class NonFiniteError(CompeftError, ValueError):
    """NaN or Inf in an input; the message names the tensor."""


class AdapterError(CompeftError):
    """An adapter folder or file that cannot be used as it is."""


class ConfigError(CompeftError):
    """A key or a value of the ready-made app that it does not take."""


class StateError(CompeftError):
    """A node's or a server's state on disk that cannot be read, written or used."""


class ResyncError(CompeftError):
    """A node lacks what a message builds on, and has to be sent it."""


class NoUsableReplyError(CompeftError):
    """A run in which no reply was of any use; the message has the reason that most had.

    Attributes
    ----------
    result : flwr.serverapp.strategy.Result, optional
        What the run would have returned: the adapter that it began with.
    """

    result: object = None


class MissingPackageError(CompeftError):
    """An optional package that is not installed; the message says how to get it."""


class ExpertError(CompeftError):
    """An expert, or a store of experts, that cannot be used as it is asked for."""


class UnknownExpertError(ExpertError):
    """A name, a version or a digest that the store does not have."""


class AccessError(ExpertError):
    """No token where one is needed, a wrong or an expired one, or one without the right."""


class UnavailableError(ExpertError):
    """A server that is away, has stopped, is busy, or speaks another way than was asked.

    Attributes
    ----------
    again : bool
        Whether asking once more may help.
    """

    again: bool = True


class StoreFullError(ExpertError):
    """There is no room: on the disk, or within the bounds that a store was given."""


class BrokenExpertError(ExpertError):
    """Bytes other than their digest says."""


class WireError(CompeftError, ValueError):
    """Bytes that a decoder rejects (proto/FORMAT.md, "What a decoder rejects")."""


class ChecksumError(WireError):
    """The CRC-32 at the end is missing or differs: damaged or cut off on the way."""


class MalformedError(WireError):
    """The bytes are no protobuf ``Update``, or a field holds what it cannot hold."""


class MissingBodyError(WireError):
    """An ``Update`` without a body that this version knows."""


class UnknownLayoutError(WireError):
    """The update names its layout by an id that the reader does not know."""


class LayoutMismatchError(WireError):
    """The layout is another than the expected one, or holds fewer parameters than the update."""


class VersionError(WireError):
    """The update is relative to another version of the global adapter."""


class CoverageError(WireError):
    """The update covers other parameters than the expected ones."""


class UpdateSizeError(WireError):
    """The update is too large for one message, to write or to read."""


class ImplausibleSizeError(WireError):
    """The update claims far more parameters than its bytes can carry."""


class DTypeError(WireError):
    """A data type that the format does not have."""


class ScaleError(WireError):
    """A scale that is negative, infinite or NaN."""


class ScaleCountError(WireError):
    """Neither one scale nor one per tensor of the layout."""


class BlockSizeError(WireError):
    """A block size that is no power of two between 2^8 and 2^24."""


class BlockCountError(WireError):
    """A table of the Golomb body without exactly one entry per block."""


class BlockNonzerosError(WireError):
    """More nonzeros in a block than it has parameters."""


class RiceParameterError(WireError):
    """A Rice parameter over 24."""


class PositionError(WireError):
    """A nonzero that would stand past the end of its block."""


class StreamLengthError(WireError):
    """A stream of bits or bytes that is shorter or longer than its content."""


class PaddingError(WireError):
    """Set bits after the end of a stream of bits."""


class NonzeroCountError(WireError):
    """More nonzeros than parameters, or fewer in an arithmetic code than the body says."""


class CodeEndError(WireError):
    """The code of a context or steps body does not end as its writer would have ended it."""


class StepRangeError(WireError):
    """An exponent or an integer of a steps or factored body beyond its range."""


class TermCountError(WireError):
    """Numbers of terms or exponents that fit neither each other nor the tensors."""


class FactorBitsError(WireError):
    """Factors of another width than 2 to 16 bits."""


class MaskOverlapError(WireError):
    """A parameter that is set in both bit masks."""


class NonFiniteBodyError(WireError):
    """NaN or Inf in a dense body."""
