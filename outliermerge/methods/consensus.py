"""How task vectors that were made sparse become one: weighted, by sign or not, and scaled.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Consensus: TypeAlias = Literal["sum", "count"]
"""What elects the sign of an element: the sum of the models' values, or their number."""


def returns_equal_models(parameters: Mapping[str, Any]) -> bool:
    """Tell whether models that are all equal come back as they are."""
    weights = parameters["weight"]
    total = math.fsum(weights)
    scaled_by_one = total == 1 or (parameters["normalize"] and abs(total) >= 1e-8)
    whole = all(density >= 1 for density in parameters.get("density", ()))
    return bool(scaled_by_one and whole and parameters["lambda"] == 1 and min(weights) >= 0)


def combined(
    kept_ME: Tensor,
    weight_M: Tensor,
    scale_M: Tensor | None = None,
    *,
    consensus: Consensus | None,
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """Return λ Σ wᵢsᵢxᵢ; of the elements that have the elected sign where there is a consensus.

    Args:
        kept_ME: xᵢ, task vectors after dropping; of any further dimensions.
        weight_M: wᵢ.
        scale_M: sᵢ, what brings them back to their size; None for 1.
        consensus: how a sign is elected, +1 where there is no majority; None for no election.
        normalize: divide by the weights that were added up, unless these are 0.
        lambda_: λ.
    """
    factor_M = weight_M if scale_M is None else weight_M * scale_M
    weighted_ME = kept_ME.flatten(1) * factor_M[:, None]
    if consensus is None:
        merged_E, total = weighted_ME.sum(0), weight_M.sum()
        if normalize and total.abs() >= 1e-8:
            merged_E = merged_E / total
        return merged_E * lambda_
    # Arithmetic instead of boolean masks, which torch's CPU kernels take 5 to 15 times longer for.
    votes_ME = weighted_ME if consensus == "sum" else weighted_ME.sign()
    sign_E = (votes_ME.sum(0).sign() + 0.5).sign()  # +1 where the sum is 0
    agreeing_ME = (weighted_ME * sign_E).relu()  # |mᵢ| where it has that sign, else 0
    merged_E = agreeing_ME.sum(0) * sign_E
    if normalize:
        divisor_E = (agreeing_ME.sign() * weight_M[:, None]).sum(0)
        merged_E = merged_E / (divisor_E + (1 - divisor_E.abs().sign()))  # 0 becomes 1
    return merged_E * lambda_
