"""The tensors that the adapters of outliermerge.peft change, computed when they are read.

Sums are computed in float64 and rounded once to float32. So merging inside a model in training and
reading blocks of any size give the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge.checkpoint.adapters.tensors import LowRankSum
from outliermerge.checkpoint.computed import ComputedTensor, read_rows
from outliermerge.checkpoint.sources import Reading, Source, TensorMeta
from outliermerge.rng import standard_normal

if TYPE_CHECKING:
    from torch import Tensor


def scaled_sum(weight_RC: Tensor, s: float, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return (1 + s) · W + scale · L·R in float64 (arXiv 2501.10661, eq. 6)."""
    change = (left.double() @ right.double()).mul_(scale)
    return change.add_(weight_RC.double().mul_(1.0 + s))


def noise_sum(weight_RC: Tensor, s: float, noise_RC: Tensor) -> Tensor:
    """Return W + s · N in float64 (arXiv 2501.10661, eq. 3)."""
    return noise_RC.double().mul_(s).add_(weight_RC)


@dataclass(frozen=True, kw_only=True)
class ScaledSum(LowRankSum):
    """(1 + s) · W + scale · BA, or with (BA)ᵀ if the layer stores its weight transposed.

    Attributes:
        s: one value; None if it was not trained, which means 0.
    """

    s: TensorMeta | None

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*super().stored, *([self.s] if self.s else []))

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        left, right = self.factors(reader, first, last)
        s = reader.whole(self.s).item() if self.s else 0.0
        weight = read_rows(reader, self.base, first, last)
        return scaled_sum(weight, s, left, right, self.scale).float()


@dataclass(frozen=True, kw_only=True)
class NoiseSum(ComputedTensor):
    """W + s · N, where N is standard Gaussian noise in the stored shape of W.

    Attributes:
        base: W, (R, …).
        s: one value.
        seed, module: N is a function of these; `module` is the layer's name in the adapter, not in
            the base.
    """

    base: Source
    s: TensorMeta
    seed: int
    module: str

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return (*self.base.stored, self.s)

    def rows(self, reader: Reading, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) as (last - first, C) of float32."""
        weight = read_rows(reader, self.base, first, last)
        span = first * self.num_columns, last * self.num_columns
        noise = standard_normal(self.seed, self.module, *span).view(weight.shape)
        return noise_sum(weight, reader.whole(self.s).item(), noise).float()
