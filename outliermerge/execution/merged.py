"""A merge as a source: it is computed from other sources when it is read, and is not stored.

Its statistics are measured at the first read. For a method on whole tensors, the result is computed
once and kept: in memory where the budget allows, else in an unnamed temporary file beside the
output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.sources import DType, Reading, Source, TensorMeta
from outliermerge.engines.torch import keywords, measure_block, merge_block
from outliermerge.execution.passes import NeedKey, Span, measure, needs_of, spans
from outliermerge.execution.rounds import run_here
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass
from outliermerge.methods.task import Task
from outliermerge.planning.plan import row_elements

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 4 * CHUNK_ELEMENTS


@dataclass(frozen=True, eq=False)
class MergedSource:
    """The merge of other sources. A Source; its values are rounded once, to the task's dtype.

    Attributes:
        name: for messages.
        task: how they are merged.
        sources: the base, where the method uses one, then the models; then the method's auxiliary
            tensors.
    """

    name: str
    task: Task
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if needs_of(self.task, "model"):
            raise ValueError(f"{self.task.method.name} measures whole models, not sources")

    @property
    def dtype(self) -> DType:
        return self.task.out_dtype

    @property
    def out_dtype(self) -> DType:
        return self.task.out_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.task.shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.num_bytes

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is computed from, each once."""
        return tuple(dict.fromkeys(meta for source in self.sources for meta in source.stored))

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop, in `dtype`.

        Raises:
            OutlierMergeError: a source cannot be read.
        """
        if stop == start:
            return
        size = self.dtype.num_bytes
        if self.task.cut == "tensor":
            held = reader.held(self, self.num_bytes, partial(self._fill, reader))
            out[:] = held[start * size : stop * size]
            return
        feed = _Feed(self, reader)
        needs = reader.once(self, feed.needs)
        for span in self._spans(start, stop):
            merged = feed.merged(span, needs)
            low, high = max(start, span[0]), min(stop, span[1])
            part = merged[(low - span[0]) * size : (high - span[0]) * size]
            out[(low - start) * size : (high - start) * size] = part

    def _fill(self, reader: Reading, out: memoryview) -> None:
        """Merge the whole tensor."""
        feed = _Feed(self, reader)
        out[:] = feed.merged((0, self.num_elements), feed.needs())

    def _spans(self, start: int, stop: int) -> list[Span]:
        """Return blocks that cover a range of elements; methods on rows get whole rows."""
        if self.task.cut == "element":
            return spans(stop, self.block_elements, start=start)
        row, step = row_elements(self.shape), self.block_elements
        return spans(min(self.num_elements, -(-stop // row) * row), step, start=start // row * row)

    @property
    def block_elements(self) -> int:
        """Elements of a block; whole rows for methods on rows."""
        row = row_elements(self.shape) if self.task.cut == "row" else 1
        return max(row, _BLOCK_ELEMENTS // row * row)


class _Feed:
    """The sources of a merge, which torch computes on the CPU."""

    def __init__(self, merged: MergedSource, reader: Reading) -> None:
        self._merged, self._reader = merged, reader
        self.num_elements, self.measured_elements = merged.num_elements, merged.block_elements

    def needs(self) -> dict[str, list[Any]]:
        """Measure the statistics that the method needs, in this thread."""
        measured = run_here(measure([self._merged.task], [self], "tensor"))
        return {name: measured[key] for name, key in needs_of(self._merged.task, "tensor").items()}

    def count(self, num_elements: int) -> None:
        """Count nothing: reads are counted by the reader of this merge."""

    def measure(self, span: Span, passes: Mapping[NeedKey, Pass]) -> dict[NeedKey, Any]:
        """Return what a span contributes to each of some passes."""
        task = self._merged.task
        block_SE = self._load(span, len(task.dtypes))
        return measure_block(task, block_SE, passes, span[0])

    def merged(self, span: Span, needs: Mapping[str, list[Any]]) -> memoryview:
        """Return the bytes of a merged span."""
        import torch

        task, block_SE = self._merged.task, self._load(span)
        own = keywords(task, needs, block_SE)
        merged_E, _ = merge_block(task, block_SE, own, span[0])
        stored_E = merged_E.to(getattr(torch, task.out_dtype.name)).contiguous()
        array: Any = stored_E.view(torch.uint8).numpy()
        return memoryview(array)

    def _load(self, span: Span, num_sources: int | None = None) -> Tensor:
        import torch

        sources: Sequence[Source] = self._merged.sources[:num_sources]
        dtype = getattr(torch, self._merged.task.compute_dtype)
        block_SE = torch.empty((len(sources), span[1] - span[0]), dtype=dtype)
        for row_E, source in zip(block_SE, sources, strict=True):
            row_E.copy_(self._reader.values(source, *span))
        return block_SE
