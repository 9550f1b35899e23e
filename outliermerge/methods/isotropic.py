"""Isotropic merging: task vectors are summed, and the singular values of the sum made equal.

Shape suffixes: M models, R rows, C columns, K = min(R, C), L singular vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from outliermerge.methods.contract import merge_method
from outliermerge.methods.matrices import (
    along,
    decomposed,
    eigenvectors,
    gram,
    matrix_workspace,
    of_each,
    orthogonal,
    orthogonal_beside,
    orthogonal_rows,
    unless_matrix,
)
from outliermerge.methods.parameter import PerModel

if TYPE_CHECKING:
    from torch import Tensor


def _sum(deltas_MRC: Tensor, weight_M: Tensor) -> Tensor:
    """Return Σ wᵢΔWᵢ in float64, one model after the other."""
    total_RC = deltas_MRC[0].double() * weight_M[0]
    for delta_RC, weight in zip(deltas_MRC[1:], weight_M[1:], strict=True):
        total_RC += delta_RC.double() * weight
    return total_RC


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=matrix_workspace,
    paper="arXiv 2502.04959",
)
def iso_c(deltas: Tensor, *, weight: PerModel = 1.0, lambda_: float = 1.0) -> Tensor:
    """Iso-C: give the sum of task vectors singular values that are all their mean.

    Σ wᵢΔWᵢ = USVᵀ; W* = W + λ · mean(S) · UVᵀ; tensors that are no matrices are averaged.

    A direction of singular value 0 stays 0, and counts in the mean.

    Args:
        deltas: task vectors.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """

    def merged(deltas_MRC: Tensor) -> Tensor:
        total_RC = _sum(deltas_MRC, weight)
        merged_RC = orthogonal(total_RC)
        mean = (merged_RC * total_RC).sum() / min(total_RC.shape)  # of the singular values
        return merged_RC.mul_(mean * lambda_)

    return of_each(deltas, merged)


def _num_common(size: int, num_models: int, fraction: float) -> int:
    """Return how many directions are common, so that the others can be divided among models.

    >>> _num_common(768, 8, 0.8), _num_common(5, 3, 0.5)
    (616, 2)
    """
    left = size - int(size * fraction)
    return size - min(round(left / num_models), size // num_models) * num_models


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=matrix_workspace,
    paper="arXiv 2502.04959",
)
def iso_cts(
    deltas: Tensor,
    *,
    common_space_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.8,
    randomized: bool = False,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """Iso-CTS: as Iso-C, with a part of the directions from each task vector alone.

    U, V: the first k singular vectors of Σ wᵢΔWᵢ, and the first (K − k)/N of each
    wᵢΔWᵢ − UUᵀwᵢΔWᵢ; both made orthogonal; W* = W + λ · mean(S) · UVᵀ; K is the shorter side; k is
    that share of it, moved so that the rest can be divided by N. Tensors that are no matrices are
    averaged.

    Args:
        deltas: task vectors.
        common_space_fraction: share of the directions that are those of the sum.
        randomized: find the directions of each task vector alone from a random start, where they
            are few: faster for matrices with more rows than columns, and the last are less exact.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """
    import torch

    def merged(deltas_MRC: Tensor) -> Tensor:
        num_models, (num_rows, num_columns) = len(deltas_MRC), deltas_MRC.shape[1:]
        size = min(num_rows, num_columns)
        common = _num_common(size, num_models, common_space_fraction)
        each = (size - common) // num_models
        total_RC = _sum(deltas_MRC, weight)
        if num_rows > num_columns:
            left_RL, values_L, right_LC = decomposed(total_RC, common)
        else:
            _, vectors_RR = eigenvectors(gram(total_RC))
            left_RL, values_L, right_LC = along(vectors_RR, total_RC, common)
            # All that is orthogonal to the common ones. Where the sum has fewer directions than
            # these, LAPACK chooses which others are left out.
            rest_RN = vectors_RR[:, : size - common]
        lefts, values, rights = [], [values_L], []
        for delta_RC, own in zip(deltas_MRC if each else (), weight, strict=False):
            wide_RC = delta_RC.double() * own
            if num_rows > num_columns:
                rest_RC = wide_RC - left_RL @ (left_RL.mT @ wide_RC)
                own_RL, own_L, own_LC = decomposed(rest_RC, each, wide_RC, randomized=randomized)
            else:
                own_NL, own_L, own_LC = decomposed(
                    rest_RN.mT @ wide_RC, each, wide_RC, randomized=randomized
                )
                own_RL = rest_RN @ own_NL
            lefts.append(own_RL.mT)
            values.append(own_L)
            rights.append(own_LC)
        if each:
            left_RL = torch.cat([left_RL, orthogonal_rows(lefts).mT], 1)
            right_LC = orthogonal_beside(right_LC, torch.cat(rights))
        mean = torch.cat(values).mean()
        return left_RL.to(deltas.dtype) @ right_LC.mul_(mean * lambda_).to(deltas.dtype)

    return of_each(deltas, merged)
