"""Merges of task vectors that were made sparse: DARE, Model Breadcrumbs, DELLA.

Each is a way to drop elements (`sparsify`) and a way to put together what is left (`consensus`).

Shape suffixes: M models, E elements, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from outliermerge.methods.averaging import sum_of
from outliermerge.methods.consensus import Consensus, combined, returns_equal_models
from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, next_below, products, to_float32
from outliermerge.methods.parameter import PerModel
from outliermerge.methods.sparsify import (
    RescaleBy,
    by_density,
    by_rank,
    check_epsilon,
    drawn,
    middle,
)
from outliermerge.methods.statistics.drawn import DrawnScale, ranked_rows
from outliermerge.methods.statistics.trim import Middle

if TYPE_CHECKING:
    from torch import Tensor

_ELECTIONS = (None, "sum", "count")  # as the kernel counts them


def _scalars(parameters: Mapping[str, Any]) -> tuple[float, ...]:
    total, normalize = sum_of(parameters["weight"]), parameters["normalize"]
    return (
        parameters["lambda"],
        float(normalize),
        float(_ELECTIONS.index(parameters.get("consensus"))),
        total if normalize and abs(total) >= 1e-8 else 1.0,
    )


def _middle_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    least, most, scales = needs["limits"]
    weights = parameters["weight"]
    return KernelCall(
        "breadcrumbs",
        scalars=_scalars(parameters),
        vectors=(weights, [next_below(x) for x in least], most, products(weights, scales)),
    )


def _dare_kernel(
    parameters: Mapping[str, Any], needs: Mapping[str, Any], context: Context
) -> KernelCall:
    weights = parameters["weight"]
    chances = [to_float32(density) for density in parameters["density"]]
    divide = _by_probability(parameters["rescale"], parameters["rescale_by"])
    factors = [1 / chance if divide and chance else 1.0 for chance in chances]
    return KernelCall(
        "dare",
        scalars=_scalars(parameters),
        vectors=(weights, chances, factors, products(weights, needs["scale"])),
        keys=[context.keys(model) for model in range(len(weights))],
    )


def _della_kernel(
    parameters: Mapping[str, Any], needs: Mapping[str, Any], context: Context
) -> KernelCall:
    weights = parameters["weight"]
    divide = _by_probability(parameters["rescale"], parameters["rescale_by"])
    return KernelCall(
        "della",
        scalars=(*_scalars(parameters), float(divide)),
        vectors=(
            weights,
            parameters["density"],
            parameters["epsilon"],
            products(weights, needs["scale"]),
        ),
        keys=[context.keys(model) for model in range(len(weights))],
        rows=ranked_rows(context),
        kept=getattr(needs["scale"], "kept", None),
    )


def _by_probability(rescale: bool, rescale_by: str) -> bool:
    return rescale and rescale_by == "probability"


def _della_workspace(num_sources: int) -> int:
    return 5 * num_sources + 14  # ranks, probabilities and random numbers, of 64 bits


@merge_method(
    space="delta",
    needs={"scale": DrawnScale(by_density)},
    idempotent=returns_equal_models,
    paper="arXiv 2311.03099",
    kernel=Kernel("dare", _dare_kernel, with_context=True),
)
def dare_linear(
    deltas_ME: Tensor,
    *,
    scale: Tensor,
    context: Context,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "probability",
    lambda_: float = 1.0,
) -> Tensor:
    """DARE: drop elements at random, rescale the others, add them up.

    mᵢ = wᵢ · drop(ΔWᵢ);
    W* = W + λ Σ mᵢ, divided by Σ wᵢ if `normalize` (unless |Σ wᵢ| < 1e-8).

    drop keeps each element with probability density and divides what is kept by it, so that its
    mean is ΔWᵢ. mergekit brings the tensor back to its L1 norm instead, as `rescale_by: l1` does,
    which takes one more pass: the same but for about 1/√n.

    Args:
        deltas_ME: task vectors.
        scale: L1 rescaling of each model, (M,).
        context: where the random numbers come from.
        weight: wᵢ.
        density: probability to keep an element.
        normalize: divide by the weights of what was added up.
        rescale: make up for what was dropped.
        rescale_by: `probability`: divide each element by its probability to be kept; `l1`: bring
            the tensor back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    divide = _by_probability(rescale, rescale_by)
    kept = drawn(deltas_ME, context, by_density, density, divide=divide)
    scale_M = scale.to(deltas_ME.dtype)
    return combined(kept, weight, scale_M, consensus=None, normalize=normalize, lambda_=lambda_)


@merge_method(
    space="delta",
    needs={"scale": DrawnScale(by_density)},
    idempotent=returns_equal_models,
    paper="arXiv 2311.03099",
    kernel=Kernel("dare", _dare_kernel, with_context=True),
)
def dare_ties(
    deltas_ME: Tensor,
    *,
    scale: Tensor,
    context: Context,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    consensus: Consensus = "sum",
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "probability",
    lambda_: float = 1.0,
) -> Tensor:
    """DARE with the consensus of TIES: drop at random, elect a sign, merge what agrees.

    mᵢ = wᵢ · drop(ΔWᵢ); s = sign Σ mᵢ, + where it is 0;
    W* = W + λ Σ{mᵢ : sign mᵢ = s}, divided by Σ{wᵢ : sign mᵢ = s} if `normalize`.

    drop keeps each element with probability density and divides what is kept by it, so that its
    mean is ΔWᵢ. mergekit brings the tensor back to its L1 norm instead, as `rescale_by: l1` does,
    which takes one more pass: the same but for about 1/√n.

    Args:
        deltas_ME: task vectors.
        scale: L1 rescaling of each model, (M,).
        context: where the random numbers come from.
        weight: wᵢ.
        density: probability to keep an element.
        consensus: whether a sign is elected by the sum of the mᵢ or by their number; +1 on a tie.
        normalize: divide by the weights of what was added up.
        rescale: make up for what was dropped.
        rescale_by: `probability`: divide each element by its probability to be kept; `l1`: bring
            the tensor back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    divide = _by_probability(rescale, rescale_by)
    kept = drawn(deltas_ME, context, by_density, density, divide=divide)
    scale_M = scale.to(deltas_ME.dtype)
    return combined(
        kept, weight, scale_M, consensus=consensus, normalize=normalize, lambda_=lambda_
    )


@merge_method(
    space="delta",
    needs={"limits": Middle()},
    idempotent=returns_equal_models,
    paper="arXiv 2312.06795",
    kernel=Kernel("breadcrumbs", _middle_kernel),
)
def breadcrumbs(
    deltas_ME: Tensor,
    *,
    limits: Tensor,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    gamma: Annotated[PerModel, Interval(ge=0, le=1)] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Model Breadcrumbs: drop the largest and the smallest elements, add up the others.

    mᵢ = wᵢ · mask(ΔWᵢ);
    W* = W + λ Σ mᵢ, divided by Σ wᵢ if `normalize` (unless |Σ wᵢ| < 1e-8).

    Of a tensor of n elements mask drops the int(gamma·n) of largest magnitude and keeps the
    int(density·n) largest of the rest; where the rest is fewer, less is dropped from the top.
    Elements tied with the least or the largest kept are kept, too (mergekit keeps some of them).
    A density of 1 keeps all, and none is kept where int(density·n) is 0.

    Args:
        deltas_ME: task vectors.
        limits: least and largest magnitudes kept and rescaling factors, (3, M).
        weight: wᵢ.
        density: share of elements kept.
        gamma: share of elements dropped for being the largest.
        normalize: divide by the weights of what was added up.
        rescale: bring the sparse task vector back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    least_M, most_M, scale_M = limits.to(deltas_ME.dtype)
    kept = middle(deltas_ME, least_M, most_M)
    return combined(kept, weight, scale_M, consensus=None, normalize=normalize, lambda_=lambda_)


@merge_method(
    space="delta",
    needs={"limits": Middle()},
    idempotent=returns_equal_models,
    paper="arXiv 2312.06795",
    kernel=Kernel("breadcrumbs", _middle_kernel),
)
def breadcrumbs_ties(
    deltas_ME: Tensor,
    *,
    limits: Tensor,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    gamma: Annotated[PerModel, Interval(ge=0, le=1)] = 0.01,
    consensus: Consensus = "sum",
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Model Breadcrumbs with the consensus of TIES.

    mᵢ = wᵢ · mask(ΔWᵢ); s = sign Σ mᵢ, + where it is 0;
    W* = W + λ Σ{mᵢ : sign mᵢ = s}, divided by Σ{wᵢ : sign mᵢ = s} if `normalize`.

    Of a tensor of n elements mask drops the int(gamma·n) of largest magnitude and keeps the
    int(density·n) largest of the rest; where the rest is fewer, less is dropped from the top.
    Elements tied with the least or the largest kept are kept, too (mergekit keeps some of them).
    A density of 1 keeps all, and none is kept where int(density·n) is 0.

    Args:
        deltas_ME: task vectors.
        limits: least and largest magnitudes kept and rescaling factors, (3, M).
        weight: wᵢ.
        density: share of elements kept.
        gamma: share of elements dropped for being the largest.
        consensus: whether a sign is elected by the sum of the mᵢ or by their number; +1 on a tie.
        normalize: divide by the weights of what was added up.
        rescale: bring the sparse task vector back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    least_M, most_M, scale_M = limits.to(deltas_ME.dtype)
    kept = middle(deltas_ME, least_M, most_M)
    return combined(
        kept, weight, scale_M, consensus=consensus, normalize=normalize, lambda_=lambda_
    )


@merge_method(
    space="delta",
    cut="row",
    needs={"scale": DrawnScale(by_rank, by_row=True)},
    workspace=_della_workspace,
    idempotent=returns_equal_models,
    check=check_epsilon,
    paper="arXiv 2406.11617",
    kernel=Kernel("della", _della_kernel, with_context=True),
)
def della(
    deltas_MRC: Tensor,
    *,
    scale: Tensor,
    context: Context,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    epsilon: Annotated[PerModel, Interval(gt=-1, lt=1)] = 0.15,
    consensus: Consensus = "sum",
    normalize: bool = True,
    rescale: bool = True,
    rescale_by: RescaleBy = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """DELLA: drop at random, small elements rather, elect a sign, merge what agrees.

    mᵢ = wᵢ · drop(ΔWᵢ); s = sign Σ mᵢ, + where it is 0;
    W* = W + λ Σ{mᵢ : sign mᵢ = s}, divided by Σ{wᵢ : sign mᵢ = s} if `normalize`.

    drop keeps an element with a probability that rises evenly with the rank of its magnitude in its
    row, from density − epsilon to density + epsilon; a vector is one row. What is kept is scaled
    to the L1 norm of the whole tensor, as in mergekit; with `rescale_by: probability` each element
    is divided by its own probability, as in the paper, so that its mean is ΔWᵢ.

    Args:
        deltas_MRC: task vectors.
        scale: L1 rescaling of each model, (M,).
        context: where the random numbers come from.
        weight: wᵢ.
        density: mean probability to keep an element.
        epsilon: how far the probabilities go from it; density ± epsilon must lie in (0, 1).
        consensus: whether a sign is elected by the sum of the mᵢ or by their number; +1 on a tie.
        normalize: divide by the weights of what was added up.
        rescale: make up for what was dropped.
        rescale_by: `probability`: divide each element by its probability to be kept; `l1`: bring
            the tensor back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    divide = _by_probability(rescale, rescale_by)
    kept = drawn(deltas_MRC, context, by_rank, density, epsilon, divide=divide)
    scale_M = scale.to(deltas_MRC.dtype)
    return combined(
        kept, weight, scale_M, consensus=consensus, normalize=normalize, lambda_=lambda_
    )


@merge_method(
    space="delta",
    cut="row",
    needs={"scale": DrawnScale(by_rank, by_row=True)},
    workspace=_della_workspace,
    idempotent=returns_equal_models,
    check=check_epsilon,
    paper="arXiv 2406.11617",
    kernel=Kernel("della", _della_kernel, with_context=True),
)
def della_linear(
    deltas_MRC: Tensor,
    *,
    scale: Tensor,
    context: Context,
    weight: PerModel = 1.0,
    density: Annotated[PerModel, Interval(ge=0, le=1)] = 1.0,
    epsilon: Annotated[PerModel, Interval(gt=-1, lt=1)] = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """DELLA without the election: drop at random, small elements rather, add up the others.

    mᵢ = wᵢ · drop(ΔWᵢ);
    W* = W + λ Σ mᵢ, divided by Σ wᵢ if `normalize` (unless |Σ wᵢ| < 1e-8).

    drop keeps an element with a probability that rises evenly with the rank of its magnitude in its
    row, from density − epsilon to density + epsilon; a vector is one row. What is kept is scaled
    to the L1 norm of the whole tensor, as in mergekit; with `rescale_by: probability` each element
    is divided by its own probability, as in the paper, so that its mean is ΔWᵢ.

    Args:
        deltas_MRC: task vectors.
        scale: L1 rescaling of each model, (M,).
        context: where the random numbers come from.
        weight: wᵢ.
        density: mean probability to keep an element.
        epsilon: how far the probabilities go from it; density ± epsilon must lie in (0, 1).
        normalize: divide by the weights of what was added up.
        rescale: make up for what was dropped.
        rescale_by: `probability`: divide each element by its probability to be kept; `l1`: bring
            the tensor back to its L1 norm.
        lambda_: λ, scales the merged task vector.
    """
    divide = _by_probability(rescale, rescale_by)
    kept = drawn(deltas_MRC, context, by_rank, density, epsilon, divide=divide)
    scale_M = scale.to(deltas_MRC.dtype)
    return combined(kept, weight, scale_M, consensus=None, normalize=normalize, lambda_=lambda_)
