"""Model Stock.

Shape suffixes: M models, R rows, C columns, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from outliermerge.methods.averaging import weighted_sum
from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.parameter import Compat
from outliermerge.methods.spherical import Products, are_finite, lengths_of, summed
from outliermerge.methods.statistics.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor

_SINGULAR = 1e-6
_CLAMPED = 1e-6  # the least product of norms that mergekit divides by


def _weights(gram: Products, compat: str) -> list[float]:
    num_models, lengths = len(gram), lengths_of(gram)
    if not are_finite(gram):
        return [1 / num_models] * num_models
    least = _CLAMPED if compat == "mergekit" else 0.0
    cosines = []
    for i, j in combinations(range(num_models), 2):
        product = max(lengths[i] * lengths[j], least)
        cosines.append(min(1.0, max(-1.0, gram[i][j] / product)) if product else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    divisor = 1 + (num_models - 1) * cosine
    return [0.0 if abs(divisor) < _SINGULAR else cosine / divisor] * num_models


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    return weighted_sum(_weights(needs["gram"], parameters["compat"]))


def _row_kernel(
    parameters: Mapping[str, Any], needs: Mapping[str, Any], context: Context
) -> KernelCall:
    clamps = float(parameters["compat"] == "mergekit")
    return KernelCall(
        "model_stock_rows", scalars=(clamps,), rows=(context.columns, context.columns)
    )


@merge_method(
    space="delta",
    name="model_stock",
    cut="row",
    min_models=2,
    kernel=Kernel("model_stock_rows", _row_kernel, with_context=True),
)
def by_filters(deltas_MRC: Tensor, *, context: Context, compat: Compat = "none") -> Tensor:
    """Merge every row of the last dimension by its own angles; see model_stock."""
    num_models = len(deltas_MRC)
    deltas_MRC = deltas_MRC.reshape(num_models, -1, context.columns)
    wide_MRC = deltas_MRC.double()
    length_MR = wide_MRC.square().sum(2).sqrt()
    least = _CLAMPED if compat == "mergekit" else 0.0
    cosine_R = length_MR.new_zeros(length_MR.shape[1])
    pairs = list(combinations(range(num_models), 2))
    for i, j in pairs:
        product_R = (length_MR[i] * length_MR[j]).clamp(min=least)
        product_R = product_R.masked_fill(product_R == 0, 1)  # no direction: a cosine of 0
        cosine_R += ((wide_MRC[i] * wide_MRC[j]).sum(1) / product_R).clamp(-1, 1)
    cosine_R /= len(pairs)
    divisor_R = 1 + (num_models - 1) * cosine_R
    is_singular_R = divisor_R.abs() < _SINGULAR
    weight_R = (cosine_R / divisor_R.masked_fill(is_singular_R, 1)).masked_fill(is_singular_R, 0)
    weight_R = weight_R.where(cosine_R.isfinite(), 1 / num_models)
    return deltas_MRC.sum(0) * weight_R[:, None].to(deltas_MRC.dtype)


@merge_method(
    space="delta",
    variant=lambda parameters: by_filters if parameters["filter_wise"] else None,
    needs={"gram": Gram()},
    min_models=2,
    paper="arXiv 2403.19522",
    kernel=Kernel("weighted_sum", _kernel),
)
def model_stock(
    deltas_ME: Tensor, *, gram: Tensor, filter_wise: bool = False, compat: Compat = "none"
) -> Tensor:
    """Model Stock: the mean of the models, drawn to the base by how much they differ from it.

    c = mean of cos(ΔWᵢ, ΔWⱼ) over pairs; t = Nc / (1 + (N − 1)c); W* = W + t · ΣΔWᵢ / N;
    W* = W where |1 + (N − 1)c| < 1e-6.

    t is as published: below 0 where task vectors point away from each other on average. The cosine
    with a task vector of zeros is 0. mergekit divides by a product of norms of at least 1e-6, so
    that task vectors shorter than some 0.001, such as those of small norms and biases, are drawn
    to the base whatever their angle.

    Args:
        deltas_ME: task vectors.
        gram: their inner products, (M, M).
        filter_wise: take every row of the last dimension as a vector of its own.
        compat: `mergekit` divides as mergekit does.
    """
    return summed(deltas_ME, _weights(gram.tolist(), compat))
