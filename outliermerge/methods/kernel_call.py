"""What a method hands to a kernel, and what kernels take: dtypes, places, blocks."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

CODES = {"bfloat16": "b", "float16": "e", "float32": "f"}
"""The dtypes that kernels know, and what they call them."""

Place: TypeAlias = memoryview | tuple[int, int] | tuple[int, int, int]
"""Where bytes are: in memory, or in a file by its descriptor and the position of the first; with a
second descriptor for writing past the page cache, -1 where there is none."""

RawBlock: TypeAlias = (
    tuple[bytes, tuple[Place, ...], int, bool]
    | tuple[bytes, tuple[Place, ...], int, bool, bytearray]
)
"""What kernels take: codes and places of each source, the number of elements, and whether the first
source is a base that the others are taken less; and where digests of each source's pieces go."""


@dataclass(frozen=True)
class KernelCall:
    """What a kernel is called with for one tensor; numbers are rounded to float32.

    Attributes:
        name: of the kernel, in the tables of backends.
        scalars: what it takes once.
        vectors: what it takes for each model, (K, M).
        report: values of the whole tensor for the manifest.
        keys: of random numbers, two 64-bit ones for each model; none where the kernel draws none.
        counts: the name under which the kernel's counts are reported; empty where it has none.
    """

    name: str
    scalars: tuple[float, ...] = ()
    vectors: tuple[Sequence[float], ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    counts: str = ""
    keys: Sequence[tuple[int, int]] = ()

    def packed_keys(self) -> bytes:
        """Return the keys as the CPU's kernels take them."""
        return b"".join(struct.pack("2q", *pair) for pair in self.keys)

    def arguments(self) -> tuple[str, bytes, bytes]:
        """Return the kernel's name, scalars and vectors as the CPU's takes them."""
        return self.name, _packed(self.scalars), b"".join(map(_packed, self.vectors))


@dataclass(frozen=True)
class Kernel:
    """A fused kernel that computes what a method does, wherever a backend has one of its name.

    Attributes:
        name: in the tables of backends; where one does not have it, torch computes.
        function: returns the call for resolved parameters and measured needs.
        with_context: whether the function is given the tensor's context, too, as a keyword.
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


def _packed(numbers: Sequence[float]) -> bytes:
    return struct.pack(f"{len(numbers)}f", *map(to_float32, numbers))


def to_float32(value: float) -> float:
    """Return a number rounded to float32, infinite where it is too large.

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
