"""The min-σ rule.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.statistics.base import StandardDeviation

if TYPE_CHECKING:
    from torch import Tensor


def _is_one_whole_model(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["weight"] == (1.0,) and parameters["lambda"] == 1)


def _call(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    sigmas = needs["sigma"]
    undefined = any(math.isnan(sigma) for sigma in sigmas)
    threshold = math.inf if undefined else parameters["t"] * min(sigmas)
    threshold = math.inf if math.isnan(threshold) else threshold
    return KernelCall(
        "min_sigma",
        scalars=(threshold, parameters["lambda"]),
        vectors=(parameters["weight"],),
        report={"threshold": threshold},
        counts="outliers",
    )


@merge_method(
    space="delta",
    needs={"sigma": StandardDeviation()},
    idempotent=_is_one_whole_model,
    paper="arXiv 2501.10661, Algorithm 2",
    kernel=Kernel("min_sigma", _call),
)
def min_sigma(
    deltas_ME: Tensor,
    *,
    sigma: Tensor,
    t: Annotated[float, Ge(0)] = 2.0,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Min-σ: average the noise inside ±tσ, keep the outliers whole.

    σ = minᵢ std(ΔWᵢ); δ ↦ δ/n where |δ| ≤ tσ, else δ; W* = W + λ Σ wᵢΔWᵢ.

    σ is measured over a whole tensor; n is the number of task models that have the tensor. The
    paper recommends t of 2 or 3; `weight` and `lambda` are ours, and their defaults are the paper's
    rule.

    Args:
        deltas_ME: task vectors.
        sigma: standard deviation of each task vector, (M,).
        t: threshold in units of σ.
        weight: wᵢ, applied after an element is classified.
        lambda_: λ, scales the sum of task vectors.
    """
    # Arithmetic instead of boolean masks, because masks take torch's CPU kernels 5 to 15 times
    # longer. σ is NaN if a non-finite value was allowed: then no element is an outlier, and all are
    # averaged.
    threshold = (t * sigma.min()).nan_to_num(nan=math.inf, posinf=math.inf)
    outliers_ME = deltas_ME.hardshrink(float(threshold))  # 0 where |δ| ≤ tσ
    noise_ME = deltas_ME - outliers_ME
    kept_ME = outliers_ME + noise_ME / len(deltas_ME)
    merged_E = (kept_ME * weight[:, None]).sum(0) * lambda_
    num_outliers_M = outliers_ME.sign().abs().sum(1).long()  # exact: blocks are below 2²⁴ elements
    return merged_E, {"threshold": threshold, "outliers": num_outliers_M}
