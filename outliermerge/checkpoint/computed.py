"""Tensors that are computed from stored tensors, row by row, when they are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.checkpoint.by_kernels import Span, read_place
from outliermerge.checkpoint.sources import DTYPES, DType, Reading, Sized, Source, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

GROUP_ELEMENTS = 65_536
"""About how many elements are computed at a time. Another number may change the last bits of
products, and so the values of adapted and quantised tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputedTensor(Sized, ABC):
    """A Source whose values are computed from stored tensors, in groups of rows.

    A tensor (R, …) has R rows; the rows of a vector are its elements. Unless it `is_exact`, rows
    are always computed in the same groups, so that values do not depend on the blocks that are
    read.

    Attributes:
        name: a stored name, for messages.
        shape: the shape of the whole tensor.
        out_dtype: the dtype of an output if the spec does not set one.
        dtype: the dtype of the values that `read` gives.
    """

    name: str
    shape: tuple[int, ...]
    out_dtype: DType
    dtype: DType = DTYPES["float32"]
    is_exact: ClassVar[bool] = False
    """Whether a row's values do not depend on the rows that are computed with it."""

    @property
    @abstractmethod
    def stored(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is computed from."""

    @abstractmethod
    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""

    @property
    def by_kernels(self) -> bool:
        """Whether kernels compute it, as `place` says, with the bits of `rows`."""
        return False

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def num_columns(self) -> int:
        return math.prod(self.shape[1:])

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded), in `dtype`."""
        assert 0 <= start <= stop <= self.num_elements
        if stop == start:
            return
        if reader.kernels is not None and self.by_kernels:
            place = self.place(reader, (start, stop), start)
            read_place(reader, place, self, stop - start, out)
            return
        import torch

        target = torch.frombuffer(out, dtype=getattr(torch, self.dtype.name))
        columns = self.num_columns  # not 0, because nothing is read of an empty tensor
        group = max(1, GROUP_ELEMENTS // columns)
        first, end = start // columns // group * group, self.num_rows
        if self.is_exact:
            first, end = start // columns, -(-stop // columns)
        while first * columns < stop:
            last = min(first + group, end)
            flat = self.rows(reader, first, last).reshape(-1)
            low, high = max(start, first * columns), min(stop, last * columns)
            skipped = first * columns
            target[low - start : high - start] = flat[low - skipped : high - skipped]
            first = last


def read_rows(reader: Reading, source: Source, first: int, last: int) -> Tensor:
    """Return rows first to last (excluded) of a source as (last - first, C), in its dtype."""
    columns = math.prod(source.shape[1:])
    return reader.values(source, first * columns, last * columns).view(last - first, columns)
