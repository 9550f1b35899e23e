"""Sums over a tensor's elements, in float64, and the moments computed from them.

Each span gives sums, and these are added exactly, in order (`math.fsum`). Spans are fixed, so a
result depends on neither threads nor memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from outliermerge.analysis.table import BINS, HALF_WIDTH

if TYPE_CHECKING:
    from torch import Tensor

_CENTRAL = 7


class Central(NamedTuple):
    """A sample's size, mean, sums of powers of deviations from the mean, and extremes."""

    num: float
    mean: float
    m2: float
    m3: float
    m4: float
    least: float
    greatest: float

    @property
    def std(self) -> float:
        """Population standard deviation; NaN for an empty sample."""
        return math.sqrt(self.m2 / self.num) if self.num else math.nan

    @property
    def skewness(self) -> float:
        """E[(x-μ)³]/σ³; NaN if all values are equal."""
        return self.m3 / self.m2 / self.std if self._varies else math.nan

    @property
    def kurtosis(self) -> float:
        """E[(x-μ)⁴]/σ⁴, 3 for a Gaussian; NaN if all values are equal."""
        return self.m4 / self.m2 * (self.num / self.m2) if self._varies else math.nan

    @property
    def _varies(self) -> bool:
        return self.num > 0 and 0 < self.m2 < math.inf


class Tally(NamedTuple):
    """Results of the first pass: finite elements; counts of zero, small and other ones; Σ|x|."""

    all: Central
    num_zeros: float
    num_small: float
    num_non_finite: float
    l1_norm: float


class Limits(NamedTuple):
    """Arguments of the second pass, which keeps elements from low to high."""

    mean: float
    low: float
    high: float
    std: float
    small: float


def limits_of(tally: Tally, filter: float, small: float) -> Limits:
    """Return the limits of the second pass, which keeps elements within `filter` σ of the mean."""
    mean, std = tally.all.mean, tally.all.std
    return Limits(mean, mean - filter * std, mean + filter * std, std, small)


class Filtered(NamedTuple):
    """Results of the second pass.

    Attributes:
        kept: the moments of the elements that the filter keeps.
        without_small: the moments of the kept elements that are not small.
        outside: how many elements are more than 2, 3 and 4 σ from the mean.
    """

    kept: Central
    without_small: Central
    outside: tuple[float, ...]


def tally_of_bytes(raw: bytes) -> Tally:
    """Return a kernel's results of the first pass."""
    values = struct.unpack(f"{_CENTRAL + 4}d", raw)
    return Tally(Central(*values[:_CENTRAL]), *values[_CENTRAL:])


def filtered_of_bytes(raw: bytes) -> Filtered:
    """Return a kernel's results of the second pass."""
    values = struct.unpack(f"{2 * _CENTRAL + 3}d", raw)
    kept, large = Central(*values[:_CENTRAL]), Central(*values[_CENTRAL : 2 * _CENTRAL])
    return Filtered(kept, large, values[2 * _CENTRAL :])


def tally_of_values(values_E: Tensor, small: float) -> Tally:
    """Return the results of the first pass over float64 values on any device."""
    finite_E = values_E[values_E.isfinite()]
    magnitudes_E = finite_E.abs()
    return Tally(
        all=_central(finite_E),
        num_zeros=float((finite_E == 0).sum()),
        num_small=float((magnitudes_E < small).sum()),
        num_non_finite=float(len(values_E) - len(finite_E)),
        l1_norm=float(magnitudes_E.sum()),
    )


def filtered_of_values(values_E: Tensor, limits: Limits) -> tuple[Filtered, list[int]]:
    """Return the results of the second pass over float64 values, and the histogram's counts."""
    finite_E = values_E[values_E.isfinite()]
    away_E = (finite_E - limits.mean).abs()
    kept_E = finite_E[(finite_E >= limits.low) & (finite_E <= limits.high)]
    counts = [0] * (BINS + 2)
    if 0 < limits.std < math.inf:
        first = limits.mean - HALF_WIDTH * limits.std
        per_bin = BINS / (2 * HALF_WIDTH) / limits.std
        bins_E = ((finite_E - first) * per_bin).clamp(-1, BINS).add(1).long()
        counts = bins_E.bincount(minlength=BINS + 2).tolist()
    filtered = Filtered(
        kept=_central(kept_E),
        without_small=_central(kept_E[kept_E.abs() >= limits.small]),
        outside=tuple(float((away_E > times * limits.std).sum()) for times in (2, 3, 4)),
    )
    return filtered, counts


def _central(values_E: Tensor) -> Central:
    if not len(values_E):
        return Central(0, 0, 0, 0, 0, math.inf, -math.inf)
    mean = values_E.mean()
    away_E = values_E - mean
    squares_E = away_E.square()
    sums = (mean, squares_E.sum(), (squares_E * away_E).sum(), squares_E.square().sum())
    return Central(len(values_E), *map(float, (*sums, values_E.min(), values_E.max())))


def fold_tallies(shares: Sequence[Tally]) -> Tally:
    """Combine spans' results of the first pass."""
    return Tally(
        all=_fold([share.all for share in shares]),
        num_zeros=math.fsum(share.num_zeros for share in shares),
        num_small=math.fsum(share.num_small for share in shares),
        num_non_finite=math.fsum(share.num_non_finite for share in shares),
        l1_norm=math.fsum(share.l1_norm for share in shares),
    )


def fold_filtered(shares: Sequence[Filtered]) -> Filtered:
    """Combine spans' results of the second pass."""
    return Filtered(
        kept=_fold([share.kept for share in shares]),
        without_small=_fold([share.without_small for share in shares]),
        outside=tuple(math.fsum(share.outside[i] for share in shares) for i in range(3)),
    )


def _fold(samples: Sequence[Central]) -> Central:
    """Combine the moments of samples (Pébay, Sandia report SAND2008-6212, 2008)."""
    num = math.fsum(sample.num for sample in samples)
    least = min((sample.least for sample in samples), default=math.inf)
    greatest = max((sample.greatest for sample in samples), default=-math.inf)
    if not num or least == greatest:
        return Central(num, least if num else math.nan, 0, 0, 0, least, greatest)
    first = next(sample.mean for sample in samples if sample.num)
    mean = first + exact_sum([sample.num * (sample.mean - first) for sample in samples]) / num
    second, third, fourth = [], [], []
    for sample in samples:
        gap = sample.mean - mean
        square = gap * gap  # `gap ** 2` would raise on overflow; a product is infinite
        second += [sample.m2, sample.num * square]
        third += [sample.m3, 3 * gap * sample.m2, sample.num * square * gap]
        fourth += [
            sample.m4,
            4 * gap * sample.m3,
            6 * square * sample.m2,
            sample.num * square * square,
        ]
    return Central(
        num, mean, exact_sum(second), exact_sum(third), exact_sum(fourth), least, greatest
    )


def exact_sum(values: Iterable[float]) -> float:
    """Add up with one rounding; NaN if a value is infinite or the sum is too large."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan
