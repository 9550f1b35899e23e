"""Merges of tensors whose sources are in memory, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.engines.batched import batches, merge_batch
from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import find_kernels, names
from outliermerge.engines.torch import TensorEngine, is_finite
from outliermerge.engines.triton import TensorMerge, differ_early, fits_gpu, merge_on_gpu
from outliermerge.execution.passes import Measured, NeedKey, Span, measure, needs_of, spans
from outliermerge.execution.pipeline import merge_tensor
from outliermerge.execution.rounds import Steps, run_all
from outliermerge.execution.threads import torch_threads
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass
from outliermerge.methods.task import Task
from outliermerge.planning.plan import row_elements
from outliermerge.storage.machine import num_threads

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 4 * CHUNK_ELEMENTS, "cuda": 64 * CHUNK_ELEMENTS}


def merge_all(merges: Sequence[TensorMerge]) -> list[TensorMerge]:
    """Fill the results: on a GPU many at once, else one after another.

    Returns:
        The merges whose result has values that are infinite, NaN or too large for its dtype.
    """
    import torch

    known = _measured_over_all(merges)
    fitting = [merge for merge in merges if fits_gpu(merge)]
    differing = dict(zip(map(id, fitting), differ_early(fitting), strict=True))
    left = [m for m in merges if differing.get(id(m)) or not _keep_equal_models(m)]
    merge_on_gpu([merge for merge in left if id(merge) in differing])
    feeds: list[MemoryFeed] = []
    alone = [merge for merge in left if id(merge) not in differing]
    on_gpu = [merge for merge in alone if merge.result.device.type == "cuda"]
    if on_gpu:
        free_bytes, _ = torch.cuda.mem_get_info(on_gpu[0].result.device)
        for batch in batches(on_gpu, memory_bytes=free_bytes // 2):
            if len(batch) > 1 and merge_batch(batch):
                alone = [merge for merge in alone if merge not in batch]
    if alone:
        _wait_for_gpus(alone)
        with torch_threads() as prepare:
            feeds = [_feed(merge) for merge in alone]
            steps = (merge_in_memory(feed, known) for feed in feeds)
            run_all(steps, threads=num_threads(0), prepare=prepare)
        _wait_for_gpus(alone)
    fits = {merge: feed.fits for merge, feed in zip(alone, feeds, strict=True)}
    return [m for m in merges if not (fits[m] if m in fits else is_finite(m.result))]


def _measured_over_all(merges: Sequence[TensorMerge]) -> Measured:
    """Return the statistics that the method needs of all tensors together."""
    tasks, found = [merge.task for merge in merges], dict[Any, list[Any]]()
    if not any(needs_of(task, "model") for task in tasks):
        return found

    def measured() -> Steps[None]:
        found.update((yield from measure(tasks, [_feed(merge) for merge in merges], "model")))

    _wait_for_gpus(merges)
    with torch_threads() as prepare:
        run_all([measured()], threads=num_threads(0), prepare=prepare)
    return found


def _wait_for_gpus(merges: Sequence[TensorMerge]) -> None:
    """Wait for what is queued on GPUs, because threads do not use the stream of their caller."""
    import torch

    for device in {merge.result.device for merge in merges}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _keep_equal_models(merge: TensorMerge) -> bool:
    """Fill the result where all sources are equal and come back as they are."""
    import torch

    def comparable(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.element_size() == 1 else tensor  # torch compares no float8

    first, method = merge.sources[0], merge.task.method
    if method.space == "weight" and not method.idempotent(merge.task.parameters):
        return False
    same = all(
        tensor.dtype == first.dtype
        and torch.equal(comparable(first), comparable(tensor).to(first.device))
        for tensor in merge.sources[1:]
    )
    if same:
        merge.result.copy_(first)
    return same


def _feed(merge: TensorMerge) -> MemoryFeed:
    tensors = (merge.result, *merge.sources)
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    kernels = find_kernels() if on_cpu else None
    return MemoryFeed(merge, kernels)


def merge_in_memory(feed: MemoryFeed, known: Measured) -> Steps[None]:
    """Fill a tensor with the merge of sources, in rounds that threads share.

    Args:
        known: the statistics that were measured over the whole model.
    """
    yield from merge_tensor([feed.task], feed, feed.engine, known=[known])


class MemoryFeed:
    """Sources in memory: kernels take their bytes, torch takes the tensors themselves.

    Attributes:
        fits: no value of the result is infinite, NaN or too large for its dtype.
    """

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
        self.num_elements, self.fits = result.numel(), True
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
        sources = self._read(span)
        _, fits, _ = self.engine.merge(self.task, prepared[0], sources, stop - start, out, start)
        self.fits = self.fits and fits

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
