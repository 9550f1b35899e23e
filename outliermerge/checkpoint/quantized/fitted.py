"""The scales of a weight, fitted to its blocks when they are first read.

The scale of a block needs the greatest magnitude of its values before a code can be written. So the
weight is read twice, in pieces, and only scales are held: once for the scales, which stay until
the codes are written, and once for the codes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge.checkpoint.quantized.coding import Coding, nearest
from outliermerge.checkpoint.quantized.tensors import CodeTensor
from outliermerge.checkpoint.sources import DType, Reading, Sized, Source, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

_PIECE_ELEMENTS = 1 << 18  # read at a time for scales


@dataclass(frozen=True)
class Held:
    """How a weight was stored before. A block whose values are still the same keeps its bytes.

    Attributes:
        values: what its codes stand for, in the shape of the weight that is coded.
        codes: its codes.
        scale: its scales, one for each block; those of bitsandbytes' nested scales are a
            `CodeTensor`, whose own codes and scales are coded again.
        zero_point: its zero points.
        groups: the block of each column, where blocks are not in their order.
    """

    values: Source
    codes: Source
    scale: Source
    zero_point: Source | None = None
    groups: TensorMeta | None = None

    @property
    def nested(self) -> CodeTensor | None:
        return self.scale if isinstance(self.scale, CodeTensor) else None


@dataclass(frozen=True, kw_only=True)
class Scales(Sized):
    """The scales of a weight, one for each block. A Source.

    Attributes:
        shape: as they are stored.
        source: the weight, (…, R, C).
        coding: how values become codes.
        block: how many rows and columns share a scale.
        scale_dtype: of the scales; codes are made by what they are after rounding.
        held: how the weight was stored before.
    """

    source: Source
    shape: tuple[int, ...]
    coding: Coding
    block: tuple[int, int]
    scale_dtype: DType
    held: Held | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> DType:
        return self.scale_dtype

    @property
    def out_dtype(self) -> DType:
        return self.scale_dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        held = self.held.values.stored if self.held else ()
        return tuple(dict.fromkeys((*self.source.stored, *held)))

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it is computed from besides the weight."""
        return (self.held.values,) if self.held else ()

    @property
    def work_bytes(self) -> int:
        """The memory that a thread needs for a piece of the weight, and all scales."""
        rows, columns = self.grid
        piece = max(_PIECE_ELEMENTS, self.source.shape[-1])
        per_block = 4 + (4 if self.coding.has_zero_points else 0) + (1 if self.held else 0)
        return (32 if self.held else 16) * piece + per_block * rows * columns

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks there are: all matrices' rows of blocks, and columns."""
        *stack, num_rows, num_columns = self.source.shape
        rows = math.prod(stack) * -(-num_rows // self.block[0])
        return rows, -(-num_columns // self.block[1])

    def blocks(self, reader: Reading, part: str, first: int, last: int) -> Tensor | None:
        """Return a part of what is known of rows first to last (excluded) of blocks."""
        made: _Made = reader.once(self, lambda: _Made(self))
        return made.rows(reader, part, first, last)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with scales start to stop (excluded)."""
        self.fill(reader, out, (start, stop), part="scales", dtype=self.dtype)

    def fill(
        self,
        reader: Reading,
        out: memoryview,
        span: tuple[int, int],
        *,
        part: str,
        dtype: DType,
        per: int = 1,
    ) -> None:
        """Fill `out` with elements of a part, of which there is one for `per` blocks."""
        import torch

        start, stop = span[0] * per, min(span[1] * per, math.prod(self.grid))
        if stop <= start:
            return
        columns = self.grid[1]
        first, last = start // columns, -(-stop // columns)
        found = self.blocks(reader, part, first, last)
        assert found is not None
        flat = found.reshape(-1)[start - first * columns : stop - first * columns : per]
        torch.frombuffer(out, dtype=getattr(torch, dtype.name)).copy_(flat)

    def spread(self, reader: Reading, part: str, first: int, last: int) -> Tensor | None:
        """Return a part for each element of rows first to last (excluded), or the only one."""
        import torch

        if self.grid == (1, 1):
            return self.blocks(reader, part, 0, 1)
        num_rows, columns = self.source.shape[-2:]
        height, width = self.block
        per_matrix = -(-num_rows // height)

        def block_row(row: int) -> int:
            return row // num_rows * per_matrix + row % num_rows // height

        low = block_row(first)
        found = self.blocks(reader, part, low, block_row(last - 1) + 1)
        if found is None:
            return None
        rows = torch.arange(first, last)
        places = rows // num_rows * per_matrix + rows % num_rows // height - low
        if (order := self.order(reader)) is not None:
            return found[places][:, order]
        wide = found[places][:, :, None].expand(-1, -1, min(width, columns))
        return wide.reshape(last - first, -1)[:, :columns]

    def order(self, reader: Reading) -> Tensor | None:
        """Return the block of each column, where blocks are not in their order."""
        if self.held is None or self.held.groups is None:
            return None
        found = reader.whole(self.held.groups)
        return None if int(found.min()) == -1 else found.long()


class _Made:
    """What is known of the blocks of a weight; each row of blocks is computed when first read."""

    def __init__(self, of: Scales) -> None:
        import torch

        self._of = of
        rows, columns = of.grid
        nested = of.held.nested if of.held else None
        self._parts = {"scales": torch.zeros(rows, columns)}
        if of.coding.has_zero_points:
            self._parts["zeros"] = torch.zeros(rows, columns)
        if of.held is not None:
            self._parts["keeps"] = torch.zeros(rows, columns, dtype=torch.bool)
        if nested is not None:
            self._parts["nested_codes"] = torch.zeros(rows, columns, dtype=torch.uint8)
            self._parts["nested_scales"] = torch.zeros(rows, columns)
        of_row = of.block[0] * of.source.shape[-1]
        whole = nested.block if nested is not None else 1  # columns is 1
        self._step = max(1, _PIECE_ELEMENTS // of_row // whole) * whole
        self._locks = [threading.Lock() for _ in range(-(-rows // self._step))]
        self._done = [False] * len(self._locks)

    def rows(self, reader: Reading, part: str, first: int, last: int) -> Tensor | None:
        """Return rows first to last (excluded) of blocks; None if there is no such part."""
        if part not in self._parts:
            return None
        num_rows = len(self._parts["scales"])
        for band in range(first // self._step, -(-last // self._step)):
            with self._locks[band]:
                if not self._done[band]:
                    low = band * self._step
                    high = min(low + self._step, num_rows)
                    for start, stop, found in self._found(reader, low, high):
                        for name, values in found.items():
                            self._parts[name][start:stop] = values
                    self._done[band] = True
        return self._parts[part][first:last]

    def _found(
        self, reader: Reading, low: int, high: int
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Yield the parts of rows low to high (excluded) of blocks."""
        of = self._of
        num_rows, height = of.source.shape[-2], of.block[0]
        if height == 1:  # rows of blocks are rows
            yield low, high, self._of_rows(reader, low, high, low, each=True)
            return
        per_matrix = -(-num_rows // height)
        for row in range(low, high):
            matrix, number = divmod(row, per_matrix)
            start = matrix * num_rows + number * height
            stop = min(start + height, (matrix + 1) * num_rows)
            yield row, row + 1, self._of_rows(reader, start, stop, row, each=False)

    def _of_rows(
        self, reader: Reading, first: int, last: int, block_row: int, *, each: bool
    ) -> dict[str, Tensor]:
        """Return the parts of rows of the weight: of each, or of all together."""
        import torch

        of, columns, num_blocks = self._of, self._of.source.shape[-1], self._of.grid[1]
        num = last - first if each else 1
        greatest, low, changed = (torch.zeros(num, num_blocks) for _ in range(3))
        order = of.order(reader)
        step = max(1, _PIECE_ELEMENTS // columns)

        def add(to: Tensor, rows: slice, values: Tensor) -> None:
            found = _by_block(values, min(of.block[1], columns), num_blocks, order)
            found = found if each else found.amax(0, keepdim=True)
            to[rows] = torch.maximum(to[rows], found)

        for start in range(first, last, step):
            stop = min(start + step, last)
            span = start * columns, stop * columns
            values = reader.values(of.source, *span).float().view(-1, columns)
            rows = slice(start - first, stop - first) if each else slice(0, 1)
            if of.coding.has_zero_points:
                add(greatest, rows, values.clamp_min(0))
                add(low, rows, -values.clamp_max(0))
            else:
                add(greatest, rows, values.abs())
            if of.held is not None:
                before = reader.values(of.held.values, *span).float().view(-1, columns)
                add(changed, rows, (values != before).float())
        made = {"scales": of.coding.scales(greatest + low, of.scale_dtype)}
        if of.coding.has_zero_points:
            made["zeros"] = of.coding.zero_points(-low, made["scales"])
        if of.held is None:
            return made
        made["keeps"] = keeps = changed == 0
        if (nested := of.held.nested) is not None:
            # Zeros need no scale of their own; nested scales can always hold the offset.
            scales = torch.where(greatest > 0, made["scales"], nested.offset or 0.0)
            return made | _nested(reader, nested, scales, keeps, block_row)

        def kept(source: Source) -> Tensor:
            begin = block_row * num_blocks
            return reader.values(source, begin, begin + keeps.numel()).float().view_as(keeps)

        made["scales"] = torch.where(keeps, kept(of.held.scale), made["scales"])
        if of.held.zero_point is not None:
            made["zeros"] = torch.where(keeps, kept(of.held.zero_point), made["zeros"])
        return made


def _by_block(values: Tensor, width: int, num_blocks: int, order: Tensor | None) -> Tensor:
    """Return the greatest of the values (R, C), at least 0, of each block of a row."""
    import torch

    if order is not None:
        places = order.long().expand_as(values)  # index_reduce_ warns that it is in beta
        return torch.zeros(len(values), num_blocks).scatter_reduce_(1, places, values, "amax")
    padded = torch.nn.functional.pad(values, (0, num_blocks * width - values.shape[1]))
    return padded.view(len(values), num_blocks, width).amax(2)


def _nested(
    reader: Reading, held: CodeTensor, scales: Tensor, keeps: Tensor, first: int
) -> dict[str, Tensor]:
    """Return nested scales: codes of the scales of blocks, and a scale for some of these.

    The scale of codes changes only where they could not reach a block's: then the scales of the
    other blocks that share it are rounded again. What is added to all stays.

    Args:
        scales: (B, 1) of all blocks, from number `first` on.
    """
    import torch

    numbers, offset = reader.whole(held.values), held.offset or 0.0
    group = held.block
    stop = first + len(scales)
    before = reader.values(held.weight, first, stop)[:, None]
    of_group = reader.whole(held.absmax).flatten()[first // group : -(-stop // group)]
    wanted = scales - offset
    of_each = torch.arange(len(scales)) // group
    reach = of_group[of_each][:, None]
    beyond = ~keeps & ((wanted > numbers.max() * reach) | (wanted < numbers.min() * reach))
    known = torch.where(keeps, numbers[before.int()] * reach, wanted)
    greatest = torch.zeros(len(of_group)).scatter_reduce(0, of_each, known.abs().flatten(), "amax")
    is_beyond = torch.zeros(len(of_group)).scatter_reduce(
        0, of_each, beyond.float().flatten(), "amax"
    )
    new = torch.where(is_beyond > 0, greatest, of_group)[of_each][:, None]
    codes = nearest((known / new).flatten(), numbers)[:, None]
    codes = torch.where(keeps & (new == reach), before, codes)
    return {
        "nested_codes": codes,
        "nested_scales": new,
        "scales": numbers[codes.int()] * new + offset,
    }
