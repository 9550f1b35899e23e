"""Tensors whose rows are those of other tensors: moved, averaged, zero, or padding.

"Rows" are columns for a tensor whose tokens are along its last axis.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, overload

from outliermerge.checkpoint.computed import GROUP_ELEMENTS, ComputedTensor, read_rows
from outliermerge.checkpoint.sources import DTYPES, DType, Reading, Source, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

_MEAN = -1  # in place of a source's number: the row is a mean of several, or zero


def without_axis(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tensor's shape without its rows, which are along axis 0 or -1."""
    return shape[1:] if axis == 0 else shape[:-1]


class _ByColumns:
    """A computed tensor (…, V) whose "rows" are along its last axis."""

    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True, slots=True)
class Run:
    """Rows `start` to `stop` of a tensor, each the mean of rows of one or several sources.

    Attributes:
        parts: the numbers of the sources, each with the source's row that goes to `start`; none
            where the rows are zero.
    """

    start: int
    stop: int
    parts: tuple[tuple[int, int], ...]


class Runs(Sequence[Run]):
    """Runs that cover a tensor in order; 20 bytes each, as every row may be one of its own.

    Args:
        runs: the runs in order.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._starts, self._numbers, self._rows = array("q"), array("i"), array("q")
        self._means: list[tuple[tuple[int, int], ...]] = []
        stop = 0
        for run in runs:
            self._starts.append(run.start)
            if len(run.parts) == 1:
                number, row = run.parts[0]
            else:
                number, row = _MEAN, len(self._means)
                self._means.append(run.parts)
            self._numbers.append(number)
            self._rows.append(row)
            stop = run.stop
        self._starts.append(stop)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number, row = self._numbers[index], self._rows[index]
        parts = self._means[row] if number == _MEAN else ((number, row),)
        return Run(self._starts[index], self._starts[index + 1], parts)

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, row: int) -> int:
        """Return the index of the run that a row of the tensor is in."""
        return bisect_right(self._starts, row, hi=len(self)) - 1

    @property
    def has_means(self) -> bool:
        return any(self._means)

    def _key(self) -> tuple[object, ...]:
        return (
            *(values.tobytes() for values in (self._starts, self._numbers, self._rows)),
            tuple(self._means),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((len(self), self._starts[-1], self._numbers[:8].tobytes()))

    def __repr__(self) -> str:
        digest = sha256(repr(self._key()).encode()).hexdigest()
        return f"Runs({len(self)} of {self._starts[-1]} rows, sha256 {digest})"


@dataclass(frozen=True, kw_only=True)
class RearrangedRows(ComputedTensor):
    """Rows copied from sources or averaged over them, in runs that cover the tensor in order."""

    sources: tuple[Source, ...]
    runs: Runs

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return tuple(dict.fromkeys(meta for source in self.sources for meta in source.stored))

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        import torch

        columns, width = self.num_columns, self.dtype.num_bytes
        result = torch.empty(last - first, columns, dtype=getattr(torch, self.dtype.name))
        # Rows go straight to their place: each may be read by itself.
        array: Any = result.view(torch.uint8).numpy()
        raw = memoryview(array).cast("B") if columns else memoryview(b"")
        index = self.runs.at(first)
        position = first
        while position < last:
            run = self.runs[index]
            stop = min(last, run.stop)
            low, high = position - run.start, stop - run.start
            if len(run.parts) == 1 and self.sources[run.parts[0][0]].dtype == self.dtype:
                number, row = run.parts[0]
                place = raw[(position - first) * columns * width : (stop - first) * columns * width]
                span = (row + low) * columns, (row + high) * columns
                self.sources[number].read(reader, *span, place)
            else:
                rows = self._part(reader, run.parts, low, high)
                result[position - first : stop - first] = rows
            position, index = stop, index + 1
        return result

    def _part(
        self, reader: Reading, parts: tuple[tuple[int, int], ...], first: int, last: int
    ) -> Tensor | float:
        if not parts:
            return 0.0
        number, row = parts[0]
        values = read_rows(reader, self.sources[number], row + first, row + last)
        if len(parts) == 1:
            return values
        total = values.double()
        for number, row in parts[1:]:
            total += read_rows(reader, self.sources[number], row + first, row + last)
        return total / len(parts)


@dataclass(frozen=True, kw_only=True)
class RearrangedColumns(_ByColumns, RearrangedRows):
    """Like RearrangedRows, for a tensor (…, V): runs are along its last axis."""

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, V) of `dtype`."""
        import torch

        read = [
            reader.values(source, first * width, last * width).view(last - first, width)
            for source in self.sources
            for width in (source.shape[-1],)
        ]
        result = torch.empty(last - first, self.num_columns, dtype=getattr(torch, self.dtype.name))
        for run in self.runs:
            width = run.stop - run.start
            parts = [read[number][:, start : start + width] for number, start in run.parts]
            if len(parts) > 1:
                parts = [torch.stack([part.double() for part in parts]).mean(0)]
            result[:, run.start : run.stop] = parts[0] if parts else 0.0
        return result


@dataclass(frozen=True, kw_only=True)
class PaddedRows(ComputedTensor):
    """A tensor and rows behind it, each of which is the mean of the tensor's own."""

    source: Source

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        import torch

        own = self.source.shape[0]
        parts = []
        if first < own:
            parts.append(read_rows(reader, self.source, first, min(last, own)).to(torch.float64))
        if last > own:
            mean = reader.once(self, lambda: self._mean(reader))
            parts.append(mean.expand(last - max(first, own), -1))
        return torch.cat(parts).to(getattr(torch, self.dtype.name))

    def _mean(self, reader: Reading) -> Tensor:
        """Return the mean (1, C) in float64; blocks are added in a fixed order."""
        import torch

        own = self.source.shape[0]
        step = max(1, GROUP_ELEMENTS // max(1, self.num_columns))
        total = torch.zeros(1, self.num_columns, dtype=torch.float64)
        for start in range(0, own, step):
            rows = read_rows(reader, self.source, start, min(start + step, own))
            total += rows.double().sum(0, keepdim=True)
        return total / own


@dataclass(frozen=True, kw_only=True)
class PaddedColumns(_ByColumns, PaddedRows):
    """Like PaddedRows, for a tensor (…, V): the mean is that of each row."""

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, V) of `dtype`."""
        import torch

        width = self.source.shape[-1]
        own = reader.values(self.source, first * width, last * width).view(-1, width).double()
        mean = own.mean(1, keepdim=True).expand(-1, self.num_columns - width)
        return torch.cat([own, mean], 1).to(getattr(torch, self.dtype.name))


def padded(source: Source, num_rows: int, axis: int = 0) -> Source:
    """Return a tensor with rows added behind it, each the mean of its own."""
    if num_rows == source.shape[axis]:
        return source
    kind = PaddedRows if axis == 0 else PaddedColumns
    others = without_axis(axis, source.shape)
    return kind(
        name=source.name,
        shape=(num_rows, *others) if axis == 0 else (*others, num_rows),
        out_dtype=source.out_dtype,
        dtype=_common_dtype([source.dtype], means=True),
        source=source,
    )


def rearrange(
    own: int,
    sources: Mapping[int, Source],
    cells: Iterable[tuple[tuple[int, int], ...]],
    axis: int = 0,
) -> Source:
    """Return a model's tensor with given rows; its own source if these are its own rows in order.

    Args:
        own: the model's number.
        sources: the tensor of each model that has it, by the model's number.
        cells: for every row, the models and their rows whose mean it is; none for a zero row.
        axis: the axis of the rows, 0 or -1.
    """
    source = sources[own]
    used: dict[int, int] = {}

    def placed(parts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple((used.setdefault(number, len(used)), row) for number, row in parts)

    runs = Runs(Run(start, stop, placed(parts)) for start, stop, parts in _spans(cells))
    if [*used] == [own] and [*runs] == [Run(0, source.shape[axis], ((0, 0),))]:
        return source
    num_rows = runs[-1].stop if runs else 0
    others = without_axis(axis, source.shape)
    rearranged = RearrangedRows if axis == 0 else RearrangedColumns
    return rearranged(
        name=source.name,
        shape=(num_rows, *others) if axis == 0 else (*others, num_rows),
        out_dtype=source.out_dtype,
        dtype=_common_dtype([sources[number].dtype for number in used or [own]], runs.has_means),
        sources=tuple(sources[number] for number in used),
        runs=runs,
    )


def _spans(
    cells: Iterable[tuple[tuple[int, int], ...]],
) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    start = stop = 0
    first: tuple[tuple[int, int], ...] = ()
    for row, parts in enumerate(cells):
        num = row - start
        if row and parts != tuple((number, place + num) for number, place in first):
            yield start, row, first
            start, first = row, parts
        elif not row:
            first = parts
        stop = row + 1
    if stop:
        yield start, stop, first


def _common_dtype(dtypes: Sequence[DType], means: bool) -> DType:
    if len(set(dtypes)) == 1 and not means:
        return dtypes[0]
    return DTYPES["float64" if DTYPES["float64"] in dtypes else "float32"]
