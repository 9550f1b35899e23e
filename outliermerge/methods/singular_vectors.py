"""Task singular vectors: the first directions of each task vector, made orthogonal to one another.

Shape suffixes: M models, R rows, C columns, L singular vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliermerge.methods.contract import merge_method
from outliermerge.methods.matrices import (
    decomposed,
    matrix_workspace,
    of_each,
    orthogonal_rows,
    unless_matrix,
)
from outliermerge.methods.parameter import PerModel

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=matrix_workspace,
    paper="arXiv 2412.00081",
)
def tsv_m(
    deltas: Tensor, *, randomized: bool = False, weight: PerModel = 1.0, lambda_: float = 1.0
) -> Tensor:
    """TSV-M: keep the first singular vectors of each task vector, without what they share.

    Uᵢ, Sᵢ, Vᵢ: the first ⌊K/N⌋ singular vectors and values of wᵢΔWᵢ, K the shorter side; U, V: all
    of them side by side, made orthogonal; W* = W + λ · U diag(S) Vᵀ; tensors that are no matrices,
    and matrices whose shorter side is below the number of models, are averaged.

    Args:
        deltas: task vectors.
        randomized: find singular vectors from a random start where ⌊K/N⌋ + 10 ≤ K/4, so with five
            models or more: faster, and the last ones are less exact.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """
    import torch

    def merged(deltas_MRC: Tensor) -> Tensor:
        each = min(deltas_MRC.shape[1:]) // len(deltas_MRC)
        if each == 0:
            mean_RC: Tensor = (deltas_MRC * weight[:, None, None]).mean(0) * lambda_
            return mean_RC
        found = [
            decomposed(delta_RC.double() * own, each, randomized=randomized)
            for delta_RC, own in zip(deltas_MRC, weight, strict=True)
        ]
        lefts, values, rights = zip(*found, strict=True)
        right_LC = orthogonal_rows(rights) * (torch.cat(values) * lambda_)[:, None]
        left_RL = orthogonal_rows([left_RL.mT for left_RL in lefts]).mT
        return left_RL.to(deltas.dtype) @ right_LC.to(deltas.dtype)

    return of_each(deltas, merged)
