"""The min-σ rule.

Shape suffixes: M models, R rows, C columns, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge

from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.statistics.base import StandardDeviation
from outliermerge.methods.statistics.deviation import GAUSSIAN, Deviation, MedianDeviation

if TYPE_CHECKING:
    from torch import Tensor

Sigma: TypeAlias = Literal["tensor", "row", "model"]
Scale: TypeAlias = Literal["std", "mad"]
Conflict: TypeAlias = Literal["sum", "elect"]


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


def _threshold(sigma: Tensor, t: float) -> Tensor:
    # σ is NaN if a non-finite value was allowed: then no element is an outlier, and all are
    # averaged.
    return (t * sigma.amin(0)).nan_to_num(nan=math.inf, posinf=math.inf)


def _merged(
    deltas_ME: Tensor, outliers_ME: Tensor, weight_M: Tensor, lambda_: float, *, elects: bool
) -> tuple[Tensor, Tensor]:
    """Return the merged task vector, and each model's number of outliers.

    Args:
        deltas_ME: task vectors.
        outliers_ME: their outliers, and 0 elsewhere.
        weight_M: the models' weights.
        lambda_: what the sum is scaled by.
        elects: whether of outliers with opposite signs only those of one sign stay.
    """
    noise_ME = deltas_ME - outliers_ME
    num_outliers_M = outliers_ME.sign().abs().sum(1).long()  # exact: blocks are below 2²⁴ elements
    if elects:
        sign_E = ((outliers_ME * weight_M[:, None]).sum(0).sign() + 0.5).sign()  # + for a sum of 0
        agreement_ME = outliers_ME * weight_M.sign()[:, None] * sign_E
        outliers_ME = outliers_ME.masked_fill(agreement_ME < 0, 0)
    kept_ME = outliers_ME + noise_ME / len(deltas_ME)
    return (kept_ME * weight_M[:, None]).sum(0) * lambda_, num_outliers_M


def _with_one_threshold(
    deltas_ME: Tensor,
    sigma: Tensor,
    t: float,
    weight: Tensor,
    lambda_: float,
    *,
    elects: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    # Arithmetic instead of boolean masks, because masks take torch's CPU kernels 5 to 15 times
    # longer.
    threshold = _threshold(sigma, t)
    outliers_ME = deltas_ME.hardshrink(float(threshold))  # 0 where |δ| ≤ tσ
    merged_E, num_outliers_M = _merged(deltas_ME, outliers_ME, weight, lambda_, elects=elects)
    return merged_E, {"threshold": threshold, "outliers": num_outliers_M}


@merge_method(
    space="delta",
    name="min_sigma",
    needs={"sigma": MedianDeviation(scope_parameter="sigma")},
    idempotent=_is_one_whole_model,
    kernel=Kernel("min_sigma", _call),
)
def by_median(
    deltas_ME: Tensor,
    *,
    sigma: Tensor,
    t: Annotated[float, Ge(0)] = 2.0,
    sigma_: Sigma = "tensor",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take the median magnitude for σ; see min_sigma."""
    return _with_one_threshold(deltas_ME, sigma, t, weight, lambda_)


@merge_method(
    space="delta",
    name="min_sigma",
    needs={"sigma": Deviation(scope_parameter="sigma")},
    idempotent=_is_one_whole_model,
)
def by_election(
    deltas_ME: Tensor,
    *,
    sigma: Tensor,
    t: Annotated[float, Ge(0)] = 2.0,
    sigma_: Sigma = "tensor",
    scale: Scale = "std",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Elect the sign of outliers; see min_sigma."""
    return _with_one_threshold(deltas_ME, sigma, t, weight, lambda_, elects=True)


@merge_method(space="delta", name="min_sigma", cut="row", idempotent=_is_one_whole_model)
def by_rows(
    deltas_MRC: Tensor,
    *,
    t: Annotated[float, Ge(0)] = 2.0,
    scale: Scale = "std",
    conflict: Conflict = "sum",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Measure σ over every row; see min_sigma."""
    if scale == "mad":
        sigma_MR = GAUSSIAN * deltas_MRC.abs().double().median(2).values
    else:
        sigma_MR = deltas_MRC.double().std(2, correction=0)
    threshold_R1 = _threshold(sigma_MR, t).to(deltas_MRC.dtype)[:, None]
    outliers_MRC = deltas_MRC.where(deltas_MRC.abs() > threshold_R1, 0)
    merged_E, num_outliers_M = _merged(
        deltas_MRC.flatten(1), outliers_MRC.flatten(1), weight, lambda_, elects=conflict == "elect"
    )
    return merged_E, {"outliers": num_outliers_M}


def _variant(parameters: Mapping[str, Any]) -> MergeMethod | None:
    if parameters["sigma"] == "row":
        return by_rows
    if parameters["conflict"] == "elect":
        return by_election
    return by_median if parameters["scale"] == "mad" else None


@merge_method(
    space="delta",
    needs={"sigma": StandardDeviation(scope_parameter="sigma")},
    idempotent=_is_one_whole_model,
    paper="arXiv 2501.10661, Algorithm 2",
    kernel=Kernel("min_sigma", _call),
    variant=_variant,
)
def min_sigma(
    deltas_ME: Tensor,
    *,
    sigma: Tensor,
    t: Annotated[float, Ge(0)] = 2.0,
    sigma_: Sigma = "tensor",
    scale: Scale = "std",
    conflict: Conflict = "sum",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Min-σ: average the noise inside ±tσ, keep the outliers whole.

    σ = minᵢ std(ΔWᵢ); δ ↦ δ/n where |δ| ≤ tσ, else δ; W* = W + λ Σ wᵢΔWᵢ.

    n is the number of task models that have the tensor, of all with `sigma: model`. The paper
    recommends t of 2 or 3. All other parameters are ours, and their defaults are the paper's rule.
    No other value of `sigma`, `scale` or `conflict` was better throughout where we measured, so
    none is recommended.

    Args:
        deltas_ME: task vectors.
        sigma: standard deviation of each task vector.
        t: threshold in units of σ.
        sigma_: what σ is measured over: each tensor, each row (along the first dimension; a vector
            is one row), or all merged tensors of a model together.
        scale: `std`, or `mad` for 1.4826 times the median of |δ|, which outliers move less and
            which is 0 where a model leaves more than half unchanged.
        conflict: what is done with outliers of opposite signs at one element: `sum` adds them;
            `elect` keeps those with the sign of Σ wᵢδᵢ over outliers (+ for 0).
        weight: wᵢ, applied after an element is classified.
        lambda_: λ, scales the sum of task vectors.
    """
    return _with_one_threshold(deltas_ME, sigma, t, weight, lambda_)
