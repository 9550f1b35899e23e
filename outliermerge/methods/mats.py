"""MaTS: merges in task parameter subspaces, by conjugate gradients.

Each model has a system whose solution it is; the merge solves the sum of the systems, iterated from
a start, so that what the data do not say stays as it was at the start.

Shape suffixes: M models, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Interval

from outliermerge.methods.averaging import check_weights, unless_measured
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.fisher import refuse_no_squares
from outliermerge.methods.parameter import MOST_STEPS, PerModel
from outliermerge.methods.prepared import Prepared
from outliermerge.methods.regmean import gram_shape, turned_gram_shape, wrong_gram

if TYPE_CHECKING:
    from torch import Tensor

Init: TypeAlias = Literal["mean", "zero"]


def solved(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Return what conjugate gradients give for apply(x) = right, a tensor being one vector.

    They end when the residual is at most `tolerance` times the right side, or in a direction of
    which the system says nothing. `right` and `start` are overwritten, since tensors are large.
    """
    limit = tolerance * float(right.norm())
    limit *= limit  # infinite where it is too large, which ** refuses
    x, residual = start, right.sub_(apply(start))
    direction, size = residual.clone(), _dot(residual, residual)
    for _ in range(iterations):
        if size <= limit:
            break
        applied = apply(direction)
        curvature = _dot(direction, applied)
        if curvature <= 0:
            break
        step = size / curvature
        x.add_(direction, alpha=step)
        residual.sub_(applied, alpha=step)
        before, size = size, _dot(residual, residual)
        direction.mul_(size / before).add_(residual)
    return x


def _dot(left: Tensor, right: Tensor) -> float:
    return float(left.flatten().dot(right.flatten()))


def _start(weights: Tensor, weight_M: Tensor, init: str) -> Tensor:
    if init == "zero":
        return weights.new_zeros(weights.shape[1:], dtype=weight_M.dtype)
    total = weights[0].double() * weight_M[0]
    for one, weight in zip(weights[1:], weight_M[1:], strict=True):
        total += one.double() * weight
    return total.div_(weight_M.sum())


def _for_tensor(context: Context) -> MergeMethod | None:
    return unless_measured(context) or (mats_turned if context.turned else None)


def _merged(
    weights_MRC: Tensor,
    gram: Tensor,
    weight_M: Tensor,
    iterations: int,
    init: str,
    tolerance: float,
) -> Tensor:
    """Return the merge of matrices (M, R, C), or of each expert's (M, E, R, C)."""
    import torch

    if gram.ndim == 4:
        pairs = zip(weights_MRC.unbind(1), gram.unbind(1), strict=True)
        of_each = (_merged(*pair, weight_M, iterations, init, tolerance) for pair in pairs)
        return torch.stack([*of_each])
    wide_MRC = weights_MRC.double()
    right_RC = wide_MRC[0] @ gram[0]
    total_CC = gram[0].clone()
    for wide_RC, gram_CC in zip(wide_MRC[1:], gram[1:], strict=True):
        right_RC += wide_RC @ gram_CC
        total_CC += gram_CC
    return solved(
        lambda x_RC: x_RC @ total_CC,
        right_RC,
        _start(wide_MRC, weight_M.double(), init if total_CC.any() else "mean"),
        iterations=iterations,
        tolerance=tolerance,
    ).to(weights_MRC.dtype)


def _weighted(grams: Iterator[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    import torch

    return torch.stack(
        [gram_CC.double() * own for gram_CC, own in zip(grams, parameters["weight"], strict=True)]
    )


def _weighted_workspace(num_models: int) -> int:
    return 2 * num_models + 2


def _is_from_mean(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["init"] == "mean")


@merge_method(
    space="weight",
    cut="tensor",
    prepared={"gram": Prepared(gram_shape, _weighted, _weighted_workspace, wrong_gram)},
    for_tensor=_for_tensor,
    workspace=lambda num_sources: 2 * num_sources + 14,
    idempotent=_is_from_mean,
    check=check_weights,
    in_float64=True,
    paper="arXiv 2312.04339",
)
def mats(
    weights_MRC: Tensor,
    *,
    gram: Tensor,
    iterations: Annotated[int, Interval(ge=1, le=MOST_STEPS)] = 100,
    init: Init = "mean",
    tolerance: Annotated[float, Ge(0)] = 1e-5,
    weight: Annotated[PerModel, Ge(0)] = 1.0,
) -> Tensor:
    """MaTS with Gram matrices: RegMean's system, iterated from the mean.

    W* = (Σ wᵢWᵢGᵢ)(Σ wᵢGᵢ)⁻¹ by conjugate gradients, in float64; the matrix is one vector.

    Few iterations leave the weights near the start where inputs are rare. Gᵢ as in regmean, whole.
    The published code can start from the base model, too, which is not here. What has no Gram
    matrix, or no inputs, is averaged.

    Args:
        weights_MRC: the models' weights.
        gram: the models' Gram matrices.
        iterations: how many at most.
        init: the start: the mean of the models, or zero.
        tolerance: of the residual, relative to the right side, at which the iteration ends.
        weight: wᵢ.
    """
    return _merged(weights_MRC, gram, weight, iterations, init, tolerance)


@merge_method(
    space="weight",
    cut="tensor",
    prepared={"gram": Prepared(turned_gram_shape, _weighted, _weighted_workspace, wrong_gram)},
    workspace=lambda num_sources: 2 * num_sources + 14,
    idempotent=_is_from_mean,
    check=check_weights,
    in_float64=True,
)
def mats_turned(
    weights: Tensor,
    *,
    gram: Tensor,
    iterations: int = 100,
    init: Init = "mean",
    tolerance: float = 1e-5,
    weight: PerModel = 1.0,
) -> Tensor:
    """MaTS of matrices whose rows are the inputs."""
    return _merged(weights.mT, gram, weight, iterations, init, tolerance).mT


@merge_method(
    space="weight",
    cut="tensor",
    auxiliary=("fisher",),
    for_tensor=unless_measured,
    workspace=lambda _: 16,
    idempotent=_is_from_mean,
    check=check_weights,
    in_float64=True,
    paper="arXiv 2312.04339",
)
def mats_fisher(
    weights: Tensor,
    *,
    fisher: Tensor,
    context: Context,
    iterations: Annotated[int, Interval(ge=1, le=MOST_STEPS)] = 100,
    init: Init = "mean",
    tolerance: Annotated[float, Ge(0)] = 1e-5,
    weight: Annotated[PerModel, Ge(0)] = 1.0,
) -> Tensor:
    """MaTS with diagonal Fisher information: Fisher averaging, iterated from the mean.

    W* = Σ wᵢFᵢWᵢ / Σ wᵢFᵢ by conjugate gradients, in float64; a tensor is one vector.

    As `fisher`, but weights of which the data say little stay near the start, the more the fewer
    the iterations. The published code can start from the base model, too, which is not here. What
    was not measured, or has a Fisher information of 0 throughout, is averaged.

    Args:
        weights: the models' weights.
        fisher: Fᵢ of each model.
        context: the tensor's name.
        iterations: how many at most.
        init: the start: the mean of the models, or zero.
        tolerance: of the residual, relative to the right side, at which the iteration ends.
        weight: wᵢ.
    """
    refuse_no_squares(fisher, context)
    wide_M = weight.double()
    total = weights.new_zeros(weights.shape[1:], dtype=wide_M.dtype)
    right = total.clone()
    for one, squares, own in zip(weights, fisher, wide_M, strict=True):
        share = squares.double() * own
        total += share
        right += share.mul_(one)
    return solved(
        lambda x: x * total,
        right,
        _start(weights, wide_M, init if total.any() else "mean"),
        iterations=iterations,
        tolerance=tolerance,
    ).to(weights.dtype)
