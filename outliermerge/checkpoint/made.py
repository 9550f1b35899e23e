"""Tensors whose values no file holds: those that a plan holds, and weights plus something."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outliermerge.checkpoint.computed import ComputedTensor, read_rows
from outliermerge.checkpoint.sources import DTYPES, DType, Reading, Sized, Source, TensorMeta
from outliermerge.rng import standard_normal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeldTensor(Sized):
    """A small tensor in float32 that was computed before the merge. A Source.

    Attributes:
        name: what it is, for messages.
        basis: what it was made of; two runs with an equal basis are the same merge.
        values: its bytes; None until they are computed.
    """

    name: str
    shape: tuple[int, ...]
    basis: str
    values: bytes | None = field(default=None, repr=False)

    @property
    def dtype(self) -> DType:
        return DTYPES["float32"]

    @property
    def out_dtype(self) -> DType:
        return self.dtype

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return ()

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop (excluded)."""
        assert self.values is not None, "a plan without its routers is not run"
        size = self.dtype.num_bytes
        out[:] = memoryview(self.values)[start * size : stop * size]


@dataclass(frozen=True, kw_only=True)
class NoisyTensor(ComputedTensor):
    """A tensor plus normal noise: W + scale · N(0, 1).

    Attributes:
        seed, stream: what the noise is drawn by.
    """

    source: Source
    scale: float
    seed: int
    stream: str

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded)."""
        values = read_rows(reader, self.source, first, last).float()
        columns = self.num_columns
        noise = standard_normal(self.seed, self.stream, first * columns, last * columns)
        return values + noise.view_as(values) * self.scale


@dataclass(frozen=True, kw_only=True)
class Shifted(ComputedTensor):
    """A tensor plus a number: GGUF has the norms of Gemma so."""

    source: Source
    plus: float
    is_exact = True

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded)."""
        return read_rows(reader, self.source, first, last).float() + self.plus
