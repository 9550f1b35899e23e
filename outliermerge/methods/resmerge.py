"""ResMerge: the first singular directions of task vectors apart from what remains of them.

Shape suffixes: M models, R rows, C columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Interval

from outliermerge.methods.context import Context
from outliermerge.methods.contract import merge_method
from outliermerge.methods.matrices import decomposed, of_each, unless_matrix
from outliermerge.methods.parameter import MOST_STEPS, PerModel

if TYPE_CHECKING:
    from torch import Tensor

_ZERO = 1e-8  # of norms, as in the published code
_INSIDE_LAYERS = re.compile(r"attn|attention|[qkvo]_proj|mlp|ffn|feed_forward|(gate|up|down)_proj")


def _workspace(num_sources: int) -> int:
    return 6 * num_sources + 8  # measured: 21 for 2 models, 45 for 6


def _check(parameters: Mapping[str, Any]) -> None:
    if parameters["beta_min"] > parameters["beta_max"]:
        raise ValueError(
            f"beta_min is {parameters['beta_min']}, expected at most beta_max "
            f"({parameters['beta_max']})"
        )


def _cosines(gram_MM: list[list[float]]) -> list[float]:
    """Return the cosine of each pair of models; 0 with a vector of zeros."""
    lengths = [math.sqrt(gram_MM[i][i]) for i in range(len(gram_MM))]
    return [
        gram_MM[i][j] / (lengths[i] * lengths[j]) if min(lengths[i], lengths[j]) > _ZERO else 0.0
        for i, j in combinations(range(len(gram_MM)), 2)
    ]


def _gram(parts_MRC: Tensor) -> list[list[float]]:
    flat_ME = parts_MRC.flatten(1)
    found: list[list[float]] = (flat_ME @ flat_ME.mT).tolist()
    return found


def _consensus(parts_MRC: Tensor, beta_min: float, beta_max: float, *, inside: bool) -> Tensor:
    """Return the direction that the models' parts have in common, by how much they agree."""
    gram, num_models = _gram(parts_MRC), len(parts_MRC)
    lengths = [math.sqrt(gram[i][i]) for i in range(num_models)]
    cosines = _cosines(gram)
    nonzero = sum(length > _ZERO for length in lengths)
    sum_length = math.sqrt(max(0.0, nonzero + 2 * math.fsum(cosines)))
    coherence = min(1.0, sum_length / num_models)
    if sum_length <= _ZERO or coherence <= 1 / math.sqrt(num_models):
        return parts_MRC.mean(0)
    mean_cosine = math.fsum(cosines) / len(cosines) if cosines else 1.0
    score = ((mean_cosine + 1) / 2 + (coherence + 1) / 2) / 2 if inside else 0.0
    beta = beta_max - (beta_max - beta_min) * min(1.0, max(0.0, score))
    length = coherence**beta * math.fsum(lengths) / num_models
    factors = [length / sum_length / own if own > _ZERO else 0.0 for own in lengths]
    return (parts_MRC * parts_MRC.new_tensor(factors)[:, None, None]).sum(0)


@merge_method(
    space="delta",
    cut="tensor",
    for_tensor=unless_matrix,
    workspace=_workspace,
    check=_check,
    paper="https://github.com/sunyd0303-cpu/ResMerge-release",
)
def resmerge(
    deltas: Tensor,
    *,
    context: Context,
    rank: Annotated[int, Interval(ge=1, le=MOST_STEPS)] = 1,
    head_ratio: Annotated[float, Ge(0)] = 0.2,
    beta_min: Annotated[float, Ge(0)] = 0.7,
    beta_max: Annotated[float, Ge(0)] = 1.0,
    randomized: bool = False,
    weight: PerModel = 1.0,
    lambda_: float = 1.0,
) -> Tensor:
    """ResMerge: the common direction of all but the first singular directions, and some of these.

    Hᵢ: the first `rank` singular directions of wᵢΔWᵢ; Rᵢ = wᵢΔWᵢ − Hᵢ; Q = Σ Rᵢ/‖Rᵢ‖;
    c = ‖Q‖/N; R = Q/‖Q‖ · c^β · mean ‖Rᵢ‖ where c > 1/√N, else mean Rᵢ;
    H = mean Hᵢ, scaled to the norm head_ratio · r · ‖R‖; W* = W + λ(R + H).

    r is the mean over pairs of max(0, cos(Hᵢ, Hⱼ)). β goes from beta_max to beta_min as the mean
    of (s + 1)/2 and (c + 1)/2 goes from 0 to 1, where s is the mean cosine of pairs of Rᵢ; it is
    beta_max for matrices outside attention and feed-forward layers, by their names. Tensors that
    are no matrices are averaged.

    Args:
        deltas: task vectors.
        context: the tensor's name.
        rank: how many singular directions make a head.
        head_ratio: norm of the merged heads in units of that of the rest, where heads agree.
        beta_min: the least β.
        beta_max: the greatest β.
        randomized: find the singular directions from a random start where rank + 10 ≤ K/4, K the
            shorter side: much faster, and less exact where no direction leads.
        weight: wᵢ.
        lambda_: λ, scales the merged task vector.
    """
    import torch

    inside = bool(_INSIDE_LAYERS.search(context.name.lower()))

    def merged(deltas_MRC: Tensor) -> Tensor:
        rest_MRC = deltas_MRC.double() * weight.double()[:, None, None]
        heads = []
        for rest_RC in rest_MRC:
            num = min(rank, *rest_RC.shape)
            left_RL, values_L, right_LC = decomposed(rest_RC, num, randomized=randomized)
            heads.append((left_RL * values_L) @ right_LC)
            rest_RC -= heads[-1]
        result_RC = _consensus(rest_MRC, beta_min, beta_max, inside=inside)
        heads_MRC = torch.stack([head for head in heads if float(head.norm()) > _ZERO] or heads)
        cosines = [max(0.0, cosine) for cosine in _cosines(_gram(heads_MRC))]
        agreement = min(1.0, math.fsum(cosines) / len(cosines)) if cosines else 1.0
        head_RC = sum(heads[1:], heads[0]) / len(heads)
        length, own = float(result_RC.norm()), float(head_RC.norm())
        if min(length, own) > _ZERO:
            result_RC += head_RC * (head_ratio * agreement * length / own)
        return result_RC * lambda_

    return of_each(deltas, merged)
