"""Singular value calibration: directions that several task vectors share are not counted twice.

Shape suffixes: M models, R rows, C columns, E elements, K = min(R, C).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.matrices import decomposed, is_matrix, matrix_workspace

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-12  # of the squared response that is divided by, as in FusionBench


@merge_method(space="merged")
def unchanged(delta_E: Tensor) -> Tensor:
    """Return the merged task vector as it is."""
    return delta_E


def _unless_matrix(context: Context) -> MergeMethod | None:
    return None if is_matrix(context) else unchanged


@merge_method(
    space="merged",
    cut="tensor",
    for_tensor=_unless_matrix,
    workspace=matrix_workspace,
    paper="arXiv 2602.05536",
)
def svc(delta: Tensor, *, deltas: Tensor, alpha: Annotated[float, Gt(0)] = 1.0) -> Tensor:
    """SVC: scale each singular direction of a merged task vector down by how often it is counted.

    ΔW = Σ sᵣuᵣvᵣᵀ; aᵣⁱ = uᵣᵀΔWᵢ; pᵣⁱ = sᵣ vᵣᵀaᵣⁱ / ‖aᵣⁱ‖²; γᵣ = N / Σᵢ max(α, pᵣⁱ);
    ΔW ↦ Σ γᵣsᵣuᵣvᵣᵀ. Tensors that are no matrices stay as they are.

    It follows any method on task vectors. Task vectors are taken without their weights. FusionBench
    takes an α of 0.1 after the mean, task arithmetic and TIES, and of 1 after TSV-M and WUDI.

    Args:
        delta: the merged task vector.
        deltas: the task vectors, (M, …).
        alpha: α, the least count: below 1, directions that are counted less than once grow.
    """
    import torch

    def calibrated(delta_RC: Tensor, deltas_MRC: Tensor) -> Tensor:
        left_RK, values_K, right_KC = decomposed(delta_RC.double())
        counts_K = torch.zeros_like(values_K)
        for own_RC in deltas_MRC:
            response_KC = left_RK.mT @ own_RC.double()
            along_K = values_K * (right_KC * response_KC).sum(1)
            counts_K += (along_K / response_KC.square().sum(1).clamp(min=_LEAST)).clamp(min=alpha)
        scale_K = values_K * (len(deltas_MRC) / counts_K)
        merged_RC: Tensor = (left_RK * scale_K) @ right_KC
        return merged_RC.to(delta.dtype)

    if delta.ndim == 2:
        return calibrated(delta, deltas)
    return torch.stack([calibrated(*each) for each in zip(delta, deltas.unbind(1), strict=True)])
