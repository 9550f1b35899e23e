"""The merge of one tensor whose sources are in memory, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import names
from outliermerge.engines.torch import TensorEngine
from outliermerge.engines.triton import TensorMerge
from outliermerge.execution.passes import Measured, NeedKey, Span, spans
from outliermerge.execution.pipeline import merge_tensor
from outliermerge.execution.rounds import Steps
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass
from outliermerge.methods.task import Task
from outliermerge.planning.plan import row_elements

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 4 * CHUNK_ELEMENTS, "cuda": 64 * CHUNK_ELEMENTS}


def merge_in_memory(feed: MemoryFeed, known: Measured) -> Steps[None]:
    """Fill a tensor with the merge of sources, in rounds that threads share.

    Args:
        known: the statistics that were measured over the whole model.
    """
    yield from merge_tensor([feed.task], feed, feed.engine, known=[known])


class MemoryFeed:
    """Sources in memory: kernels take their bytes, torch takes the tensors themselves."""

    def __init__(self, merge: TensorMerge, kernels: Any | None) -> None:
        task, result = merge.task, merge.result
        kernels = kernels if task.fits_kernels(names()) else None
        self.task, self._result_E = task, result.view(-1)
        in_blocks = merge.auxiliary[: len(task.auxiliary)]
        self._wholes = merge.auxiliary[len(task.auxiliary) :]
        self._sources = [tensor.reshape(-1) for tensor in (*merge.sources, *in_blocks)]
        self.engine: KernelEngine | TensorEngine = (
            TensorEngine(result.device) if kernels is None else KernelEngine(kernels)
        )
        self.num_elements = result.numel()
        limit = _BLOCK_ELEMENTS.get(result.device.type, _BLOCK_ELEMENTS["cpu"])
        rows = row_elements(task.shape) * task.rows_at_once
        self.measured_elements = {"element": limit, "row": max(rows, limit // rows * rows),
                                  "tensor": max(1, self.num_elements)}[task.cut]  # fmt: skip

    def wholes(self, task: Task) -> Mapping[str, Any]:
        """Return copies of the auxiliary tensors that the method takes whole, each in its turn."""
        num = task.num_models
        return {
            name: map(_copied, self._wholes[place * num : (place + 1) * num])
            for place, name in enumerate(task.method.prepared)
        }

    def spans(self) -> list[Span]:
        return spans(self.num_elements, self.measured_elements)

    def count(self, num_elements: int) -> None:
        """Count nothing: only reads from files are counted."""

    def measure(self, span: Span, passes: Mapping[NeedKey, Pass]) -> dict[NeedKey, Any]:
        """Return what a span contributes to each of some passes."""
        start, stop = span
        sources = self._read(span)[: len(self.task.dtypes)]
        return self.engine.measure(self.task, passes, sources, stop - start, start)

    def merge(self, span: Span, prepared: Sequence[Any]) -> None:
        """Fill a span of the result."""
        start, stop = span
        out = self._part(self._result_E, span)
        self.engine.merge(self.task, prepared[0], self._read(span), stop - start, out, start)

    def _read(self, span: Span) -> list[Any]:
        return [self._part(tensor, span) for tensor in self._sources]

    def _part(self, tensor_E: Tensor, span: Span) -> Any:
        import torch

        part_E = tensor_E[span[0] : span[1]]
        if isinstance(self.engine, TensorEngine):
            return part_E
        return memoryview(part_E.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _copied(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.float64, copy=True)
