"""The merge of one tensor whose sources are in memory, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import names
from outliermerge.engines.torch import keywords, measure_block, merge_block
from outliermerge.execution.passes import NeedKey, Span, measure_needs, spans
from outliermerge.execution.rounds import Round, Steps
from outliermerge.methods.contract import Task
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass
from outliermerge.planning.plan import row_elements

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 4 * CHUNK_ELEMENTS, "cuda": 64 * CHUNK_ELEMENTS}


def merge_in_memory(
    task: Task, sources: Sequence[Tensor], result: Tensor, kernels: Any | None
) -> Steps[None]:
    """Fill a tensor with the merge of sources, in steps that threads share."""
    import torch

    num_elements = result.numel()
    flat = [tensor.detach().reshape(-1) for tensor in sources]
    result_E = result.view(-1)
    limit = _BLOCK_ELEMENTS.get(result.device.type, _BLOCK_ELEMENTS["cpu"])
    row = row_elements(task.shape)
    block_elements = {"element": limit, "row": max(row, limit // row * row),
                      "tensor": max(1, num_elements)}[task.method.cut]  # fmt: skip
    fits = kernels is not None and task.fits_kernels(names())
    engine = KernelEngine(kernels) if fits else None

    def load(span: Span) -> Tensor:
        start, stop = span
        dtype = getattr(torch, task.compute_dtype)
        block_SE = torch.empty((len(flat), stop - start), dtype=dtype, device=result.device)
        for source, target in zip(flat, block_SE, strict=True):
            target.copy_(source[start:stop])
        return block_SE

    def measure(span: Span, passes: dict[NeedKey, Pass]) -> dict[NeedKey, Any]:
        if engine is not None:
            raws = [_bytes(tensor, span) for tensor in flat]
            return engine.measure(task, passes, raws, span[1] - span[0])
        return measure_block(task, load(span), passes)

    (needs,) = yield from measure_needs(
        [task], measure, num_elements=num_elements, block_elements=block_elements
    )
    prepared = None if engine is None else engine.prepare(task, needs)

    def merge(span: Span) -> None:
        if engine is not None:
            raws = [_bytes(tensor, span) for tensor in flat]
            engine.merge(task, prepared, raws, span[1] - span[0], _bytes(result_E, span))
            return
        block_SE = load(span)
        merged_E, _ = merge_block(task, block_SE, keywords(task, needs, block_SE))
        result_E[span[0] : span[1]].copy_(merged_E)

    yield Round(merge, spans(num_elements, block_elements))


def _bytes(tensor_E: Tensor, span: Span) -> memoryview:
    import torch

    array: Any = tensor_E[span[0] : span[1]].contiguous().view(torch.uint8).numpy()
    return memoryview(array)
