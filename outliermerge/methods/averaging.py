"""Methods that average or pass on weights.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outliermerge.method import PerModel, merge_method

if TYPE_CHECKING:
    from torch import Tensor


def _is_mean(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["normalize"]) or math.fsum(parameters["weight"]) == 1


def _has_a_mean(parameters: Mapping[str, Any]) -> None:
    if parameters["normalize"] and math.fsum(parameters["weight"]) == 0:
        raise ValueError(
            f"the weights {list(parameters['weight'])} add up to 0, so there is no mean. "
            "Set normalize: false for a plain sum."
        )


@merge_method(space="weight", idempotent=_is_mean, check=_has_a_mean, paper="arXiv 2203.05482")
def linear(weights_ME: Tensor, *, weight: PerModel = 1.0, normalize: bool = True) -> Tensor:
    """Weighted sum of the models' weights; the mean by default (model soup).

    W* = Σ wᵢWᵢ, divided by Σ wᵢ if `normalize`.

    Args:
        weights_ME: the models' weights.
        weight: wᵢ.
        normalize: divide by Σ wᵢ, which must then not be 0.
    """
    if normalize:
        weight = weight / weight.sum()
    merged_E: Tensor = (weights_ME * weight[:, None]).sum(0)
    return merged_E


@merge_method(
    space="weight",
    idempotent=lambda parameters: bool(parameters["scale"] == 1),
    max_models=1,
)
def passthrough(weights_ME: Tensor, *, scale: float = 1.0) -> Tensor:
    """One model's weights as they are, times `scale`.

    W* = scale · W₁

    Args:
        weights_ME: the one model's weights.
        scale: the factor; 1 copies the bytes.
    """
    return weights_ME[0] * scale
