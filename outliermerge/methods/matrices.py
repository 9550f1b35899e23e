"""What methods on whole matrices share: which tensors are matrices, and their singular vectors.

A matrix is a tensor of two dimensions, or each of an expert tensor's. Not taken for one are the
rows of tokens (embeddings and heads) and CLIP's text projection. These, vectors and kernels of
convolutions are averaged, as by the published code of these methods.

Shape suffixes: M models, R rows, C columns, K = min(R, C), L singular vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outliermerge import rng
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
_PANELS = 4  # of the rows of a Gram matrix, whose other triangle is not computed
_SMALL_COSINE = 1e-5
_LEAST = 1e-300
_OVERSAMPLING, _ITERATIONS = 10, 3  # of subspace iterations
_MOST_SHARE = 1 / 4  # of the directions, beyond which subspace iterations are hardly faster


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
    tensor and the model whose values these are.

    Args:
        symmetric_KK: the matrix, of which only the lower triangle is read. It is overwritten where
            a value is infinite or NaN.
    """
    import torch

    broken = ~symmetric_KK.isfinite().all()  # no branch, so that many can be done in one call
    values_K, vectors_KK = torch.linalg.eigh(symmetric_KK.masked_fill_(broken, 0))
    return values_K.masked_fill_(broken, math.nan), vectors_KK.masked_fill_(broken, math.nan)


def gram(matrix_RC: Tensor) -> Tensor:
    """Return the Gram matrix of rows (R, R), of which only the lower triangle is whole."""
    import torch

    size = matrix_RC.shape[0]
    step = -(-size // _PANELS)
    panels = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows_PR = matrix_RC[start:stop] @ matrix_RC[:stop].mT
        panels.append(torch.nn.functional.pad(rows_PR, (0, size - stop)))
    return torch.cat(panels)


def decomposed(
    matrix_RC: Tensor,
    num: int | None = None,
    whole: Tensor | None = None,
    *,
    randomized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left singular vectors (R, L), singular values (L,) and right ones (L, C).

    They are those of largest value, in descending order, from the eigenvectors of the Gram matrix
    of the shorter side. The relative error of a direction whose value is s is about ε(s₁/s)², where
    s₁ is the largest value and ε that of float64. What is below s₁√(Kε) cannot be told from 0:
    there the value and the vectors are 0, where LAPACK would return some orthonormal vectors.

    Args:
        matrix_RC: the matrix, in float64.
        num: how many; K by default.
        whole: what the matrix is a remainder of, if it is one: then s₁ is the norm of this, so that
            rounding errors of a remainder of 0 are taken for 0.
        randomized: find them by subspace iterations where they are at most a quarter of K.
            The last are less exact.

    >>> import torch
    >>> left, values, right = decomposed(torch.tensor([[0.0, 3], [4, 0]], dtype=torch.float64))
    >>> values.tolist(), ((left * values) @ right).tolist()
    ([4.0, 3.0], [[0.0, 3.0], [4.0, 0.0]])
    """
    if matrix_RC.shape[0] > matrix_RC.shape[1]:
        right_CL, values_L, left_LR = decomposed(matrix_RC.mT, num, whole, randomized=randomized)
        return left_LR.mT, values_L, right_CL.mT
    if randomized and num is not None and num + _OVERSAMPLING <= len(matrix_RC) * _MOST_SHARE:
        return _leading(matrix_RC, num, whole)
    _, vectors_RK = eigenvectors(gram(matrix_RC))
    return along(vectors_RK, matrix_RC, num, whole)


def along(
    vectors_RK: Tensor, matrix_RC: Tensor, num: int | None = None, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `decomposed` does, given the eigenvectors, in ascending order."""
    size = vectors_RK.shape[1]
    left_RL = vectors_RK[:, size - (size if num is None else num) :].flip(1)
    return _measured(left_RL, left_RL.mT @ matrix_RC, whole)


def _leading(matrix_RC: Tensor, num: int, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return about what `decomposed` does, for a wide matrix A, from a random start.

    Subspace iterations with AAᵀ (Halko, Martinsson, Tropp 2011, arXiv 0909.4061) with 10 vectors
    more than are wanted, the last one in float64; then the best vectors of the subspace. The start
    is the same for all matrices of a shape.

    Where values fall off quickly, or the rank is at most L + 10, the result is as exact as that of
    the Gram matrix. The worst is noise, which has no leading directions: values were up to 10% too
    small, and what all vectors leave of A up to 3% longer than what the true ones leave.
    """
    import torch

    num_rows, num_tried, device = len(matrix_RC), num + _OVERSAMPLING, matrix_RC.device
    start = rng.uniform(0, "singular vectors", 0, num_rows * num_tried, device)
    basis_RT = (start - 0.5).view(num_rows, num_tried).float()
    # Divided by its largest value, so that no square is too large or too small for float32.
    unit_RC = matrix_RC / matrix_RC.abs().amax().clamp(min=_LEAST)
    for tried_RC in (*[unit_RC.float()] * (_ITERATIONS - 1), unit_RC):
        basis_RT = basis_RT.to(tried_RC.dtype)
        basis_RT, _ = torch.linalg.qr(tried_RC @ (tried_RC.mT @ basis_RT))
    projected_TC = basis_RT.mT @ matrix_RC
    _, turned_TT = eigenvectors(gram(projected_TC))
    best_TL = turned_TT[:, _OVERSAMPLING:].flip(1)
    return _measured(basis_RT @ best_TL, best_TL.mT @ projected_TC, whole)


def _measured(
    left_RL: Tensor, right_LC: Tensor, whole: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, and the lengths and directions of their products with the matrix."""
    # More exact than the roots of eigenvalues: the error is some ε of the largest, not √ε.
    values_L = right_LC.norm(dim=1)
    largest = values_L[:1] if whole is None else whole.norm()
    is_zero_L = values_L <= largest * math.sqrt(len(left_RL) * _EPSILON)
    right_LC /= values_L.masked_fill(is_zero_L, 1)[:, None]
    return (
        left_RL.masked_fill(is_zero_L, 0),
        values_L.masked_fill(is_zero_L, 0),
        right_LC.masked_fill_(is_zero_L[:, None], 0),
    )


def orthogonal(matrix_RC: Tensor) -> Tensor:
    """Return the nearest matrix whose singular values are all 1, those of 0 left at 0.

    It is A(AᵀA)^−½, or (AAᵀ)^−½A if it is wide, from one decomposition and one product with A. As
    exact as `decomposed`; what is below s₁√(Nε) is taken for 0, N the longer side.

    Args:
        matrix_RC: the matrix, in float64.

    >>> import torch
    >>> orthogonal(torch.tensor([[0.0, 3], [4, 0]], dtype=torch.float64)).round(decimals=9).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if matrix_RC.shape[0] > matrix_RC.shape[1]:
        return orthogonal(matrix_RC.mT).mT
    return _inverse_root(gram(matrix_RC), max(matrix_RC.shape)) @ matrix_RC


def _inverse_root(gram_KK: Tensor, size: int) -> Tensor:
    """Return G^−½, with 0 along eigenvectors whose value cannot be told from 0.

    Args:
        gram_KK: G, of which only the lower triangle is read.
        size: how many products were added up for a value of G, or K if these are fewer.
    """
    values_K, vectors_KK = eigenvectors(gram_KK)
    is_zero_K = values_K <= values_K[-1:] * (size * _EPSILON)
    roots_K = values_K.masked_fill(is_zero_K, 1).rsqrt().masked_fill(is_zero_K, 0)
    return (vectors_KK * roots_K) @ vectors_KK.mT


def orthogonal_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return what `orthogonal` makes of sets of orthonormal rows, one below the other.

    Args:
        parts: the sets (L, C), of equal shape, in float64; rows may be 0.
    """
    import torch

    if len(parts) == 1:
        return parts[0]
    return _orthogonal_pair(*parts) if len(parts) == 2 else orthogonal(torch.cat([*parts]))


def _orthogonal_pair(first_LC: Tensor, second_LC: Tensor) -> Tensor:
    """Return it for two sets X and Y, from the singular values c of XYᵀ, a matrix of half the size.

    The Gram matrix of all rows has an eigenvalue 1 + c and one 1 − c for each c.
    """
    import torch

    cosines_LL = first_LC @ second_LC.mT
    _, left_LL = eigenvectors(gram(cosines_LL))
    right_LL = left_LL.mT @ cosines_LL  # of length c, because c may be 0
    cosine_L = right_LL.norm(dim=1)
    is_shared_L = 1 - cosine_L <= max(first_LC.shape) * _EPSILON
    differ_L = (1 - cosine_L).masked_fill(is_shared_L, 1).rsqrt().masked_fill(is_shared_L, 0)
    agree_L = (1 + cosine_L).rsqrt()
    is_small_L = cosine_L < _SMALL_COSINE  # there the quotients are those of c = 0
    divisor_L = cosine_L.masked_fill(is_small_L, 1)
    same_L = (agree_L + differ_L) / 2 - 1
    squared_L = (same_L / divisor_L**2).masked_fill(is_small_L, 3 / 8)
    other_L = ((agree_L - differ_L) / 2 / divisor_L).masked_fill(is_small_L, -1 / 2)
    along_X, along_Y = left_LL.mT @ first_LC, right_LL @ second_LC
    moved_X = same_L[:, None] * along_X + other_L[:, None] * along_Y
    moved_Y = squared_L[:, None] * along_Y + other_L[:, None] * along_X
    return torch.cat([first_LC + left_LL @ moved_X, second_LC + right_LL.mT @ moved_Y])


def orthogonal_beside(rows_LC: Tensor, others_NC: Tensor) -> Tensor:
    """Return what `orthogonal` makes of orthonormal rows and, below them, fewer others.

    The Gram matrix of all rows is the identity but along the others and what the orthonormal ones
    have in common with them: so a matrix of twice their number is decomposed.

    Args:
        rows_LC: orthonormal rows, some of which may be 0, in float64.
        others_NC: the others, of any length, in float64.
    """
    import torch

    num = len(others_NC)
    if len(rows_LC) <= num:
        return orthogonal(torch.cat([rows_LC, others_NC]))
    basis_LN, common_NN = torch.linalg.qr(rows_LC @ others_NC.mT)
    unit_NN = torch.eye(num, dtype=rows_LC.dtype, device=rows_LC.device)
    upper = torch.cat([unit_NN, torch.zeros_like(unit_NN)], 1)
    lower = torch.cat([common_NN.mT, gram(others_NC)], 1)
    root = _inverse_root(torch.cat([upper, lower]), max(rows_LC.shape))
    inner_NC = basis_LN.mT @ rows_LC
    moved = root @ torch.cat([inner_NC, others_NC])
    return torch.cat([rows_LC + basis_LN @ (moved[:num] - inner_NC), moved[num:]])


def matrix_workspace(num_sources: int) -> int:
    """Return how many tensors of a matrix's size a method of one decomposition at a time needs.

    Measured with square matrices of float32, which take the most: 23.5 for 2 models, 22 for 6.
    """
    return 26
