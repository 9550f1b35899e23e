"""The statistic of RAM+: how many elements a model changes alone, and how many others change too.

Shape suffixes: M models, E elements of a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.methods.kernel_call import RawBlock, to_float32
from outliermerge.methods.statistics.base import Pass, Scope

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Overlap:
    """Of each model's elements above epsilon how many no other model has, and the rest, (2, M)."""

    depends_on: tuple[str, ...] = ("epsilon",)
    scope: Scope = "tensor"
    rows: ClassVar = ("elements changed alone", "elements changed with others")
    kernels: ClassVar = ("overlap",)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return 1

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        return _Counts(num_models, parameters["epsilon"])


class _Counts:
    chunks = None
    kernel = "overlap"

    def __init__(self, num_models: int, epsilon: float) -> None:
        self._epsilon = epsilon
        self._counts = [[0] * num_models, [0] * num_models]

    def measure(self, block_ME: Tensor) -> list[list[int]]:
        active_ME = block_ME.abs() > self._epsilon
        alone_ME = active_ME & (active_ME.sum(0) == 1)
        unique_M = alone_ME.sum(1)
        return [unique_M.tolist(), (active_ME.sum(1) - unique_M).tolist()]

    def measure_raw(self, kernels: Any, block: RawBlock, **_: int) -> list[list[int]]:
        found = array("Q", kernels.overlap(block, to_float32(self._epsilon))).tolist()
        return [found[: len(found) // 2], found[len(found) // 2 :]]

    def add(self, share: list[list[int]]) -> None:
        for total, counts in zip(self._counts, share, strict=True):
            total[:] = [old + new for old, new in zip(total, counts, strict=True)]

    def finish(self) -> list[list[int]]:
        return self._counts
