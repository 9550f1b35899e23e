"""What methods on whole matrices share: which tensors are matrices, and their singular vectors.

A matrix is a tensor of two dimensions, or each of an expert tensor's. Not taken for one are the
rows of tokens (embeddings and heads) and CLIP's text projection. These, vectors and kernels of
convolutions are averaged, as by the published code of these methods.

Shape suffixes: M models, R rows, C columns, K = min(R, C), L singular vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from outliermerge.methods.averaging import weighted_sum
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, to_float32
from outliermerge.methods.parameter import PerModel

if TYPE_CHECKING:
    from torch import Tensor

_OF_TOKENS = re.compile(
    r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings?|token_embedding|embed_in|embed_out|wte"
    r"|shared|lm_head|text_projection)([._]|$)"
)
_EPSILON = 2.0**-52


def is_matrix(context: Context) -> bool:
    """Tell whether a tensor is a matrix, or holds those of experts.

    >>> is_matrix(Context("layers.0.q_proj.weight", (8, 8)))
    True
    >>> is_matrix(Context("lm_head.weight", (100, 8))), is_matrix(Context("conv", (8, 3, 2, 2)))
    (False, False)
    """
    shape = context.shape
    holds_matrices = len(shape) == 2 or (len(shape) == 3 and "expert" in context.name)
    return holds_matrices and min(shape) > 1 and not _OF_TOKENS.search(context.name)


def _mean_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    weights = parameters["weight"]
    share = to_float32(parameters["lambda"] / len(weights))
    return weighted_sum([to_float32(weight) * share for weight in weights])


@merge_method(space="delta", kernel=Kernel("weighted_sum", _mean_kernel))
def averaged(deltas_ME: Tensor, *, weight: PerModel = 1.0, lambda_: float = 1.0) -> Tensor:
    """Average task vectors: W* = W + λ Σ wᵢΔWᵢ / N."""
    merged_E: Tensor = (deltas_ME * (weight * (lambda_ / len(weight)))[:, None]).sum(0)
    return merged_E


def unless_matrix(context: Context) -> MergeMethod | None:
    """Return the method for a tensor that is no matrix; None for a matrix."""
    return None if is_matrix(context) else averaged


def of_each(deltas: Tensor, merged: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the merge of matrices (M, R, C), or of each expert's (M, experts, R, C).

    Args:
        deltas: task vectors.
        merged: merges (M, R, C), in any dtype, to (R, C).
    """
    import torch

    if deltas.ndim == 3:
        return merged(deltas).to(deltas.dtype)
    return torch.stack([merged(each_MRC).to(deltas.dtype) for each_MRC in deltas.unbind(1)])


def eigenvectors(symmetric_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (K,) in ascending order, and eigenvectors (K, K) as columns.

    They are NaN where a value is infinite or NaN, for which LAPACK fails: so a merge can name the
    tensor and the model whose values these are. The matrix is overwritten then.
    """
    import torch

    broken = ~symmetric_KK.isfinite().all()  # no branch, so that many can be done in one call
    values_K, vectors_KK = torch.linalg.eigh(symmetric_KK.masked_fill_(broken, 0))
    return values_K.masked_fill_(broken, math.nan), vectors_KK.masked_fill_(broken, math.nan)


def decomposed(matrix_RC: Tensor, num: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return left singular vectors (R, L), singular values (L,) and right ones (L, C).

    They are those of largest value, in descending order, from the eigenvectors of the Gram matrix
    of the shorter side. The relative error of a direction whose value is s is about ε(s₁/s)², where
    s₁ is the largest value and ε that of float64. What is below s₁√(Kε) cannot be told from 0:
    there the value and the vectors are 0, where LAPACK would return some orthonormal vectors.

    Args:
        matrix_RC: the matrix, in float64.
        num: how many; K by default.

    >>> import torch
    >>> left, values, right = decomposed(torch.tensor([[0.0, 3], [4, 0]], dtype=torch.float64))
    >>> values.tolist(), ((left * values) @ right).tolist()
    ([4.0, 3.0], [[0.0, 3.0], [4.0, 0.0]])
    """
    if matrix_RC.shape[0] > matrix_RC.shape[1]:
        right_CL, values_L, left_LR = decomposed(matrix_RC.mT, num)
        return left_LR.mT, values_L, right_CL.mT
    size = matrix_RC.shape[0]
    _, vectors_RK = eigenvectors(matrix_RC @ matrix_RC.mT)
    left_RL = vectors_RK[:, size - (size if num is None else num) :].flip(1)
    right_LC = left_RL.mT @ matrix_RC
    # More exact than the roots of eigenvalues: the error is some ε of the largest, not √ε.
    values_L = right_LC.norm(dim=1)
    is_zero_L = values_L <= values_L[:1] * math.sqrt(size * _EPSILON)
    right_LC = right_LC / values_L.masked_fill(is_zero_L, 1)[:, None]
    return (
        left_RL.masked_fill(is_zero_L, 0),
        values_L.masked_fill(is_zero_L, 0),
        right_LC.masked_fill(is_zero_L[:, None], 0),
    )


def orthogonal(matrix_RC: Tensor) -> Tensor:
    """Return the nearest matrix whose singular values are all 1, those of 0 left at 0."""
    left_RK, _, right_KC = decomposed(matrix_RC)
    return left_RK @ right_KC


def matrix_workspace(num_sources: int) -> int:
    """Return how many tensors of a matrix's size a method of one decomposition at a time needs.

    Measured with square matrices of float32, which take the most: 30 for 2 models, 29 for 6.
    """
    return 32
