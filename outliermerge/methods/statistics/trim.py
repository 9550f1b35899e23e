"""The statistics of methods that keep magnitudes by their rank: where to trim.

A search looks for one magnitude in each model or, in groups of M searches, for several.

Shape suffixes: M models, E elements of a block, C elements of a chunk.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.arguments import checked
from outliermerge.methods.kernel_call import RawBlock
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, Scope, Statistic, scope_of

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

_DIGIT_BITS = 16
_NUM_SAMPLED = 8  # chunks, sampled if a tensor has at least four times as many
_GROUPED_BINS = 512
_WINDOW_DIGITS = 3  # of 1/128 octave each: about 1% of the elements


@checked
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

    Attributes:
        scope_parameter: the method's parameter that says whether n counts one tensor or all merged
            tensors of a model; empty if `scope` says so.
    """

    depends_on: tuple[str, ...] = ("density", "rescale")
    scope: Scope = "tensor"
    scope_parameter: str = ""
    kernels: ClassVar = ("histogram", "magnitudes")
    rows: ClassVar = ("least magnitude kept", "rescaling factor")

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        selects = any(0 < density < 1 for density in parameters["density"])
        return selects * (num_searches(self, parameters) + bool(parameters.get("rescale")))

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return sum(int(0 < density < 1) for density in parameters["density"])

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
        whole = Search(num_models, tuple(ranks), tuple(thresholds), bool(parameters.get("rescale")))
        sampled = scope_of(self, parameters) == "tensor"
        return Select(sampled_first(whole, num_elements) if sampled else whole)


@dataclass(frozen=True)
class Middle:
    """Least and largest magnitude that each model keeps, and L1 rescaling, shape (3, M).

    Of n elements the int(gamma·n) largest are dropped and of the rest the int(density·n) largest
    kept; where the rest is fewer, less is dropped from the top. Both magnitudes are found exactly,
    as by `Trim`, and every element tied with one of them is kept. A density of 1 or more keeps
    all, and none is kept where int(density·n) is 0.
    """

    depends_on: tuple[str, ...] = ("density", "gamma", "rescale")
    scope: Scope = "tensor"
    kernels: ClassVar = ("histogram", "magnitudes")
    rows: ClassVar = ("least magnitude kept", "largest magnitude kept", "rescaling factor")

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        selects = any(0 < density < 1 for density in parameters["density"])
        return selects * (1 + bool(parameters["rescale"]))

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return 2 * sum(int(0 < density < 1) for density in parameters["density"])

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        n = num_elements
        least: list[int | None] = []  # ranks from the largest
        most: list[int | None] = []
        lows, highs = [0.0] * num_models, [math.inf] * num_models
        pairs = zip(parameters["density"], parameters["gamma"], strict=True)
        for model, (density, gamma) in enumerate(pairs):
            kept, top = int(density * n), int(gamma * n)
            bottom, selects = max(0, n - kept - top), density < 1 and kept > 0
            least.append(n - bottom if selects and bottom else None)
            most.append(n - bottom - kept + 1 if selects and bottom + kept < n else None)
            if density < 1 and not kept:
                lows[model] = math.inf
        ranks = (*least, *most)
        if not any(ranks):
            return [lows, highs, [1.0] * num_models]
        search = Search(num_models, ranks, (*lows, *highs), bool(parameters["rescale"]))
        return Select(sampled_first(search, num_elements))


def num_searches(need: Statistic, parameters: Mapping[str, Any]) -> int:
    """Return how often a search usually reads: twice where no sample of a tensor comes first."""
    return 1 if scope_of(need, parameters) == "tensor" else 2


def is_sampled(num_elements: int) -> bool:
    """Tell whether a tensor is so large that a sample of it is looked at first."""
    return num_elements // CHUNK_ELEMENTS >= 4 * _NUM_SAMPLED


def bytes_of_counters(num_elements: int, *, samples: bool) -> tuple[int, int, int]:
    """Return the memory for the bins of one rank that is looked for in a tensor, or a model.

    Returns:
        What all threads share: bins of the highest bits, and then the finer ones that are made
        while those are still there; what each thread takes besides, if kernels count; if torch
        does, which counts one rank after the other.
    """
    first, digit = 1 << (_DIGIT_BITS - 1), 1 << _DIGIT_BITS
    finer = _WINDOW_DIGITS * digit if samples and is_sampled(num_elements) else digit
    return 8 * (first + finer), 4 * first, 16 * finer


def sampled_first(whole: Search, num_elements: int) -> Search:
    """Return the search that looks at a sample of a large tensor first."""
    if not is_sampled(num_elements):
        return whole
    num_chunks = num_elements // CHUNK_ELEMENTS
    chunks = tuple(i * num_chunks // _NUM_SAMPLED for i in range(_NUM_SAMPLED))
    share = len(chunks) * CHUNK_ELEMENTS / num_elements
    ranks = tuple(rank and max(1, round(rank * share)) for rank in whole.ranks)
    return replace(whole, ranks=ranks, chunks=chunks, whole=whole)


@dataclass(frozen=True)
class Search:
    """What is looked for, and where.

    Attributes:
        ranks: of the magnitudes wanted, from the largest, M for each group; None where there is
            none to find.
        thresholds: where there is no rank.
        rescale: whether L1 norms are wanted, too.
        lows: least bits that are counted, for each rank.
        shift: bits per bin, or None for the highest 16 of the dtype.
        num_bins: how many bins.
        chunks: the chunks that are read; None for all.
        whole: for a sample, the search on the whole tensor that follows.
        narrow: look at values rounded to float32, because tensors of a model have several dtypes.
    """

    num_models: int
    ranks: tuple[int | None, ...]
    thresholds: tuple[float, ...]
    rescale: bool = False
    lows: tuple[int, ...] = ()
    shift: int | None = None
    num_bins: int = 1 << (_DIGIT_BITS - 1)  # the sign bit is always 0
    chunks: tuple[int, ...] | None = None
    whole: Search | None = None
    narrow: bool = False


class Select:
    """Counts magnitudes by their bits, to find those of given ranks."""

    kernel = "histogram"

    def __init__(self, search: Search) -> None:
        import numpy

        self.search = search
        self.chunks: Sequence[int] | None = search.chunks
        self._lows = search.lows or (0,) * len(search.ranks)
        self._widths: set[int] = set()  # in bits, of the values seen
        self._lock = threading.Lock()
        # One more bin counts all magnitudes above the others. Kernels count into these arrays.
        self._counts: list[numpy.ndarray[Any, Any] | None] = [
            None if rank is None else numpy.zeros(search.num_bins + 1, numpy.uint64)
            for rank in search.ranks
        ]

    def _shift(self, num_bits: int = 32) -> int:
        shift = self.search.shift
        return num_bits - _DIGIT_BITS if shift is None else shift

    def measure(self, block_ME: Tensor) -> None:
        import torch

        block_ME = block_ME.float() if self.search.narrow else block_ME
        num_bits = 8 * block_ME.element_size()
        self._widths.add(num_bits)
        integer = torch.int32 if num_bits == 32 else torch.int64
        num_bins, shift = self.search.num_bins, self._shift(num_bits)
        for place, total in enumerate(self._counts):
            if total is None:
                continue
            magnitude_E = block_ME[place % self.search.num_models].abs()
            offset_E = magnitude_E.view(integer) - self._lows[place]
            bin_E = (offset_E[offset_E >= 0] >> shift).clamp_(max=num_bins)
            counts: Any = bin_E.bincount(minlength=num_bins + 1).cpu().numpy()
            with self._lock:  # here and not in `add`: the counts of all blocks need not be held
                total += counts.astype("uint64")

    def measure_raw(self, kernels: Any, block: RawBlock) -> None:
        self._widths.add(32)
        kernels.histogram(block, self._lows, self._shift(), tuple(self._counts))

    def add(self, share: None) -> None:
        """Do nothing: blocks are counted as they are measured."""

    def again(self, search: Search) -> Select:
        """Return the pass that goes on with a search."""
        return Select(search)

    def finish(self) -> Pass | list[Any]:
        search = self.search
        if len(self._widths) > 1:
            return self.again(replace(search, narrow=True))
        num_bits = max(self._widths, default=32)
        shift = self._shift(num_bits)
        found = [
            None if rank is None else self._find(place, rank, shift)
            for place, rank in enumerate(search.ranks)
        ]
        if search.whole is not None:
            if num_bits != 32:
                return self.again(search.whole)
            return self.again(_window(search.whole, found))
        pairs = zip(found, search.ranks, strict=True)
        if any(low is None and rank is not None for low, rank in pairs):  # the window missed it
            whole = Search(search.num_models, search.ranks, search.thresholds, search.rescale)
            return self.again(whole)
        if shift:
            lows = tuple(low or 0 for low in found)
            finer = replace(search, lows=lows, shift=shift - _DIGIT_BITS, num_bins=1 << _DIGIT_BITS)
            return self.again(finer)
        thresholds = [
            threshold if low is None else _float_of_bits(low, num_bits)
            for low, threshold in zip(found, search.thresholds, strict=True)
        ]
        limits = [thresholds[group] for group in _groups(search.num_models, len(thresholds))]
        return _KeptShare(limits) if search.rescale else [*limits, [1.0] * search.num_models]

    def _find(self, place: int, rank: int, shift: int) -> int | None:
        """Return the least bits of the bin that contains a rank; None if no bin does."""
        counts: Any = self._counts[place]
        left = rank - int(counts[-1])  # those above all bins
        if left <= 0:
            return None
        # Of groups of bins first: adding up every bin one after the other takes far longer.
        size = math.gcd(len(counts) - 1, _GROUPED_BINS)
        groups = counts[:-1].reshape(-1, size)
        group, left = _from_top(groups.sum(1), left)
        if group < 0:
            return None
        bin_, _ = _from_top(groups[group], left)
        return self._lows[place] + ((group * size + bin_) << shift)


def _from_top(counts: Any, rank: int) -> tuple[int, int]:
    """Return where a rank is, counted from the last entry, and its rank there; -1 if nowhere.

    >>> import numpy
    >>> _from_top(numpy.array([5, 3, 2], "uint64"), 4)
    (1, 2)
    """
    from_top = counts[::-1].cumsum()
    place = int(from_top.searchsorted(counts.dtype.type(rank)))
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before


def _groups(num_models: int, size: int) -> list[slice]:
    return [slice(start, start + num_models) for start in range(0, size, num_models)]


def _window(whole: Search, lows: Sequence[int | None]) -> Search:
    """Return the search among magnitudes around those that a sample showed."""
    digit, most = 1 << _DIGIT_BITS, (1 << 31) - (_WINDOW_DIGITS << _DIGIT_BITS)
    return replace(
        whole,
        lows=tuple(min(max((low or 0) - digit, 0), most) for low in lows),
        shift=0,
        num_bins=_WINDOW_DIGITS << _DIGIT_BITS,
    )


class _KeptShare:
    """L1 norms before and after trimming.

    Args:
        limits: least magnitudes kept and, where there is an upper limit, the largest ones.
    """

    chunks = None
    kernel = "magnitudes"

    def __init__(self, limits: list[list[float]]) -> None:
        self._limits = limits
        self._sums: list[list[list[float]]] = []  # of chunks: all, from least on, above largest

    def measure(self, block_ME: Tensor) -> list[list[list[float]]]:
        least_M1, *largest_M1 = (block_ME.new_tensor(row)[:, None] for row in self._limits)
        shares = []
        for start in range(0, block_ME.shape[1], CHUNK_ELEMENTS):
            magnitude_MC = block_ME[:, start : start + CHUNK_ELEMENTS].abs()
            masks = [magnitude_MC >= least_M1, *(magnitude_MC > limit for limit in largest_M1)]
            rows = [magnitude_MC, *(magnitude_MC * mask_MC for mask_MC in masks)]
            shares.append([row_MC.double().sum(1).tolist() for row_MC in rows])
        return shares

    def measure_raw(self, kernels: Any, block: RawBlock) -> list[list[list[float]]]:
        least, *largest = self._limits
        starts = [least, *([_next_above(limit) for limit in row] for row in largest)]
        packed = [struct.pack(f"{len(row)}f", *row) for row in starts]
        sums = [
            list(struct.iter_unpack(f"{2 * len(least)}d", kernels.magnitudes(block, row)))
            for row in packed
        ]
        return [
            [list(chunk[0][::2]), *(list(values[1::2]) for values in chunk)]
            for chunk in zip(*sums, strict=True)
        ]

    def add(self, share: list[list[list[float]]]) -> None:
        self._sums += share

    def finish(self) -> list[Any]:
        scales = []
        for model in range(len(self._limits[0])):
            rows = zip(*([row[model] for row in chunk] for chunk in self._sums), strict=True)
            before, after, *above = map(math.fsum, rows)
            scales.append(l1_scale(before, after - sum(above)))
        return [*self._limits, scales]


def l1_scale(before: float, after: float) -> float:
    """Return what brings what is kept back to its L1 norm; 1 where a norm is below 1e-7."""
    return before / after if 1e-7 <= after and 1e-7 <= before < math.inf else 1.0


def _next_above(x: float) -> float:
    """Return the least float32 above a magnitude that is one."""
    bits = struct.unpack("<i", struct.pack("<f", x))[0]
    return _float_of_bits(bits + 1, 32) if math.isfinite(x) else math.inf


def _float_of_bits(bits: int, num_bits: int) -> float:
    integer, real = ("<i", "<f") if num_bits == 32 else ("<q", "<d")
    value: float = struct.unpack(real, struct.pack(integer, bits))[0]
    return value
