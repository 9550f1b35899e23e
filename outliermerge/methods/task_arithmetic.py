"""Task arithmetic, and TIES, which makes task vectors sparse first.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval

from outliermerge.methods.averaging import normalized, sum_of, weighted_sum
from outliermerge.methods.consensus import combined, returns_equal_models
from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, next_below, products, to_float32
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.sparsify import trimmed
from outliermerge.methods.statistics.trim import Trim

if TYPE_CHECKING:
    from torch import Tensor


def _sum_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    weights, lambda_ = parameters["weight"], to_float32(parameters["lambda"])
    if parameters["normalize"] and abs(sum_of(weights)) >= 1e-8:
        weights = normalized(weights)
    return weighted_sum([to_float32(weight) * lambda_ for weight in weights])


def _ties_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    thresholds, scales = needs["limits"]
    largest_dropped = [next_below(threshold) for threshold in thresholds]
    return KernelCall(
        "ties",
        scalars=(parameters["lambda"], float(parameters["normalize"])),
        vectors=(parameters["weight"], largest_dropped, products(parameters["weight"], scales)),
    )


@merge_method(
    space="delta",
    idempotent=returns_equal_models,
    paper="arXiv 2212.04089",
    kernel=Kernel("weighted_sum", _sum_kernel),
)
def task_arithmetic(
    deltas_ME: Tensor,
    *,
    weight: PerModel = 1.0,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Weighted sum of task vectors.

    W* = W + λ Σ wᵢΔWᵢ, the sum divided by Σ wᵢ if `normalize` (unless |Σ wᵢ| < 1e-8).

    Args:
        deltas_ME: task vectors.
        weight: wᵢ.
        normalize: divide by Σ wᵢ.
        lambda_: λ, scales the sum of task vectors.
    """
    total = weight.sum()
    if normalize and total.abs() >= 1e-8:
        weight = weight / total
    merged_E: Tensor = (deltas_ME * (weight * lambda_)[:, None]).sum(0)
    return merged_E


@merge_method(
    space="delta",
    needs={"limits": Trim(scope_parameter="trim")},
    idempotent=returns_equal_models,
    paper="arXiv 2306.01708",
    kernel=Kernel("ties", _ties_kernel),
)
def ties(
    deltas_ME: Tensor,
    *,
    limits: Tensor,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    trim: Literal["tensor", "model"] = "tensor",
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """TIES: trim small elements, elect a sign, merge the elements that agree with it.

    mᵢ = wᵢ · trim(ΔWᵢ); s = +1 where Σ mᵢ ≥ 0, else −1;
    W* = W + λ Σ{mᵢ : sign mᵢ = s}, divided by Σ{wᵢ : sign mᵢ = s} if `normalize`.

    trim keeps the k = max(1, int(density·n)) largest magnitudes of n elements. The
    k-th is found exactly, and every element tied with it is kept: in bfloat16 many are, so
    somewhat more than k can stay (mergekit keeps k, an arbitrary choice among equals).

    Args:
        deltas_ME: task vectors.
        limits: magnitude thresholds and rescaling factors, (2, M).
        weight: wᵢ.
        density: share of elements kept; 0 keeps none.
        trim: whether the largest are kept of each tensor, as in mergekit, or of all tensors that
            are merged together, as in the paper.
        normalize: divide by the weights of the elements kept.
        rescale: bring the trimmed task vector back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    threshold_M, scale_M = limits.to(deltas_ME.dtype)
    kept_ME = trimmed(deltas_ME, threshold_M)
    return combined(kept_ME, weight, scale_M, consensus="sum", normalize=normalize, lambda_=lambda_)
