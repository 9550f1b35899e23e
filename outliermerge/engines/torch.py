"""The torch engine: it calls the methods' own functions, on the CPU or on GPUs.

Shape suffixes: M models, S sources (the base, where there is one, then the models), E elements.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from outliermerge.checkpoint.sources import DType
from outliermerge.engines.rounding import rounded
from outliermerge.methods.contract import Cut, MergeMethod
from outliermerge.methods.statistics.base import Pass
from outliermerge.methods.task import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class TorchEngine:
    """torch on one or several devices.

    Each thread has its own buffers (pinned where a GPU reads them) and its own stream; threads are
    given the devices in turn. So one thread's block is copied to a device while another's is
    computed and a third's is read from disk.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._own = _Own(devices, itertools.count())

    def buffer(self, slot: object, num_bytes: int) -> memoryview:
        """Return this thread's buffer for a slot; every call for the slot gives the same memory."""
        import torch

        found = self._own.raw.get(slot)
        if found is None or len(found) < num_bytes:
            pinned = self._own.device.type == "cuda"
            found = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._own.raw[slot] = found
        array: Any = found[:num_bytes].numpy()
        return memoryview(array)

    def prepare(
        self, task: Task, needs: Mapping[str, list[Any]], wholes: Mapping[str, Iterator[Tensor]]
    ) -> Any:
        """Return the needs as they are, of which each device makes its own tensors, and the wholes.

        Args:
            wholes: the auxiliary tensors that the method takes whole, the models' one by one.
        """
        import torch

        with self._own.stream():
            made = made_of(task, needs, wholes, self._own.device)
            if wholes and self._own.device.type == "cuda":  # other streams will read them
                torch.cuda.synchronize(self._own.device)
        return made

    def measure(
        self,
        task: Task,
        passes: Mapping[T, Pass],
        sources: Sequence[memoryview],
        num_elements: int,
        start: int = 0,
    ) -> dict[T, Any]:
        """Return a block's share in each statistic's pass."""
        with self._own.stream():
            block_SE = self._load(task, sources, num_elements)
            return measure_block(task, block_SE, passes, start)

    def merge(
        self,
        task: Task,
        prepared: Any,
        raws: list[memoryview],
        num_elements: int,
        out: memoryview,
        start: int = 0,
    ) -> tuple[bool, bool, dict[str, Any]]:
        """Fill `out` with a block's merged weights."""
        import torch

        with self._own.stream():
            block_SE = self._load(task, raws, num_elements)
            finite = is_finite(block_SE)
            merged_E, report = merge_block(
                task, block_SE, keywords(task, prepared, block_SE), start
            )
            keys, dtype = task.rounding_keys, task.out_dtype.name
            rounded_E = merged_E if keys is None else rounded(merged_E, dtype, keys, start)
            stored_E = rounded_E.to(getattr(torch, dtype))
            fits_ = fits(merged_E, stored_E)
            _values(task.out_dtype, out).copy_(stored_E)  # waits for the stream
            return finite, fits_, {name: value.tolist() for name, value in report.items()}

    def is_finite(self, dtype: DType, raw: memoryview) -> bool:
        """Tell whether no value is infinite or NaN."""
        return is_finite(_values(dtype, raw))

    def convert(
        self,
        dtype: DType,
        raw: memoryview,
        out_dtype: DType,
        out: memoryview,
        keys: tuple[int, int] | None = None,
        start: int = 0,
    ) -> bool:
        """Write the values to `out` in another dtype; tell whether all fit in its range."""
        values, stored = _values(dtype, raw), _values(out_dtype, out)
        stored.copy_(values if keys is None else rounded(values, out_dtype.name, keys, start))
        return fits(values, stored)

    def equal(self, a: memoryview, b: memoryview) -> bool:
        """Tell whether two buffers hold the same bytes."""
        import torch

        return torch.equal(_bytes(a), _bytes(b))

    def _load(self, task: Task, raws: Sequence[memoryview], num_elements: int) -> Tensor:
        """Return sources (S, E) in the compute dtype, in a buffer of this thread."""
        import torch

        own, dtype = self._own, getattr(torch, task.compute_dtype)
        size = len(raws) * num_elements
        flat = own.block.get(dtype)
        if flat is None or len(flat) < size:
            flat = own.block[dtype] = torch.empty(size, dtype=dtype, device=own.device)
        block_SE = flat[:size].view(len(raws), num_elements)
        dtypes = (*task.dtypes, *task.auxiliary)[: len(raws)]
        for row_E, source, raw in zip(block_SE, dtypes, raws, strict=True):
            # Copy in the storage dtype, which is smaller; the device widens it.
            stored_E = _values(source, raw).to(own.device, non_blocking=True)
            row_E.copy_(stored_E)
        return block_SE


class TensorEngine:
    """torch on tensors that are in memory already; the output is a tensor, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(
        self, task: Task, needs: Mapping[str, list[Any]], wholes: Mapping[str, Iterator[Tensor]]
    ) -> Any:
        """Return the needs, and what is made of the wholes."""
        return made_of(task, needs, wholes, self._device)

    def measure(
        self,
        task: Task,
        passes: Mapping[T, Pass],
        sources: Sequence[Tensor],
        num_elements: int,
        start: int = 0,
    ) -> dict[T, Any]:
        """Return a block's share in each statistic's pass."""
        return measure_block(task, self._load(task, sources, num_elements), passes, start)

    def merge(
        self,
        task: Task,
        prepared: Any,
        sources: Sequence[Tensor],
        num_elements: int,
        out: Tensor,
        start: int = 0,
    ) -> tuple[bool, bool, dict[str, Any]]:
        """Fill `out` (E,) with a block's merged weights; return what another engine does."""
        block_SE = self._load(task, sources, num_elements)
        merged_E, report = merge_block(task, block_SE, keywords(task, prepared, block_SE), start)
        out.copy_(merged_E)
        fits_ = fits(merged_E, out)
        return fits_, fits_, report

    def _load(self, task: Task, sources: Sequence[Tensor], num_elements: int) -> Tensor:
        import torch

        dtype = getattr(torch, task.compute_dtype)
        block_SE = torch.empty((len(sources), num_elements), dtype=dtype, device=self._device)
        for row_E, source_E in zip(block_SE, sources, strict=True):
            row_E.copy_(source_E)
        return block_SE


class _Own(threading.local):
    """The device, stream and buffers of one thread."""

    def __init__(self, devices: Sequence[str], numbers: Iterator[int]) -> None:
        import torch

        self.device = torch.device(devices[next(numbers) % len(devices)])
        self.raw: dict[object, Tensor] = {}
        self.block: dict[object, Tensor] = {}
        self._stream: Any = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def stream(self) -> Any:
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def made_of(
    task: Task,
    needs: Mapping[str, Any],
    wholes: Mapping[str, Iterator[Tensor]],
    device: torch.device,
) -> dict[str, Any]:
    """Return the needs, and what the method makes of the auxiliary tensors that it takes whole."""
    import torch

    made, compute = dict(needs), getattr(torch, task.compute_dtype)
    for name, tensors in wholes.items():
        wide = (one.to(device, torch.promote_types(one.dtype, compute)) for one in tensors)
        made[name] = task.method.prepared[name].make(wide, task.parameters)
    return made


def keywords(task: Task, needs: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Return needs and parameters as the method's function takes them, on a block's device."""
    import torch

    empty = like.new_empty(0)
    return task.method.arguments(task.parameters, like=empty) | {
        name: value.to(like.device)
        if isinstance(value, torch.Tensor)
        else empty.new_tensor(value, dtype=torch.float64)
        for name, value in needs.items()
    }


def measure_block(
    task: Task, block_SE: Tensor, passes: Mapping[T, Pass], start: int = 0
) -> dict[T, Any]:
    """Return a block's share in each statistic's pass.

    Args:
        block_SE: the sources; overwritten.
        start: the block's first element.
    """
    block_ME = to_deltas(block_SE) if task.is_delta else block_SE
    shares: dict[T, Any] = {}
    for name, state in passes.items():
        block = block_SE if getattr(state, "with_base", False) else block_ME
        more = {"start": start} if getattr(state, "with_start", False) else {}
        shares[name] = state.measure(block, **more)
    return shares


def merge_block(
    task: Task, block_SE: Tensor, keywords: Mapping[str, Any], start: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a block's merged weights (E,) in the compute dtype, and the method's report.

    Args:
        block_SE: the sources, followed by the auxiliary tensors; overwritten.
        keywords: needs and parameters as the method's function takes them.
        start: the block's first element.
    """
    method, num_sources = task.method, len(task.dtypes)
    more: dict[str, Any] = {}
    others_AE = block_SE[num_sources:]
    for number, name in enumerate(method.in_blocks):
        rows = others_AE[number * task.num_models : (number + 1) * task.num_models]
        more[name] = view_for(method.cut, rows, task.shape)
    block_SE = block_SE[:num_sources]
    if method.space == "both":
        more["base"] = view_for(method.cut, block_SE[:1], task.shape)[0]
    context = replace(task.context, shape=task.shape, start=start)
    if method.takes_context:
        more["context"] = context
    block_ME = to_deltas(block_SE) if task.is_delta else block_SE
    result = method.function(view_for(method.cut, block_ME, task.shape), **keywords, **more)
    merged, report = result if isinstance(result, tuple) else (result, {})
    merged_E = _flat(method, merged, block_SE)
    for modifier, parameters in task.modifiers:
        own = modifier.arguments(parameters, like=merged_E)
        own |= {"context": context} if modifier.takes_context else {}
        if modifier.takes_deltas:
            own["deltas"] = view_for(modifier.cut, block_ME, task.shape)
        view = view_for(modifier.cut, merged_E[None], task.shape)[0]
        merged_E = _flat(modifier, modifier.function(view, **own), block_SE)
    if task.is_delta:
        merged_E = merged_E + block_SE[0]
    return merged_E, report


def _flat(method: MergeMethod, merged: Tensor, block_SE: Tensor) -> Tensor:
    merged_E = merged.reshape(-1)
    if merged_E.shape != block_SE.shape[1:]:
        raise ValueError(
            f"{method.name} returned shape {tuple(merged.shape)} for a block "
            f"of {block_SE.shape[1]} elements"
        )
    return merged_E


def to_deltas(block_SE: Tensor) -> Tensor:
    """Subtract the base, in place, and return the task vectors (M, E)."""
    return block_SE[1:].sub_(block_SE[0])


def view_for(cut: Cut, block_ME: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a block in the shape that a method with this cut takes."""
    num_models = len(block_ME)
    if cut == "row":
        columns = math.prod(shape[1:]) if len(shape) > 1 else block_ME.shape[1]
        return block_ME.view(num_models, -1, columns)
    if cut == "tensor":
        return block_ME.view(num_models, *shape)
    return block_ME


def fits(values: Tensor, stored: Tensor) -> bool:
    """Tell whether finite values stay finite in the dtype in which they are stored.

    torch stores values that are too large for float8_e4m3fn as its largest value, 448. Here a value
    is too large if it is nearer to 480, which would be the next one, than to 448.
    """
    import torch

    kept = torch.finfo(stored.dtype).max
    low, high = _extremes(values)
    if stored.dtype == torch.float8_e4m3fn:
        return -464 <= low and high <= 464
    return (-kept <= low and high <= kept) or is_finite(stored)


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite.

    The least and the greatest value tell it: both are NaN if any value is.
    """
    return not values.numel() or all(math.isfinite(extreme) for extreme in _extremes(values))


def _extremes(values: Tensor) -> tuple[float, float]:
    wide = values if values.element_size() >= 4 else values.float()
    low, high = wide.aminmax()
    return float(low), float(high)


def _bytes(raw: memoryview) -> Tensor:
    import torch

    return torch.frombuffer(raw, dtype=torch.uint8) if len(raw) else torch.empty(0)


def _values(dtype: DType, raw: memoryview) -> Tensor:
    import torch

    kind = getattr(torch, dtype.name)
    return torch.frombuffer(raw, dtype=kind) if len(raw) else torch.empty(0, dtype=kind)
