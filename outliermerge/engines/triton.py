"""The Triton engine: fused kernels merge many tensors that are on a GPU already.

A batch takes three launches: two measure the moments of all its tensors, and one merges them. With
one launch per tensor, the launches would take longer than the arithmetic. torch computes where
there is no kernel for a method or a dtype.

Shape suffixes: T tensors of a batch, M models, S sources (the base, where there is one, then the
models), P pieces.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from outliermerge.engines.torch import measure_block
from outliermerge.methods.kernel_call import CODES, KernelCall
from outliermerge.methods.statistics.base import (
    CHUNK_ELEMENTS,
    StandardDeviation,
    Statistic,
    is_measured_by,
    scope_of,
)
from outliermerge.methods.task import Task

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

_LOG = logging.getLogger(__name__)
_BATCH_ELEMENTS = 1 << 32  # that is 17 MB of moments for each model
_BLOCK_CHUNKS = 64  # how many chunks torch measures at a time
_LEFT_OUT = 0x7FFFFFFF
_MOST_MODELS = 16  # a kernel is compiled for each number of models; more do not fit in registers

KERNELS = {"min_sigma": (2, 1), "ties": (2, 3), "weighted_sum": (0, 1)}
"""The merges in `triton_kernels`, and how many scalars and vectors (M,) each takes."""


@dataclass(frozen=True, eq=False)
class TensorMerge:
    """One tensor's merge in memory.

    Attributes:
        task: how it is merged.
        sources: the base, where there is one, then the models; all of one shape.
        result: the tensor that is filled.
        auxiliary: the method's auxiliary tensors: all models' of the first kind, then of the next.
    """

    task: Task
    sources: tuple[Tensor, ...]
    result: Tensor
    auxiliary: tuple[Tensor, ...] = ()

    @property
    def num_elements(self) -> int:
        return self.result.numel()


def fits_gpu(merge: TensorMerge) -> bool:
    """Tell whether the fused GPU kernels support a merge and its device."""
    device = merge.result.device
    models = merge.task.dtypes[merge.task.is_delta :]
    return (
        device.type == "cuda"
        and merge.task.fits_kernels(KERNELS)
        and all(
            scope_of(need, merge.task.parameters) == "tensor"
            for need in merge.task.method.needs.values()
        )
        and len(set(models)) == 1
        and len(models) <= _MOST_MODELS
        and all(source.device == device and source.is_contiguous() for source in merge.sources)
        and merge.result.is_contiguous()
        and _work_on(device)
    )


@cache
def _work_on(device: Any) -> bool:
    """Tell whether kernels can be built and launched on a device, by trying one."""
    import torch

    kernels = _kernels()
    if not kernels.is_installed:
        return False
    try:
        with torch.cuda.device(device):
            place, num = torch.zeros((2, 1), dtype=torch.int64, device=device)
            out = torch.zeros((2, 2), dtype=torch.float64, device=device)
            kernels.combine_moments[1, 1](out[0], place, num + 1, out[1], M=1)
    except Exception as error:  # no C compiler, a device too old: Triton has no common class
        _LOG.warning("%s: Triton cannot build its kernels, so torch computes: %s", device, error)
        return False
    return True


def _kernels() -> Any:
    # Triton takes a while to import.
    return importlib.import_module("outliermerge.engines.triton_kernels")


def merge_on_gpu(merges: Sequence[TensorMerge]) -> None:
    """Fill the results of merges that the kernels support, on the current streams."""
    for batch in _batches(merges):
        with batch.on_device():
            needs = [dict[str, list[Any]]() for _ in batch.merges]
            method = batch.merges[0].task.method
            for name, need in method.needs.items():
                measure = _measured if is_measured_by(need, vars(_Measures).keys()) else _by_torch
                measure = _deviations if isinstance(need, StandardDeviation) else measure
                for own, value in zip(needs, measure(batch, need), strict=True):
                    own[name] = value
            assert method.kernel is not None
            batch.merge(
                [
                    method.kernel(merge.task.parameters, own, merge.task.context)
                    for merge, own in zip(batch.merges, needs, strict=True)
                ]
            )


def differ_early(merges: Sequence[TensorMerge]) -> list[bool]:
    """Tell, for merges that the kernels support, whether sources differ in their first elements.

    Where they do not differ there, the caller compares the whole tensors.
    """
    found: dict[int, bool] = {}
    for batch in _batches(merges):
        with batch.on_device():
            flags = batch.empty((len(batch.merges),), "int32")
            batch.launch("heads_differ", (batch.sizes, flags), grid=(len(batch.merges),))
            for merge, flag in zip(batch.merges, flags.tolist(), strict=True):
                found[id(merge)] = bool(flag)
    return [found.get(id(merge), False) for merge in merges]


def _batches(merges: Sequence[TensorMerge]) -> Iterator[_Batch]:
    """Group tensors for one launch, in their order, up to some billions of elements."""
    groups: dict[object, list[TensorMerge]] = {}
    for merge in merges:
        if merge.num_elements:
            groups.setdefault(_kind(merge), []).append(merge)
    for group in groups.values():
        batch: list[TensorMerge] = []
        left = _BATCH_ELEMENTS
        for merge in group:
            if batch and merge.num_elements > left:
                yield _Batch(tuple(batch))
                batch, left = [], _BATCH_ELEMENTS
            batch.append(merge)
            left -= merge.num_elements
        yield _Batch(tuple(batch))


def _kind(merge: TensorMerge) -> object:
    task = merge.task
    return task.method.name, task.dtypes, task.out_dtype, merge.result.device, _alignment(merge)


def _alignment(merge: TensorMerge) -> int:
    """Return 8 where eight elements can be loaded and stored at once, else 1."""
    tensors = (*merge.sources, merge.result)
    aligned = all(tensor.data_ptr() % 32 == 0 for tensor in tensors)
    return 8 if aligned and merge.num_elements % 8 == 0 else 1


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tensors of the same dtypes on one device, and the tables of their addresses for kernels."""

    merges: tuple[TensorMerge, ...]

    @property
    def task(self) -> Task:
        return self.merges[0].task

    @cached_property
    def sizes(self) -> Tensor:
        return self.upload([merge.num_elements for merge in self.merges], "int64")

    @cached_property
    def addresses(self) -> Tensor:
        return self.upload(
            [
                [tensor.data_ptr() for tensor in (*merge.sources, merge.result)]
                for merge in self.merges
            ],
            "int64",
        )

    @cached_property
    def num_pieces_T(self) -> numpy.ndarray[Any, Any]:
        import numpy

        sizes_T = numpy.array([merge.num_elements for merge in self.merges])
        return -(-sizes_T // CHUNK_ELEMENTS)

    @cached_property
    def pieces(self) -> Tensor:
        """Every piece of every tensor, (P, 3)."""
        import numpy

        sizes_T = numpy.array([merge.num_elements for merge in self.merges])
        tensor_P = numpy.repeat(numpy.arange(len(sizes_T)), self.num_pieces_T)
        first_T = numpy.cumsum(self.num_pieces_T) - self.num_pieces_T
        number_P = numpy.arange(len(tensor_P)) - first_T[tensor_P]
        pieces_P3 = numpy.empty((len(tensor_P), 3), numpy.int32)
        pieces_P3[:, 0], pieces_P3[:, 1], pieces_P3[:, 2] = tensor_P, number_P, CHUNK_ELEMENTS
        last_T = first_T + self.num_pieces_T - 1
        pieces_P3[last_T, 2] = sizes_T - (self.num_pieces_T - 1) * CHUNK_ELEMENTS
        return self.upload(pieces_P3, "int32")

    def on_device(self) -> Any:
        import torch

        device = self.merges[0].result.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def upload(self, values: Any, dtype: str) -> Tensor:
        import torch

        like = self.merges[0].result
        return torch.as_tensor(values, dtype=getattr(torch, dtype)).to(like.device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        import torch

        return self.merges[0].result.new_empty(shape, dtype=getattr(torch, dtype))

    def launch(self, kernel: str, arguments: tuple[Any, ...], *, grid: tuple[int, ...]) -> None:
        """Launch a kernel with the addresses, further arguments, and the batch's dtypes."""
        task, kernels = self.task, _kernels()
        out = {"OUT": CODES[task.out_dtype.name]} if kernel in KERNELS else {}
        getattr(kernels, kernel)[grid](
            self.addresses,
            *arguments,
            M=task.num_models,
            BASE=CODES[task.dtypes[0].name] if task.is_delta else "",
            MODEL=CODES[task.dtypes[-1].name],
            ALIGN=_alignment(self.merges[0]),
            **out,
            **kernels.OPTIONS,
        )

    def num_parts(self, pieces: Tensor) -> int:
        return len(pieces) * _parts_of_a_piece()

    def moments(self) -> list[list[list[float]]]:
        """Return the mean and sum of squared deviations of each tensor and model (T, M, 2)."""
        import numpy

        kernels, num_models = _kernels(), self.task.num_models
        num_parts = self.num_parts(self.pieces)
        partials = self.empty((num_parts, num_models, 2), "float64")
        self.launch("moments", (self.pieces, partials), grid=(num_parts,))
        first_T = (numpy.cumsum(self.num_pieces_T) - self.num_pieces_T) * _parts_of_a_piece()
        out = self.empty((len(self.merges), num_models, 2), "float64")
        kernels.combine_moments[len(self.merges), num_models](
            partials, self.upload(first_T, "int64"), self.sizes, out, M=num_models
        )
        found: list[list[list[float]]] = out.tolist()
        return found

    def merge(self, calls: Sequence[KernelCall]) -> None:
        """Fill the results, each with the parameters of its kernel call."""
        import numpy

        for call in calls:
            assert KERNELS[call.name] == (len(call.scalars), len(call.vectors)), call.name
        values = [[*call.scalars, *itertools.chain(*call.vectors)] for call in calls]
        with numpy.errstate(over="ignore"):  # to infinity, as on the CPU
            parameters = self.upload(numpy.array(values).astype(numpy.float32), "float32")
        grid = (self.num_parts(self.pieces),)
        self.launch(calls[0].name, (self.pieces, parameters), grid=grid)


def _parts_of_a_piece() -> int:
    kernels = _kernels()
    assert kernels.PIECE.value == CHUNK_ELEMENTS
    return int(CHUNK_ELEMENTS // kernels.BLOCK.value)


def _deviations(batch: _Batch, need: Statistic) -> Iterator[list[Any]]:
    """Measure the standard deviations of all tensors of a batch in one pass."""
    for merge, moments_M in zip(batch.merges, batch.moments(), strict=True):
        state: Any = need.start(len(moments_M), merge.num_elements, merge.task.parameters)
        means, squares = zip(*moments_M, strict=True)
        state.add([(merge.num_elements, list(means), list(squares))])
        yield state.finish()


def _measured(batch: _Batch, need: Statistic) -> Iterator[list[Any]]:
    """Measure another statistic, tensor by tensor."""
    for merge in batch.merges:
        task, own = merge.task, _Batch((merge,))
        state: Any = need.start(task.num_models, merge.num_elements, task.parameters)
        while not isinstance(state, list):
            pieces = own.pieces if state.chunks is None else own.pieces[list(state.chunks)]
            state.add(state.measure_raw(_Measures, (own, pieces)))
            state = state.finish()
        yield state


def _by_torch(batch: _Batch, need: Statistic) -> Iterator[list[Any]]:
    """Measure a statistic that has no kernels, tensor by tensor."""
    import torch

    for merge in batch.merges:
        task, flat = merge.task, [source.reshape(-1) for source in merge.sources]
        state: Any = need.start(task.num_models, merge.num_elements, task.parameters)
        while not isinstance(state, list):
            step, starts = _BLOCK_CHUNKS * CHUNK_ELEMENTS, state.chunks
            if starts is not None:
                step, starts = CHUNK_ELEMENTS, [i * CHUNK_ELEMENTS for i in starts]
            for start in range(0, merge.num_elements, step) if starts is None else starts:
                block_SE = torch.stack([source[start : start + step].float() for source in flat])
                state.add(measure_block(task, block_SE, {need: state})[need])
            state = state.finish()
        yield state


class _Measures:
    """The kernel functions that statistics call, with some pieces of a tensor as the block."""

    @staticmethod
    def histogram(
        block: tuple[_Batch, Tensor],
        lows: tuple[int, ...],
        shift: int,
        counts: tuple[numpy.ndarray[Any, Any] | None, ...],
    ) -> None:
        """Add to the counts of the models for which counts are wanted, M at a time."""
        batch, pieces = block
        num_models = batch.task.num_models
        for start in range(0, len(counts) - num_models, num_models):
            stop = start + num_models
            _Measures.histogram(block, lows[start:stop], shift, counts[start:stop])
        lows, counts = lows[-num_models:], counts[-num_models:]
        if all(own is None for own in counts):
            return
        num_bins = next(len(own) for own in counts if own is not None) - 1
        found = batch.empty((len(counts), num_bins + 1), "int32").zero_()
        wanted = [_LEFT_OUT if own is None else low for low, own in zip(lows, counts, strict=True)]
        batch.launch(
            "histogram",
            (pieces, batch.upload(wanted, "int32"), found, shift, num_bins),
            grid=(batch.num_parts(pieces),),
        )
        array_MB: Any = found.cpu().numpy()
        for own, new in zip(counts, array_MB, strict=True):
            if own is not None:
                own += new.astype("uint64")

    @staticmethod
    def magnitudes(block: tuple[_Batch, Tensor], thresholds: bytes) -> bytes:
        """Return the sums over all pieces, float64 (M, 2)."""
        import numpy

        batch, pieces = block
        num_parts, num_models = batch.num_parts(pieces), batch.task.num_models
        partials = batch.empty((num_parts, num_models, 2), "float64")
        least_M = batch.upload(numpy.frombuffer(bytearray(thresholds), numpy.float32), "float32")
        batch.launch("magnitudes", (pieces, least_M, partials), grid=(num_parts,))
        array: Any = partials.sum(0).cpu().numpy()
        return bytes(array.tobytes())
