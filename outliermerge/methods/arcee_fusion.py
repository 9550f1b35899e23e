"""Arcee Fusion.

Shape suffixes: R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliermerge.methods.contract import merge_method
from outliermerge.methods.parameter import Compat

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8
_ROWS_ELEMENTS = 1 << 20  # whose divergences are computed at a time, in float64


@merge_method(
    space="weight",
    base_as="first",
    cut="tensor",
    idempotent=lambda parameters: True,
    workspace=lambda num_sources: 6,
    min_models=2,
    max_models=2,
    paper="https://arcee.ai",
)
def arcee_fusion(weights: Tensor, *, compat: Compat = "none") -> Tensor:
    """Take the most important changes of one model into the base, whole.

    sᵢ = |W₁ᵢ − Wᵢ| · KL(softmax W₁ ‖ softmax W), softmax along the last dimension, 1e-8 added to
    both; W* = W₁ where s ≥ median + 1.5 (Q₃ − Q₁) of the tensor's s, else W.

    The quartiles are exact elements of s, at q(n − 1) rounded down; mergekit draws a million of a
    larger tensor's at random. The divergence is computed in float64: in float32, as in mergekit,
    that of a usual task vector is smaller than its rounding error and can be below 0.

    Args:
        weights: the base's and the other model's weights.
        compat: `mergekit` computes the divergence in the merge's own dtype.
    """
    import torch

    base, other = (tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in weights)
    num_elements = base.numel()
    if num_elements == 0:
        return weights[0]
    score_RC = (other - base).abs()
    dtype = score_RC.dtype if compat == "mergekit" else torch.float64
    step = max(1, _ROWS_ELEMENTS // base.shape[1])
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        p_RC, q_RC = (x[rows].to(dtype).softmax(1) + _EPS for x in (other, base))
        divergence_R = (p_RC * (p_RC / q_RC).log()).sum(1, keepdim=True)
        score_RC[rows] *= divergence_R.to(score_RC.dtype)
    scores = score_RC.view(-1)
    low, median, high = (
        scores.kthvalue(quarter * (num_elements - 1) // 4 + 1).values for quarter in (1, 2, 3)
    )
    threshold = median + 1.5 * (high - low)
    return torch.where(score_RC >= threshold, other, base)
