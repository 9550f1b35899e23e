"""PCB: models compete for each element, and those that lose are dropped.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval

from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.statistics.competition import Competition, scores

if TYPE_CHECKING:
    from torch import Tensor


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    vectors = (*needs["limits"], parameters["weight"])
    return KernelCall("pcb", scalars=(parameters["lambda"],), vectors=vectors)


@merge_method(
    space="delta",
    needs={"limits": Competition(scope_parameter="trim")},
    paper="arXiv 2410.02396",
    kernel=Kernel("pcb", _kernel),
)
def pcb(
    deltas_ME: Tensor,
    *,
    limits: Tensor,
    density: Annotated[float, Interval(gt=0, le=1)] = 0.1,
    trim: Literal["tensor", "model"] = "model",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """PCB: weigh each model's elements by their size and by their agreement with the others.

    aᵢ = |ΔWᵢ|, no less than its 0.01% quantile and no more than its 99.99% quantile;
    xᵢ = (aᵢ − min aᵢ)/(max aᵢ − min aᵢ); bᵢ = exp(N xᵢ²) · tanh(ΔWᵢ Σⱼ ΔWⱼ);
    cᵢ goes from 0 to 1 as bᵢ goes from the least of its `density` largest to its largest;
    W* = W + λ Σ wᵢcᵢ aᵢ sign(ΔWᵢ) / Σ cᵢ.

    Elements for which a model is against the sum (bᵢ ≤ 0) are not kept, even where fewer others
    are than `density` says. The published code looks for wᵢ, from 1 or 1.2 on, by an evolution.

    Args:
        deltas_ME: task vectors.
        limits: bounds of magnitudes and of scores, (4, M).
        density: share of the elements that win.
        trim: whether quantiles are those of all merged tensors together, as in the paper, or of
            each tensor.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """
    least_M1, most_M1, low_M1, high_M1 = limits.to(deltas_ME.dtype)[:, :, None]
    scores_ME = scores(deltas_ME, least_M1, most_M1)
    width_M1 = high_M1 - low_M1
    share_ME = ((scores_ME - low_M1) / width_M1.masked_fill(width_M1 <= 0, 1)).clamp(0, 1)
    alone_ME = ((scores_ME >= low_M1) & (scores_ME > 0)).to(share_ME.dtype)
    share_ME = share_ME.where(width_M1 > 0, alone_ME)
    clamped_ME = deltas_ME.sign() * deltas_ME.abs().clamp(least_M1, most_M1)
    clamped_ME.masked_fill_(~deltas_ME.isfinite(), math.nan)  # clamping hides infinities
    total_E = share_ME.sum(0).clamp(min=1e-12)
    merged_E: Tensor = (clamped_ME * share_ME * weight[:, None]).sum(0) / total_E * lambda_
    return merged_E
