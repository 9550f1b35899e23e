"""The trim threshold, for methods that keep the largest magnitudes.

Shape suffixes: M models, E elements of a block, C elements of a chunk.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.methods.kernel_call import RawBlock
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, Scope

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

_DIGIT_BITS = 16
_NUM_SAMPLED = 8  # chunks, sampled if a tensor has at least four times as many
_WINDOW_DIGITS = 3  # of 1/128 octave each: about 1% of the elements


@dataclass(frozen=True)
class Trim:
    """Magnitude threshold and L1 rescaling of each model's elements, shape (2, M).

    Row 0 is the k-th largest magnitude with k = max(1, int(density·n)), found exactly by radix
    selection: histograms of the magnitude's bits, 16 at a time. Methods keep every element that is
    not below it, so all ties with it are kept. A density of 1 or more gives 0 (keep all), a density
    of 0 or less gives infinity (keep none). Row 1 is Σ|x| / Σ|kept| where `rescale` is set, neither
    sum is below 1e-7, and the first is finite, else 1.

    In a large tensor some chunks are sampled first. They give a window of magnitudes that usually
    contains the k-th, so that one more pass finds it exactly. If the window does not contain it,
    the two passes of the full selection follow.
    """

    depends_on: tuple[str, ...] = ("density", "rescale")
    scope: Scope = "tensor"
    kernels: ClassVar = ("histogram", "magnitudes")
    rows: ClassVar = ("least magnitude kept", "rescaling factor")

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        selects = any(0 < density < 1 for density in parameters["density"])
        return selects * (1 + bool(parameters.get("rescale")))

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        ranks = [
            max(1, int(density * num_elements)) if 0 < density < 1 else None
            for density in parameters["density"]
        ]
        thresholds = [0.0 if density > 0 else math.inf for density in parameters["density"]]
        if num_elements == 0 or not any(ranks):
            return [thresholds, [1.0] * num_models]
        whole = _Search(tuple(ranks), tuple(thresholds), bool(parameters.get("rescale")))
        num_chunks = num_elements // CHUNK_ELEMENTS
        if num_chunks < 4 * _NUM_SAMPLED or self.scope == "model":
            return _Select(whole)
        chunks = tuple(i * num_chunks // _NUM_SAMPLED for i in range(_NUM_SAMPLED))
        share = len(chunks) * CHUNK_ELEMENTS / num_elements
        sampled = tuple(rank and max(1, round(rank * share)) for rank in ranks)
        return _Select(replace(whole, ranks=sampled, chunks=chunks, whole=whole))


@dataclass(frozen=True)
class _Search:
    """A search for the magnitudes of given ranks, one for each model.

    Attributes:
        ranks: the rank of the magnitude to find, from the largest; None for a model with nothing to
            find.
        thresholds: the thresholds of models without a rank.
        lows: for each model, the least magnitude bits that are counted.
        shift: bits per bin, or None for the highest 16 of the dtype.
        num_bins: how many bins.
        chunks: the chunks that are read; None for all.
        whole: for a sample, the search on the whole tensor that follows.
    """

    ranks: tuple[int | None, ...]
    thresholds: tuple[float, ...]
    rescale: bool
    lows: tuple[int, ...] = ()
    shift: int | None = None
    num_bins: int = 1 << (_DIGIT_BITS - 1)  # the sign bit is always 0
    chunks: tuple[int, ...] | None = None
    whole: _Search | None = None


class _Select:
    """Counts magnitudes by their bits, to find those of given ranks."""

    kernel = "histogram"

    def __init__(self, search: _Search) -> None:
        import numpy

        self._search = search
        self.chunks: Sequence[int] | None = search.chunks
        self._lows = search.lows or (0,) * len(search.ranks)
        self._num_bits = 32
        # One more bin counts all magnitudes above the others. Kernels count into these arrays.
        self._counts = [
            None if rank is None else numpy.zeros(search.num_bins + 1, numpy.uint64)
            for rank in search.ranks
        ]

    def _shift(self) -> int:
        shift = self._search.shift
        return self._num_bits - _DIGIT_BITS if shift is None else shift

    def measure(self, block_ME: Tensor) -> list[numpy.ndarray[Any, Any] | None]:
        import torch

        self._num_bits = 8 * block_ME.element_size()
        integer = torch.int32 if self._num_bits == 32 else torch.int64
        num_bins, shift = self._search.num_bins, self._shift()
        shares: list[numpy.ndarray[Any, Any] | None] = []
        for model, rank in enumerate(self._search.ranks):
            if rank is None:
                shares.append(None)
                continue
            offset_E = block_ME[model].abs().view(integer) - self._lows[model]
            bin_E = (offset_E[offset_E >= 0] >> shift).clamp_(max=num_bins)
            counts: Any = bin_E.bincount(minlength=num_bins + 1).cpu().numpy()
            shares.append(counts.astype("uint64"))
        return shares

    def measure_raw(self, kernels: Any, block: RawBlock) -> None:
        kernels.histogram(block, self._lows, self._shift(), tuple(self._counts))

    def add(self, share: list[numpy.ndarray[Any, Any] | None] | None) -> None:
        for total, counts in zip(self._counts, share or (), strict=bool(share)):
            if total is not None and counts is not None:
                total += counts

    def finish(self) -> Pass | list[Any]:
        found = [
            None if rank is None else self._find(model, rank)
            for model, rank in enumerate(self._search.ranks)
        ]
        search = self._search
        if search.whole is not None:
            if self._num_bits != 32:
                return _Select(search.whole)
            return _Select(_window(search.whole, found))
        pairs = zip(found, search.ranks, strict=True)
        if any(low is None and rank is not None for low, rank in pairs):  # the window missed it
            return _Select(_Search(search.ranks, search.thresholds, search.rescale))
        if shift := self._shift():
            lows = tuple(low or 0 for low in found)
            finer = replace(search, lows=lows, shift=shift - _DIGIT_BITS, num_bins=1 << _DIGIT_BITS)
            return _Select(finer)
        thresholds = [
            threshold if low is None else _float_of_bits(low, self._num_bits)
            for low, threshold in zip(found, search.thresholds, strict=True)
        ]
        return _KeptShare(thresholds) if search.rescale else [thresholds, [1.0] * len(thresholds)]

    def _find(self, model: int, rank: int) -> int | None:
        """Return the least bits of the bin that contains a rank; None if no bin does."""
        counts: Any = self._counts[model]
        from_top = counts[::-1].cumsum()  # starts with those above all bins
        place = int(from_top.searchsorted(rank))
        if place in (0, len(counts)):
            return None
        return self._lows[model] + ((len(counts) - 1 - place) << self._shift())


def _window(whole: _Search, lows: Sequence[int | None]) -> _Search:
    """Return the search in a window around the magnitudes that the sample gave."""
    digit, most = 1 << _DIGIT_BITS, (1 << 31) - (_WINDOW_DIGITS << _DIGIT_BITS)
    return replace(
        whole,
        lows=tuple(min(max((low or 0) - digit, 0), most) for low in lows),
        shift=0,
        num_bins=_WINDOW_DIGITS << _DIGIT_BITS,
    )


class _KeptShare:
    """L1 norms before and after trimming."""

    chunks = None
    kernel = "magnitudes"

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

    def measure_raw(self, kernels: Any, block: RawBlock) -> list[tuple[list[float], list[float]]]:
        num_models = len(self._thresholds)
        thresholds = struct.pack(f"{num_models}f", *self._thresholds)
        sums = kernels.magnitudes(block, thresholds)
        chunks = struct.iter_unpack(f"{2 * num_models}d", sums)
        return [(list(values[::2]), list(values[1::2])) for values in chunks]

    def add(self, share: list[tuple[list[float], list[float]]]) -> None:
        self._sums += share

    def finish(self) -> list[Any]:
        scales = []
        for model in range(len(self._thresholds)):
            before = math.fsum(whole[model] for whole, _ in self._sums)
            after = math.fsum(kept[model] for _, kept in self._sums)
            known = 1e-7 <= after and 1e-7 <= before < math.inf
            scales.append(before / after if known else 1.0)
        return [self._thresholds, scales]


def _float_of_bits(bits: int, num_bits: int) -> float:
    integer, real = ("<i", "<f") if num_bits == 32 else ("<q", "<d")
    value: float = struct.unpack(real, struct.pack(integer, bits))[0]
    return value
