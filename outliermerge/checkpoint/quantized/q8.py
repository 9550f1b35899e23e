"""Weights as GGUF's Q8_0 blocks, made when they are read: 32 values share a scale."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.sources import DTYPES, DType, Reading, Sized, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown

if TYPE_CHECKING:
    from torch import Tensor

VALUES, BYTES = 32, 34


@dataclass(frozen=True)
class Q8Blocks(Sized):
    """The bytes of a weight (R, C) in blocks: a float16 scale, then 32 codes. A Source.

    The same bytes as `gguf.quantize(values, GGMLQuantizationType.Q8_0)`.
    """

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> DType:
        return DTYPES["uint8"]

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, columns = self.source.shape
        return (*stack, columns // VALUES * BYTES)

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with bytes start to stop (excluded), and note how far they are off.

        Raises:
            OutlierMergeError: the weight has values that are infinite, NaN or too large.
        """
        if stop == start:
            return
        first, last = start // BYTES, -(-stop // BYTES)
        values = reader.values(self.source, first * VALUES, last * VALUES).float()
        if not bool((values / 127).half().isfinite().all()):  # the scale is a float16
            raise OutlierMergeError(
                f"tensor {shown(self.name)} has values that are infinite, NaN or beyond "
                f"{127 * 65504:,}, which Q8_0 cannot hold. Check its models."
            )
        raw, off = _encoded(values.view(-1, VALUES))
        array: Any = raw.view(-1).numpy()
        out[:] = memoryview(array)[start - first * BYTES : stop - first * BYTES]
        own = slice(-(-start // BYTES) - first, None)  # a block is counted where it begins
        whole = values.view(-1, VALUES).double().square()
        reader.note(self, start, (float(off[own].sum()), float(whole[own].sum())))


def _encoded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks (B, 34) as bytes, and the squares of what they are off, of values (B, 32)."""
    import torch

    scales = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    scaled = blocks * inverse
    codes = torch.copysign((scaled.abs() + 0.5).floor(), scaled).to(torch.int8)
    stored = scales.half()
    raw = stored.view(torch.uint8)
    raw = raw if sys.byteorder == "little" else raw.flip(1)
    off = (codes.double() * stored.double() - blocks.double()).square()
    return torch.cat((raw, codes.view(torch.uint8)), 1), off
