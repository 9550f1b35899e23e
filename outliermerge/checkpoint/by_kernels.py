"""Places of values that kernels compute while they read: of codes and scales, of factors.

A place is what a kernel reads a source from. For a stored tensor that is a file and a position; for
others a tuple that says what to read and what to compute (engines/native/computed.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

from outliermerge.checkpoint.sources import DTYPES, Reading, Region, Source, TensorMeta
from outliermerge.storage.failures import failure

KINDS = {"float32": "f", "bfloat16": "b", "float16": "e", "float8_e4m3fn": "4",
         "float8_e5m2": "5", "int8": "i", "uint8": "u"}  # fmt: skip
"""The dtypes of codes that kernels turn into float32, and their names for them."""
_FLOATS = ("float32", "bfloat16", "float16")
Span = tuple[int, int]


class Computable(Source, Protocol):
    """A source whose values kernels may compute."""

    @property
    def by_kernels(self) -> bool:
        """Whether kernels compute it."""

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""


def is_by_kernels(source: Source) -> TypeGuard[Computable]:
    """Tell whether kernels compute a source that is not stored."""
    return getattr(source, "by_kernels", False)


def is_stored(source: Source | None, dtypes: Sequence[str] = _FLOATS) -> bool:
    """Tell whether kernels can read a stored tensor: its dtype is one of these."""
    if not isinstance(source, TensorMeta) or source.offset is None:
        return False
    return source.dtype.name in dtypes


def are_floats(source: Source) -> bool:
    """Tell whether kernels can read a source, stored or computed, as float32."""
    return is_stored(source) or (is_by_kernels(source) and source.dtype.name == "float32")


def place_of(reader: Reading, source: Source, span: Span, first: int) -> tuple[Any, ...]:
    """Return where kernels read a source as float32, which `are_floats` is true of."""
    if is_by_kernels(source):
        return source.place(reader, span, first)
    assert isinstance(source, TensorMeta)
    return codes_place(source, span, first)


def codes_place(
    weight: TensorMeta,
    span: Span,
    first: int,
    *,
    kind: str = "",
    sizes: tuple[int, int] = (1, 1),
    block: tuple[int, int] = (1, 1),
    first_row: int = 0,
    scales: bytearray | None = None,
    zeros: bytearray | None = None,
    table: bytes | None = None,
    zero: float = 0.0,
    factor: float = 1.0,
    added: float = -0.0,
) -> tuple[Any, ...]:
    """Return a place of (code − zero point − zero) × scale × factor + added.

    Args:
        weight: the codes as they are stored.
        kind: of the codes, where it is not that of their dtype: `h` are two codes in a byte, the
            first in its high bits, `l` in its low bits.
        sizes: rows and columns of a matrix; there may be several, one after the other.
        block: the rows and columns that a scale is for.
        first_row: the row of scales with which `scales` and `zeros`, of float32, begin.
        table: what codes stand for, of float32; else they are numbers.
        added: −0 changes no value.
    """
    assert weight.offset is not None
    low, high = (end * weight.dtype.num_bytes for end in span)
    if kind in ("h", "l"):
        low, high = span[0] // 2, -(-span[1] // 2)
    region = Region(weight.path, weight.offset, weight.offset + low, weight.offset + high)
    kind = kind or KINDS[weight.dtype.name]
    return ("codes", first, region, kind, *sizes, *block, first_row, scales, zeros, table, zero,
            factor, added)  # fmt: skip


def read_place(
    reader: Reading, place: tuple[Any, ...], source: Source, num_elements: int, out: memoryview
) -> None:
    """Fill `out` with float32 from a place of a source.

    Raises:
        OutlierMergeError: a file cannot be read or has become shorter.
    """
    (opened,) = reader.opened([place])
    try:
        reader.kernels.copy(KINDS["float32"], opened, num_elements, out)
    except (OSError, EOFError) as error:
        raise failure(source.stored[0].path, "read", error, tensor=source.name) from error


def floats(reader: Reading, source: Source, start: int, stop: int) -> bytearray:
    """Return elements start to stop (excluded) of a source that `are_floats` is true of."""
    out = bytearray(DTYPES["float32"].num_bytes * (stop - start))
    place = place_of(reader, source, (start, stop), start)
    read_place(reader, place, source, stop - start, memoryview(out))
    return out
