"""RegMean: the linear layer whose outputs are nearest to all models' on their own data.

For inputs x of model i, Σᵢ Σₓ ‖(W − Wᵢ)x‖² is least where W Σ Gᵢ = Σ WᵢGᵢ, with Gᵢ = Σ xxᵀ.

Shape suffixes: M models, R rows (outputs), C columns (inputs), P rows of a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from outliermerge.methods.averaging import check_weights, unless_measured
from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.prepared import Prepared

if TYPE_CHECKING:
    from torch import Tensor

_PANEL = 64
_FULL = 0.999  # from here on, Gram matrices are taken as they are and may be singular
_STORED = 2.0**-24  # the rounding of Gram matrices, which are stored as float32


def gram_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a Gram matrix of inputs, which are the weights' last dimension."""
    return (shape[-1], shape[-1]) if shape else (0, 0)


def reduced(grams: Iterator[Tensor], parameters: Mapping[str, Any]) -> list[Tensor]:
    """Return wᵢGᵢ with off-diagonal elements times `reduce`, changed in place.

    An input that no model ever has gets a 1 in all of them, so that its column is averaged.
    """
    found = []
    for gram_CC, weight in zip(grams, parameters["weight"], strict=True):
        diagonal_C = gram_CC.diagonal().clone()
        gram_CC *= parameters["reduce"] * weight
        gram_CC.diagonal().copy_(diagonal_C * weight)
        found.append(gram_CC)
    never_C = sum(gram_CC.diagonal() for gram_CC in found) <= 0
    for gram_CC, weight in zip(found, parameters["weight"], strict=True):
        gram_CC.diagonal()[never_C] = weight
    return found


def _maps(grams: Iterator[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    """Return Pᵢ = Gᵢ(Σ Gⱼ)⁻¹ (M, C, C): then W = Σ WᵢPᵢ, row by row.

    The sum is scaled to a diagonal of 1, so that neither its solution nor what is taken for 0
    depends on the units of inputs.
    """
    import torch

    found = reduced(grams, parameters)
    total_CC = found[0].clone()
    for gram_CC in found[1:]:
        total_CC += gram_CC
    unit_C = total_CC.diagonal().rsqrt()
    total_CC *= unit_C[:, None] * unit_C
    factor_CC, failed = torch.linalg.cholesky_ex(total_CC)
    if parameters["reduce"] < _FULL and not failed:
        for gram_CC in found:
            solved_CC = torch.cholesky_solve(unit_C[:, None] * gram_CC, factor_CC)
            gram_CC.copy_((unit_C[:, None] * solved_CC).mT)
    else:
        _solve_singular(found, total_CC, unit_C, parameters["weight"])
    return torch.stack(found)


def _solve_singular(
    grams: list[Tensor], total_CC: Tensor, unit_C: Tensor, weights: tuple[float, ...]
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


def by_panels(weights_MRC: Tensor, context: Context, merged: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the merge of rows, in panels of 64 that begin at multiples of 64 in the tensor.

    A product's last bits depend on its shape and a row's place in it. With panels, they do not
    depend on the blocks.

    Args:
        weights_MRC: a block of rows.
        context: says where it is.
        merged: merges (M, P, C) to (P, C), row by row, in float64.
    """
    num_rows, num_columns = weights_MRC.shape[1:]
    first = context.start // num_columns
    out_RC = weights_MRC.new_empty((num_rows, num_columns))
    for start in range(first // _PANEL * _PANEL, first + num_rows, _PANEL):
        low, high = max(start, first), min(start + _PANEL, first + num_rows)
        panel_MPC = weights_MRC.new_zeros((len(weights_MRC), _PANEL, num_columns)).double()
        panel_MPC[:, low - start : high - start] = weights_MRC[:, low - first : high - first]
        out_RC[low - first : high - first] = merged(panel_MPC)[low - start : high - start]
    return out_RC


def _always(parameters: Mapping[str, Any]) -> bool:
    return True


@merge_method(
    space="weight",
    cut="row",
    prepared={"gram": Prepared(gram_shape, _maps, lambda num_models: 2 * num_models + 4)},
    for_tensor=unless_measured,
    workspace=lambda num_sources: 3 * num_sources + 6,
    idempotent=_always,
    check=check_weights,
    paper="arXiv 2212.09849",
)
def regmean(
    weights_MRC: Tensor,
    *,
    gram: Tensor,
    context: Context,
    reduce: Annotated[float, Interval(ge=0, le=1)] = 0.9,
    weight: PerModel = 1.0,
) -> Tensor:
    """RegMean: linear layers that answer the models' own inputs as the models do.

    Ĝᵢ: wᵢGᵢ with off-diagonal elements times `reduce`; W* = (Σ WᵢĜᵢ)(Σ Ĝᵢ)⁻¹, in float64.

    Gᵢ is the mean of xxᵀ over the inputs x of the layer, which `outliermerge measure --statistics
    gram` writes. With `reduce: 1` the sum can be singular: along inputs that no model has, weights
    are averaged. What has no Gram matrix (norms, biases, embeddings) is averaged.

    Args:
        weights_MRC: the models' weights.
        gram: what was made of the models' Gram matrices.
        context: where the block is in its tensor.
        reduce: the factor of off-diagonal elements.
        weight: wᵢ.
    """

    def merged(panel_MPC: Tensor) -> Tensor:
        total_PC = panel_MPC[0] @ gram[0]
        for panel_PC, map_CC in zip(panel_MPC[1:], gram[1:], strict=True):
            total_PC += panel_PC @ map_CC
        return total_PC

    return by_panels(weights_MRC, context, merged)
