"""The protocol of an engine, which computes the blocks of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from outliermerge.checkpoint.sources import DType
from outliermerge.methods.statistics.base import Pass
from outliermerge.methods.task import Task

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """Computes blocks that are given as raw bytes; any thread may call it."""

    def buffer(self, slot: object, num_bytes: int) -> memoryview:
        """Return this thread's buffer for a slot; every call for the slot gives the same memory."""

    def prepare(
        self, task: Task, needs: Mapping[str, list[Any]], wholes: Mapping[str, Iterator[Tensor]]
    ) -> Any:
        """Return what `merge` takes as `prepared`, once for a whole tensor."""

    def measure(
        self,
        task: Task,
        passes: Mapping[Any, Pass],
        sources: Sequence[Any],
        num_elements: int,
        start: int = 0,
    ) -> dict[Any, Any]:
        """Return what a block, which begins at element `start`, contributes to each pass."""

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
            Whether all sources are finite, whether the output is finite, and the method's report.
        """

    def is_finite(self, dtype: DType, raw: memoryview) -> bool:
        """Tell whether all values are finite."""

    def convert(
        self,
        dtype: DType,
        raw: memoryview,
        out_dtype: DType,
        out: memoryview,
        keys: tuple[int, int] | None = None,
        start: int = 0,
    ) -> bool:
        """Write the values to `out` in another dtype; tell whether all fit in its range.

        Args:
            keys: for rounding at random, as a task's `rounding_keys`.
            start: the first element.
        """

    def equal(self, a: memoryview, b: memoryview) -> bool:
        """Tell whether two buffers hold the same bytes."""
