"""Consensus of TALL masks: what too few models need of the sum of task vectors is left out.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.parameter import AT_MOST_MODELS, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    scalars = (parameters["consensus"], parameters["lambda"])
    vectors = (parameters["weight"], parameters["tall_mask_lambda"])
    return KernelCall("consensus", scalars=scalars, vectors=vectors)


@merge_method(space="delta", paper="arXiv 2405.07813", kernel=Kernel("consensus", _kernel))
def consensus_ta(
    deltas_ME: Tensor,
    *,
    tall_mask_lambda: Annotated[PerModel, Ge(0)] = 0.4,
    consensus: Annotated[int, Ge(0), AT_MOST_MODELS] = 2,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """Consensus TA: task arithmetic on the elements that enough models have a use for.

    T = Σ wᵢΔWᵢ; mᵢ = 1 where |ΔWᵢ| > μᵢ|T − ΔWᵢ|, else 0; W* = W + λT where Σ mᵢ ≥ consensus.

    mᵢ are the TALL masks. With a consensus of 2, what no model or one alone has a use for is left
    out; with 1, what none has; with 0, nothing. The paper chooses μᵢ of 0.2 to 0.6 for each model
    on its validation data.

    Args:
        deltas_ME: task vectors.
        tall_mask_lambda: μᵢ; the larger, the less a model has a use for.
        consensus: how many models must have a use for an element.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """
    total_E = (deltas_ME * weight[:, None]).sum(0)
    uses_ME = deltas_ME.abs() > (total_E - deltas_ME).abs() * tall_mask_lambda[:, None]
    merged_E: Tensor = total_E * (uses_ME.sum(0) >= consensus) * lambda_
    return merged_E
