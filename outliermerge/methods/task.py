"""The description of one tensor's merge, the same for all engines."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outliermerge.checkpoint.sources import DType
from outliermerge.methods.context import Context
from outliermerge.methods.contract import COARSEST_FIRST, Cut, MergeMethod
from outliermerge.methods.kernel_call import CODES
from outliermerge.methods.prepared import PANEL_ROWS
from outliermerge.methods.statistics.base import scope_of


@dataclass(frozen=True)
class Task:
    """How one tensor is merged; all engines take this.

    Attributes:
        parameters: resolved for this tensor, per-model ones as tuples.
        dtypes: the dtypes in which the sources are stored.
        out_dtype: the dtype in which the result is stored.
        compute_dtype: the dtype of the arithmetic.
        shape: the shape of the whole tensor.
        context: the tensor's name and place in the model, for methods that ask for it.
        auxiliary: the dtypes of the auxiliary tensors that are read in blocks: all models' of the
            first kind, then of the next.
        modifiers: the modifiers of the merged task vector, in order, with resolved parameters.
        stochastic: round at random, up or down.
    """

    method: MergeMethod
    parameters: Mapping[str, Any]
    dtypes: tuple[DType, ...]
    out_dtype: DType
    compute_dtype: str
    shape: tuple[int, ...]
    context: Context = field(default_factory=Context)
    auxiliary: tuple[DType, ...] = ()
    modifiers: tuple[tuple[MergeMethod, Mapping[str, Any]], ...] = ()
    stochastic: bool = False

    @property
    def rounding_keys(self) -> tuple[int, int] | None:
        """What the random numbers are made of by which the output is rounded, if it is."""
        is_short = self.out_dtype.name in ("bfloat16", "float16")
        return self.context.keys(purpose="rounding") if self.stochastic and is_short else None

    @property
    def cut(self) -> Cut:
        """How finely the tensor may be split: the coarsest cut of the method and its modifiers."""
        cuts = {self.method.cut, *(modifier.cut for modifier, _ in self.modifiers)}
        return next(cut for cut in COARSEST_FIRST if cut in cuts)

    @property
    def rows_at_once(self) -> int:
        """How many rows the blocks of a method on rows hold, or a multiple of it."""
        return PANEL_ROWS if self.method.prepared and len(self.shape) == 2 else 1

    @property
    def is_delta(self) -> bool:
        return self.method.uses_base

    @property
    def num_models(self) -> int:
        return len(self.dtypes) - self.is_delta

    @property
    def num_sources(self) -> int:
        """How many tensors are read block by block."""
        return len(self.dtypes) + len(self.auxiliary)

    @property
    def prepared_bytes(self) -> int:
        """The memory for what is made of whole auxiliary tensors, and to make it."""
        return sum(
            8 * math.prod(one.shape(self.shape)) * one.workspace(self.num_models)
            for one in self.method.prepared.values()
        )

    @property
    def held_bytes(self) -> int:
        """The memory for what statistics keep until the tensor is merged, where kernels measure."""
        size = math.prod(self.shape)
        needs = [need for need in self.method.needs.values() if hasattr(need, "held_bytes")]
        return sum(need.held_bytes(self.num_models, size, self.parameters) for need in needs)

    @property
    def num_ranks(self) -> dict[bool, int]:
        """How many ranks statistics look for in the tensor (False), and in the model (True)."""
        found = {False: 0, True: 0}
        for need in self.method.needs.values():
            if hasattr(need, "num_ranks"):
                of_model = scope_of(need, self.parameters) == "model"
                found[of_model] += need.num_ranks(self.num_models, self.parameters)
        return found

    def fits_kernels(self, names: Container[str]) -> bool:
        """Tell whether a backend with kernels of these names supports this merge and its dtypes."""
        fits = kernel_fits(self.method, (*self.dtypes, self.out_dtype), self.compute_dtype, names)
        return fits and not self.modifiers


def kernel_fits(
    method: MergeMethod, dtypes: Iterable[DType], compute_dtype: str, names: Container[str]
) -> bool:
    """Tell whether a backend with kernels of these names has a method's for dtypes."""
    return (
        method.kernel is not None
        and method.kernel.name in names
        and compute_dtype == "float32"
        and all(dtype.name in CODES for dtype in dtypes)
    )
