"""Sources that are quantised when they are read: codes, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.quantized.fitted import Scales
from outliermerge.checkpoint.sources import DType, Reading, Sized, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Beside(Sized):
    """What is stored beside the scales and codes of a weight. A Source.

    Attributes:
        part: `zeros`, or of nested scales `nested_codes` and `nested_scales`.
        per: how many blocks it has one for.
    """

    scales: Scales
    part: str
    dtype: DType
    shape: tuple[int, ...]
    per: int = 1

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it is computed from."""
        return (self.scales,)

    @property
    def name(self) -> str:
        return self.scales.name

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.scales.stored

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        self.scales.fill(reader, out, (start, stop), part=self.part, dtype=self.dtype, per=self.per)


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
        return self.scales.coding.codes

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
        columns, of = self.shape[-1], self.scales
        first, last = start // columns, -(-stop // columns)
        flat = reader.values(self.source, start, stop).float()
        if not bool(flat.isfinite().all()):
            raise OutlierMergeError(
                f"tensor {shown(self.name)} has values that are infinite or NaN, which "
                f"{self.dtype.name} codes cannot hold. Check its models, or leave it out by "
                "`ignore` of `quantize`."
            )

        def spread(part: str) -> Tensor | None:
            found = of.spread(reader, part, first, last)
            if found is None or found.numel() == 1:
                return None if found is None else found.reshape(-1)
            return found.reshape(-1)[start - first * columns : stop - first * columns]

        scales, zeros, keeps = spread("scales"), spread("zeros"), spread("keeps")
        assert scales is not None
        numbers = of.coding.numbers(reader)
        codes = of.coding.encode(flat, scales, zeros, numbers)
        if keeps is not None and bool(keeps.any()):
            assert of.held is not None
            before = reader.values(of.held.codes, start, stop).view(torch.uint8)
            codes = torch.where(keeps, before, codes.view(torch.uint8)).view(codes.dtype)
        torch.frombuffer(out, dtype=codes.dtype).copy_(codes)
        wide = flat.double()
        off = of.coding.decode(codes, scales, zeros, numbers).double().sub_(wide)
        reader.note(self, start, (float(off.square_().sum()), float(wide.square_().sum())))


def codes_in(source: Source) -> Source:
    """Return the codes of which a source is another form; itself if it is none."""
    found: Source | None = source
    while found is not None and not isinstance(found, Codes):
        found = getattr(found, "source", None)
    return found or source


def scales_in(source: Source) -> Scales | None:
    """Return the scales by which a source is coded, of which it is a form, or that it is beside."""
    found: Any = source
    while found is not None and not isinstance(found, Scales):
        by = isinstance(found, Codes | Beside)
        found = found.scales if by else getattr(found, "source", None)
    return found
