"""Methods that interpolate on a sphere. Each is a sum of the models that inner products tell.

Shape suffixes: M models, E elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from annotated_types import Gt, Interval

from outliermerge.methods.averaging import normalized, weighted_sum
from outliermerge.methods.contract import merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall, to_float32
from outliermerge.methods.parameter import MOST_STEPS, PerModel
from outliermerge.methods.statistics.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor

Products: TypeAlias = Sequence[Sequence[float]]
"""Inner products, as `Gram` measures them."""

_LEAST_LENGTH = 1e-8  # of a vector that has a direction
_NEARLY_PARALLEL = 0.9995
_ROUNDING = 1e-7  # of float32: a sum of unit vectors that is shorter has no direction


def summed(block_ME: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the sum of models, each times its weight, as the kernel `weighted_sum` adds up."""
    merged_E: Tensor = (block_ME * block_ME.new_tensor(weights)[:, None]).sum(0)
    return merged_E


def lengths_of(gram: Products) -> list[float]:
    """Return the norms of vectors.

    >>> lengths_of([[4.0, 0.0], [0.0, 9.0]])
    [2.0, 3.0]
    """
    return [math.sqrt(max(0.0, row[number])) for number, row in enumerate(gram)]


def are_finite(gram: Products) -> bool:
    """Tell whether inner products are known: not where a value that is allowed in is infinite."""
    return all(math.isfinite(product) for row in gram for product in row)


def pair_weights(angle: float, t: float) -> list[float]:
    """Return how two vectors with an angle between them are weighted at t on the way.

    >>> pair_weights(math.pi / 2, 0.0)
    [1.0, 0.0]
    """
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _slerp_weights(gram: Products, t: float) -> list[float]:
    first, second = (x if x > _LEAST_LENGTH else 1.0 for x in lengths_of(gram))
    cosine = gram[0][1] / (first * second)
    if not are_finite(gram) or abs(cosine) > _NEARLY_PARALLEL:
        return [1 - t, t]
    return pair_weights(math.acos(cosine), t)


def _slerp_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    return weighted_sum(_slerp_weights(needs["gram"], parameters["t"]))


@merge_method(
    space="weight",
    base_as="first",
    needs={"gram": Gram()},
    idempotent=lambda parameters: True,
    min_models=2,
    max_models=2,
    paper="doi 10.1145/325165.325242",
    kernel=Kernel("weighted_sum", _slerp_kernel),
)
def slerp(weights_ME: Tensor, *, gram: Tensor, t: float = 0.5) -> Tensor:
    """Spherical interpolation between the base model and one other.

    W* = (sin((1 − t)θ) · W + sin(tθ) · W₁) / sin θ, θ the angle between W and W₁;
    (1 − t)W + tW₁ where |cos θ| > 0.9995.

    W is the base model, so that t = 0 gives it and t = 1 the other. The angle is of whole
    tensors; a tensor of zeros counts as at a right angle to all.

    Args:
        weights_ME: the base's and the other model's weights.
        gram: their inner products, (2, 2).
        t: the way from the base to the other model.
    """
    return summed(weights_ME, _slerp_weights(gram.tolist(), t))


def _multislerp_weights(
    gram: Products, weights: Sequence[float], normalize: bool, eps: float
) -> list[float]:
    if len(weights) == 1:
        return [1.0]
    weights = normalized(weights) if normalize else weights
    if not are_finite(gram):
        return list(weights)
    lengths = lengths_of(gram)
    shares = [weight / (length + eps) for weight, length in zip(weights, lengths, strict=True)]
    least = max(eps, _ROUNDING * math.fsum(map(abs, weights)))
    length = _length(shares, gram)
    if length < least:
        return list(weights)
    mean_length = math.fsum(w * length for w, length in zip(weights, lengths, strict=True))
    return [mean_length * share / length for share in shares]


def _length(shares: Sequence[float], gram: Products) -> float:
    """Return the norm of a sum of vectors."""
    rows = zip(shares, gram, strict=True)
    square = math.fsum(a * b * p for a, row in rows for b, p in zip(shares, row, strict=True))
    return math.sqrt(max(0.0, square))


def _multislerp_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    weights = [to_float32(weight) for weight in parameters["weight"]]
    normalize, eps = parameters["normalize_weights"], parameters["eps"]
    return weighted_sum(_multislerp_weights(needs["gram"], weights, normalize, eps))


def _weighs_to_one(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["normalize_weights"]) or math.fsum(parameters["weight"]) == 1


def _can_be_normalized(parameters: Mapping[str, Any]) -> None:
    if parameters["normalize_weights"] and math.fsum(parameters["weight"]) == 0:
        raise ValueError(
            f"the weights {list(parameters['weight'])} add up to 0 and cannot be normalised. "
            "Set normalize_weights: false to take them as they are."
        )


@merge_method(
    space="delta",
    name="multislerp",
    needs={"gram": Gram()},
    check=_can_be_normalized,
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    kernel=Kernel("weighted_sum", _multislerp_kernel),
)
def multislerp_of_deltas(
    deltas_ME: Tensor,
    *,
    gram: Tensor,
    weight: PerModel = 1.0,
    normalize_weights: bool = True,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Tensor:
    """Barycentre of task vectors on a sphere around the base model; see multislerp."""
    weights = weight.tolist()
    return summed(deltas_ME, _multislerp_weights(gram.tolist(), weights, normalize_weights, eps))


@merge_method(
    space="weight",
    with_base=multislerp_of_deltas,
    needs={"gram": Gram()},
    idempotent=_weighs_to_one,
    check=_can_be_normalized,
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    kernel=Kernel("weighted_sum", _multislerp_kernel),
)
def multislerp(
    weights_ME: Tensor,
    *,
    gram: Tensor,
    weight: PerModel = 1.0,
    normalize_weights: bool = True,
    eps: Annotated[float, Gt(0)] = 1e-8,
) -> Tensor:
    """Barycentre of two or more models on a sphere; with a base model, of task vectors.

    uᵢ = Wᵢ / (‖Wᵢ‖ + eps); m = Σ wᵢuᵢ; W* = Σ wᵢ‖Wᵢ‖ · m / ‖m‖; Σ wᵢWᵢ where m is 0.
    With a base model ΔWᵢ takes the place of Wᵢ, and W is added.

    The published rule goes on from m / ‖m‖ along Σ wᵢ(uᵢ − (uᵢ·m)m / ‖m‖²), but that is 0 by the
    definition of m: mergekit, which does so, takes this step by a rounding error. Of three or more
    models that cancel each other out it refuses a merge; here they are added up, as two are.

    Args:
        weights_ME: the models' weights.
        gram: their inner products, (M, M).
        weight: wᵢ.
        normalize_weights: divide wᵢ by Σ wᵢ, which must then not be 0.
        eps: added to norms; where m is shorter it has no direction.
    """
    weights = weight.tolist()
    return summed(weights_ME, _multislerp_weights(gram.tolist(), weights, normalize_weights, eps))


def _karcher_weights(gram: Products, max_iter: int, tol: float) -> list[float]:
    num_models, lengths = len(gram), lengths_of(gram)
    if num_models == 1 or not are_finite(gram):
        return [1 / num_models] * num_models
    valid = [number for number, length in enumerate(lengths) if length > tol]
    if not valid:
        return [0.0] * num_models
    units = [[gram[i][j] / (lengths[i] * lengths[j]) for j in valid] for i in valid]
    mean = _karcher_mean(units, max_iter, tol)
    mean_length = math.fsum(lengths) / num_models
    weights = dict(zip(valid, mean, strict=True))
    return [
        mean_length * weights[number] / lengths[number] if number in weights else 0.0
        for number in range(num_models)
    ]


def _karcher_mean(units: Products, max_iter: int, tol: float) -> list[float]:
    """Return the mean of unit vectors as shares of each.

    Args:
        units: their inner products.
    """
    num_units = len(units)
    mean = [1 / num_units] * num_units
    length = _length(mean, units)
    if length < tol:  # they cancel each other out
        mean = [1.0] + [0.0] * (num_units - 1)
    else:
        mean = [share / length for share in mean]
    for _ in range(max_iter):
        tangent = [0.0] * num_units
        for number, row in enumerate(units):
            cosine = math.fsum(share * product for share, product in zip(mean, row, strict=True))
            angle = math.acos(min(1.0, max(-1.0, cosine)))
            if min(angle, math.pi - angle) < tol:  # there already, or opposite: no way is shortest
                continue
            factor = angle / math.sin(angle) / num_units
            tangent = [t - factor * cosine * m for t, m in zip(tangent, mean, strict=True)]
            tangent[number] += factor
        step = _length(tangent, units)
        if step < tol:
            break
        along, aside = math.cos(step), math.sin(step) / step
        mean = [along * m + aside * t for m, t in zip(mean, tangent, strict=True)]
        length = _length(mean, units)
        mean = [share / length for share in mean]
    return mean


def _karcher_kernel(parameters: Mapping[str, Any], needs: Mapping[str, Any]) -> KernelCall:
    return weighted_sum(_karcher_weights(needs["gram"], parameters["max_iter"], parameters["tol"]))


@merge_method(
    space="weight",
    base_as="model",
    needs={"gram": Gram()},
    idempotent=lambda parameters: True,
    paper="doi 10.1002/cpa.3160300502",
    kernel=Kernel("weighted_sum", _karcher_kernel),
)
def karcher(
    weights_ME: Tensor,
    *,
    gram: Tensor,
    max_iter: Annotated[int, Interval(ge=0, le=MOST_STEPS)] = 10,
    tol: Annotated[float, Gt(0)] = 1e-5,
) -> Tensor:
    """Karcher mean: the point of a sphere with the least squared angles to all models.

    uᵢ = Wᵢ / ‖Wᵢ‖; m ← exp_m(mean of log_m(uᵢ)), from the mean's direction on, until a step is
    shorter than `tol`; W* = m · mean of ‖Wᵢ‖.

    A base model is one of the models. What is not longer than `tol` counts for the mean length
    alone; of tensors that are all so short, the mean is 0.

    Args:
        weights_ME: the models' weights.
        gram: their inner products, (M, M).
        max_iter: the most steps.
        tol: the least length, angle and step that count.
    """
    return summed(weights_ME, _karcher_weights(gram.tolist(), max_iter, tol))
