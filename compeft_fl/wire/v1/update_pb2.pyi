from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_F32: _ClassVar[DType]
    DTYPE_F16: _ClassVar[DType]
    DTYPE_BF16: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
DTYPE_F32: DType
DTYPE_F16: DType
DTYPE_BF16: DType

class Update(_message.Message):
    __slots__ = ("layout", "layout_id", "num_parameters", "offset", "base_version", "metadata", "golomb", "bitmask", "dense", "context", "steps", "factored", "crc32")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    GOLOMB_FIELD_NUMBER: _ClassVar[int]
    BITMASK_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    layout_id: bytes
    num_parameters: int
    offset: int
    base_version: int
    metadata: _containers.ScalarMap[str, str]
    golomb: GolombTernary
    bitmask: BitmaskTernary
    dense: Dense
    context: ContextTernary
    steps: Steps
    factored: Factored
    crc32: int
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., layout_id: _Optional[bytes] = ..., num_parameters: _Optional[int] = ..., offset: _Optional[int] = ..., base_version: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ..., golomb: _Optional[_Union[GolombTernary, _Mapping]] = ..., bitmask: _Optional[_Union[BitmaskTernary, _Mapping]] = ..., dense: _Optional[_Union[Dense, _Mapping]] = ..., context: _Optional[_Union[ContextTernary, _Mapping]] = ..., steps: _Optional[_Union[Steps, _Mapping]] = ..., factored: _Optional[_Union[Factored, _Mapping]] = ..., crc32: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DType
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class GolombTernary(_message.Message):
    __slots__ = ("scales", "block_size", "block_nonzeros", "rice_parameters", "quotients", "remainders", "signs")
    SCALES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NONZEROS_FIELD_NUMBER: _ClassVar[int]
    RICE_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    QUOTIENTS_FIELD_NUMBER: _ClassVar[int]
    REMAINDERS_FIELD_NUMBER: _ClassVar[int]
    SIGNS_FIELD_NUMBER: _ClassVar[int]
    scales: _containers.RepeatedScalarFieldContainer[float]
    block_size: int
    block_nonzeros: _containers.RepeatedScalarFieldContainer[int]
    rice_parameters: bytes
    quotients: bytes
    remainders: bytes
    signs: bytes
    def __init__(self, scales: _Optional[_Iterable[float]] = ..., block_size: _Optional[int] = ..., block_nonzeros: _Optional[_Iterable[int]] = ..., rice_parameters: _Optional[bytes] = ..., quotients: _Optional[bytes] = ..., remainders: _Optional[bytes] = ..., signs: _Optional[bytes] = ...) -> None: ...

class BitmaskTernary(_message.Message):
    __slots__ = ("scales", "positive", "negative")
    SCALES_FIELD_NUMBER: _ClassVar[int]
    POSITIVE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_FIELD_NUMBER: _ClassVar[int]
    scales: _containers.RepeatedScalarFieldContainer[float]
    positive: bytes
    negative: bytes
    def __init__(self, scales: _Optional[_Iterable[float]] = ..., positive: _Optional[bytes] = ..., negative: _Optional[bytes] = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ("dtype", "values")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    values: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., values: _Optional[bytes] = ...) -> None: ...

class ContextTernary(_message.Message):
    __slots__ = ("scales", "num_nonzeros", "flat", "code")
    SCALES_FIELD_NUMBER: _ClassVar[int]
    NUM_NONZEROS_FIELD_NUMBER: _ClassVar[int]
    FLAT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    scales: _containers.RepeatedScalarFieldContainer[float]
    num_nonzeros: int
    flat: bool
    code: bytes
    def __init__(self, scales: _Optional[_Iterable[float]] = ..., num_nonzeros: _Optional[int] = ..., flat: bool = ..., code: _Optional[bytes] = ...) -> None: ...

class Steps(_message.Message):
    __slots__ = ("exponent", "num_nonzeros", "code")
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    NUM_NONZEROS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    exponent: int
    num_nonzeros: int
    code: bytes
    def __init__(self, exponent: _Optional[int] = ..., num_nonzeros: _Optional[int] = ..., code: _Optional[bytes] = ...) -> None: ...

class Factored(_message.Message):
    __slots__ = ("terms", "exponents", "bits", "factors", "signs", "rest")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    EXPONENTS_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    SIGNS_FIELD_NUMBER: _ClassVar[int]
    REST_FIELD_NUMBER: _ClassVar[int]
    terms: _containers.RepeatedScalarFieldContainer[int]
    exponents: _containers.RepeatedScalarFieldContainer[int]
    bits: int
    factors: bytes
    signs: bytes
    rest: GolombTernary
    def __init__(self, terms: _Optional[_Iterable[int]] = ..., exponents: _Optional[_Iterable[int]] = ..., bits: _Optional[int] = ..., factors: _Optional[bytes] = ..., signs: _Optional[bytes] = ..., rest: _Optional[_Union[GolombTernary, _Mapping]] = ...) -> None: ...
