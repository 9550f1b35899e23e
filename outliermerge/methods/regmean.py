"""RegMean: the linear layer whose outputs are nearest to all models' on their own data.

For inputs x of model i, Σᵢ Σₓ ‖(W − Wᵢ)x‖² is least where W Σ Gᵢ = Σ WᵢGᵢ, with Gᵢ = Σ xxᵀ. What is
computed is W − W₁, which solves the same for Wᵢ − W₁: that needs a product less, and rounding
errors are those of the small differences. Of experts that are one tensor, each is a matrix with
Gram matrices of its own.

Shape suffixes: M models, E experts, R rows (outputs), C columns (inputs), P rows of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from outliermerge.methods.averaging import check_weights, unless_measured
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.prepared import PANEL_ROWS, Prepared

if TYPE_CHECKING:
    from torch import Tensor

_FULL = 0.999  # from here on, Gram matrices are taken as they are and may be singular
_SLACK = 1e-3  # of the largest value on the diagonal
_STORED = 2.0**-24  # the rounding of Gram matrices, which are stored as float32


def gram_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the Gram matrices of inputs, which are the weights' last dimension.

    >>> gram_shape((50, 40)), gram_shape((8, 50, 40))
    ((40, 40), (8, 40, 40))
    """
    return (*shape[:-2], shape[-1], shape[-1]) if shape else (0, 0)


def turned_gram_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the Gram matrices of inputs, which are the weights' last but one."""
    return gram_shape((*shape[:-2], *shape[:-3:-1]))


def wrong_gram(grams: Tensor) -> str:
    """Say why matrices cannot be means of xxᵀ; empty if they can.

    A mean of xxᵀ is symmetric, with no value above √(GᵢᵢGⱼⱼ). Rounding errors are allowed, also
    those of matrices that were stored as float16.

    >>> import torch
    >>> wrong_gram(torch.tensor([[1.0, 0.5], [0.5, 4.0]])), wrong_gram(-torch.eye(2))
    ('', 'values below 0 on the diagonal')
    """
    import torch

    for gram_CC in each_of(grams) if grams.numel() else ():
        diagonal_C = gram_CC.diagonal()
        if float(diagonal_C.amin()) < 0:
            return "values below 0 on the diagonal"
        slack = _SLACK * float(diagonal_C.amax())
        diagonal_C = diagonal_C.to(torch.promote_types(diagonal_C.dtype, torch.float32))
        root_C = diagonal_C.sqrt()
        for start in range(0, len(gram_CC), PANEL_ROWS):  # the whole at once is much slower
            rows = slice(start, start + PANEL_ROWS)
            rows_PC = gram_CC[rows].to(root_C.dtype)
            if float((rows_PC - gram_CC[:, rows].mT).abs_().amax()) > slack:
                return "values that are not symmetric"
            if float(rows_PC.abs().addr_(root_C[rows], root_C, alpha=-1).amax()) > slack:
                return "values larger than those on its diagonal allow"
    return ""


def each_of(grams: Tensor) -> tuple[Tensor, ...]:
    """Return the matrix, or that of each expert."""
    return grams.unbind(0) if grams.ndim == 3 else (grams,)


def _reduce(grams: Sequence[Tensor], parameters: Mapping[str, Any]) -> None:
    """Make wᵢGᵢ of Gᵢ, with off-diagonal elements times `reduce`.

    An input that no model ever has gets a 1 in all of them, so that its column is averaged.
    """
    for gram_CC, weight in zip(grams, parameters["weight"], strict=True):
        diagonal_C = gram_CC.diagonal().clone()
        gram_CC *= parameters["reduce"] * weight
        gram_CC.diagonal().copy_(diagonal_C * weight)
    never_C = sum(gram_CC.diagonal() for gram_CC in grams) <= 0
    for gram_CC, weight in zip(grams, parameters["weight"], strict=True):
        gram_CC.diagonal()[never_C] = weight


def _system(grams: Iterator[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    """Return Ĝᵢ of all models but the first, and L with LLᵀ = Σ Ĝᵢ (M, C, C).

    Then W = W₁ + (Σ (Wᵢ − W₁)Ĝᵢ)L⁻ᵀL⁻¹, row by row. Of experts (M, E, C, C). Where the sum is
    singular, Ĝᵢ(Σ Ĝᵢ)⁺ takes the place of Ĝᵢ, and L is the identity.
    """
    import torch

    system = torch.empty(0)
    for number, gram in enumerate(grams):
        if number == 0:
            system = gram.new_empty((len(parameters["weight"]), *gram.shape), dtype=torch.float64)
        system[number - 1] = gram  # the first one's is the last, where L will be
    for *others, first_CC in zip(*map(each_of, system), strict=True):
        _factorize([first_CC, *others], parameters)
    return system


def _factorize(found: Sequence[Tensor], parameters: Mapping[str, Any]) -> None:
    """Turn Gᵢ into Ĝᵢ, or Ĝᵢ(Σ Ĝᵢ)⁺, and the first one then into L.

    The sum is scaled to a diagonal of 1, so that neither its solution nor what is taken for 0
    depends on the units of inputs.
    """
    import torch

    _reduce(found, parameters)
    total_CC = found[0].clone()
    for gram_CC in found[1:]:
        total_CC += gram_CC
    unit_C = total_CC.diagonal().rsqrt()
    total_CC *= unit_C
    total_CC *= unit_C[:, None]
    if parameters["reduce"] < _FULL:
        factor_CC, failed = torch.linalg.cholesky_ex(total_CC)
        if not failed:
            torch.div(factor_CC, unit_C[:, None], out=found[0])
            return
    _solve_singular(found, total_CC, unit_C, parameters["weight"])
    found[0].zero_().diagonal().fill_(1)


def _solve_singular(
    grams: Sequence[Tensor], total_CC: Tensor, unit_C: Tensor, weights: tuple[float, ...]
) -> None:
    """Turn Gᵢ into Gᵢ(Σ Gⱼ)⁺, and into a mean for inputs along which the sum is 0."""
    import torch

    values_C, vectors_CC = torch.linalg.eigh(total_CC)
    kept_C = values_C > values_C[-1] * len(values_C) * _STORED
    inverse_C = torch.where(kept_C, values_C, 1).reciprocal() * kept_C
    inverse_CC = (vectors_CC * inverse_C) @ vectors_CC.mT
    inverse_CC *= unit_C[:, None] * unit_C
    none_CC = (vectors_CC * ~kept_C) @ vectors_CC.mT
    none_CC *= unit_C / unit_C[:, None]
    for gram_CC, weight in zip(grams, weights, strict=True):
        gram_CC.copy_(gram_CC @ inverse_CC + none_CC * (weight / sum(weights)))


def _system_workspace(num_models: int) -> int:
    return num_models + 10  # measured: 11.1 for 2 models, where the sum is singular; else 4


def _by_panels(weights_MRC: Tensor, system: Tensor, context: Context) -> Tensor:
    """Return the merge of a block of rows, in panels that begin at multiples of their height.

    A product's last bits depend on its shape and a row's place in it. With panels, they do not
    depend on the blocks. Blocks of whole panels waste no work.
    """
    num_rows, num_columns = weights_MRC.shape[1:]
    first, height = context.start // num_columns, min(PANEL_ROWS, context.shape[0])
    out_RC = weights_MRC.new_empty((num_rows, num_columns))
    for start in range(first // height * height, first + num_rows, height):
        low, high = max(start, first), min(start + height, first + num_rows)
        panel_MPC = weights_MRC.new_zeros(
            (len(weights_MRC), height, num_columns), dtype=system.dtype
        )
        panel_MPC[:, low - start : high - start] = weights_MRC[:, low - first : high - first]
        out_RC[low - first : high - first] = _solved(panel_MPC, system)[low - start : high - start]
    return out_RC


def _for_tensor(context: Context) -> MergeMethod | None:
    return unless_measured(context) or (regmean_turned if context.turned else None)


def _always(parameters: Mapping[str, Any]) -> bool:
    return True


@merge_method(
    space="weight",
    cut="row",
    prepared={"gram": Prepared(gram_shape, _system, _system_workspace, wrong_gram)},
    for_tensor=_for_tensor,
    workspace=lambda num_sources: 3 * num_sources + 6,
    idempotent=_always,
    check=check_weights,
    in_float64=True,
    paper="arXiv 2212.09849",
)
def regmean(
    weights_MRC: Tensor,
    *,
    gram: Tensor,
    context: Context,
    reduce: Annotated[float, Interval(ge=0, le=1)] = 0.9,
    weight: Annotated[PerModel, Ge(0)] = 1.0,
) -> Tensor:
    """RegMean: linear layers that answer the models' own inputs as the models do.

    Ĝᵢ: wᵢGᵢ with off-diagonal elements times `reduce`; W* = (Σ WᵢĜᵢ)(Σ Ĝᵢ)⁻¹, in float64.

    Gᵢ is the mean of xxᵀ over the inputs x of the layer, which `outliermerge measure --statistics
    gram` writes; experts that are one tensor have one each, of the tokens that are routed to them.
    With `reduce: 1` the sum can be singular: along inputs that no model has, weights are averaged,
    as is an expert without tokens, and what has no Gram matrix (norms, biases, embeddings).

    Args:
        weights_MRC: the models' weights.
        gram: what was made of the models' Gram matrices.
        context: where the block is in its tensor.
        reduce: the factor of off-diagonal elements.
        weight: wᵢ.
    """
    if gram.ndim == 3:
        return _by_panels(weights_MRC, gram, context)
    return _by_expert(weights_MRC, gram, context)


def _solved(weights_MRC: Tensor, system: Tensor) -> Tensor:
    """Return W₁ + (Σ (Wᵢ − W₁)Ĝᵢ)L⁻ᵀL⁻¹ (R, C), in float64."""
    import torch

    first_RC, *others = weights_MRC.double()
    total_RC = torch.zeros_like(first_RC)
    for own_RC, gram_CC in zip(others, system[:-1], strict=True):
        total_RC.addmm_(own_RC - first_RC, gram_CC)
    factor_CC = system[-1]
    half_RC = torch.linalg.solve_triangular(factor_CC.mT, total_RC, upper=True, left=False)
    merged_RC: Tensor = torch.linalg.solve_triangular(factor_CC, half_RC, upper=False, left=False)
    return merged_RC.add_(first_RC)


def _by_expert(weights: Tensor, systems: Tensor, context: Context) -> Tensor:
    """Return the merge of a block of whole experts."""
    import torch

    shape = context.shape[1:]
    weights_MERC = weights.view(len(weights), -1, *shape)
    first, merged = context.start // (shape[0] * shape[1]), []
    for number, weights_MRC in enumerate(weights_MERC.unbind(1), start=first):
        merged.append(_solved(weights_MRC, systems[:, number]).to(weights.dtype))
    return torch.stack(merged)


@merge_method(
    space="weight",
    cut="tensor",
    prepared={"gram": Prepared(turned_gram_shape, _system, _system_workspace, wrong_gram)},
    workspace=lambda num_sources: num_sources + 10,
    idempotent=_always,
    check=check_weights,
    in_float64=True,
)
def regmean_turned(
    weights: Tensor, *, gram: Tensor, reduce: float = 0.9, weight: PerModel = 1.0
) -> Tensor:
    """RegMean of matrices whose rows are the inputs: Wᵀ as of others, of each expert or the one."""
    import torch

    first, *others = weights.double()
    total = torch.zeros_like(first)
    for own, gram_CC in zip(others, gram[:-1], strict=True):
        total += gram_CC.mT @ (own - first)
    half = torch.linalg.solve_triangular(gram[-1], total, upper=False)
    merged: Tensor = torch.linalg.solve_triangular(gram[-1].mT, half, upper=True)
    return merged.add_(first).to(weights.dtype)
