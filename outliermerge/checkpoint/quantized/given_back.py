"""What comes back in the form in which it was stored: packed, turned, as exponents.

The forms that readers of quantised models make of stored tensors (packed.py), the other way round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.quantized.coding import Coding
from outliermerge.checkpoint.quantized.encoded import Beside, Codes
from outliermerge.checkpoint.quantized.fitted import Held, Scales
from outliermerge.checkpoint.quantized.packed import PowersOfTwo, Turned, Unpacked, turned
from outliermerge.checkpoint.quantized.tensors import CodeTensor, ScaledTensor
from outliermerge.checkpoint.rearranged import Cut, reshaped
from outliermerge.checkpoint.sources import (
    DTYPES,
    FLOAT_DTYPES,
    DType,
    OfSource,
    Reading,
    Sized,
    Source,
    TensorMeta,
)

if TYPE_CHECKING:
    from torch import Tensor

_BYTE = 8
_CODES = ("float8_e4m3fn", "float8_e5m2", "int8")


@dataclass(frozen=True)
class Packed(Sized):
    """Codes (…, C) packed as `Unpacked` reads them. A Source.

    Attributes:
        bits, order: as `Unpacked` has them.
        dtype: of what is stored.
        shape: of what is stored; the last axis is a row of codes.
    """

    source: Source
    bits: int
    dtype: DType
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def _line(self) -> tuple[int, int]:
        """How many codes, and bytes, are packed by themselves: a row if its end is filled up."""
        width, row_bytes = self.source.shape[-1], self.shape[-1] * self.dtype.num_bytes
        common = math.gcd(self.bits, _BYTE)
        codes, num_bytes = _BYTE // common, self.bits // common
        while codes % max(1, len(self.order)):
            codes, num_bytes = 2 * codes, 2 * num_bytes
        is_filled_up = width * self.bits != row_bytes * _BYTE or width % codes
        return (width, row_bytes) if is_filled_up else (codes, num_bytes)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        if stop == start:
            return
        codes, num_bytes = self._line
        begin, end = (place * self.dtype.num_bytes for place in (start, stop))
        first, last = begin // num_bytes, -(-end // num_bytes)
        lines = reader.values(self.source, first * codes, last * codes).view(last - first, codes)
        raw: Any = self._packed(lines, num_bytes).contiguous().flatten().numpy()
        out[:] = memoryview(raw)[begin - first * num_bytes : end - first * num_bytes]

    def _packed(self, codes: Tensor, num_bytes: int) -> Tensor:
        """Return lines of codes as bytes (lines, num_bytes)."""
        import torch

        codes = torch.nn.functional.pad(codes, (0, num_bytes * _BYTE // self.bits - codes.shape[1]))
        if self.order:
            codes = codes.view(len(codes), -1, len(self.order))[:, :, list(self.order)].flatten(1)
        if self.bits == 4:
            made = codes[:, ::2] | codes[:, 1::2] << 4
        elif self.bits == _BYTE:
            made = codes
        else:
            bits = (codes[:, :, None] >> torch.arange(self.bits).to(torch.uint8) & 1).flatten(1)
            bits = torch.nn.functional.pad(bits, (0, num_bytes * _BYTE - bits.shape[1]))
            places = torch.arange(_BYTE).to(torch.uint8)
            made = (bits.view(len(codes), -1, _BYTE) << places).sum(2, dtype=torch.uint8)
        return made


@dataclass(frozen=True)
class Exponents(OfSource):
    """Powers of 2 as bytes: their exponents plus 127. A Source."""

    source: Source

    @property
    def dtype(self) -> DType:
        return DTYPES["uint8"]

    @property
    def out_dtype(self) -> DType:
        return DTYPES["uint8"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        import torch

        bits = reader.values(self.source, start, stop).view(torch.int32)
        # The least power, 2 to the power of -127, is subnormal: its exponent is 0.
        torch.frombuffer(out, dtype=torch.uint8).copy_(bits >> 23)


def stored_form(form: Source, made: Source | None) -> tuple[TensorMeta, Source] | None:
    """Return the stored tensor that a form is made of, and what to store in its place.

    Args:
        form: a stored tensor, or what a reader made of it.
        made: the same of another weight; None asks for the stored tensor only.

    Returns:
        None if the form has no inverse.
    """
    if isinstance(form, TensorMeta):
        return form, made if made is not None else form
    if isinstance(form, Turned):
        back = turned(made) if made is not None else None
    elif isinstance(form, Unpacked) and not form.plus:
        source = form.source
        back = made and Packed(made, form.bits, source.dtype, source.shape, form.order)
    elif isinstance(form, PowersOfTwo):
        back = made and Exponents(made)
    elif isinstance(form, Cut) and form.num_elements == form.source.num_elements:
        back = made and reshaped(made, form.source.shape)
    else:
        return None
    return stored_form(form.source, back)


def forms_of(weight: Source) -> tuple[Source, ...] | None:
    """Return the forms of a weight's scales, zero points and codes, the codes last.

    Returns:
        None if the weight cannot be coded again.
    """
    if isinstance(weight, CodeTensor) and weight.bits == 4:
        absmax = weight.absmax
        scales = (absmax.weight, absmax.absmax) if isinstance(absmax, CodeTensor) else (absmax,)
        metas = (*scales, weight.weight)
        # Codes that are stored as floats would be checked, and refused, as floats.
        fits = (
            weight.num_elements % weight.block == weight.block % _BYTE == 0
            and weight.weight.dtype.name == "uint8"
            and all(isinstance(meta, TensorMeta) and meta.offset is not None for meta in metas)
        )
        return metas if fits else None
    if not isinstance(weight, ScaledTensor):
        return None
    parts = (weight.scale, weight.zero_point, weight.weight)
    forms = tuple(form for form in parts if form is not None)
    codes, scale = weight.weight, weight.scale
    is_plain = codes.dtype.name in _CODES if isinstance(codes, TensorMeta) else bool(_bits(codes))
    is_scale = scale.dtype.name in FLOAT_DTYPES and (weight.groups is None or weight.block[0] == 1)
    is_known = all(stored_form(form, None) is not None for form in forms)
    is_number = weight.zero_point is None or not codes.dtype.is_float
    return forms if is_plain and is_scale and is_known and is_number else None


def _bits(form: Source) -> int | None:
    """Return how many bits packed codes have."""
    form = form.source if isinstance(form, Turned) else form
    return form.bits if isinstance(form, Unpacked) else None


def coded_again(before: Source, source: Source, *, is_power: bool) -> list[Source]:
    """Return what stands in the place of each of a weight's forms, in their order.

    Args:
        before: the weight as it was stored; it has forms.
        source: the weight to store.
        is_power: scales are powers of 2, though they are stored as floats.
    """
    if isinstance(before, CodeTensor):
        return _blocks_of_elements(before, source)
    assert isinstance(before, ScaledTensor)
    codes, zero = before.weight, before.zero_point
    scales = Scales(
        source=source,
        shape=before.scale.shape,
        coding=Coding(
            codes=codes.dtype,
            bits=_bits(codes) or _BYTE,
            table=before.values,
            zero=before.zero,
            factor=before.factor,
            has_zero_points=zero is not None,
            is_power=is_power or isinstance(before.scale, PowersOfTwo),
        ),
        block=before.block,
        scale_dtype=before.scale.dtype,
        held=Held(before, codes, before.scale, zero, before.groups),
    )
    zeros = [] if zero is None else [Beside(scales, "zeros", zero.dtype, zero.shape)]
    return [scales, *zeros, Codes(scales)]


def _blocks_of_elements(before: CodeTensor, source: Source) -> list[Source]:
    """Return bitsandbytes' scales and codes: its blocks go on from one row to the next."""
    block, stored = before.block, before.weight
    assert isinstance(stored, TensorMeta)
    rows = before.num_elements // block
    raw = replace(stored, shape=(rows, block // 2))
    first_is_high = (1, 0)
    codes = Unpacked(
        name=stored.name, shape=(rows, block), out_dtype=raw.dtype, dtype=raw.dtype, source=raw,
        bits=4, order=first_is_high,
    )  # fmt: skip
    absmax = before.absmax
    scales = Scales(
        source=reshaped(source, (rows, block)),
        shape=absmax.shape,
        coding=Coding(codes=raw.dtype, bits=4, table=before.values),
        block=(1, block),
        scale_dtype=absmax.dtype,
        held=Held(reshaped(before, (rows, block)), codes, absmax),
    )
    packed = Packed(Codes(scales), 4, raw.dtype, raw.shape, first_is_high)
    if not isinstance(absmax, CodeTensor):
        return [scales, packed]
    inner = absmax.absmax
    return [
        Beside(scales, "nested_codes", absmax.weight.dtype, absmax.weight.shape),
        Beside(scales, "nested_scales", inner.dtype, inner.shape, absmax.block),
        packed,
    ]
