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
        return 2 if 0 < parameters["select_topk"] < 1 else 1

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
    """Counts variances by their bits; the rank wanted follows from how many are not 0."""

    kernel = "variances"

    def __init__(self, search: Search, num_models: int, share: float, least: float) -> None:
        super().__init__(search)
        self._num_models, self._share, self._least = num_models, share, least
        self._num_nonzero = 0

    def measure(self, block_ME: Tensor) -> Any:
        variance_E = variance(block_ME)
        super().measure(variance_E[None])
        return int(variance_E.count_nonzero())

    def measure_raw(self, kernels: Any, block: RawBlock, **_: int) -> Any:
        return kernels.variances(block, self._lows[0], self._shift(), self._counts[0])

    def add(self, share: Any) -> None:
        self._num_nonzero += share

    def again(self, search: Search) -> Select:
        return _Variances(search, self._num_models, self._share, self._least)

    def finish(self) -> Pass | list[Any]:
        rank = int(self._share * self._num_nonzero)
        if rank == 0 and self.search.whole is None:
            return _Squares(self._num_models, math.inf, self._least)
        self.search = replace(self.search, ranks=(max(1, rank),))
        found: Any = super().finish()
        if isinstance(found, list):
            return _Squares(self._num_models, found[0][0], self._least)
        return found  # type: ignore[no-any-return]


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
        total = math.fsum(squares)
        if not self._least < total < math.inf:  # infinite or NaN: a merge names whose value is
            return [self._threshold, *([1 / len(squares)] * len(squares))]
        return [self._threshold, *(square / total for square in squares)]
