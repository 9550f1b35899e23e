"""Inner products of models, for methods that combine models by their norms and angles.

Shape suffixes: M models, S sources (the base, then the models), R rows (M or S), E elements of a
block, C elements of a chunk.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.arguments import checked
from outliermerge.methods.kernel_call import RawBlock
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, Scope

if TYPE_CHECKING:
    from torch import Tensor


@checked
@dataclass(frozen=True)
class Gram:
    """Inner products of the models' task vectors, or weights, shape (M, M).

    G = Δ Δᵀ of a whole tensor, so that ‖Δᵢ‖² is G[i, i] and the cosine of two models
    G[i, j] / √(G[i, i] G[j, j]). An entry is NaN if a value is not finite.

    Attributes:
        with_base: include the base's weights as the first row, shape (S, S); for methods on task
            vectors.
        scope_parameter: the method's parameter that says whether the products are those of one
            tensor or of all merged tensors of a model; empty if `scope` says so.
    """

    with_base: bool = False
    depends_on: tuple[str, ...] = ()
    scope: Scope = "tensor"
    scope_parameter: str = ""
    kernels: ClassVar = ("gram",)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return 1

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        return _Products(num_models + self.with_base, with_base=self.with_base)


class _Products:
    """The upper triangle of each chunk's inner products."""

    chunks = None
    kernel = "gram"

    def __init__(self, num_rows: int, *, with_base: bool) -> None:
        self.with_base = with_base
        self._num_rows = num_rows
        self._sums = array("d")  # (chunks, R(R+1)/2)

    def measure(self, block_RE: Tensor) -> array[float]:
        import torch

        found = []
        for start in range(0, block_RE.shape[1], CHUNK_ELEMENTS):
            chunk_RC = block_RE[:, start : start + CHUNK_ELEMENTS].double()
            # No matrix product: its bits may change with the number of threads and with memory
            # addresses.
            found += [(chunk_RC[row] * chunk_RC[row:]).sum(1) for row in range(self._num_rows)]
        return array("d", torch.cat(found).tolist())

    def measure_raw(self, kernels: Any, block: RawBlock) -> array[float]:
        return array("d", kernels.gram(block, self.with_base))

    def add(self, share: array[float]) -> None:
        self._sums += share

    def finish(self) -> list[list[float]]:
        num_rows = self._num_rows
        places = [(i, j) for i in range(num_rows) for j in range(i, num_rows)]
        gram = [[0.0] * num_rows for _ in range(num_rows)]
        for number, (i, j) in enumerate(places):
            gram[i][j] = gram[j][i] = _sum(self._sums[number :: len(places)])
        return gram


def _sum(products: array[float]) -> float:
    try:
        total = math.fsum(products)
    except (OverflowError, ValueError):  # non-finite inputs that the user allowed
        return math.nan
    return total if math.isfinite(total) else math.nan
