"""Weights computed in float32 from codes and scales, a group of rows at a time.

On a CPU, looking codes up in a table was measured 3 to 5 times faster than torch's cast of float8.
Laying out scales with `expand` is as much faster than gathering them by index.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.by_kernels import (
    KINDS,
    Span,
    are_floats,
    codes_place,
    floats,
    is_stored,
)
from outliermerge.checkpoint.computed import ComputedTensor
from outliermerge.checkpoint.quantized.packed import Unpacked, finite_floats, refuse_scale
from outliermerge.checkpoint.sources import Reading, Source, TensorMeta
from outliermerge.errors import OutlierMergeError

if TYPE_CHECKING:
    from torch import Tensor


_SMALL_BYTES = 1 << 20  # scales that are kept rather than read again for each group of rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _MatrixTensor(ComputedTensor):
    """A tensor of matrices, also stacked (…, R, C); its rows are the rows of the matrices."""

    weight: Source

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledTensor(_MatrixTensor):
    """(code − zero point) × scale × factor; a block of rows and columns shares a scale.

    Scales and zero points are (…, R / block rows, C / block columns), both rounded up.

    Attributes:
        values: the numbers that codes stand for, where they are no numbers themselves.
        zero: what is taken off all codes, besides.
        groups: the block of columns of each column (C), where blocks are not in their order.
    """

    scale: Source
    zero_point: Source | None = None
    block: tuple[int, int]
    factor: float = 1.0
    values: tuple[float, ...] = ()
    zero: float = 0.0
    groups: TensorMeta | None = None

    @property
    def _parts(self) -> tuple[Source, ...]:
        parts = (self.weight, self.scale, self.zero_point, self.groups)
        return tuple([part for part in parts if part is not None])

    @property
    def sources(self) -> tuple[Source, ...]:
        """Those of its parts that are computed."""
        return tuple([part for part in self._parts if not isinstance(part, TensorMeta)])

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        stored: tuple[TensorMeta, ...] = ()
        for part in self._parts:
            stored += part.stored
        return stored

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        num_matrix_rows, num_columns = self.shape[-2:]
        width = -(-num_columns // self.block[1])
        row = torch.arange(first, last)
        matrix, row = row // num_matrix_rows, row % num_matrix_rows
        block_row = matrix * -(-num_matrix_rows // self.block[0]) + row // self.block[0]
        low, high = int(block_row[0]), int(block_row[-1]) + 1

        def by_element(source: Source) -> Tensor:
            if isinstance(source, TensorMeta) and source.num_bytes <= _SMALL_BYTES:
                blocks = reader.whole(source).view(-1, width)[low:high].float()
            else:
                blocks = reader.values(source, low * width, high * width).float().view(-1, width)
            if source is self.scale:
                refuse_not_finite(blocks, source)
            blocks = blocks[block_row - low]
            if self.groups is not None and (order := self._order(reader, width)) is not None:
                return blocks[:, order]
            wide = blocks[:, :, None].expand(-1, -1, self.block[1])
            return wide.reshape(last - first, -1)[:, :num_columns]

        codes = reader.values(self.weight, first * num_columns, last * num_columns)
        if self.values:
            values = torch.tensor(self.values).index_select(0, codes.int()).view(-1, num_columns)
        else:
            values = _as_float32(codes).view(-1, num_columns)
        if self.zero_point is not None:
            values = values - by_element(self.zero_point)
        if self.zero:
            values = values - self.zero
        values = values * by_element(self.scale)
        return values if self.factor == 1 else values * self.factor

    @property
    def by_kernels(self) -> bool:
        if self.groups is not None or self._codes is None or not are_floats(self.scale):
            return False
        zero_point = self.zero_point
        return zero_point is None or are_floats(zero_point) or is_stored(zero_point, [*KINDS])

    @property
    def _codes(self) -> tuple[TensorMeta, str] | None:
        """The stored codes and their kind, where kernels can read them."""
        weight = self.weight
        if isinstance(weight, TensorMeta) and is_stored(weight, [*KINDS]) and not self.values:
            return weight, KINDS[weight.dtype.name]
        source = weight.source if isinstance(weight, Unpacked) else None
        if isinstance(source, TensorMeta) and source.offset is not None:
            assert isinstance(weight, Unpacked)
            is_plain = weight.bits == 4 and not weight.order and not weight.plus
            if is_plain and 2 * source.num_bytes == weight.num_elements:
                return source, "l"
        return None

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        assert self._codes is not None
        (num_rows, num_columns), (height, width) = self.shape[-2:], self.block
        per_row, per_matrix = -(-num_columns // width), -(-num_rows // height)
        row, last = span[0] // num_columns, (span[1] - 1) // num_columns
        low, high = (at // num_rows * per_matrix + at % num_rows // height for at in (row, last))
        ends = low * per_row, (high + 1) * per_row
        zero_point = self.zero_point
        return codes_place(
            self._codes[0],
            span,
            first,
            kind=self._codes[1],
            sizes=(num_rows, num_columns),
            block=(height, width),
            first_row=low,
            scales=finite_floats(reader, self.scale, *ends),
            zeros=None if zero_point is None else floats(reader, zero_point, *ends),
            table=struct.pack(f"{len(self.values)}f", *self.values) if self.values else None,
            zero=self.zero,
            factor=self.factor,
        )

    def _order(self, reader: Reading, width: int) -> Tensor | None:
        """Return the block of each column, or None where -1 says that they are in order."""
        assert self.groups is not None
        order = reader.whole(self.groups)
        low, high = int(order.min()), int(order.max())
        if low == -1:
            return None
        if low < 0 or high >= width:
            raise OutlierMergeError(
                f"{self.groups.path}: tensor {self.groups.name!r}: has the groups {low} to {high}, "
                f"expected 0 to {width - 1}, as there are scales. Fetch the model again."
            )
        return order.long()


def refuse_not_finite(scales: Tensor, source: Source) -> None:
    """Refuse scales that would make weights of nothing."""
    if not scales.isfinite().all():
        found = scales[~scales.isfinite()].flatten()[0]
        refuse_scale(source, f"{float(found)}")


@dataclass(frozen=True, kw_only=True)
class RowScaledTensor(ComputedTensor):
    """code × scale for a weight (R, …): one scale for all, or num_groups for each row.

    The scales of a row are in the order of its columns; each is for C / num_groups columns.
    """

    weight: TensorMeta
    scale: TensorMeta
    num_groups: int

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (self.weight, self.scale)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        columns = self.num_columns
        values = _as_float32(reader.values(self.weight, first * columns, last * columns))
        scale = reader.whole(self.scale).float().flatten()
        refuse_not_finite(scale, self.scale)
        if self.num_groups:
            scale = scale[first * self.num_groups : last * self.num_groups, None]
            return (values.view(scale.shape[0], -1) * scale).view(last - first, -1)
        return (values * scale).view(last - first, -1)

    @property
    def by_kernels(self) -> bool:
        return is_stored(self.weight, [*KINDS]) and is_stored(self.scale)

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        columns, groups = self.num_columns, self.num_groups
        row = span[0] // columns if groups else 0
        end = -(-span[1] // columns) * groups if groups else 1
        return codes_place(
            self.weight,
            span,
            first,
            sizes=(self.num_rows, columns),
            block=(1, columns // groups) if groups else (self.num_rows, columns),
            first_row=row,
            scales=finite_floats(reader, self.scale, row * groups, end),
        )


def _as_float32(codes: Tensor) -> Tensor:
    import torch

    if not codes.is_floating_point() or codes.element_size() > 1:
        return codes.float()
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int())


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTensor(_MatrixTensor):
    """bitsandbytes' nf4 and fp4: value of a code × greatest magnitude (absmax) of its block.

    Blocks continue from one row to the next. The first code of a byte is in its high bits; `offset`
    is added to absmax.
    """

    bits: int
    values: TensorMeta
    absmax: Source
    block: int
    offset: float | None = None

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.weight.stored, self.values, *self.absmax.stored)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        start, stop = first * self.num_columns, last * self.num_columns
        first_block, end_block = start // self.block, -(-stop // self.block)
        begin, end = first_block * self.block, min(end_block * self.block, self.num_elements)
        # The bytes can be stored as any dtype (bnb_4bit_quant_storage).
        num_codes = 8 // self.bits * self.weight.dtype.num_bytes
        skipped = begin // num_codes
        codes = reader.values(self.weight, skipped, -(-end // num_codes)).view(torch.uint8)
        if self.bits == 4:
            codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()
        codes = codes[begin - skipped * num_codes : end - skipped * num_codes]
        values = reader.whole(self.values).index_select(0, codes.int())
        values = torch.nn.functional.pad(values, (0, end_block * self.block - end))
        absmax = reader.whole(self.absmax).flatten()[first_block:end_block]
        refuse_not_finite(absmax, self.absmax)
        values = (values.view(-1, self.block) * absmax[:, None]).flatten()[start - begin :]
        values = values[: stop - start].view(last - first, -1)
        return values if self.offset is None else values + self.offset

    @property
    def by_kernels(self) -> bool:
        is_there = isinstance(self.weight, TensorMeta) and self.weight.offset is not None
        return is_there and is_stored(self.values, ["float32"]) and are_floats(self.absmax)

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        assert isinstance(self.weight, TensorMeta)
        low, high = span[0] // self.block, -(-span[1] // self.block)
        return codes_place(  # a block is a row, of which one scale is for all columns
            self.weight,
            span,
            first,
            kind="h" if self.bits == 4 else "u",
            sizes=(-(-self.num_elements // self.block), self.block),
            block=(1, self.block),
            first_row=low,
            scales=finite_floats(reader, self.absmax, low, high),
            table=bytes(reader.whole_floats(self.values)),
            added=-0.0 if self.offset is None else self.offset,
        )
