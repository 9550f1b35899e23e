"""Descriptions of tensors and checkpoints, known before any bytes are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from outliermerge.display import short_repr
from outliermerge.storage.stamps import FileStamp

if TYPE_CHECKING:
    from torch import Tensor


# The end of the name under which PyTorch stores a module's own state, which can be anything.
EXTRA_STATE = "_extra_state"


MAX_TENSOR_NAME = 1000  # characters; names in models have up to 200


def is_name(name: str) -> bool:
    """Tell whether a text can be a tensor's name in a file."""
    if not 0 < len(name) <= MAX_TENSOR_NAME or name == "__metadata__":
        return False
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: torch's name for it, safetensors' code, its size; is_float: mergeable."""

    name: str
    code: str
    num_bytes: int
    is_float: bool

    def __repr__(self) -> str:
        return self.code

    def __hash__(self) -> int:  # plans ask for it for each tensor, as for that of a TensorMeta
        return hash(self.code)


_TABLE = (
    DType("bool", "BOOL", 1, False),
    DType("uint8", "U8", 1, False),
    DType("int8", "I8", 1, False),
    DType("uint16", "U16", 2, False),
    DType("int16", "I16", 2, False),
    DType("uint32", "U32", 4, False),
    DType("int32", "I32", 4, False),
    DType("uint64", "U64", 8, False),
    DType("int64", "I64", 8, False),
    DType("complex64", "C64", 8, False),
    DType("float8_e4m3fn", "F8_E4M3", 1, True),
    DType("float8_e5m2", "F8_E5M2", 1, True),
    DType("float16", "F16", 2, True),
    DType("bfloat16", "BF16", 2, True),
    DType("float32", "F32", 4, True),
    DType("float64", "F64", 8, True),
)
DTYPES = {dtype.name: dtype for dtype in _TABLE}
# Exponents, of which scales of quantised weights are powers of two, are read as bytes.
EXPONENTS = DType("uint8", "F8_E8M0", 1, False)
DTYPES_BY_CODE = {dtype.code: dtype for dtype in (*_TABLE, EXPONENTS)}
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Region(NamedTuple):
    """Bytes of a file that kernels read, and the position that they count from.

    Attributes:
        low, high: the positions of the bytes that must be there.
    """

    path: Path
    position: int
    low: int
    high: int


class Reading(Protocol):
    """The object that sources are read with; `reader.Reader` reads from files.

    Attributes:
        kernels: the module of the compiled kernels, or None where torch computes all.
    """

    @property
    def kernels(self) -> Any: ...

    def read_stored(self, meta: TensorMeta, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the stored bytes of elements start to stop."""

    def values(self, source: Source, start: int, stop: int) -> Tensor:
        """Return elements start to stop as a new tensor (E,) of the source's dtype."""

    def whole(self, source: Source) -> Tensor:
        """Return a small tensor (scales, a low-rank factor) in its shape; the latest are cached."""

    def whole_floats(self, source: Source) -> bytearray:
        """Return a small tensor as float32, read by kernels; the latest are cached."""

    def opened(self, places: Sequence[Any]) -> list[Any]:
        """Return places for kernels, with descriptors where regions have paths."""

    def once(self, source: object, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for a source, or several, calling it the first time only."""

    def merge(self, source: Any, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop of a source that is a merge of others."""

    def note(self, source: object, start: int, found: Any) -> None:
        """Keep what was found when elements of a source were read, from an element on."""

    def held(self, source: Source, num_bytes: int, make: Callable[[memoryview], Any]) -> Any:
        """Return what `make` returned for a source at the first call, of room that it can fill."""


class Source(Protocol):
    """A tensor as a merge reads it: stored, or computed from stored tensors when it is read.

    Attributes:
        name: a stored name, for messages.
        dtype: the dtype of the values that `read` gives.
        out_dtype: the dtype of an output if the spec does not set one.
        stored: the stored tensors that it is read from.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def out_dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_elements(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def stored(self) -> tuple[TensorMeta, ...]: ...
    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded), in `dtype`."""


def inner(source: Source) -> tuple[Source, ...]:
    """Return the sources that a source is computed from; those of its own are not among them."""
    single = (getattr(source, name, None) for name in ("base", "source"))
    return (*getattr(source, "sources", ()), *(one for one in single if one is not None))


class Sized:
    """Counts the elements and bytes of a source by its shape and dtype."""

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def dtype(self) -> DType: ...
        @property
        def shape(self) -> tuple[int, ...]: ...

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.num_bytes


class OfSource(Sized):
    """What is made of one source, whose name and dtypes it has."""

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def source(self) -> Source: ...

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def out_dtype(self) -> DType:
        return self.source.out_dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored


@dataclass(frozen=True, slots=True)
class TensorMeta(Sized):
    """One stored tensor: its name, type and shape, and where its bytes are. A Source.

    Attributes:
        name: the tensor's name in its file.
        dtype: the stored element type.
        shape: the stored shape; () is a scalar.
        path: the file that holds it.
        offset: the position of its first byte in the file. None if its elements are not contiguous,
            as in some PyTorch pickles; then it is read by name.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int | None

    def __repr__(self) -> str:
        where = f"{str(self.path)!r} at {self.offset}"
        return f"TensorMeta({self.name!r} {self.dtype} {[*self.shape]} in {where})"

    def __hash__(self) -> int:
        return hash((self.name, self.path, self.offset))

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (self,)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the stored bytes of elements start to stop (excluded).

        Raises:
            OutlierMergeError: the file cannot be read or has become shorter.
        """
        reader.read_stored(self, start, stop, out)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's weights, described from the headers of its files.

    Attributes:
        root: the folder, or the file of a raw state dict.
        tensors: the tensors by name, in the order of the files. Names in a pipeline's component
            start with its folder: `unet/conv_in.weight`.
        weight_files: the files that hold the tensors.
        sidecars: configuration, tokenizer and processor files, relative to root.
        left_behind: files of the folder that are not copied to a merged model.
        components: for each component's folder ("" for a plain model) the stem of its weight files.
        notes: notes for the user on how it was read.
        other_files: further files of tensors, which are not read and are not copies.
        metadata: for each component's folder the metadata in its files' headers.
        whole: components whose loaders cannot read several shards.
        companions: stored tensors that others are dequantised with, and codes under other names
            than their weights', by name.
    """

    root: Path
    tensors: Mapping[str, Source]
    weight_files: tuple[FileStamp, ...]
    sidecars: tuple[str, ...]
    left_behind: tuple[str, ...]
    components: Mapping[str, str] = field(default_factory=lambda: {"": "model"})
    notes: tuple[str, ...] = ()
    other_files: tuple[Path, ...] = ()
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    companions: Mapping[str, TensorMeta] = field(default_factory=dict)

    def __repr__(self) -> str:
        files = f"{len(self.tensors)} tensors in {len(self.weight_files)} file(s)"
        return short_repr(self, f"{self.root}, {files}")
