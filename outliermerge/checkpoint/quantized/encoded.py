"""Sources that are quantised when they are read: the codes of a weight, and its scales.

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

from outliermerge.checkpoint.quantized.tensors import ScaledTensor
from outliermerge.checkpoint.sources import DType, Reading, Sized, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown

if TYPE_CHECKING:
    from torch import Tensor

_PIECE_ELEMENTS = 1 << 18  # read at a time for scales
_LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.5}
"""What the greatest magnitude of a block is divided by, as compressed-tensors does."""


@dataclass(frozen=True, kw_only=True)
class Scales(Sized):
    """The scales of a weight, one for each block. A Source.

    Attributes:
        shape: as they are stored.
        source: the weight, (…, R, C).
        codes: the dtype of its codes.
        block: how many rows and columns share a scale.
        scale_dtype: of the scales; codes are made by what they are after rounding.
        held: the codes and scales that the weight had before. A block that they hold exactly keeps
            them.
    """

    source: Source
    shape: tuple[int, ...]
    codes: DType
    block: tuple[int, int]
    scale_dtype: DType
    held: ScaledTensor | None = None

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
        held = self.held.stored if self.held else ()
        return tuple(dict.fromkeys((*self.source.stored, *held)))

    @property
    def work_bytes(self) -> int:
        """The memory that a thread needs for a piece of the weight, and all scales."""
        rows, columns = self.grid
        piece = max(_PIECE_ELEMENTS, self.source.shape[-1])
        return 16 * piece + 4 * rows * columns

    @property
    def factor(self) -> float:
        """What codes are multiplied with besides: bitsandbytes has one."""
        return self.held.factor if self.held else 1.0

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks there are: all matrices' rows of blocks, and columns."""
        *stack, num_rows, num_columns = self.source.shape
        rows = math.prod(stack) * -(-num_rows // self.block[0])
        return rows, -(-num_columns // self.block[1])

    def values(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return the scales of rows first to last (excluded) of blocks, as float32."""
        made: _Made = reader.once(self, lambda: _Made(self))
        return made.rows(reader, first, last)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with scales start to stop (excluded)."""
        import torch

        if stop == start:
            return
        columns = self.grid[1]
        first, last = start // columns, -(-stop // columns)
        flat = self.values(reader, first, last).reshape(-1)
        target = torch.frombuffer(out, dtype=getattr(torch, self.dtype.name))
        target.copy_(flat[start - first * columns : stop - first * columns])

    def encode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the codes of values, by scales of the same shape or one that spreads to it."""
        import torch

        wide = values / (scales * self.factor)
        if self.codes.name == "int8":
            return wide.round_().clamp_(-128, 127).to(torch.int8)
        largest = _LARGEST[self.codes.name]
        return wide.clamp_(-largest, largest).to(getattr(torch, self.codes.name))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return what codes stand for, as the reader of such models does."""
        return codes.float() * scales * self.factor


@dataclass(frozen=True)
class Codes(Sized):
    """The codes of a weight. A Source."""

    scales: Scales

    @property
    def source(self) -> Source:
        """The weight."""
        return self.scales.source

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it is computed from besides."""
        return (self.scales,)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> DType:
        return self.scales.codes

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.scales.stored

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with codes start to stop (excluded), and note how far they are off.

        Raises:
            OutlierMergeError: the weight has infinite or NaN values, which codes do not have.
        """
        import torch

        if stop == start:
            return
        columns = self.shape[-1]
        first, last = start // columns, -(-stop // columns)
        flat = reader.values(self.source, start, stop).float()
        if not bool(flat.isfinite().all()):
            raise OutlierMergeError(
                f"tensor {shown(self.name)} has values that are infinite or NaN, which "
                f"{self.dtype.name} codes cannot hold. Check its models, or leave it out by "
                "`ignore` of `quantize`."
            )
        scales = self._spread(reader, first, last).reshape(-1)
        if scales.numel() > 1:
            scales = scales[start - first * columns : stop - first * columns]
        codes = self.scales.encode(flat, scales)
        torch.frombuffer(out, dtype=codes.dtype).copy_(codes)
        wide = flat.double()
        off = self.scales.decode(codes, scales).double().sub_(wide)
        reader.note(self, start, (float(off.square_().sum()), float(wide.square_().sum())))

    def _spread(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return the scale of each element of rows first to last, or the only one of all."""
        import torch

        if self.scales.grid == (1, 1):
            return self.scales.values(reader, 0, 1)
        num_rows, columns = self.shape[-2:]
        height, width = self.scales.block
        per_matrix = -(-num_rows // height)

        def block_row(row: int) -> int:
            return row // num_rows * per_matrix + row % num_rows // height

        low = block_row(first)
        scales = self.scales.values(reader, low, block_row(last - 1) + 1)
        rows = torch.arange(first, last)
        places = rows // num_rows * per_matrix + rows % num_rows // height - low
        wide = scales[places][:, :, None].expand(-1, -1, min(width, columns))
        return wide.reshape(last - first, -1)[:, :columns]


class _Made:
    """The scales of a weight; each row of blocks is computed when it is first read."""

    def __init__(self, of: Scales) -> None:
        import torch

        self._of = of
        rows, columns = of.grid
        self._scales = torch.zeros(rows, columns)
        of_row = of.block[0] * of.source.shape[-1]
        self._step = max(1, _PIECE_ELEMENTS // of_row)
        self._locks = [threading.Lock() for _ in range(-(-rows // self._step))]
        self._done = [False] * len(self._locks)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) of blocks."""
        for band in range(first // self._step, -(-last // self._step)):
            with self._locks[band]:
                if not self._done[band]:
                    low = band * self._step
                    high = min(low + self._step, len(self._scales))
                    for start, stop, found in self._found(reader, low, high):
                        self._scales[start:stop] = found
                    self._done[band] = True
        return self._scales[first:last]

    def _found(self, reader: Reading, low: int, high: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the scales of rows low to high (excluded) of blocks."""
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
    ) -> Tensor:
        """Return the scales of rows of the weight: of each, or of all together."""
        import torch

        of, columns = self._of, self._of.source.shape[-1]
        width, num_blocks = min(of.block[1], columns), of.grid[1]
        num = last - first if each else 1
        greatest = torch.zeros(num, num_blocks)
        keeps = torch.ones(num, num_blocks, dtype=torch.bool)
        before = None
        if of.held is not None:
            stored = reader.whole(of.held.scale).float().view(-1, num_blocks)
            before = stored[block_row : block_row + num]
        step = max(1, _PIECE_ELEMENTS // columns)
        for start in range(first, last, step):
            stop = min(start + step, last)
            values = reader.values(of.source, start * columns, stop * columns).float()
            values = torch.nn.functional.pad(
                values.view(-1, columns), (0, num_blocks * width - columns)
            ).view(-1, num_blocks, width)
            rows = slice(start - first, stop - first) if each else slice(0, 1)
            top = values.abs().amax(2)
            top = top if each else top.amax(0, keepdim=True)
            greatest[rows] = torch.maximum(greatest[rows], top)
            if before is not None:
                scales = before[rows][:, :, None]
                same = of.decode(of.encode(values, scales), scales) == values
                same = same.all(2) if each else same.all(2).all(0, keepdim=True)
                keeps[rows] &= same
        dtype = getattr(torch, of.scale_dtype.name)
        # bitsandbytes stores the greatest magnitude itself: its factor is 1 / 127.
        divisor = 1.0 if of.factor != 1 else _LARGEST[of.codes.name]
        exact = (greatest / divisor).to(dtype)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        made = torch.where(greatest > 0, exact.clamp_min(smallest), 1.0).float()
        return made if before is None else torch.where(keeps, before, made)
