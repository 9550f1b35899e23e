"""Tensors that a PEFT adapter changes, computed from the base's and the adapter's when read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.by_kernels import (
    Span,
    are_floats,
    codes_place,
    floats,
    is_stored,
    place_of,
)
from outliermerge.checkpoint.computed import GROUP_ELEMENTS, ComputedTensor, read_rows
from outliermerge.checkpoint.sources import Reading, Source, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

# Larger factors (as for a large vocabulary) would evict one another from the reader's cache.
_MAX_WHOLE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class LowRankSum(ComputedTensor):
    """W + s·BA (arXiv 2106.09685), or W + s·(BA)ᵀ where the layer stores its weight transposed.

    Products are added up in the order of the ranks. Each product, each sum, the product with s and
    the sum with W are rounded to float32, so that a value depends on neither blocks nor processors.

    Attributes:
        base: W, (R, …).
        lora_a, lora_b: A (r, …) and B (…, r).
        scale: s.
        transposed: W is stored (in, out), as Conv1D and embeddings do.
    """

    base: Source
    lora_a: TensorMeta
    lora_b: TensorMeta
    scale: float
    transposed: bool = False

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.base.stored, self.lora_a, self.lora_b)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        left, right = (factor.float() for factor in self.factors(reader, first, last))
        change = torch.zeros(last - first, self.num_columns)
        for k in range(right.shape[0]):
            change += left[:, k, None] * right[k]
        return read_rows(reader, self.base, first, last).float() + change * self.scale

    @property
    def by_kernels(self) -> bool:
        parts = (self.base, self.lora_a, self.lora_b)
        return type(self) is LowRankSum and all(map(are_floats, parts))

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        columns, rank = self.num_columns, self.lora_a.shape[0]
        row, end = span[0] // columns, -(-span[1] // columns)
        left: bytes | bytearray
        right: bytes | bytearray
        if self.transposed:
            starts = range(0, rank * self.num_rows, self.num_rows)
            some = [floats(reader, self.lora_a, at + row, at + end) for at in starts]
            left = _turned(b"".join(some), end - row)
            right = _turned(reader.whole_floats(self.lora_b), rank)
        else:
            left = floats(reader, self.lora_b, row * rank, end * rank)
            right = reader.whole_floats(self.lora_a)
        base = place_of(reader, self.base, span, first)
        return ("low_rank", first, base, columns, row, rank, self.scale, left, right, None, None)

    def factors(self, reader: Reading, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return L (last - first, r) and R (r, C): L·R are rows of BA, or of (BA)ᵀ."""
        if self.transposed:
            return _columns(reader, self.lora_a, first, last).T, reader.whole(self.lora_b).T
        return read_rows(reader, self.lora_b, first, last), reader.whole(self.lora_a).flatten(1)


def _turned(matrix: bytes | bytearray, columns: int) -> bytes:
    """Return a matrix of float32 (R, C), of which C are the columns, as (C, R)."""
    values = array("f", matrix)
    return b"".join(values[column::columns].tobytes() for column in range(columns))


def _columns(reader: Reading, matrix: TensorMeta, first: int, last: int) -> Tensor:
    import torch

    if matrix.num_bytes <= _MAX_WHOLE_BYTES:
        return reader.whole(matrix)[:, first:last]
    num_rows, width = matrix.shape
    starts = range(0, num_rows * width, width)
    return torch.stack([reader.values(matrix, at + first, at + last) for at in starts])


@dataclass(frozen=True, kw_only=True)
class Transposed(ComputedTensor):
    """A stored matrix (C, R), read as (R, C); `dtype` is the matrix's dtype."""

    matrix: TensorMeta

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (self.matrix,)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        return _columns(reader, self.matrix, first, last).T


def transposed(matrix: TensorMeta) -> Transposed:
    """Return a stored matrix with its two axes swapped."""
    return Transposed(
        name=matrix.name,
        shape=matrix.shape[::-1],
        out_dtype=matrix.dtype,
        dtype=matrix.dtype,
        matrix=matrix,
    )


@dataclass(frozen=True, kw_only=True)
class InDType(ComputedTensor):
    """A stored tensor, unchanged; an output stores it in the dtype of the base's tensor."""

    whole: TensorMeta

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (self.whole,)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        return read_rows(reader, self.whole, first, last)

    @property
    def by_kernels(self) -> bool:
        return is_stored(self.whole, ["float32"])

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        return codes_place(self.whole, span, first)


@dataclass(frozen=True, kw_only=True)
class ColumnNorms(ComputedTensor):
    """The L2 norm of each column of a matrix (R, C), as a vector (C,)."""

    matrix: ComputedTensor

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.matrix.stored

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return elements first to last (excluded) as (last - first, 1) of float32."""
        import torch

        squares = torch.zeros(last - first, dtype=torch.float64)
        step = max(1, GROUP_ELEMENTS // self.matrix.num_columns)
        for row in range(0, self.matrix.num_rows, step):
            end = min(row + step, self.matrix.num_rows)
            part = self.matrix.rows(reader, row, end)[:, first:last]
            squares += part.double().square().sum(0)
        return squares.sqrt().float()[:, None]


def row_norms(values_RC: Tensor) -> Tensor:
    """Return the L2 norms of rows as float32 (R,).

    Squares are added up in float64 by halves: the second half to the first, until one is left.
    """
    squares = values_RC.double().square()
    while (width := squares.shape[1]) > 1:
        half = (width + 1) // 2
        squares[:, : width - half] += squares[:, half:]
        squares = squares[:, :half]
    return squares[:, 0].sqrt().float()


@dataclass(frozen=True, kw_only=True)
class Rescaled(ComputedTensor):
    """DoRA (arXiv 2402.09353): m · V / ‖V‖, with V = W + s·BA and one norm for each output.

    Attributes:
        direction: V.
        magnitude: m, one value for each output.
        by_column: there is one for each index of the second axis of V: where that is the outputs'
            axis, or where the inputs have the norms, as LyCORIS trained them at first.
    """

    direction: ComputedTensor
    magnitude: TensorMeta
    by_column: bool

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.direction.stored, self.magnitude)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        values = self.direction.rows(reader, first, last)
        magnitude = reader.whole(self.magnitude).float().flatten()
        if not self.by_column:
            return values * (magnitude[first:last] / row_norms(values))[:, None]
        columns = ColumnNorms(
            name=self.name,
            shape=(self.num_columns,),
            out_dtype=self.out_dtype,
            matrix=self.direction,
        )
        norms = reader.whole(columns)
        width = self.num_columns // len(magnitude)
        if width > 1:  # of a convolution, whose columns are inputs and places
            norms = norms.view(-1, width).double().square().sum(1).sqrt().float()
        return values * (magnitude / norms).repeat_interleave(width)

    @property
    def by_kernels(self) -> bool:
        is_by_row = not self.by_column and are_floats(self.magnitude)
        return is_by_row and isinstance(self.direction, LowRankSum) and self.direction.by_kernels

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        row, end = span[0] // self.num_columns, -(-span[1] // self.num_columns)
        magnitudes = floats(reader, self.magnitude, row, end)
        norms = self._norms(reader, row, end)
        return (*self.direction.place(reader, span, first)[:-2], magnitudes, norms)

    def _norms(self, reader: Reading, first: int, last: int) -> bytes:
        """Return the norms of rows of V; each is computed once while the tensor is read."""
        columns, made = self.num_columns, reader.once(self, dict[int, bytes])
        step = max(1, 4 * GROUP_ELEMENTS // columns)
        for low in range(first // step * step, last, step):
            if low not in made:  # two threads may compute the same
                high = min(low + step, self.num_rows)
                span = low * columns, high * columns
                place = reader.opened([self.direction.place(reader, span, span[0])])[0]
                made[low] = reader.kernels.norms(place, high - low, columns)
        found = b"".join(made[low] for low in range(first // step * step, last, step))
        return found[4 * (first % step) :]


@dataclass(frozen=True, kw_only=True)
class ShiftedBias(ComputedTensor):
    """b + s·b_B: the bias of a layer whose factor B also has a bias, b_B (`lora_bias`)."""

    base: Source
    change: TensorMeta
    scale: float

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.base.stored, self.change)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return elements first to last (excluded) as (last - first, 1) of float32."""
        change = reader.whole(self.change)[first:last, None].float() * self.scale
        return read_rows(reader, self.base, first, last).float() + change


@dataclass(frozen=True, kw_only=True)
class ReplacedRows(ComputedTensor):
    """W with some rows replaced (`trainable_token_indices`); `dtype` is the dtype of W.

    Attributes:
        new: the replacing rows, (n, C).
        indices: which rows of W they replace, in order.
    """

    base: Source
    new: TensorMeta
    indices: tuple[int, ...]

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.base.stored, self.new)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of `dtype`."""
        values = read_rows(reader, self.base, first, last)
        for place, index in enumerate(self.indices):
            if first <= index < last:
                values[index - first] = reader.whole(self.new)[place].to(values.dtype)
        return values


def as_of(source: Source) -> dict[str, Any]:
    """Return the attributes that a computed tensor takes from the tensor that it changes."""
    return {"name": source.name, "shape": source.shape, "out_dtype": source.out_dtype}


def in_dtype_of(meta: TensorMeta, base: Source | None) -> Source:
    """Return a tensor that an output stores in the dtype of the base's tensor."""
    if base is None or meta.dtype == base.out_dtype:
        return meta
    return InDType(
        name=meta.name, shape=meta.shape, out_dtype=base.out_dtype, dtype=meta.dtype, whole=meta
    )


def makes(
    shape: tuple[int, ...], pair: tuple[TensorMeta, TensorMeta, bool], *, transposed: bool
) -> bool:
    """Tell whether the product of A and B has this shape."""
    a, b = pair[0].shape, pair[1].shape
    if len(a) < 2 or len(b) < 2:
        return False
    if transposed:
        return len(a) == len(b) == 2 and a[0] == b[1] and (a[1], b[0]) == shape
    return math.prod(b[1:]) == a[0] and (b[0], *a[1:]) == shape


def stores_head(tensors: Mapping[str, Source]) -> bool:
    """Tell whether a model stores a head beside its embeddings, by the shape of the two."""
    shapes = [
        source.shape
        for name, source in tensors.items()
        if len(source.shape) == 2 and not any(part.isdigit() for part in name.split("."))
    ]
    return bool(shapes) and shapes.count(max(shapes)) > 1
