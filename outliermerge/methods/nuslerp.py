"""NuSLERP: spherical interpolation of two models, or of their task vectors.

Shape suffixes: M models (2), R rows, C columns, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.methods.averaging import weighted_sum
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, to_float32
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.spherical import (
    Products,
    are_finite,
    lengths_of,
    pair_weights,
    summed,
)
from outliermerge.methods.statistics.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_LENGTH = 1e-7  # shorter vectors are taken as this long
_LEAST_SINE = 1e-6  # of vectors that are not parallel: below it float32 weights cancel out


def _way(weights: Sequence[float]) -> float:
    """Return how far the second model is gone to.

    >>> _way([1.0, 3.0]), _way([1.0, -1.0])
    (0.75, 0.5)
    """
    total = math.fsum(weights)
    return 0.5 if abs(total) < 1e-6 else weights[1] / total


def _weights(gram: Products, weights: Sequence[float]) -> list[float]:
    t = _way(weights)
    first, second = (max(length, _LEAST_LENGTH) for length in lengths_of(gram))
    cosine = gram[0][1] / (first * second)
    if not are_finite(gram) or 1 - cosine * cosine <= _LEAST_SINE**2:
        return [1 - t, t]
    return pair_weights(math.acos(cosine), t)


def _along(block_MRC: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Interpolate every vector along a dimension for itself."""
    t = _way(weight.tolist())
    first, second = block_MRC.double()
    lengths = [
        x.square().sum(dim, keepdim=True).sqrt().clamp(min=_LEAST_LENGTH) for x in (first, second)
    ]
    cosine = (first * second).sum(dim, keepdim=True) / (lengths[0] * lengths[1])
    parallel = ~(1 - cosine.square() > _LEAST_SINE**2)
    angle = cosine.masked_fill(parallel, 0).acos()
    for_first = (((1 - t) * angle).sin() / angle.sin()).masked_fill(parallel, 1 - t)
    for_second = ((t * angle).sin() / angle.sin()).masked_fill(parallel, t)
    dtype = block_MRC.dtype
    merged_RC: Tensor = block_MRC[0] * for_first.to(dtype) + block_MRC[1] * for_second.to(dtype)
    return merged_RC


def _along_rows(block_MRC: Tensor, weight: Tensor, context: Context) -> Tensor:
    return _along(block_MRC.reshape(len(block_MRC), -1, context.columns), weight, -1)


def _along_columns(block: Tensor, weight: Tensor) -> Tensor:
    rows = block.shape[1] if block.ndim > 1 else 1
    return _along(block.reshape(len(block), rows, block[0].numel() // max(1, rows)), weight, 0)


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    weights = [to_float32(weight) for weight in parameters["weight"]]
    return weighted_sum(_weights(needs["gram"], weights))


def _row_kernel(
    parameters: Mapping[str, Any], needs: Mapping[str, Any], context: Context
) -> KernelCall:
    row = (context.columns, context.columns)
    return KernelCall("nuslerp_rows", vectors=(parameters["weight"],), rows=row)


_BY_ROWS = Kernel("nuslerp_rows", _row_kernel, with_context=True)


def _always(parameters: Mapping[str, Any]) -> bool:
    return True


# By rows a tensor is cut between them; by columns it is held whole.


@merge_method(
    space="delta",
    name="nuslerp",
    cut="row",
    idempotent=_always,
    min_models=2,
    max_models=2,
    kernel=_BY_ROWS,
)
def by_rows_of_deltas(deltas_MRC: Tensor, *, context: Context, weight: PerModel = 1.0) -> Tensor:
    """Interpolate task vectors along the last dimension; see nuslerp."""
    return _along_rows(deltas_MRC, weight, context)


@merge_method(
    space="weight",
    name="nuslerp",
    cut="row",
    idempotent=_always,
    min_models=2,
    max_models=2,
    kernel=_BY_ROWS,
)
def by_rows(weights_MRC: Tensor, *, context: Context, weight: PerModel = 1.0) -> Tensor:
    """Interpolate weights along the last dimension; see nuslerp."""
    return _along_rows(weights_MRC, weight, context)


@merge_method(
    space="delta", name="nuslerp", cut="tensor", idempotent=_always, min_models=2, max_models=2
)
def by_columns_of_deltas(deltas: Tensor, *, weight: PerModel = 1.0) -> Tensor:
    """Interpolate task vectors along the first dimension; see nuslerp."""
    return _along_columns(deltas, weight)


@merge_method(
    space="weight", name="nuslerp", cut="tensor", idempotent=_always, min_models=2, max_models=2
)
def by_columns(weights: Tensor, *, weight: PerModel = 1.0) -> Tensor:
    """Interpolate weights along the first dimension; see nuslerp."""
    return _along_columns(weights, weight)


def _variant_of_deltas(parameters: Mapping[str, Any]) -> MergeMethod | None:
    if parameters["nuslerp_flatten"]:
        return None
    return by_columns_of_deltas if parameters["nuslerp_row_wise"] else by_rows_of_deltas


def _variant(parameters: Mapping[str, Any]) -> MergeMethod | None:
    if parameters["nuslerp_flatten"]:
        return None
    return by_columns if parameters["nuslerp_row_wise"] else by_rows


@merge_method(
    space="delta",
    name="nuslerp",
    variant=_variant_of_deltas,
    needs={"gram": Gram()},
    min_models=2,
    max_models=2,
    kernel=Kernel("weighted_sum", _kernel),
)
def nuslerp_of_deltas(
    deltas_ME: Tensor,
    *,
    gram: Tensor,
    weight: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Spherical interpolation of two task vectors; see nuslerp."""
    return summed(deltas_ME, _weights(gram.tolist(), weight.tolist()))


@merge_method(
    space="weight",
    with_base=nuslerp_of_deltas,
    variant=_variant,
    needs={"gram": Gram()},
    idempotent=_always,
    min_models=2,
    max_models=2,
    kernel=Kernel("weighted_sum", _kernel),
)
def nuslerp(
    weights_ME: Tensor,
    *,
    gram: Tensor,
    weight: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Spherical interpolation of two models; with a base model, of their task vectors.

    W* = (sin((1 − t)θ) · W₁ + sin(tθ) · W₂) / sin θ, t = w₂ / (w₁ + w₂), or 0.5 if that sum is 0;
    (1 − t)W₁ + tW₂ where sin θ ≤ 1e-6. With a base model ΔWᵢ takes the place of Wᵢ, and W is added.

    Args:
        weights_ME: the two models' weights.
        gram: their inner products, (2, 2).
        weight: wᵢ.
        nuslerp_flatten: take a tensor as one vector, θ of the whole; else the vectors along one of
            its dimensions, each with its own θ.
        nuslerp_row_wise: that dimension is the first; else the last.
    """
    return summed(weights_ME, _weights(gram.tolist(), weight.tolist()))
