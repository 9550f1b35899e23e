"""The statistic of PCB: bounds of magnitudes, and of the scores by which models compete.

Shape suffixes: M models, E elements of a block.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.methods.kernel_call import RawBlock, packed
from outliermerge.methods.statistics.base import Pass, Scope, scope_of
from outliermerge.methods.statistics.trim import Search, Select, num_searches, sampled_first

if TYPE_CHECKING:
    from torch import Tensor

_TAIL = 1e-4  # of the smallest and of the largest magnitudes, as in the published code
_LARGEST_POWER = 80  # exp of it is finite in float32


def scores(deltas_ME: Tensor, least_M1: Tensor, most_M1: Tensor) -> Tensor:
    """Return exp(N x²) tanh(δ Σδ), with x where |δ| is between its bounds, from 0 to 1.

    Of more than 80 models all are divided by exp(N − 80). Only their ratios count.
    """
    width_M1 = (most_M1 - least_M1).masked_fill(most_M1 <= least_M1, 1)
    place_ME = (deltas_ME.abs().clamp(least_M1, most_M1) - least_M1) / width_M1
    num_models = len(deltas_ME)
    size_ME = (place_ME.square() * num_models - max(0, num_models - _LARGEST_POWER)).exp()
    return size_ME * (deltas_ME * deltas_ME.sum(0)).tanh()


@dataclass(frozen=True)
class Competition:
    """Bounds of magnitudes, then the least score that wins and the largest score, shape (4, M).

    Ranks are found exactly, as by `Trim`. Scores below 0 count as 0.

    Attributes:
        scope_parameter: the method's parameter that says whether the elements are those of one
            tensor or of all merged tensors of a model; empty if `scope` says so.
    """

    depends_on: tuple[str, ...] = ("density",)
    scope: Scope = "tensor"
    scope_parameter: str = ""
    kernels: ClassVar = ("histogram", "scores")
    rows: ClassVar = ("least magnitude", "largest magnitude", "least score", "largest score")

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return 2 * num_searches(self, parameters)

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return 2 * num_models  # of magnitudes; then of scores, which are fewer

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        if num_elements == 0:
            return [[0.0] * num_models] * 4
        n = num_elements
        ranks = (n - int(n * _TAIL), n - max(0, int(n * (1 - _TAIL) - 1)))
        wins = n - min(n - 1, int(n * (1 - parameters["density"])))
        samples = scope_of(self, parameters) == "tensor"

        def search(ranks: tuple[int, ...]) -> Search:
            each = tuple(rank for rank in ranks for _ in range(num_models))
            whole = Search(num_models, each, (0.0,) * len(each))
            return sampled_first(whole, n) if samples else whole

        return _Magnitudes(search(ranks), search((wins,)))


class _Magnitudes(Select):
    def __init__(self, search: Search, then: Search) -> None:
        super().__init__(search)
        self._then = then

    def again(self, search: Search) -> Select:
        return _Magnitudes(search, self._then)

    def finish(self) -> Pass | list[Any]:
        found = super().finish()
        return _Scores(self._then, found[:2]) if isinstance(found, list) else found


class _Scores(Select):
    """Counts scores by their bits, and finds the largest."""

    kernel = "scores"

    def __init__(self, search: Search, bounds: Sequence[list[float]]) -> None:
        super().__init__(search)
        self._bounds, self._largest = bounds, [0.0] * search.num_models

    def measure(self, block_ME: Tensor) -> Any:
        least_M1, most_M1 = (block_ME.new_tensor(row)[:, None] for row in self._bounds)
        scores_ME = scores(block_ME, least_M1, most_M1).relu()
        super().measure(scores_ME)
        return scores_ME.amax(1).tolist()

    def measure_raw(self, kernels: Any, block: RawBlock) -> Any:
        bounds = b"".join(map(packed, self._bounds))
        found = kernels.scores(block, bounds, self._lows, self._shift(), tuple(self._counts))
        self._widths.add(32)
        return struct.unpack(f"{self.search.num_models}f", found)

    def add(self, share: Any) -> None:
        self._largest = [max(pair) for pair in zip(self._largest, share, strict=True)]

    def again(self, search: Search) -> Select:
        return _Scores(search, self._bounds)

    def finish(self) -> Pass | list[Any]:
        found = super().finish()
        return [*self._bounds, found[0], self._largest] if isinstance(found, list) else found
