"""The distribution of a model's weights, or of its task vectors, tensor by tensor.

The measures are those of arXiv 2501.10661, sections 2.2 and A. An element is kept if it is within
3σ of the tensor's mean, and skewness and kurtosis are those of the kept elements. An exact Gaussian
keeps 99.73% of its elements; they have a kurtosis of 2.83, not 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.analysis.labels import label_of
from outliermerge.analysis.measure import (
    Measured,
    Measurer,
    are_counted,
    fit_kernels,
    measure_values,
)
from outliermerge.analysis.models import Subject, open_subject
from outliermerge.analysis.places import ModulePlace, find_places
from outliermerge.analysis.table import Histogram, TensorStats, WeightStats
from outliermerge.arguments import checked, nothing, wrong
from outliermerge.checkpoint.reader import Reader
from outliermerge.engines.kernels import find_kernels
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, shown
from outliermerge.execution.computing import reads_by_torch
from outliermerge.execution.rounds import Steps, run_all
from outliermerge.execution.threads import choose_device, exceeds_memory, torch_threads
from outliermerge.notebook import with_bar
from outliermerge.optional import require_torch
from outliermerge.storage.machine import keep_freed_memory, num_threads

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_FILTER = 3.0
DEFAULT_SMALL = 1e-3


@checked
@with_bar("the reading of weights")
def weight_stats(
    model: str | Path | Subject,
    *,
    base: str | Path | None = None,
    rename: str | None = None,
    filter: float = DEFAULT_FILTER,
    small: float = DEFAULT_SMALL,
    device: str = "cpu",
    threads: int = 0,
    kernels: bool = True,
    on_total: Callable[[int], None] = nothing,
    on_progress: Callable[[int], None] = nothing,
) -> WeightStats:
    """Measure the distribution of each of a model's tensors.

    Tensors are streamed, so memory does not grow with the model. 16-bit values are read once and
    counted by their bit patterns; others, task vectors and small tensors are read twice.
    Differences from a base are taken in float64. Infinite and NaN elements are counted and left
    out. Powers are in float64 as well: they overflow for elements above 1e75, and underflow below
    1e-75.

    Args:
        model: a folder, a file, a hub id, an adapter, `base+adapter`, or a result of
            `open_subject`.
        base: measure the task vectors against this model instead of the weights.
        rename: from the model's tensor names to the base's, as `open_subject` takes it.
        filter: elements within this many σ of the mean are kept; 0 or more.
        small: the magnitude below which an element is small (the paper's Table 5: 1e-3).
        device: `cpu`, `cuda`, `cuda:N` or `auto`; kernels compute on the CPU only.
        threads: worker threads; 0 chooses by the number of processors.
        kernels: use the fused kernels on the CPU; False uses torch.
        on_total: called once, before reading, with the number of bytes of all readings.
        on_progress: called with the number of bytes just read, by any thread. In a notebook a bar
            shows both if neither is given.

    Raises:
        ArgumentError: an argument is wrong.
        OutlierMergeError: a model is absent or broken, or has no tensor in common with the base.

    Example:
        >>> from outliermerge.analysis.stats import weight_stats
        >>> weight_stats("models/mine").whole.spreads["kurtosis"]  # doctest: +SKIP
        Spread(mean=3.02, std=0.24)
    """
    _check_limits(filter, small)
    subject = open_subject(model, base, rename=rename).changed()
    device = choose_device(device)
    if _needs_torch(subject, _kernels(device, kernels)):
        how = "" if _kernels(device, kernels) else " without the C kernels"
        require_torch(f"measuring {shown(subject.reference)}{how}")
    on_total(_work_bytes(subject, _kernels(device, kernels)))
    places = find_places(subject.tensors)
    found: dict[str, TensorStats] = {}
    keep_freed_memory()
    with Reader() as reader, ExitStack() as stack:
        measurer = Measurer(
            reader=reader,
            kernels=_kernels(device, kernels),
            device=device,
            filter=filter,
            small=small,
            on_progress=on_progress,
        )
        upcoming = dict(pairwise(subject.tensors))
        forgets = exceeds_memory(subject.num_bytes)

        def measure(name: str) -> Steps[None]:
            sources = subject.tensors[name]
            reader.will_need(enumerate(subject.tensors[upcoming.get(name, name)]))
            measured = yield from measurer.measure(sources)
            shape = sources[-1].shape
            found[name] = _stats(name, places[name], shape, measured)
            reader.release(enumerate(sources))
            if forgets:
                reader.forget(enumerate(sources))

        prepare = _nothing
        if _needs_torch(subject, measurer.kernels):
            prepare = stack.enter_context(torch_threads())
        reader.read_ahead(map(enumerate, subject.tensors.values()))
        run_all(map(measure, subject.tensors), threads=num_threads(threads), prepare=prepare)
    tensors = tuple(found[name] for name in subject.tensors)
    return WeightStats(
        model=subject.reference,
        base=subject.base,
        filter=filter,
        small=small,
        tensors=tensors,
        notes=(*subject.notes, *_warnings(tensors)),
    )


@checked
def stats_of_tensor(
    values: Tensor,
    *,
    name: str = "tensor",
    filter: float = DEFAULT_FILTER,
    small: float = DEFAULT_SMALL,
) -> TensorStats:
    """Measure the distribution of a tensor of floats in memory, of any shape, on any device.

    Raises:
        ArgumentError: an argument is wrong.
        OutlierMergeError: the tensor does not contain floats.

    Example:
        >>> import torch
        >>> stats_of_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0])).kurtosis
        1.64
    """
    _check_limits(filter, small)
    if not hasattr(values, "is_floating_point"):
        raise wrong("values", values, "a tensor")
    if not values.is_floating_point():
        raise OutlierMergeError(f"{shown(name)}: found {values.dtype}, expected floats")
    measured = measure_values(values, filter=filter, small=small)
    return _stats(name, find_places([name])[name], tuple(values.shape), measured)


def _check_limits(filter: float, small: float) -> None:
    for name, value in (("filter", filter), ("small", small)):
        if not (math.isfinite(value) and value >= 0):
            raise ArgumentError(f"{argument(name)}: found {value}, expected a number of at least 0")


def _stats(
    name: str, place: ModulePlace, shape: tuple[int, ...], measured: Measured
) -> TensorStats:
    tally, (kept, large, outside), counts = measured.tally, measured.filtered, measured.counts
    every = tally.all

    def share(num: float) -> float:
        return num / every.num if every.num else math.nan

    histogram = Histogram(counts[1:-1], counts[0], counts[-1]) if any(counts) else None
    return TensorStats(
        name=name,
        layer=place.layer,
        module=place.module,
        shape=shape,
        num_elements=int(every.num + tally.num_non_finite),
        num_non_finite=int(tally.num_non_finite),
        mean=every.mean if every.num else math.nan,
        std=every.std,
        minimum=every.least if every.num else math.nan,
        maximum=every.greatest if every.num else math.nan,
        zero_ratio=share(tally.num_zeros),
        skewness_before=every.skewness,
        kurtosis_before=every.kurtosis,
        kept_ratio=share(kept.num),
        skewness=kept.skewness,
        kurtosis=kept.kurtosis,
        small_ratio=share(tally.num_small),
        without_small_ratio=share(large.num),
        std_without_small=large.std,
        skewness_without_small=large.skewness,
        kurtosis_without_small=large.kurtosis,
        outside_2_ratio=share(outside[0]),
        outside_3_ratio=share(outside[1]),
        outside_4_ratio=share(outside[2]),
        l1_norm=tally.l1_norm,
        l2_norm=math.sqrt(every.m2 + every.num * every.mean * every.mean) if every.num else 0.0,
        label=label_of(histogram),
        histogram=histogram,
    )


def _work_bytes(subject: Subject, kernels: Any | None) -> int:
    return sum(
        sum(source.num_bytes for source in each) * (1 if kernels and are_counted(each) else 2)
        for each in subject.tensors.values()
    )


def _needs_torch(subject: Subject, kernels: Any | None) -> bool:
    """Tell whether torch measures any tensor, or computes one when it is read."""
    return kernels is None or any(
        not fit_kernels(each) or reads_by_torch(each) for each in subject.tensors.values()
    )


def _nothing() -> None:
    return None


def _kernels(device: str, wanted: bool) -> Any | None:
    return find_kernels() if wanted and device == "cpu" else None


def _warnings(tensors: Sequence[TensorStats]) -> list[str]:
    notes = []
    for tensor in tensors:
        if tensor.num_non_finite:
            notes.append(
                f"{tensor.name}: {tensor.num_non_finite:,} of {tensor.num_elements:,} elements are "
                "infinite or NaN, and left out of its statistics"
            )
        if tensor.std == math.inf:
            notes.append(f"{tensor.name}: its elements are too large to be squared")
    if constant := sum(tensor.is_matrix and tensor.std == 0 for tensor in tensors):
        notes.append(
            f"not counted in groups, since all their elements are equal: {constant} matrices"
        )
    return notes
