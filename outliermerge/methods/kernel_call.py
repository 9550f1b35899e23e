"""The arguments of kernels: a method's numbers, dtypes, places and blocks."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

CODES = {"bfloat16": "b", "float16": "e", "float32": "f"}
"""The dtypes that kernels support, and the codes that kernels use for them."""

SPARE_BYTES = 4
"""Behind the bits of what is kept, so that kernels can read more than one byte at once."""

Place: TypeAlias = memoryview | tuple[int, int] | tuple[int, int, int] | tuple[Any, ...]
"""Where elements are: in memory, or in a file, given by its descriptor and the position of the
first byte; a third number is a second descriptor for direct writes, or -1. A tuple that begins with
a text says what to compute (checkpoint/by_kernels.py)."""

RawBlock: TypeAlias = (
    tuple[bytes, tuple[Place, ...], int, bool]
    | tuple[bytes, tuple[Place, ...], int, bool, bytearray]
)
"""A block as kernels take it: the dtype codes and the places of the sources, the number of
elements, and whether the first source is a base to subtract from the others. A buffer for the
digests of each source's pieces can follow."""


@dataclass(frozen=True)
class KernelCall:
    """The arguments of a kernel for one tensor; numbers are rounded to float32.

    Attributes:
        name: the kernel's name in the tables of backends.
        scalars: numbers for the whole tensor.
        vectors: K numbers for each model, (K, M).
        report: values for the manifest that describe the whole tensor.
        keys: two 64-bit keys of random numbers for each model; none if the kernel draws none.
        rows: the elements of a row, and how many of them are ranked together, for a kernel that
            goes by rows.
        kept: a bit for each element of each model that is kept, for a kernel that may know it.
        counts: the name under which the kernel's counts are reported; empty if it counts nothing.
    """

    name: str
    scalars: tuple[float, ...] = ()
    vectors: tuple[Sequence[float], ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    counts: str = ""
    keys: Sequence[tuple[int, int]] = ()
    rows: tuple[int, int] = (0, 0)
    kept: bytearray | None = None

    def arguments(self) -> tuple[str, bytes, bytes]:
        """Return the kernel's name, scalars and vectors as the CPU kernels take them."""
        return self.name, packed(self.scalars), b"".join(map(packed, self.vectors))


@dataclass(frozen=True)
class Kernel:
    """A fused kernel that computes a method, on every backend that has a kernel of this name.

    Attributes:
        name: the name in the tables of backends; torch computes for a backend without it.
        function: returns the call for resolved parameters and measured needs.
        with_context: whether the function also gets the tensor's context, as a keyword.
    """

    name: str
    function: Callable[..., KernelCall]
    with_context: bool = False

    def __call__(
        self, parameters: Mapping[str, Any], needs: Mapping[str, Any], context: Any = None
    ) -> KernelCall:
        more = {"context": context} if self.with_context else {}
        call = self.function(parameters, needs, **more)
        assert call.name == self.name, f"{call.name} is called where {self.name} is declared"
        return call


def kept_in(
    kept: bytearray | None, num_models: int, start: int, num_elements: int
) -> tuple[bytearray, ...]:
    """Return the bits if they are those of a block, too, in a tuple; else an empty one."""
    if kept is None or (start + num_elements + 7) // 8 > len(kept) // num_models - SPARE_BYTES:
        return ()
    return (kept,)


def packed(numbers: Sequence[float]) -> bytes:
    """Return numbers as float32, as the CPU kernels take them."""
    return struct.pack(f"{len(numbers)}f", *map(to_float32, numbers))


def packed_keys(keys: Sequence[tuple[int, int]]) -> bytes:
    """Return keys of random numbers as the CPU kernels take them."""
    return b"".join(struct.pack("2q", *pair) for pair in keys)


def to_float32(value: float) -> float:
    """Return a number rounded to float32; infinity if it is too large.

    >>> to_float32(0.1), to_float32(1e39)
    (0.10000000149011612, inf)
    """
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def products(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Return products of numbers that are rounded to float32."""
    return [to_float32(a) * to_float32(b) for a, b in zip(left, right, strict=True)]


def next_below(threshold: float) -> float:
    """Return the largest float32 below a magnitude, which is rounded to float32; 0 for 0.

    >>> next_below(1.0), next_below(0.0)
    (0.9999999403953552, 0.0)
    """
    (bits,) = struct.unpack("<i", struct.pack("<f", to_float32(threshold)))
    (below,) = struct.unpack("<f", struct.pack("<i", max(bits - 1, 0)))
    return float(below)
