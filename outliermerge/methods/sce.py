"""SCE: select, calculate, erase.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.parameter import Compat
from outliermerge.methods.statistics.spread import Spread, variance

if TYPE_CHECKING:
    from torch import Tensor

_CLAMPED = 1e-6  # the least divisor of mergekit


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    least, *weights = needs["selected"]
    least_divisor = _CLAMPED if parameters["compat"] == "mergekit" else 0.0
    return KernelCall("sce", scalars=(least, least_divisor), vectors=(weights,))


def _keeps_all(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["select_topk"] >= 1 and parameters["compat"] == "none")


@merge_method(
    space="delta",
    needs={"selected": Spread()},
    idempotent=_keeps_all,
    paper="arXiv 2408.07990",
    kernel=Kernel("sce", _kernel),
)
def sce(
    deltas_ME: Tensor,
    *,
    selected: Tensor,
    select_topk: Annotated[float, Interval(ge=0, le=1)] = 1.0,
    compat: Compat = "none",
) -> Tensor:
    """SCE: select elements that differ between models, weigh models by size, erase minorities.

    xᵢ = ΔWᵢ where Var(ΔW) is among the largest, else 0; wᵢ = Σxᵢ² / Σⱼ Σxⱼ²; s = sign Σ xᵢ, + where
    it is 0; W* = W + Σ{wᵢxᵢ : sign xᵢ = s} / Σ{wᵢ : sign xᵢ = s}

    The int(select_topk·n) largest are selected of the n elements whose variance over the models is
    not 0, and those tied with the last (mergekit keeps some of these). The sums of squares are of
    a whole tensor. mergekit weighs all models alike where these sums, divided by the number of
    elements, are below 1e-6 together, as those of fine-tuned models often are, and divides by at
    least 1e-6; so does `compat: mergekit`.

    Args:
        deltas_ME: task vectors.
        selected: the least variance selected, and each model's weight, (1 + M,).
        select_topk: share of elements selected; 1 selects all, also where models agree.
        compat: `mergekit` for its weights where task vectors are small.
    """
    least, *weights = selected.tolist()
    if least > 0:
        deltas_ME = deltas_ME * (variance(deltas_ME) >= least)
    weight_M1 = deltas_ME.new_tensor(weights)[:, None]
    sign_E = (deltas_ME.sum(0).sign() + 0.5).sign()  # +1 where the sum is 0
    agreeing_ME = (deltas_ME * sign_E).relu()  # |xᵢ| where it has that sign, else 0
    divisor_E = (agreeing_ME.sign() * weight_M1).sum(0)
    if compat == "mergekit":
        divisor_E = divisor_E.clamp(min=_CLAMPED)
    else:
        divisor_E = divisor_E + (1 - divisor_E.sign())  # 0 becomes 1
    return (agreeing_ME * weight_M1).sum(0) * sign_E / divisor_E
