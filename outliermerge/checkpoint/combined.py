"""Rows that are sums of a tensor's rows with given weights, beside rows that are copies."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.computed import GROUP_ELEMENTS, ComputedTensor
from outliermerge.checkpoint.sources import Reading, Source, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

MEAN = -1
"""In place of the number of a row: the mean of all rows."""


@dataclass(frozen=True)
class Sums:
    """Sums of rows. Legend: S sums, K summands of the longest.

    Attributes:
        rows: the rows that any sum has, in order; MEAN may be the first.
        places: (S, K) the place in `rows` of each summand. Shorter sums have more of their first
            one, with the weight 0.
        weights: (S, K) in float64.
    """

    rows: Tensor
    places: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows_SK: Tensor, weights_SK: Tensor) -> Sums:
        """Make them of the numbers of the summed rows."""
        import torch

        rows, places = torch.unique(rows_SK, return_inverse=True)
        return cls(rows, places.view(rows_SK.shape).to(torch.int32), weights_SK.double())


@dataclass(frozen=True, kw_only=True)
class CombinedRows(ComputedTensor):
    """A tensor with copies of rows of another one, and sums of its rows.

    The rows that any sum has are held in memory from the first sum on, in the tensor's dtype.

    Attributes:
        source: the tensor; a vector's rows are its elements.
        copied: for every row the number of the source's row, or -1 - n for the sum number n.
        basis: what the sums were made of; two runs with an equal basis are the same merge.
        sums: None until they are computed.
    """

    source: Source
    basis: str
    copied: Sequence[int] = field(compare=False, repr=False)
    sums: Sums | None = field(default=None, compare=False, repr=False)

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    @property
    def num_rows(self) -> int:
        return len(self.copied)

    @property
    def num_columns(self) -> int:
        return self.num_elements // max(1, len(self.copied))

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        import torch

        columns = self.num_columns
        result = torch.empty(last - first, columns, dtype=getattr(torch, self.dtype.name))
        wanted = self.copied[first:last]
        start = 0
        while start < len(wanted):
            stop = start + 1
            if wanted[start] >= 0:  # rows that follow one another are read together
                while stop < len(wanted) and wanted[stop] == wanted[start] + stop - start:
                    stop += 1
                row = wanted[start]
                span = row * columns, (row + stop - start) * columns
                result[start:stop] = reader.values(self.source, *span).view(-1, columns)
            start = stop
        places = [place for place, row in enumerate(wanted) if row < 0]
        if places:
            numbers = torch.tensor([-1 - wanted[place] for place in places])
            result[places] = self._summed(reader, numbers).to(result.dtype)
        return result

    def _summed(self, reader: Reading, numbers: Tensor) -> Tensor:
        """Return sums in float64; summands are added in their order, whatever the threads are."""
        import torch

        assert self.sums is not None, "a plan without its sums is not run"
        held: Tensor = reader.once(self, lambda: self._held(reader))
        places, weights = self.sums.places[numbers], self.sums.weights[numbers]
        total = torch.zeros(len(numbers), self.num_columns, dtype=torch.float64)
        for place, weight in zip(places.T, weights.T, strict=True):
            total += weight[:, None] * held[place].double()
        return total

    def _held(self, reader: Reading) -> Tensor:
        """Return the rows that are summed, in the source's dtype."""
        import torch

        assert self.sums is not None
        columns = self.num_columns
        numbers = self.sums.rows
        held = torch.empty(len(numbers), columns, dtype=getattr(torch, self.source.dtype.name))
        with_mean = len(numbers) > 0 and int(numbers[0]) == MEAN
        if len(numbers) == int(with_mean):
            return self._mean(reader)[None].to(held.dtype) if with_mean else held
        for start, rows in row_blocks(reader, self.source, columns):
            low, high = torch.searchsorted(numbers, torch.tensor([start, start + len(rows)]))
            held[low:high] = rows[numbers[low:high] - start]
        if with_mean:
            held[0] = self._mean(reader)
        return held

    def _mean(self, reader: Reading) -> Tensor:
        """Return the mean of all rows in float64; blocks are added in a fixed order."""
        import torch

        total = torch.zeros(self.num_columns, dtype=torch.float64)
        number = 0
        for _, rows in row_blocks(reader, self.source, self.num_columns):
            total += rows.double().sum(0)
            number += len(rows)
        return total / number


def row_blocks(reader: Reading, source: Source, columns: int) -> Any:
    """Yield the rows of a tensor in blocks (B, C), each with the number of its first row."""
    step = max(1, GROUP_ELEMENTS * 16 // max(1, columns))
    number = source.num_elements // max(1, columns)
    for start in range(0, number, step):
        stop = min(start + step, number)
        yield start, reader.values(source, start * columns, stop * columns).view(-1, columns)


def copies(rows: Sequence[int | None]) -> array[int]:
    """Return `copied` for rows of which some are None: these get the sums, in order."""
    found = array("q")
    num_sums = 0
    for row in rows:
        if row is None:
            num_sums += 1
        found.append(-num_sums if row is None else row)
    return found
