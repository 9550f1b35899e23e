"""Whole-tensor statistics computed block by block.

Shape suffixes: M models, E elements of a block, C elements of a chunk.

Any thread may measure a block; one thread adds the results up in block order. Sums are in float64
over fixed chunks of 65,536 elements, and the sums of chunks are added exactly (`math.fsum`). So a
result depends on neither block size nor thread count. Blocks start at multiples of a chunk.

torch measures statistics on float32 values; where a backend has kernels for a statistic, these
measure it on raw bytes. Selections agree bit for bit. Sums inside a chunk are taken in another
order, so standard deviations agree to about 1e-15.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, cast

from outliermerge.arguments import checked
from outliermerge.checkpoint.checksum import PIECE_ELEMENTS
from outliermerge.methods.kernel_call import RawBlock

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = PIECE_ELEMENTS
"""A chunk of sums is a piece of checksums, so that kernels compute both in one reading. Another
number would change sums, and checksums of earlier outputs."""

Scope: TypeAlias = Literal["tensor", "model"]
"""What a statistic describes: one tensor, or all merged tensors of a model together."""


class Pass(Protocol):
    """One reading of a tensor's blocks.

    A pass with `with_base` set gets the sources (S, E), the base first, in place of (M, E). A pass
    with `with_start` set also gets the number of the block's first element. A pass with `by_row`
    set reads blocks of whole rows, for methods that merge by rows.
    """

    @property
    def chunks(self) -> Sequence[int] | None:
        """The numbers of the chunks to read of each tensor, in order; None for all.

        The last chunk of a tensor may be shorter; numbers beyond the last are passed over.
        """

    def measure(self, block_ME: Tensor) -> Any:
        """Return what a block contributes; called by any thread."""

    def add(self, share: Any) -> None:
        """Add what a block contributes; called in block order by one thread."""

    def finish(self) -> Pass | list[Any]:
        """Return the next pass, or the result as (nested) lists of numbers."""


class RawPass(Pass, Protocol):
    """A pass that a backend's kernels can measure as well.

    Attributes:
        kernel: the function of the backend that `measure_raw` calls.
    """

    kernel: str

    def measure_raw(self, kernels: Any, block: RawBlock, **where: int) -> Any:
        """Return what a block contributes, computed by kernels; called by any thread.

        A pass with `with_start` set gets the number of the block's first element as `start`.
        """


def raw_pass(state: Pass, kernels: Any) -> RawPass | None:
    """Return the pass if kernels can measure it, else None: then torch measures it."""
    kernel = getattr(state, "kernel", None)
    return cast(RawPass, state) if kernel and hasattr(kernels, kernel) else None


class Statistic(Protocol):
    """A declaration of one value that a method needs of a whole tensor.

    A statistic that kernels can measure also has `kernels`: the names of the kernel functions that
    its passes call. A statistic of a whole model has `scope = "model"`; if a parameter of the
    method says so, `scope_parameter` is its name. If `with_context` is set, `start` gets the
    tensor's context as a keyword. One whose result takes memory until the tensor is merged tells
    how much: `held_bytes`, which is called like `start`. One that counts values in bins, to find
    those of given ranks, tells of how many ranks: `num_ranks`, for a number of models and
    parameters.

    Attributes:
        depends_on: names of the method's parameters that the statistic depends on.
    """

    @property
    def depends_on(self) -> tuple[str, ...]: ...

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        """Return how often the tensor is usually read."""

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        """Return the first pass, or the result if no pass is needed."""


def scope_of(need: Statistic, parameters: Mapping[str, Any]) -> Scope:
    """Return whether a statistic describes one tensor or the whole model."""
    named = getattr(need, "scope_parameter", "")
    return cast(Scope, parameters[named] if named else getattr(need, "scope", "tensor"))


def is_measured_by(need: Statistic, functions: AbstractSet[str]) -> bool:
    """Tell whether a backend with these functions can measure a statistic without torch.

    >>> is_measured_by(StandardDeviation(), {"moments"}), is_measured_by(StandardDeviation(), set())
    (True, False)
    """
    kernels = getattr(need, "kernels", ())
    return bool(kernels) and functions >= set(kernels)


@checked
@dataclass(frozen=True)
class StandardDeviation:
    """Population standard deviation of each model's elements, shape (M,).

    Chunk means and squared deviations are combined by Chan's formula, which stays accurate if the
    mean is large compared with σ.

    Attributes:
        scope_parameter: the method's parameter that says whether the elements are those of one
            tensor or of all merged tensors of a model; empty if `scope` says so.
    """

    depends_on: tuple[str, ...] = ()
    scope: Scope = "tensor"
    scope_parameter: str = ""
    kernels: ClassVar = ("moments",)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return 1

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        return _Moments(num_models)


class _Moments:
    chunks = None
    kernel = "moments"

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

    def measure_raw(
        self, kernels: Any, block: RawBlock
    ) -> list[tuple[int, list[float], list[float]]]:
        num_elements = block[2]
        shares, start = [], 0
        for values in struct.iter_unpack(f"{2 * self._num_models}d", kernels.moments(block)):
            num = min(CHUNK_ELEMENTS, num_elements - start)
            shares.append((num, list(values[::2]), list(values[1::2])))
            start += num
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
