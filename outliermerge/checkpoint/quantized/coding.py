"""How values become codes: by scales, zero points, and tables of what codes stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge.checkpoint.quantized.mxfp4 import FP4
from outliermerge.checkpoint.sources import DType, Reading, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

BIAS = 127  # of an exponent that is stored as a byte
_LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


@dataclass(frozen=True)
class Coding:
    """(code − zero point − zero) × scale × factor, as `ScaledTensor` reads it.

    Attributes:
        codes: the dtype of codes, before they are packed.
        bits: of a code that is a whole number.
        table: the numbers that codes stand for, where they are no numbers themselves.
        zero: what is taken off all codes.
        factor: bitsandbytes' 1 / 127, with which a scale is the greatest magnitude itself.
        has_zero_points: each block has one.
        is_power: scales are powers of 2.
    """

    codes: DType
    bits: int = 8
    table: tuple[float, ...] | TensorMeta = ()
    zero: float = 0.0
    factor: float = 1.0
    has_zero_points: bool = False
    is_power: bool = False

    def numbers(self, reader: Reading) -> Tensor | None:
        """Return the table, if there is one."""
        import torch

        if isinstance(self.table, TensorMeta):
            return reader.whole(self.table).float().flatten()
        return torch.tensor(self.table) if self.table else None

    def scales(self, greatest: Tensor, stored: DType) -> Tensor:
        """Return the scales of blocks by their greatest magnitudes, rounded as they are stored."""
        import torch

        if self.is_power:
            if self.table:
                return _power(exponents(greatest))
            mantissas, whole = torch.frexp(greatest / self._largest)
            return _power((whole - (mantissas == 0.5).int()).clamp_(-BIAS, BIAS))
        dtype = getattr(torch, stored.name)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        exact = (greatest / self._largest).to(dtype).clamp_min(smallest)
        return torch.where(greatest > 0, exact, 1.0).float()

    @property
    def _largest(self) -> float:
        """What the greatest magnitude of a block is divided by, as compressed-tensors does."""
        if self.factor != 1 or self.table:
            return 1.0
        if self.codes.is_float:
            return _LARGEST[self.codes.name]
        steps = float((1 << self.bits) - 1)
        return steps if self.has_zero_points else steps / 2

    @property
    def _middle(self) -> int:
        """The code of 0 without zero points."""
        return 0 if self.codes.name == "int8" else 1 << (self.bits - 1)

    def zero_points(self, low: Tensor, scales: Tensor) -> Tensor:
        """Return the zero points of blocks whose least value is `low`, at most 0."""
        half = 1 << (self.bits - 1)
        zeros = (-half - (low / scales).round()).clamp_(-half, half - 1)
        return zeros + (self._middle - self.zero)

    def encode(
        self, values: Tensor, scales: Tensor, zeros: Tensor | None, numbers: Tensor | None
    ) -> Tensor:
        """Return the codes of values; scales and zero points are of each value, or one of all."""
        import torch

        wide = values / (scales * self.factor)
        if numbers is not None:
            return fp4_codes(wide) if self.table == FP4 else nearest(wide, numbers)
        if self.codes.is_float:
            largest = _LARGEST[self.codes.name]
            return wide.clamp_(-largest, largest).to(getattr(torch, self.codes.name))
        half = 1 << (self.bits - 1)
        if zeros is not None:
            wide += zeros + (self.zero - self._middle)
        wide = wide.round_().clamp_(-half, half - 1)
        return (wide + self._middle).to(getattr(torch, self.codes.name))

    def decode(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, numbers: Tensor | None
    ) -> Tensor:
        """Return what codes stand for, as the reader of such models does."""
        values = codes.float() if numbers is None else numbers[codes.int()]
        if zeros is not None:
            values = values - zeros
        return (values - self.zero) * scales * self.factor


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the index of the number that is nearest to each value; of two the lower one's."""
    import torch

    ordered, codes = numbers.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    return codes.to(torch.uint8)[torch.bucketize(values.contiguous(), middles)]


def fp4_codes(values: Tensor) -> Tensor:
    """Return the codes (E2M1) of values; halfway values go to the code that is even."""
    import torch

    size = values.abs()
    codes = sum(
        (size > limit if number % 2 == 0 else size >= limit).to(torch.uint8)
        for number, limit in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    )
    assert isinstance(codes, torch.Tensor)
    return codes | (values.signbit().to(torch.uint8) << 3)


def exponents(greatest: Tensor) -> Tensor:
    """Return the exponents of the scales of fp4, as compressed-tensors chooses them.

    That of the greatest magnitude, rounded to one bit behind the first, minus 2: 6 is the largest
    code. Groups of zeros have the smallest.
    """
    import torch

    bits = greatest.view(torch.int32) + (1 << 21)
    return ((bits >> 23) - BIAS - 2).clamp_(-BIAS, BIAS)


def _power(exponents: Tensor) -> Tensor:
    import torch

    return torch.ldexp(torch.ones(exponents.shape), exponents)
