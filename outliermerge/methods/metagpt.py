"""MetaGPT: coefficients of task arithmetic from the norms of task vectors.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from outliermerge.methods.averaging import weighted_sum
from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.spherical import summed
from outliermerge.methods.statistics.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor


def _weights(gram: Sequence[Sequence[float]], lambda_: float) -> list[float]:
    squares = [row[model] for model, row in enumerate(gram)]
    total = math.fsum(squares)
    if not 0 < total < math.inf:  # nothing changes, or a merge names whose value is not finite
        return [lambda_ / len(squares)] * len(squares)
    return [lambda_ * square / total for square in squares]


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    return weighted_sum(_weights(needs["gram"], parameters["lambda"]))


@merge_method(
    space="delta",
    needs={"gram": Gram(scope_parameter="norms")},
    paper="arXiv 2406.11385",
    kernel=Kernel("weighted_sum", _kernel),
)
def metagpt(
    deltas_ME: Tensor,
    *,
    gram: Tensor,
    norms: Literal["tensor", "model"] = "model",
    lambda_: float = 1.0,
) -> Tensor:
    """MetaGPT: task arithmetic with coefficients in proportion to the squared norms of models.

    wᵢ = ‖ΔWᵢ‖² / Σ ‖ΔWⱼ‖²; W* = W + λ Σ wᵢΔWᵢ.

    Args:
        deltas_ME: task vectors.
        gram: inner products of task vectors, (M, M).
        norms: whether norms are those of all merged tensors together, as in the paper, or of each
            tensor.
        lambda_: λ, scales the sum of task vectors.
    """
    return summed(deltas_ME, _weights(gram.tolist(), lambda_))
