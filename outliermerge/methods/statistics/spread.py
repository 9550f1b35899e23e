"""The statistic of SCE: which elements differ most between models, and the models' weights.

Shape suffixes: M models, E elements of a block, C elements of a chunk.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.methods.kernel_call import RawBlock
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, Scope
from outliermerge.methods.statistics.trim import Search, Select, sampled_first

if TYPE_CHECKING:
    from torch import Tensor


def variance(block_ME: Tensor) -> Tensor:
    """Return the population variance of each element over the models, (E,).

    One operation after the other, so that every device gives the same bits.

    >>> import torch
    >>> variance(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([1., 0.])
    """
    share = 1 / len(block_ME)
    mean_E = block_ME[0].clone()
    for row_E in block_ME[1:]:
        mean_E += row_E
    mean_E *= share
    total_E = (block_ME[0] - mean_E).square_()
    for row_E in block_ME[1:]:
        total_E += (row_E - mean_E).square_()
    return total_E.mul_(share)


_LISTED_BYTES = 32 << 20  # of a tensor; where more is found in a window, it is read once more
_MOST_LEVELS = 2048  # that kernels list of a chunk


@dataclass(frozen=True)
class Spread:
    """The least variance that is kept, then each model's weight, shape (1 + M,).

    Of the elements whose variance over the models is not 0 the int(select_topk·number) of largest
    variance are kept, and those tied with the last; infinity where none are, 0 where select_topk
    is 1 or more. A weight is Σx² of what is kept, divided by that of all models; all are alike
    where that is 0 or not finite.
    """

    depends_on: tuple[str, ...] = ("select_topk", "compat")
    scope: Scope = "tensor"
    kernels: ClassVar = ("variances", "squares")

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return 1

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return int(0 < parameters["select_topk"] < 1)

    def held_bytes(self, num_models: int, num_elements: int, parameters: Mapping[str, Any]) -> int:
        """Return the memory for what kernels list of the variances in a window, at most."""
        if not 0 < parameters["select_topk"] < 1:
            return 0
        most = -(-num_elements // CHUNK_ELEMENTS) * _MOST_LEVELS * (1 + num_models) * 8
        return min(most, _LISTED_BYTES)

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        share, clamps = parameters["select_topk"], parameters["compat"] == "mergekit"
        least_mean = 1e-6 * num_elements if clamps else 0.0
        if not 0 < share < 1:
            return _Squares(num_models, 0.0 if share > 0 else math.inf, least_mean)
        search = sampled_first(Search(1, (1,), (math.inf,)), num_elements)
        return _Variances(search, num_models, share, least_mean)


class _Variances(Select):
    """Counts variances by their bits; the rank wanted follows from how many are not 0.

    Kernels also add up squares: of variances above those counted, and for each of those counted,
    so that no other pass is needed to add up what is kept.
    """

    kernel = "variances"

    def __init__(self, search: Search, num_models: int, share: float, least: float) -> None:
        super().__init__(search)
        self._num_models, self._share, self._least = num_models, share, least
        self._num_nonzero = 0
        self._above: list[bytes] = []
        self._levels: list[bytes] | None = []  # None where they are not known, or too many
        self._num_bytes = 0

    def measure(self, block_ME: Tensor) -> Any:
        variance_E = variance(block_ME)
        super().measure(variance_E[None])
        return int(variance_E.count_nonzero()), None, None

    def measure_raw(self, kernels: Any, block: RawBlock, **_: int) -> Any:
        return kernels.variances(block, self._lows[0], self._shift(), self._counts[0])

    def add(self, share: Any) -> None:
        num_nonzero, above, levels = share
        self._num_nonzero += num_nonzero
        self._num_bytes += len(levels or b"")
        if levels is None or self._levels is None or self._num_bytes > _LISTED_BYTES:
            self._levels = None
            return
        self._above.append(above)
        self._levels.append(levels)

    def again(self, search: Search) -> Select:
        return _Variances(search, self._num_models, self._share, self._least)

    def finish(self) -> Pass | list[Any]:
        rank = int(self._share * self._num_nonzero)
        if rank == 0 and self.search.whole is None:
            return _Squares(self._num_models, math.inf, self._least)
        self.search = replace(self.search, ranks=(max(1, rank),))
        found: Any = super().finish()
        if not isinstance(found, list):
            return found  # type: ignore[no-any-return]
        threshold = found[0][0]
        if self._levels is None:
            return _Squares(self._num_models, threshold, self._least)
        return [threshold, *_weights(self._squares(threshold), self._least)]

    def _squares(self, threshold: float) -> list[float]:
        """Return the sums of squares of what is kept, (M,)."""
        import numpy

        assert self._levels is not None
        levels = numpy.frombuffer(b"".join(self._levels)).reshape(-1, 1 + self._num_models)
        kept = levels[levels[:, 0] >= threshold, 1:]
        above = numpy.frombuffer(b"".join(self._above)).reshape(-1, self._num_models)
        # Added up one after the other, and not as numpy likes: every machine gives the same bits.
        inside = kept.cumsum(0)[-1:]
        return [math.fsum(sums) for sums in zip(*above.tolist(), *inside.tolist(), strict=True)]


class _Squares:
    """Sums of squares of what is kept."""

    chunks = None
    kernel = "squares"

    def __init__(self, num_models: int, threshold: float, least: float) -> None:
        self._threshold, self._least = threshold, least
        self._sums: list[list[float]] = [[] for _ in range(num_models)]

    def measure(self, block_ME: Tensor) -> list[list[float]]:
        if self._threshold > 0:
            block_ME = block_ME * (variance(block_ME) >= self._threshold)
        shares = []
        for start in range(0, block_ME.shape[1], CHUNK_ELEMENTS):
            shares.append(block_ME[:, start : start + CHUNK_ELEMENTS].double().square_().sum(1))
        return [share_M.tolist() for share_M in shares]

    def measure_raw(self, kernels: Any, block: RawBlock, **_: int) -> list[list[float]]:
        values, step = array("d", kernels.squares(block, self._threshold)).tolist(), len(self._sums)
        return [values[at : at + step] for at in range(0, len(values), step)]

    def add(self, share: list[list[float]]) -> None:
        for chunk in share:
            for total, value in zip(self._sums, chunk, strict=True):
                total.append(value)

    def finish(self) -> list[float]:
        squares = [math.fsum(values) for values in self._sums]
        return [self._threshold, *_weights(squares, self._least)]


def _weights(squares: list[float], least: float) -> list[float]:
    """Return each model's share in sums of squares."""
    total = math.fsum(squares)
    if not least < total < math.inf:  # infinite or NaN: a merge names whose value is
        return [1 / len(squares)] * len(squares)
    return [square / total for square in squares]
