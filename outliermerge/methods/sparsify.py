"""How task vectors are made sparse: by magnitude, at random, or at random by rank.

Shape suffixes: M models, E elements, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from outliermerge.methods.context import Context
from outliermerge.methods.statistics.drawn import Probability

if TYPE_CHECKING:
    from torch import Tensor

RescaleBy: TypeAlias = Literal["probability", "l1"]
"""What makes up for dropped elements: each divided by its probability to be kept, or all of a
tensor brought back to its L1 norm."""


def trimmed(deltas_ME: Tensor, threshold_M: Tensor) -> Tensor:
    """Return task vectors with 0 where a magnitude is below a threshold."""
    import torch

    # hardshrink instead of a boolean mask, which torch's CPU kernels take 5 times longer for.
    largest_dropped_M = threshold_M.nextafter(torch.zeros_like(threshold_M))
    return torch.stack(
        [row.hardshrink(float(x)) for row, x in zip(deltas_ME, largest_dropped_M, strict=True)]
    )


def middle(deltas_ME: Tensor, least_M: Tensor, most_M: Tensor) -> Tensor:
    """Return task vectors with 0 where a magnitude is below the least or above the most.

    Infinities and NaN stay.
    """
    kept_ME = trimmed(deltas_ME, least_M)
    size_ME = kept_ME.abs()
    return kept_ME.masked_fill_((size_ME > most_M[:, None]) & (size_ME < math.inf), 0)


def drawn(
    deltas: Tensor,
    context: Context,
    probability: Probability,
    density_M: Tensor,
    epsilon_M: Tensor | None = None,
    *,
    divide: bool,
) -> Tensor:
    """Return task vectors (M, …) with 0 where an element is dropped at random.

    Args:
        probability: of keeping an element.
        divide: divide what is kept by it.
    """
    density = density_M.tolist()
    epsilon = [0.0] * len(density) if epsilon_M is None else epsilon_M.tolist()
    out = deltas.new_zeros(deltas.shape)
    for model, own in enumerate(deltas):
        if density[model] <= 0:
            continue
        chance = probability(own, context, density[model], epsilon[model])
        kept = own * (context.uniform(own, model=model) < chance)
        # Not a division by a number: on a GPU that is a product with its reciprocal.
        out[model] = kept * (1 / chance) if divide else kept
    return out


def by_density(values: Tensor, context: Context, density: float, epsilon: float) -> float:
    """Return DARE's probability: the density."""
    return density


def by_rank(values_RC: Tensor, context: Context, density: float, epsilon: float) -> Any:
    """Return DELLA's probabilities, float64: from density − ε to density + ε by rank in a row.

    Equal magnitudes rank by place. Of a tensor of more than two dimensions a row is along the
    second one, as in mergekit. Where a row is one element, the density.
    """
    import torch

    if not 0 < density < 1:
        return density
    num_rows, columns = values_RC.shape
    length = context.shape[1] if len(context.shape) > 2 else columns
    if length < 2:
        return density
    order = values_RC.abs().view(num_rows, length, -1).argsort(dim=1, stable=True)
    rank = torch.arange(length, dtype=torch.float64, device=values_RC.device)
    steps = (rank / (length - 1)).mul_(2 * epsilon).add_(density - epsilon)
    chances = torch.empty(order.shape, dtype=torch.float64, device=values_RC.device)
    return chances.scatter_(1, order, steps[None, :, None].expand_as(order)).view_as(values_RC)


def check_epsilon(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError where a probability of DELLA would not lie between 0 and 1."""
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not (0 < density - abs(epsilon) and density + abs(epsilon) < 1):
            raise ValueError(
                f"density {density:g} with epsilon {epsilon:g} gives probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}, expected between 0 and 1. "
                "Choose a smaller epsilon."
            )
