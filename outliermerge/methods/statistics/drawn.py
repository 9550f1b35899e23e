"""The statistic of methods that drop elements at random: what is left of the L1 norm.

Shape suffixes: M models, E elements of a block, R rows, C columns.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import (
    SPARE_BYTES,
    RawBlock,
    kept_in,
    packed,
    packed_keys,
)
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, Scope
from outliermerge.methods.statistics.trim import l1_scale

if TYPE_CHECKING:
    from torch import Tensor

Probability: TypeAlias = Callable[..., Any]
"""Returns the probability to keep each element of a model's block, or one for all.

Args: the block, its context, and the model's density and epsilon."""


_KEPT_BYTES = 32 << 20  # of a tensor; elements beyond are ranked once more when they are merged


class Scales(list[float]):
    """The factor of each model, and what kernels kept by rank: bits, None where torch measured."""

    kept: bytearray | None = None


@dataclass(frozen=True)
class DrawnScale:
    """Σ|x| / Σ|kept| of each model whose elements are kept at random, shape (M,).

    1 where `rescale` is off or not by L1 norm, where all are kept, and where a sum is below 1e-7.

    Attributes:
        probability: of keeping an element.
        by_row: whether it is of the ranks in a row.
    """

    probability: Probability
    by_row: bool = False
    depends_on: tuple[str, ...] = ("density", "epsilon", "rescale", "rescale_by")
    scope: Scope = "tensor"
    with_context: bool = True
    kernels: ClassVar = ("drawn",)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        drops = any(0 < density < 1 for density in parameters["density"])
        return int(drops and parameters["rescale"] and parameters["rescale_by"] == "l1")

    def held_bytes(self, num_models: int, num_elements: int, parameters: Mapping[str, Any]) -> int:
        """Return the memory for what kernels keep by rank: one bit an element, within a limit."""
        if not (self.by_row and self.num_passes(parameters)):
            return 0
        own = min(-(-num_elements // 8), _KEPT_BYTES // num_models)
        return num_models * (own + SPARE_BYTES)

    def start(
        self,
        num_models: int,
        num_elements: int,
        parameters: Mapping[str, Any],
        *,
        context: Context | None = None,
    ) -> Pass | list[Any]:
        if not self.num_passes(parameters):
            return [1.0] * num_models
        assert context is not None
        epsilon = parameters.get("epsilon", [0.0] * num_models)
        num_bytes = self.held_bytes(num_models, num_elements, parameters)
        return _Norms(self, context, parameters["density"], epsilon, num_bytes)


class _Norms:
    """L1 norms of all elements and of those kept."""

    chunks = None
    kernel = "drawn"
    with_start = True

    def __init__(
        self, need: DrawnScale, context: Context, density: Any, epsilon: Any, num_bytes: int
    ) -> None:
        self.by_row = need.by_row
        self._probability, self._context = need.probability, context
        self._density, self._epsilon = density, epsilon
        self._before = [array("d") for _ in density]
        self._after = [array("d") for _ in density]
        self._kept = bytearray(num_bytes) if num_bytes else None

    def measure(self, block_ME: Tensor, start: int = 0) -> list[tuple[array[float], array[float]]]:
        self._kept = None
        context = replace(self._context, start=start)
        # As methods get them: rounded to the block's dtype.
        density, epsilon = (
            block_ME.new_tensor(values).tolist() for values in (self._density, self._epsilon)
        )
        if self.by_row:
            block_ME = block_ME.view(len(block_ME), -1, row_size(context, block_ME.shape[1]))
        shares = []
        for model, own in enumerate(block_ME):
            chance = self._probability(own, context, density[model], epsilon[model])
            kept = own * (context.uniform(own, model=model) < chance)
            shares.append((self._sums(own), self._sums(kept)))
        return shares

    def measure_raw(
        self, kernels: Any, block: RawBlock, start: int = 0
    ) -> list[tuple[array[float], array[float]]]:
        num_models, context = len(self._before), self._context
        keys = packed_keys([context.keys(model) for model in range(num_models)])
        rows = ranked_rows(context) if self.by_row else ()
        if start % 8:  # another block writes a part of the same byte
            self._kept = None
        kept = kept_in(self._kept, num_models, start, block[2])
        sums = array("d", kernels.drawn(
            block, start, packed(self._density), packed(self._epsilon), keys, *rows, *kept
        ))  # fmt: skip
        step = 2 * num_models
        return [(sums[at::step], sums[at + 1 :: step]) for at in range(0, step, 2)]

    def _sums(self, values: Tensor) -> array[float]:
        """Return sums over pieces that do not depend on blocks: a chunk's, or a row's."""
        rows_RC = values if self.by_row else values[None]
        found = array("d")
        for first in range(0, rows_RC.shape[1], CHUNK_ELEMENTS):
            piece_RC = rows_RC[:, first : first + CHUNK_ELEMENTS]
            found.extend(piece_RC.abs().double().sum(1).tolist())
        return found

    def add(self, share: list[tuple[array[float], array[float]]]) -> None:
        for model, (before, after) in enumerate(share):
            self._before[model] += before
            self._after[model] += after

    def finish(self) -> Scales:
        scales = Scales(
            l1_scale(math.fsum(before), math.fsum(after))
            for before, after in zip(self._before, self._after, strict=True)
        )
        scales.kept = self._kept
        return scales


def row_size(context: Context, num_elements: int) -> int:
    """Return the elements of one row of a context's tensor; a vector is one row.

    >>> row_size(Context(shape=(4, 3, 2)), 24)
    6
    """
    return math.prod(context.shape[1:]) if len(context.shape) > 1 else num_elements


def ranked_rows(context: Context) -> tuple[int, int]:
    """Return the elements of a row of a context's tensor, and how many are ranked together.

    Of a tensor of more than two dimensions these are along the second one, as in mergekit.

    >>> ranked_rows(Context(shape=(4, 3, 2))), ranked_rows(Context(shape=(4,)))
    ((6, 3), (4, 4))
    """
    elements = row_size(context, math.prod(context.shape))
    return elements, context.shape[1] if len(context.shape) > 2 else elements
