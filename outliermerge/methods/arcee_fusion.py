"""Arcee Fusion.

Shape suffixes: M models (2), R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.parameter import Compat
from outliermerge.methods.statistics.importance import (
    Quartiles,
    by_last_dimension,
    divergences,
    scores,
)

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    space="weight",
    base_as="first",
    cut="row",
    needs={"quartiles": Quartiles()},
    idempotent=lambda parameters: True,
    workspace=lambda num_sources: 18,  # softmax and divergence in 64 bits
    min_models=2,
    max_models=2,
    paper="https://arcee.ai",
)
def arcee_fusion(
    weights_MRC: Tensor, *, quartiles: Tensor, context: Context, compat: Compat = "none"
) -> Tensor:
    """Take the most important changes of one model into the base, whole.

    sᵢ = |W₁ᵢ − Wᵢ| · KL(softmax W₁ ‖ softmax W), softmax along the last dimension, 1e-8 added to
    both; W* = W₁ where s ≥ median + 1.5 (Q₃ − Q₁) of the tensor's s, else W.

    The quartiles are exact elements of s, at q(n − 1) rounded down; mergekit draws a million of a
    larger tensor's at random. The divergence is computed in float64: in float32, as in mergekit,
    that of a usual task vector is smaller than its rounding error and can be below 0.

    Args:
        weights_MRC: the base's and the other model's weights.
        quartiles: of the scores, (3,).
        context: where the tensor's shape is from.
        compat: `mergekit` computes the divergence in the merge's own dtype.
    """
    import torch

    block_MRC = by_last_dimension(weights_MRC, context)
    score_RC = scores(block_MRC, divergences(block_MRC, compat))
    low, median, high = quartiles.to(score_RC.dtype)
    # A score that is NaN is of values that are, which must not be hidden.
    return torch.where(score_RC < median + 1.5 * (high - low), block_MRC[0], block_MRC[1])
