"""LiNeS: a merged task vector is scaled by the depth of its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(space="merged", paper="arXiv 2410.17146")
def lines(delta_E: Tensor, *, context: Context, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """LiNeS: scale shallow layers less than deep ones.

    ΔW ↦ (α + β·l/(L − 1))ΔW in layer l of L, from 0 on; αΔW outside layers.

    Layers are counted in each stack, such as that of a vision tower. The paper takes 1/N of a
    ratio of norms for α and looks for β on validation data, and α + β = 1 for a single model; the
    defaults here are not from it.

    Args:
        delta_E: the merged task vector.
        context: the tensor's layer.
        alpha: α, the scale of the first layer, and outside layers.
        beta: β, what the last layer's scale is more.
    """
    place = 0.0 if context.layer is None else context.layer / max(1, context.num_layers - 1)
    return delta_E * (alpha + beta * place)
