"""What a method hands to a kernel, and what kernels take: dtypes, places, blocks."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """A method as a kernel computes it, for one tensor; values are rounded to float32.

    Attributes:
        kernel: `weighted_sum`, `min_sigma` or `ties`.
        weights: of the models.
        dropped: for ties, the largest magnitude that is trimmed of each model.
        scaled: for ties, weights times what brings back the L1 norm.
        report: values of the whole tensor for the manifest.
        counts: the name under which the kernel's counts are reported; empty where it has none.
    """

    kernel: str
    weights: Sequence[float]
    lambda_: float = 1.0
    threshold: float = 0.0
    normalize: bool = False
    dropped: Sequence[float] = ()
    scaled: Sequence[float] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    counts: str = ""

    def arguments(self) -> tuple[str, tuple[float, float, bool], bytes]:
        """Return the kernel's name and parameters as it takes them."""
        none = [0.0] * len(self.weights)
        values = [*self.weights, *(self.dropped or none), *(self.scaled or none)]
        packed = struct.pack(f"{len(values)}f", *map(to_float32, values))
        return self.kernel, (self.threshold, self.lambda_, self.normalize), packed


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
