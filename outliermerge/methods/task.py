"""One tensor's merge, whoever computes it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from outliermerge.checkpoint.sources import DType
from outliermerge.methods.context import Context
from outliermerge.methods.contract import COARSEST_FIRST, Cut, MergeMethod
from outliermerge.methods.kernel_call import CODES


@dataclass(frozen=True)
class Task:
    """How one tensor is merged, whoever computes it.

    Attributes:
        parameters: resolved for this tensor, per-model ones as tuples.
        dtypes: as the sources' values are stored.
        out_dtype: as the result is stored.
        compute_dtype: of the arithmetic.
        shape: of the whole tensor.
        context: where it is.
        auxiliary: dtypes of the method's auxiliary tensors, of all models for one after the other.
        modifiers: what is done to the merged task vector, in order, with resolved parameters.
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

    @property
    def cut(self) -> Cut:
        """How finely the tensor may be split: as the coarsest of the method and its modifiers."""
        cuts = {self.method.cut, *(modifier.cut for modifier, _ in self.modifiers)}
        return next(cut for cut in COARSEST_FIRST if cut in cuts)

    @property
    def is_delta(self) -> bool:
        return self.method.uses_base

    @property
    def num_models(self) -> int:
        return len(self.dtypes) - self.is_delta

    def fits_kernels(self, names: Container[str]) -> bool:
        """Tell whether a backend with kernels of these names computes it, by its dtypes too."""
        dtypes = {dtype.name for dtype in (*self.dtypes, self.out_dtype)}
        return (
            self.method.kernel is not None
            and self.method.kernel.name in names
            and not self.modifiers
            and self.compute_dtype == "float32"
            and dtypes <= CODES.keys()
        )
