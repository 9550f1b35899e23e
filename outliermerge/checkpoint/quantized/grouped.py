"""Weights as Q8_0 and MXFP4, made when they are read: 32 values of a row share a scale."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.quantized.coding import BIAS, exponents, fp4_codes
from outliermerge.checkpoint.quantized.mxfp4 import FP4
from outliermerge.checkpoint.sources import DTYPES, DType, OfSource, Reading, Source
from outliermerge.errors import OutlierMergeError, shown

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32


@dataclass(frozen=True)
class _Grouped(OfSource):
    """Bytes of the groups of a weight (…, C), whose columns are whole groups. A Source."""

    source: Source

    _form = "MXFP4"
    _bytes = 1  # of a group
    _most = 3.4028235e38  # the largest magnitude

    @property
    def dtype(self) -> DType:
        return DTYPES["uint8"]

    @property
    def out_dtype(self) -> DType:
        return DTYPES["uint8"]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, columns = self.source.shape
        return (*stack, columns // GROUP * self._bytes)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with bytes start to stop (excluded), and note how far they are off.

        Raises:
            OutlierMergeError: the weight has values that are infinite, NaN or too large.
        """
        if stop == start:
            return
        first, last = start // self._bytes, -(-stop // self._bytes)
        groups = reader.values(self.source, first * GROUP, last * GROUP).float().view(-1, GROUP)
        if not float(groups.abs().max()) <= self._most:
            raise OutlierMergeError(
                f"tensor {shown(self.name)} has values that are infinite, NaN or beyond "
                f"{self._most:,.9g}, which {self._form} cannot hold. Check its models."
            )
        made, off = self._made(groups)
        array: Any = made.reshape(-1).numpy()
        out[:] = memoryview(array)[start - first * self._bytes : stop - first * self._bytes]
        if off is not None:
            own = slice(-(-start // self._bytes) - first, None)  # counted where a group begins
            whole = groups[own].double().square()
            reader.note(self, start, (float(off[own].sum()), float(whole.sum())))

    def _made(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the bytes of groups, and the squares of what they are off, if that is noted."""
        raise NotImplementedError


class Q8Blocks(_Grouped):
    """GGUF's Q8_0 of a weight: a float16 scale, then 32 codes.

    The same bytes as `gguf.quantize(values, GGMLQuantizationType.Q8_0)`.
    """

    _form = "Q8_0"
    _bytes = 2 + GROUP
    _most = 127 * 65504.0  # the scale is a float16

    def _made(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        scales = groups.abs().amax(1, keepdim=True) / 127
        scaled = groups * torch.where(scales == 0, 0.0, 1 / scales)
        codes = torch.copysign((scaled.abs() + 0.5).floor(), scaled).to(torch.int8)
        stored = scales.half()
        raw = stored.view(torch.uint8)
        raw = raw if sys.byteorder == "little" else raw.flip(1)
        off = (codes.double() * stored.double() - groups.double()).square()
        return torch.cat((raw, codes.view(torch.uint8)), 1), off


class MxScales(_Grouped):
    """The scales of a weight in MXFP4: powers of 2, stored as their exponents plus 127."""

    def _made(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        return (_exponents(groups) + BIAS).to(torch.uint8), None


class MxCodes(_Grouped):
    """The codes (E2M1) of a weight in MXFP4, two in a byte, the first in its low bits.

    As in compressed-tensors' `mxfp4-pack-quantized`.
    """

    _bytes = GROUP // 2

    def _made(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        powers = _exponents(groups)
        scales = torch.ldexp(torch.ones(powers.shape), powers)
        codes = fp4_codes(groups / scales)
        values = torch.tensor(FP4).index_select(0, codes.view(-1).int()).view_as(groups)
        off = (values * scales - groups).double().square()
        return codes[:, ::2] | (codes[:, 1::2] << 4), off


def _exponents(groups: Tensor) -> Tensor:
    """Return the exponent of each group's scale (B, 1)."""
    return exponents(groups.abs().amax(1, keepdim=True))
