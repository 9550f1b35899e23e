"""What is known of a tensor before its bytes are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from outliermerge.storage.stamps import FileStamp

if TYPE_CHECKING:
    from torch import Tensor


# What PyTorch ends the name of a module's own state with, which can be anything.
EXTRA_STATE = "_extra_state"


MAX_TENSOR_NAME = 1000  # characters of a tensor's name; those of models have up to 200


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
DTYPES_BY_CODE = {dtype.code: dtype for dtype in _TABLE}
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Reading(Protocol):
    """What a source is read by; `reader.Reader` reads from files."""

    def read_stored(self, meta: TensorMeta, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the stored bytes of elements start to stop."""

    def values(self, source: Source, start: int, stop: int) -> Tensor:
        """Return elements start to stop as a new tensor (E,) of the source's dtype."""

    def whole(self, source: Source) -> Tensor:
        """Return a small tensor (scales, a low-rank factor) in its shape; the latest are kept."""

    def once(self, source: Source, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for a source, calling it the first time only."""

    def held(
        self, source: Source, num_bytes: int, fill: Callable[[memoryview], None]
    ) -> memoryview:
        """Return bytes that `fill` filled the first time they were asked for."""


class Source(Protocol):
    """A tensor as a merge sees it: stored as it is, or computed from stored ones when read.

    Attributes:
        name: a stored name, for messages.
        dtype: of the values that `read` gives.
        out_dtype: what an output stores where the spec does not say.
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
        """Fill out with elements start to stop, in `dtype`."""


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One stored tensor: its name, type and shape, and where its bytes are. A Source.

    Attributes:
        name: the tensor's name in its file.
        dtype: element type as stored.
        shape: as stored; () is a scalar.
        path: the file that holds it.
        offset: position of its first byte in the file, or None where its elements do not lie
            there one behind the other: so can those in a PyTorch pickle, which are read by name.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int | None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.num_bytes

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (self,)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill out with the stored bytes of elements start to stop.

        Raises:
            OutlierMergeError: the file cannot be read or has become shorter.
        """
        reader.read_stored(self, start, stop, out)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's weights as its headers describe them.

    Attributes:
        root: the folder, or the file of a raw state dict.
        tensors: by name, in the order of the files; those of a component of a pipeline have
            its folder before their name: `unet/conv_in.weight`.
        weight_files: the files that hold the tensors.
        sidecars: configuration, tokenizer and processor files, relative to root.
        left_behind: files of the folder that a merged model does not take over.
        components: by component's folder ("" for a plain model) the stem of its weight files.
        notes: what a person should know of how it was read.
        other_files: files of tensors beside those that are read, and no copies of them.
        metadata: by component's folder what its files' headers say beside the tensors.
        whole: components that are loaded from one file alone.
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
