"""Reinforced Agent Merging: what one model changes alone is kept whole, the rest is averaged.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.statistics.overlap import Overlap

if TYPE_CHECKING:
    from torch import Tensor


def _keeps_all(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["epsilon"] == 0)


def _active(deltas_ME: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return task vectors with 0 where they are not active, and how many models are, (E,)."""
    active_ME = deltas_ME.abs() > epsilon
    return deltas_ME * active_ME, active_ME.sum(0)


def _factors(overlap: Sequence[Sequence[float]], r: float, alpha: float) -> list[float]:
    """Return what the elements that a model changes alone are multiplied by."""
    pairs = zip(*overlap, strict=True)
    return [1 + r * min(shared / max(unique, 1), alpha) for unique, shared in pairs]


def _ram_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    return KernelCall("ram", scalars=(parameters["epsilon"],))


def _ramplus_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    factors = _factors(needs["overlap"], parameters["r"], parameters["alpha"])
    return KernelCall("ramplus", scalars=(parameters["epsilon"],), vectors=(factors,))


@merge_method(
    space="delta",
    idempotent=_keeps_all,
    paper="arXiv 2601.13572",
    kernel=Kernel("ram", _ram_kernel),
)
def ram(deltas_ME: Tensor, *, epsilon: Annotated[float, Ge(0)] = 1e-5) -> Tensor:
    """RAM: the mean over the models that change an element, so that one alone is kept whole.

    Aᵢ = |ΔWᵢ| > epsilon; W* = W + Σ{ΔWᵢ : Aᵢ} / Σ Aᵢ

    Args:
        deltas_ME: task vectors.
        epsilon: the largest change that counts as none; it is dropped.
    """
    kept_ME, count_E = _active(deltas_ME, epsilon)
    merged_E: Tensor = kept_ME.sum(0) / count_E.clamp(min=1)
    return merged_E


@merge_method(
    space="delta",
    needs={"overlap": Overlap()},
    idempotent=_keeps_all,
    paper="arXiv 2601.13572",
    kernel=Kernel("ramplus", _ramplus_kernel),
)
def ramplus_tl(
    deltas_ME: Tensor,
    *,
    overlap: Tensor,
    r: float = 0.1,
    alpha: Annotated[float, Ge(0)] = 0.2,
    epsilon: Annotated[float, Ge(0)] = 1e-5,
) -> Tensor:
    """RAM+, tensor by tensor: as RAM, and what a model changes alone is made larger.

    Aᵢ = |ΔWᵢ| > epsilon; ρᵢ = elements that Aᵢ shares / elements that it has alone;
    W* = W + Σ{ΔWᵢ : Aᵢ} / Σ Aᵢ where several models are active, and
    W* = W + (1 + r · min(ρᵢ, alpha)) · ΔWᵢ where model i is alone.

    Args:
        deltas_ME: task vectors.
        overlap: for each model how many of its elements are its own, and how many shared, (2, M).
        r: how much ρ counts.
        alpha: the most that it may be.
        epsilon: the largest change that counts as none; it is dropped.
    """
    import torch

    kept_ME, count_E = _active(deltas_ME, epsilon)
    factor_M1 = deltas_ME.new_tensor(_factors(overlap.tolist(), r, alpha))[:, None]
    mean_E = kept_ME.sum(0) / count_E.clamp(min=1)
    return torch.where(count_E == 1, (kept_ME * factor_M1).sum(0), mean_E)
