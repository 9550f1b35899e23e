"""Whole-tensor statistics computed block by block.

Shape suffixes: M models, E elements of a block, C elements of a chunk.

A statistic is measured on blocks by any thread and added up in block order by one. Sums are
float64 over fixed chunks of 65,536 elements and are then added exactly (`math.fsum`), so a result
depends on neither block size nor thread count. Blocks start at multiples of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 65_536


class Pass(Protocol):
    """One reading of a tensor's blocks."""

    def measure(self, block_ME: Tensor) -> Any:
        """Return a block's share; called by any thread."""

    def add(self, share: Any) -> None:
        """Take in a block's share; called in block order by one thread."""

    def finish(self) -> Pass | list[Any]:
        """Return the next pass, or the result as (nested) lists of numbers."""


class Statistic(Protocol):
    """A declaration of what a method needs to know of a whole tensor."""

    @property
    def max_passes(self) -> int:
        """How often the tensor is read at most, for float32 arithmetic."""

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        """Return the first pass, or the result where none is needed."""


@dataclass(frozen=True)
class StandardDeviation:
    """Population standard deviation of each model's elements, shape (M,).

    Chunk means and squared deviations are combined by Chan's formula, which is safe where the
    mean is large against σ.
    """

    max_passes: int = 1

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        return _Moments(num_models)


class _Moments:
    def __init__(self, num_models: int) -> None:
        self._num_models = num_models
        self._chunks: list[tuple[int, list[float], list[float]]] = []

    def measure(self, block_ME: Tensor) -> list[tuple[int, list[float], list[float]]]:
        shares = []
        for start in range(0, block_ME.shape[1], CHUNK_ELEMENTS):
            chunk_MC = block_ME[:, start : start + CHUNK_ELEMENTS].double()
            mean_M = chunk_MC.mean(1)
            squares_M = (chunk_MC - mean_M[:, None]).square_().sum(1)
            shares.append((chunk_MC.shape[1], mean_M.tolist(), squares_M.tolist()))
        return shares

    def add(self, share: list[tuple[int, list[float], list[float]]]) -> None:
        self._chunks += share

    def finish(self) -> list[float]:
        return [self._deviation(model) for model in range(self._num_models)]

    def _deviation(self, model: int) -> float:
        total = sum(count for count, _, _ in self._chunks)
        if total == 0:
            return 0.0
        try:
            mean = math.fsum(count * means[model] for count, means, _ in self._chunks) / total
            squares = math.fsum(
                term
                for count, means, squares in self._chunks
                for term in (squares[model], count * (means[model] - mean) ** 2)
            )
        except (OverflowError, ValueError):  # non-finite inputs that the user allowed
            return math.nan
        return math.sqrt(squares / total)


@dataclass(frozen=True)
class Trim:
    """Magnitude threshold and L1 rescaling of each model's elements, shape (2, M).

    Row 0 is the k-th largest magnitude with k = max(1, int(density·n)), found exactly by radix
    selection: histograms of the magnitude's bits, 16 at a time. Keeping what is not below it keeps
    every element tied with it. A density of 1 or more gives 0 (keep all), of 0 or less gives
    infinity (keep none). Row 1 is Σ|x| / Σ|kept| where `rescale` is set and neither sum is below
    1e-7, else 1.
    """

    max_passes: int = 3

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        densities = parameters["density"]
        ranks = [
            max(1, int(density * num_elements)) if 0 < density < 1 else None
            for density in densities
        ]
        thresholds = [0.0 if density > 0 else math.inf for density in densities]
        if num_elements == 0 or not any(ranks):
            return [thresholds, [1.0] * num_models]
        return _RadixSelect(ranks, thresholds, bool(parameters.get("rescale")), prefixes=None)


class _RadixSelect:
    """Finds magnitudes by rank from the largest; one instance a pass."""

    def __init__(
        self,
        ranks: list[int | None],
        thresholds: list[float],
        rescale: bool,
        *,
        prefixes: list[int] | None,
        shift: int | None = None,
    ) -> None:
        self._ranks, self._thresholds, self._rescale = ranks, thresholds, rescale
        self._prefixes, self._shift = prefixes, shift
        self._counts: list[Tensor | None] = [None] * len(ranks)
        self._num_bits = 0

    def measure(self, block_ME: Tensor) -> list[Tensor | None]:
        import torch

        self._num_bits = 8 * block_ME.element_size()
        shift = self._num_bits - 16 if self._shift is None else self._shift
        integer = torch.int32 if self._num_bits == 32 else torch.int64
        shares: list[Tensor | None] = []
        for model, rank in enumerate(self._ranks):
            if rank is None:
                shares.append(None)
                continue
            bits_E = block_ME[model].abs().view(integer)
            if self._prefixes is not None:
                bits_E = bits_E[(bits_E >> (shift + 16)) == self._prefixes[model]]
            shares.append(((bits_E >> shift) & 0xFFFF).bincount(minlength=1 << 16))
        return shares

    def add(self, share: list[Tensor | None]) -> None:
        for model, counts in enumerate(share):
            total = self._counts[model]
            self._counts[model] = counts if total is None or counts is None else total + counts

    def finish(self) -> Pass | list[Any]:
        shift = self._num_bits - 16 if self._shift is None else self._shift
        ranks, prefixes = list(self._ranks), [0] * len(self._ranks)
        for model, rank in enumerate(self._ranks):
            counts = self._counts[model]
            if rank is None or counts is None:
                continue
            from_top = counts.flip(0).cumsum(0)
            place = int((from_top < rank).sum())
            above = int(from_top[place - 1]) if place else 0
            ranks[model] = rank - above
            previous = self._prefixes[model] if self._prefixes is not None else 0
            prefixes[model] = (previous << 16) | (len(counts) - 1 - place)
        if shift:
            return _RadixSelect(
                ranks, self._thresholds, self._rescale, prefixes=prefixes, shift=shift - 16
            )
        thresholds = [
            threshold if rank is None else _float_of_bits(prefix, self._num_bits)
            for threshold, rank, prefix in zip(self._thresholds, self._ranks, prefixes, strict=True)
        ]
        return _KeptShare(thresholds) if self._rescale else [thresholds, [1.0] * len(thresholds)]


class _KeptShare:
    """L1 norms before and after trimming."""

    def __init__(self, thresholds: list[float]) -> None:
        self._thresholds = thresholds
        self._sums: list[tuple[list[float], list[float]]] = []

    def measure(self, block_ME: Tensor) -> list[tuple[list[float], list[float]]]:
        thresholds_M1 = block_ME.new_tensor(self._thresholds)[:, None]
        shares = []
        for start in range(0, block_ME.shape[1], CHUNK_ELEMENTS):
            magnitude_MC = block_ME[:, start : start + CHUNK_ELEMENTS].abs()
            kept_MC = magnitude_MC * (magnitude_MC >= thresholds_M1)
            shares.append((magnitude_MC.double().sum(1).tolist(), kept_MC.double().sum(1).tolist()))
        return shares

    def add(self, share: list[tuple[list[float], list[float]]]) -> None:
        self._sums += share

    def finish(self) -> list[Any]:
        scales = []
        for model in range(len(self._thresholds)):
            before = math.fsum(whole[model] for whole, _ in self._sums)
            after = math.fsum(kept[model] for _, kept in self._sums)
            scales.append(before / after if before >= 1e-7 and after >= 1e-7 else 1.0)
        return [self._thresholds, scales]


def _float_of_bits(bits: int, num_bits: int) -> float:
    import struct

    integer, real = ("<i", "<f") if num_bits == 32 else ("<q", "<d")
    value: float = struct.unpack(real, struct.pack(integer, bits))[0]
    return value
