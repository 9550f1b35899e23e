"""Codes as they are packed: unpacked, turned, and what scales are stored as.

Each of these is a source, so that a `ScaledTensor` is made of them as of stored tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.by_kernels import Span, codes_place, floats, is_stored
from outliermerge.checkpoint.computed import ComputedTensor
from outliermerge.checkpoint.sources import DTYPES, OfSource, Reading, Source, TensorMeta, inner
from outliermerge.errors import OutlierMergeError

if TYPE_CHECKING:
    from torch import Tensor

_STEP_BYTES = 1 << 20  # how much is turned at a time
NOT_A_NUMBER = 255  # of exponents


@dataclass(frozen=True, kw_only=True)
class OfPacked(ComputedTensor):
    """A tensor (…, C) that is computed row by row of one (…, W)."""

    source: Source
    is_exact = True

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    def packed(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) of the source as (last - first, W)."""
        width = self.source.shape[-1] if self.source.shape else 1
        return reader.values(self.source, first * width, last * width).view(last - first, width)


@dataclass(frozen=True, kw_only=True)
class Unpacked(OfPacked):
    """Codes of `bits` bits as bytes, from rows of bits: the lowest bits of a word come first.

    Attributes:
        order: of the codes in a word of 32 bits, where it is another: which of its columns the
            lowest bits hold, and so on.
        plus: are added to the words of 32 bits, in turn.
    """

    bits: int
    order: tuple[int, ...] = ()
    plus: tuple[int, ...] = ()

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of bytes."""
        import torch

        words = self.packed(reader, first, last)
        if self.plus:
            plus = torch.tensor(self.plus).repeat(-(-words.shape[1] // len(self.plus)))
            words = (words.long() + plus[: words.shape[1]]).to(torch.int32)
        codes = words.view(torch.uint8)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).view(last - first, -1)
        elif self.bits != 8:
            codes = _any_bits(codes, self.bits)
        if self.order:
            places = sorted(range(len(self.order)), key=self.order.__getitem__)
            codes = codes.view(last - first, -1, len(places))[:, :, places].flatten(1)
        return codes[:, : self.num_columns]


def _any_bits(stored: Tensor, bits: int) -> Tensor:
    """Return codes that may begin in one byte and end in the next."""
    import torch

    starts = torch.arange(stored.shape[1] * 8 // bits) * bits
    wide = torch.nn.functional.pad(stored, (0, 1)).int()
    pairs = wide[:, starts // 8] | wide[:, starts // 8 + 1] << 8
    return (pairs >> (starts % 8).int() & (1 << bits) - 1).to(torch.uint8)


@dataclass(frozen=True)
class Turned(OfSource):
    """A tensor (outer, a, b) as (outer, b, a). A Source.

    It is turned once, and kept as a whole while it is read: in memory, or where that is too little
    in a file. `Swapped` reads again what it turns, which is too slow for pieces of few rows.
    """

    source: Source
    outer: int
    a: int
    b: int
    shape: tuple[int, ...]

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        size = self.dtype.num_bytes
        whole = reader.held(self, self.num_bytes, partial(self._turn, reader))
        out[:] = whole[start * size : stop * size]

    def _turn(self, reader: Reading, room: memoryview) -> memoryview:
        import numpy

        kind = f"u{self.dtype.num_bytes}"
        target = numpy.frombuffer(room, dtype=kind).reshape(self.outer, self.b, self.a)
        step = max(1, _STEP_BYTES // (self.b * self.dtype.num_bytes))
        for number in range(self.outer):
            for first in range(0, self.a, step):
                last = min(first + step, self.a)
                place = (number * self.a + first) * self.b
                stop = place + (last - first) * self.b
                raw = bytearray((stop - place) * self.dtype.num_bytes)
                self.source.read(reader, place, stop, memoryview(raw))
                rows = numpy.frombuffer(raw, dtype=kind).reshape(last - first, self.b)
                target[number, :, first:last] = rows.T
        return room


def turned(source: Source) -> Source:
    """Return a tensor (…, a, b) as (…, b, a)."""
    *stack, a, b = source.shape
    return Turned(source, math.prod(stack), a, b, (*stack, b, a))


def turned_in(sources: Iterable[Source]) -> list[Turned]:
    """Return what is kept as a whole while sources are read."""
    seen: dict[int, Source] = {}  # a merge of merges may have one in many places
    pending = list(sources)
    while pending:
        source = pending.pop()
        if id(source) not in seen:
            seen[id(source)] = source
            pending += inner(source)
    return [source for source in seen.values() if isinstance(source, Turned)]


@dataclass(frozen=True, kw_only=True)
class PowersOfTwo(OfPacked):
    """Scales that are stored as exponents (E8M0): a byte e is 2 to the power of e - 127."""

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        import torch

        exponents = self.packed(reader, first, last)
        if (exponents == NOT_A_NUMBER).any():
            refuse_scale(self, "NaN (the exponent 255)")
        # The bits of a float32, in which the least one, 2 to the power of -127, is subnormal.
        bits = exponents.int() << 23
        return bits.masked_fill_(exponents == 0, 1 << 22).view(torch.float32)

    @property
    def by_kernels(self) -> bool:
        return is_stored(self.source, ["uint8"])

    def place(self, reader: Reading, span: Span, first: int) -> tuple[Any, ...]:
        """Return where kernels compute elements from `first` on; those of `span` can be read."""
        assert isinstance(self.source, TensorMeta)
        bits = [1 << 22, *(code << 23 for code in range(1, NOT_A_NUMBER)), 0x7FC00000]
        return codes_place(self.source, span, first, table=struct.pack("256I", *bits))


@dataclass(frozen=True, kw_only=True)
class Divided(OfPacked):
    """Scales that are stored as multiples of one more scale: scale / divisor."""

    divisor: Source

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.source.stored, *self.divisor.stored)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        divisor = reader.whole(self.divisor).float().flatten()
        if not divisor[0].isfinite() or divisor[0] == 0:
            refuse_scale(self.divisor, f"{float(divisor[0])}")
        return self.packed(reader, first, last).float() / divisor


def exponents(scale: Source) -> PowersOfTwo:
    """Return the scales that exponents stand for."""
    return PowersOfTwo(
        name=scale.name, shape=scale.shape, out_dtype=DTYPES["float32"], source=scale
    )


def finite_floats(reader: Reading, scale: Source, start: int, stop: int) -> bytearray:
    """Return elements start to stop (excluded) of scales as float32, read by kernels.

    Raises:
        OutlierMergeError: one of them is not finite.
    """
    found = floats(reader, scale, start, stop)
    if not reader.kernels.all_finite("f", found, stop - start):
        values = struct.unpack(f"{stop - start}f", found)
        is_exponent = isinstance(scale, PowersOfTwo)
        wrong = next(value for value in values if not math.isfinite(value))
        refuse_scale(scale, f"NaN (the exponent {NOT_A_NUMBER})" if is_exponent else f"{wrong}")
    return found


def refuse_scale(scale: Source, what: str) -> None:
    """Refuse a scale that would make weights of nothing."""
    raise OutlierMergeError(
        f"{scale.stored[0].path}: tensor {scale.name!r}: has a scale that is {what}, expected a "
        "finite number. Fetch the model again."
    )
