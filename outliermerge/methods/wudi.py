"""WUDI: the merged task vector that disturbs each model's inputs least, by steps or solved.

WUDI's loss is Σ ‖(τ − τᵢ)τᵢᵀ‖² / ‖τᵢ‖², and its gradient 2(τC − D) with C = Σ τᵢᵀτᵢ/‖τᵢ‖² and
D = Σ τᵢτᵢᵀτᵢ/‖τᵢ‖². SWUDI and ASWUDI solve τC = D along some eigenvectors of C, from Σ τᵢ.

Shape suffixes: M models, R rows, C columns (inputs), L eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Ge, Interval

from outliermerge.methods.contract import merge_method
from outliermerge.methods.matrices import eigenvectors, of_each, unless_matrix
from outliermerge.methods.parameter import MOST_STEPS, PerModel

if TYPE_CHECKING:
    from torch import Tensor

Start: TypeAlias = Literal["sum", "mean", "zero"]
Rank: TypeAlias = Literal["participation", "gavish_donoho"]

_LEAST = 1e-8  # the least eigenvalue that is divided by, as in the published code
_SMALL = 1e-12  # of ‖τᵢ‖²: below, all is averaged
_BETAS, _ADAM_EPSILON = (0.9, 0.999), 1e-8


def _workspace(num_sources: int) -> int:
    # Measured at most 57 for 6 models. C has at most as many elements as all models together.
    return 12 * num_sources + 10


def _solved(
    deltas_MRC: Tensor, weight_M: Tensor, start: str, filtered: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Return θ − θF + DG, where θ is the start and F and G are functions of C.

    Args:
        deltas_MRC: task vectors.
        weight_M: what they are multiplied by.
        start: θ: their sum, their mean or 0.
        filtered: returns f(λ) of the largest eigenvalues, for eigenvalues λ (L,) in descending
            order and the number of rows. F has f(λ) for eigenvalues, and G has f(λ)/λ.
    """
    import torch

    wide_MRC, unit_MRC = _units(deltas_MRC, weight_M)
    if unit_MRC is None:
        return wide_MRC.mean(0)
    num_rows, num_columns = wide_MRC.shape[1:]
    stacked_RC = unit_MRC.flatten(0, 1)
    if len(stacked_RC) < num_columns:  # C has the eigenvalues of this smaller matrix, and zeros
        values_L, vectors_RL = eigenvectors(stacked_RC @ stacked_RC.mT)
        vectors_CL = stacked_RC.mT @ vectors_RL
        values_L = vectors_CL.square().sum(0)
        is_zero_L = values_L <= values_L.amax() * num_columns * 2.0**-52
        vectors_CL = (vectors_CL / values_L.masked_fill(is_zero_L, 1).sqrt()).masked_fill(
            is_zero_L, 0
        )
        zeros = values_L.new_zeros(num_columns - len(values_L))
        values_L = torch.cat([values_L.flip(0), zeros])
    else:
        values_L, vectors_CL = eigenvectors(stacked_RC.mT @ stacked_RC)
        values_L = values_L.flip(0)
    values_L = values_L.clamp(min=_LEAST)
    filter_L = filtered(values_L, num_rows)[: vectors_CL.shape[1]]
    vectors_CL = vectors_CL.flip(1)[:, : len(filter_L)]
    moved_RL = -filter_L * (_start(wide_MRC, start) @ vectors_CL)
    for unit_RC, delta_RC in zip(unit_MRC, wide_MRC, strict=True):
        # D's rows along the eigenvectors, without a matrix of the size of C for each model
        along_RL = unit_RC @ (unit_RC.mT @ (delta_RC @ vectors_CL))
        moved_RL += along_RL * (filter_L / values_L[: len(filter_L)])
    merged_RC: Tensor = _start(wide_MRC, start) + moved_RL @ vectors_CL.mT
    return merged_RC


def _iterated(
    deltas_MRC: Tensor, weight_M: Tensor, start: str, iterations: int, rate: float
) -> Tensor:
    """Return what steps of Adam make of the start: in the compute dtype, from C and D in float64.

    C and D are doubled, and the correction of the squares is put into the step and its ε, so that
    a step passes over the matrix less often.
    """
    import torch

    wide_MRC, unit_MRC = _units(deltas_MRC, weight_M)
    if unit_MRC is None:
        return wide_MRC.mean(0)
    dtype = deltas_MRC.dtype
    stacked_NC = unit_MRC.flatten(0, 1)
    # What the steps are multiplied by, one after the other: a factor of C if that is smaller.
    is_wide = stacked_NC.shape[0] < stacked_NC.shape[1]
    factors = [stacked_NC.mT, stacked_NC * 2] if is_wide else [(stacked_NC.mT @ stacked_NC) * 2]
    *first, last = [factor.to(dtype) for factor in factors]
    wanted_RC = sum(
        (delta_RC @ unit_RC.mT) @ unit_RC
        for delta_RC, unit_RC in zip(wide_MRC, unit_MRC, strict=True)
    )
    wanted_RC = wanted_RC.mul_(2).to(dtype)
    x_RC = _start(wide_MRC, start).to(dtype, copy=True)
    del wide_MRC, unit_MRC, stacked_NC, factors
    mean_RC, square_RC = x_RC.new_zeros(x_RC.shape), x_RC.new_zeros(x_RC.shape)
    slope_RC = torch.empty_like(x_RC)
    for step in range(1, iterations + 1):
        torch.mm(x_RC @ first[0] if first else x_RC, last, out=slope_RC)
        slope_RC -= wanted_RC
        mean_RC.lerp_(slope_RC, 1 - _BETAS[0])
        square_RC.mul_(_BETAS[1]).addcmul_(slope_RC, slope_RC, value=1 - _BETAS[1])
        correction = math.sqrt(1 - _BETAS[1] ** step)
        size_RC = torch.sqrt(square_RC, out=slope_RC).add_(_ADAM_EPSILON * correction)
        x_RC.addcdiv_(mean_RC, size_RC, value=-rate * correction / (1 - _BETAS[0] ** step))
    return x_RC


def _units(deltas_MRC: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return τᵢ and τᵢ/‖τᵢ‖ in float64; no second where all are next to nothing."""
    wide_MRC = deltas_MRC.double() * weight_M.double()[:, None, None]
    norm_M = wide_MRC.square().sum((1, 2))
    if not bool((norm_M >= _SMALL).any()):
        return wide_MRC, None
    return wide_MRC, wide_MRC / norm_M.clamp(min=_SMALL).sqrt()[:, None, None]


def _start(wide_MRC: Tensor, start: str) -> Tensor:
    if start == "zero":
        return wide_MRC.new_zeros(wide_MRC.shape[1:])
    return wide_MRC.sum(0) if start == "sum" else wide_MRC.mean(0)


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=_workspace,
    paper="arXiv 2503.08099",
)
def wudi(
    deltas: Tensor,
    *,
    iterations: Annotated[int, Interval(ge=0, le=MOST_STEPS)] = 300,
    learning_rate: Annotated[float, Interval(gt=0, le=1)] = 1e-5,
    start: Start = "sum",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """WUDI: reduce interference with the inputs of each model, by steps of Adam.

    τᵢ = wᵢΔWᵢ; τ from θ by Adam on Σ ‖(τ − τᵢ)τᵢᵀ‖² / ‖τᵢ‖²; W* = W + λτ.

    A step moves no element by more than about `learning_rate`, whatever the size of task vectors:
    with 300 steps of 1e-5, by 0.003 at most. Steps are taken in the compute dtype. `swudi` and
    `aswudi` solve the same for some of the inputs' directions, in the time of a few steps. Inputs
    are the last dimension. Tensors that are no matrices are averaged.

    Args:
        deltas: task vectors.
        iterations: how many steps.
        learning_rate: of Adam.
        start: θ: the sum of τᵢ, their mean, or zero.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """
    return of_each(
        deltas, lambda one: _iterated(one, weight, start, iterations, learning_rate) * lambda_
    )


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=_workspace,
    paper="arXiv 2606.07289",
)
def swudi(
    deltas: Tensor,
    *,
    time: Annotated[float, Ge(0)] = 300.0,
    rank_ratio: Annotated[float, Interval(gt=0, le=1)] = 0.65,
    start: Start = "sum",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """SWUDI: reduce interference with the inputs of each model, solved by eigenvectors.

    τᵢ = wᵢΔWᵢ; C = Σ τᵢᵀτᵢ/‖τᵢ‖² = VΛVᵀ; D = Σ τᵢτᵢᵀτᵢ/‖τᵢ‖²; f(λ) = 1 − exp(−time·λ) for the
    largest eigenvalues, 0 for others; W* = W + λ(θ − θV f(Λ)Vᵀ + DV (f(Λ)/Λ)Vᵀ), θ by `start`.

    This is gradient descent on WUDI's loss, followed for that time. Inputs are the last dimension.
    The published code scales the result of `start: sum` by about 1/N for language models, and
    recommends a rank_ratio of 0.85 there. Eigenvalues below 1e-8 count as 1e-8. Tensors that are
    no matrices are averaged.

    Args:
        deltas: task vectors.
        time: how far the descent is followed along each eigenvector.
        rank_ratio: share of the eigenvectors that are used, rounded up.
        start: θ: the sum of τᵢ, their mean, or zero.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """

    def filtered(values_L: Tensor, num_rows: int) -> Tensor:
        num = max(1, math.ceil(round(len(values_L) * rank_ratio, 3)))
        return -(-time * values_L[:num]).expm1()

    return of_each(deltas, lambda one: _solved(one, weight, start, filtered) * lambda_)


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=_workspace,
    paper="arXiv 2606.07289",
)
def aswudi(
    deltas: Tensor,
    *,
    rank: Rank = "participation",
    start: Start = "sum",
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """ASWUDI: as SWUDI, with a number of eigenvectors chosen for each matrix, and solved fully.

    y = √λ over the eigenvalues λ of C; `participation`: ⌈(Σy)²/Σy²⌉ eigenvectors;
    `gavish_donoho`: as many as have y above a multiple of the median that depends on the shape.
    f(λ) = 1 for these, 0 for others; W* = W + λ(θ − θV f(Λ)Vᵀ + DV (f(Λ)/Λ)Vᵀ) as in swudi.

    The published code takes `participation` for CLIP and T5, and `gavish_donoho` for language
    models that were trained whole. Tensors that are no matrices are averaged.

    Args:
        deltas: task vectors.
        rank: how the number of eigenvectors is chosen.
        start: θ: the sum of τᵢ, their mean, or zero.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """

    def filtered(values_L: Tensor, num_rows: int) -> Tensor:
        roots_L = values_L.sqrt()
        if rank == "participation":
            share = float(roots_L.sum() ** 2 / values_L.sum())
            num = math.ceil(share) if math.isfinite(share) else len(values_L)
        else:
            least = _threshold(num_rows, len(values_L)) * float(roots_L.median())
            num = int((roots_L > least).sum())
        return values_L.new_ones(min(max(num, 1), len(values_L)))

    return of_each(deltas, lambda one: _solved(one, weight, start, filtered) * lambda_)


def _threshold(num_rows: int, num_columns: int) -> float:
    """Return the published code's multiple of the median, from Gavish and Donoho's.

    >>> round(_threshold(4096, 4096), 3), round(_threshold(4096, 1024), 3)
    (1.195, 1.95)
    """
    ratio = min(num_rows, num_columns) / max(num_rows, num_columns)
    median = math.sqrt((1 - ratio) ** 2 + ratio) if ratio < 0.9999 else math.sqrt(2 + math.sqrt(3))
    under_root = ratio + 1 + math.sqrt(ratio * ratio + 14 * ratio + 1)
    return math.sqrt(2 * (ratio + 1) + 8 * ratio / under_root) / median
