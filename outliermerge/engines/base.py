"""What computes blocks: the protocol that engines follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from outliermerge.checkpoint.sources import DType
from outliermerge.methods.statistics.base import Pass
from outliermerge.methods.task import Task


class Engine(Protocol):
    """What computes blocks of raw bytes; any thread may call it."""

    def buffer(self, slot: object, num_bytes: int) -> memoryview:
        """Return bytes that this thread uses again for the slot."""

    def prepare(self, task: Task, needs: Mapping[str, list[Any]]) -> Any:
        """Return what `merge` needs to know of a whole tensor."""

    def measure(
        self,
        task: Task,
        passes: Mapping[Any, Pass],
        sources: Sequence[Any],
        num_elements: int,
        start: int = 0,
    ) -> dict[Any, Any]:
        """Return a block's share in each statistic's pass; `start` is its first element."""

    def merge(
        self,
        task: Task,
        prepared: Any,
        raws: list[memoryview],
        num_elements: int,
        out: memoryview,
        start: int = 0,
    ) -> tuple[bool, bool, dict[str, Any]]:
        """Fill `out` with a block's merged weights; `start` is its first element.

        Returns:
            Whether all sources are finite, whether the output is, and the method's report.
        """

    def is_finite(self, dtype: DType, raw: memoryview) -> bool:
        """Tell whether no value is infinite or NaN."""

    def convert(self, dtype: DType, raw: memoryview, out_dtype: DType, out: memoryview) -> bool:
        """Fill out with the values in another dtype; tell whether it holds them."""

    def equal(self, a: memoryview, b: memoryview) -> bool:
        """Tell whether two buffers hold the same bytes."""
