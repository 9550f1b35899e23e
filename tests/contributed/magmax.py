"""MagMax: of each element the task vector that moved it most.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliermerge.methods.contract import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    space="delta",
    paper="arXiv 2407.06322",
)
def magmax(deltas_ME: Tensor, *, lambda_: float = 1.0) -> Tensor:
    """MagMax: keep each element's largest change, that of the first model of equals.

    W* = W + λ ΔWₖ with k = argmaxᵢ |ΔWᵢ|, for each element.

    Args:
        deltas_ME: task vectors.
        lambda_: λ, scales the merged task vector.
    """
    merged_E = deltas_ME[0]
    for delta_E in deltas_ME[1:]:
        # NaN, where values that are not finite are let in, is neither passed over nor replaced.
        kept_E = (delta_E.abs() <= merged_E.abs()) | merged_E.isnan()
        merged_E = merged_E.where(kept_E, delta_E)
    return merged_E * lambda_
