"""Fisher-weighted averaging: each parameter counts by what a model's data say of it.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from outliermerge.errors import OutlierMergeError, shown
from outliermerge.methods.averaging import check_weights, unless_measured
from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.parameter import PerModel

if TYPE_CHECKING:
    from torch import Tensor


def refuse_no_squares(fisher: Tensor, context: Context) -> None:
    """Refuse what is no mean of squares: values below 0, infinite or NaN.

    Raises:
        OutlierMergeError: a model's block has such values.
    """
    for number, own in enumerate(fisher if fisher.numel() else ()):
        low, high = own.aminmax()
        if not (low >= 0 and high < math.inf):
            raise OutlierMergeError(
                f"the Fisher information of {shown(context.name)} of model {number + 1} has values "
                "that are below 0, infinite or NaN. Measure the model again."
            )


def _always(parameters: Mapping[str, Any]) -> bool:
    return True


@merge_method(
    space="weight",
    auxiliary=("fisher",),
    for_tensor=unless_measured,
    workspace=lambda num_sources: 9 * num_sources + 6,
    idempotent=_always,
    check=check_weights,
    in_float64=True,
    paper="arXiv 2111.09832",
)
def fisher(
    weights_ME: Tensor,
    *,
    fisher: Tensor,
    context: Context,
    weight: Annotated[PerModel, Ge(0)] = 1.0,
    epsilon: Annotated[float, Gt(0)] = 1e-12,
) -> Tensor:
    """Average weights in proportion to diagonal Fisher information (Fisher merging).

    W* = Σ wᵢ(Fᵢ + ε)Wᵢ / Σ wᵢ(Fᵢ + ε), for each element, in float64.

    `outliermerge measure --statistics fisher` writes Fᵢ. Where all are 0, ε makes it the mean. The
    published code has ε = 1e-6 and divides each model's F by its norm; wᵢ can do that here: the
    norms are in the statistics' manifest. What was not measured, such as buffers, is averaged.

    Args:
        weights_ME: the models' weights.
        fisher: Fᵢ of each model.
        context: the tensor's name.
        weight: wᵢ.
        epsilon: ε.
    """
    refuse_no_squares(fisher, context)
    share_ME = (fisher.double() + epsilon).mul_(weight.double()[:, None])
    total_E = share_ME.sum(0)
    merged_E: Tensor = share_ME.mul_(weights_ME).sum(0).div_(total_E).to(weights_ME.dtype)
    return merged_E
