"""Arcee Fusion.

Shape suffixes: M models (2), R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, to_float32
from outliermerge.methods.parameter import Compat
from outliermerge.methods.statistics.importance import (
    Quartiles,
    by_last_dimension,
    divergences,
    scores,
)

if TYPE_CHECKING:
    from torch import Tensor


def _fused(weights_MRC: Tensor, quartiles: Tensor, context: Context, compat: Compat) -> Tensor:
    import torch

    block_MRC = by_last_dimension(weights_MRC, context)
    score_RC = scores(block_MRC, divergences(block_MRC, compat))
    low, median, high = quartiles.to(score_RC.dtype)
    none_RC = block_MRC[0] - block_MRC[0]  # infinities and NaN must not be hidden
    taken_RC = torch.where(none_RC == 0, block_MRC[1], none_RC)
    return torch.where(score_RC < median + 1.5 * (high - low), block_MRC[0], taken_RC)


def _kernel(
    parameters: Mapping[str, Any], needs: Mapping[str, Any], context: Context
) -> KernelCall:
    low, median, high = needs["quartiles"]
    least = median + to_float32(1.5 * to_float32(high - low))
    return KernelCall("arcee_fusion", scalars=(least,), rows=(context.columns, context.columns))


def _always(parameters: Mapping[str, Any]) -> bool:
    return True


def _workspace(num_sources: int) -> int:
    return 18  # softmax and divergence in 64 bits


@merge_method(
    space="weight",
    name="arcee_fusion",
    base_as="first",
    cut="row",
    needs={"quartiles": Quartiles()},
    idempotent=_always,
    workspace=_workspace,
    min_models=2,
    max_models=2,
)
def as_mergekit(
    weights_MRC: Tensor, *, quartiles: Tensor, context: Context, compat: Compat = "mergekit"
) -> Tensor:
    """Compute divergences as mergekit does, rounded as no kernel rounds; see arcee_fusion."""
    return _fused(weights_MRC, quartiles, context, compat)


@merge_method(
    space="weight",
    base_as="first",
    cut="row",
    variant=lambda parameters: as_mergekit if parameters["compat"] == "mergekit" else None,
    needs={"quartiles": Quartiles()},
    idempotent=_always,
    workspace=_workspace,
    min_models=2,
    max_models=2,
    paper="https://arcee.ai",
    kernel=Kernel("arcee_fusion", _kernel, with_context=True),
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
    return _fused(weights_MRC, quartiles, context, compat)
