"""Reads tensors for an extraction: compares two, reads one in blocks, works on several in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, TypeVar

from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.execution.passes import spans

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")
_SPAN_ELEMENTS = 1 << 20


def difference(name: str, base: Source, model: Source, reader: Reader) -> float:
    """Return the Frobenius norm of model − base; NaN where their shapes differ.

    Of tensors that are not floats it is 1 where they differ.

    Raises:
        OutlierMergeError: a value is infinite or NaN.
    """
    import torch

    if base is model:
        return 0.0
    if base.shape != model.shape:
        return math.nan
    is_float = base.dtype.is_float and model.dtype.is_float
    squares = 0.0
    for start, stop in spans(model.num_elements, _SPAN_ELEMENTS):
        ours, theirs = (reader.values(source, start, stop) for source in (model, base))
        if not is_float:
            if base.dtype != model.dtype or not torch.equal(ours, theirs):
                return 1.0
            continue
        change = ours.double() - theirs.double()
        total = float(change.square().sum())
        if math.isnan(total):  # equal infinities
            total = float(change.masked_fill_(ours == theirs, 0).square_().sum())
        squares += total
    if not math.isfinite(squares):
        raise OutlierMergeError(
            f"{shown(name)}: found values that are infinite, NaN or too large to be squared, "
            "expected others: there is no adapter of them"
        )
    return math.sqrt(squares)


def blocks(source: Source, reader: Reader) -> Iterator[Tensor]:
    """Yield the values of a tensor in order."""
    for start, stop in spans(source.num_elements, _SPAN_ELEMENTS):
        yield reader.values(source, start, stop)


def in_order(
    pool: Executor, function: Callable[[T], U], items: Sequence[T], ahead: int
) -> Iterator[U]:
    """Yield the results in the order of the items; few of them wait for those before."""
    waiting = deque[Future[U]]()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
