"""NearSwap.

Shape suffixes: M models (1), E elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall

if TYPE_CHECKING:
    from torch import Tensor


def _kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    return KernelCall("nearswap", scalars=(parameters["t"],))


@merge_method(
    space="delta",
    max_models=1,
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    kernel=Kernel("nearswap", _kernel),
)
def nearswap(deltas_ME: Tensor, *, t: Annotated[float, Ge(0)] = 0.0001) -> Tensor:
    """Take from a model what is near the base's weight, and go towards the rest by t at most.

    s = t / max(|ΔW₁|, 1e-6), at least 0 and at most 1; W* = W + sΔW₁.

    Args:
        deltas_ME: the one model's task vector.
        t: how far an element moves at most; the published merge's by default, mergekit has none.
    """
    delta_E = deltas_ME[0]
    merged_E: Tensor = delta_E * (t / delta_E.abs().clamp(min=1e-6)).clamp(0, 1)
    return merged_E
