"""Methods that average weights, or copy those of one model.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, to_float32
from outliermerge.methods.parameter import PerModel

if TYPE_CHECKING:
    from torch import Tensor


def _is_mean(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["normalize"]) or math.fsum(parameters["weight"]) == 1


def _has_a_mean(parameters: Mapping[str, Any]) -> None:
    if parameters["normalize"] and sum_of(parameters["weight"]) == 0:
        raise ValueError(
            f"the weights {list(parameters['weight'])} add up to 0, so there is no mean. "
            "Set normalize: false for a plain sum."
        )


def _mean_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    weights = parameters["weight"]
    return weighted_sum(normalized(weights) if parameters["normalize"] else weights)


def weighted_sum(weights: Sequence[float]) -> KernelCall:
    """Return the kernel call for the weighted sum of models."""
    return KernelCall("weighted_sum", vectors=(weights,))


def normalized(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum, in float32 arithmetic."""
    rounded, total = [to_float32(weight) for weight in weights], sum_of(weights)
    if total == 0:
        return [math.copysign(math.inf, weight) if weight else math.nan for weight in rounded]
    return [weight / total for weight in rounded]


def sum_of(weights: Sequence[float]) -> float:
    """Return the sum of weights in float32 arithmetic."""
    total = 0.0
    for weight in weights:
        total = to_float32(total + to_float32(weight))
    return total


@merge_method(
    space="weight",
    idempotent=_is_mean,
    check=_has_a_mean,
    paper="arXiv 2203.05482",
    kernel=Kernel("weighted_sum", _mean_kernel),
)
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
    idempotent=lambda parameters: bool(parameters["scale"] == (1,)),
    max_models=1,
    kernel=Kernel("weighted_sum", lambda parameters, needs: weighted_sum(parameters["scale"])),
)
def passthrough(weights_ME: Tensor, *, scale: PerModel = 1.0) -> Tensor:
    """One model's weights as they are, times `scale`.

    W* = scale · W₁

    Args:
        weights_ME: the one model's weights.
        scale: the factor; 1 copies the bytes.
    """
    scaled_E: Tensor = weights_ME[0] * scale[0]
    return scaled_E


def check_weights(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that are all 0."""
    weights = parameters["weight"]
    if not any(weights):
        raise ValueError(f"found the weights {list(weights)}, expected one above 0")


@merge_method(
    space="weight",
    check=check_weights,
    idempotent=lambda parameters: True,
    kernel=Kernel("weighted_sum", lambda own, needs: weighted_sum(normalized(own["weight"]))),
)
def averaged_weights(weights_ME: Tensor, *, weight: PerModel = 1.0) -> Tensor:
    """Average weights: W* = Σ wᵢWᵢ / Σ wᵢ."""
    merged_E: Tensor = (weights_ME * (weight / weight.sum())[:, None]).sum(0)
    return merged_E


def unless_measured(context: Context) -> MergeMethod | None:
    """Return the method for a tensor for which no model has what the method takes besides it."""
    return averaged_weights if context.lacks else None
