"""What a comparison means for a merge, in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from outliermerge.analysis.pairs import PairStats
from outliermerge.analysis.places import short_names

# Cosines of task vectors. Unrelated fine-tunes of one base have about 0; two that were trained on
# parts of the same data have been seen at 0.3.
_UNRELATED, _ALIKE = 0.1, 0.5
_FEW = 0.0001  # of all elements: conflicts that no merge will show


def verdict_of(
    models: Sequence[str],
    pairs: Sequence[PairStats],
    tensors: Sequence[PairStats],
    *,
    has_base: bool,
) -> str:
    """Return in a sentence or two how models fit together, and where they conflict.

    Args:
        models: their names.
        pairs: every pair of whole models.
        tensors: every pair, tensor by tensor.
        has_base: task vectors are compared, not weights.
    """
    known = [pair for pair in pairs if not math.isnan(pair.cosine)]
    if not known:
        return "Nothing can be said: no two models have finite values that are not all zero."
    if not has_base:
        least = min(known, key=lambda pair: pair.cosine)
        return (
            f"{_names(models, least)} are the least alike, with a cosine of {least.cosine:.4f} "
            "between their weights. What will conflict in a merge is told of task vectors: name "
            "the base model."
        )
    worst = max(known, key=lambda pair: (pair.conflict_ratio, -pair.cosine))
    rows = [row for row in tensors if (row.a, row.b) == (worst.a, worst.b)]
    names = _names(models, worst)
    cosine = round(worst.cosine, 2) + 0.0  # no "-0.00"
    said = f"{names} {_direction(worst.cosine)} (cosine {cosine:.2f})"
    if len(known) > 1:
        said = f"Of {len(known)} pairs, {names} conflict most. They {_direction(worst.cosine)}"
        said += f" (cosine {cosine:.2f})"
    both = worst.both_outliers_ratio
    if not worst.conflict_ratio > 0:
        return f"{said}, and nothing that min-σ keeps whole of both will cancel."
    cancelling = worst.conflict_ratio / both if both else math.nan
    said += (
        f". Of the elements that min-σ keeps whole of both, {cancelling:.0%} have opposite signs "
        f"and will cancel: {worst.conflict_ratio:.2%} of all elements"
    )
    if worst.conflict_ratio < _FEW:
        return f"{said}, which is next to nothing."
    return f"{said}, the largest share of them in {_where(rows)}."


def _names(models: Sequence[str], pair: PairStats) -> str:
    return f"{models[pair.a]} and {models[pair.b]}"


def _direction(cosine: float) -> str:
    if cosine < -_UNRELATED:
        return "changed the base in opposite directions, so that a merge undoes a part of each"
    if cosine < _UNRELATED:
        return "changed the base in unrelated directions"
    return f"changed the base {'largely' if cosine > _ALIKE else 'partly'} in the same direction"


def _where(rows: Sequence[PairStats]) -> str:
    """Return the type of module and the layer that have most of the conflicts."""
    short = short_names(row.module for row in rows)
    module, share = _most(rows, lambda row: short[row.module])
    said = f"{module} ({share:.0%})"
    if any(row.layer is not None for row in rows):
        layer, share = _most(rows, lambda row: row.layer)
        said += f", and by layer in {layer} ({share:.0%})"
    return said


def _most(rows: Sequence[PairStats], key: Callable[[PairStats], str | None]) -> tuple[str, float]:
    counts: dict[str, float] = {}
    total = 0.0
    for row in rows:
        if math.isnan(row.conflict_ratio):
            continue
        total += row.conflict_ratio * row.num_elements
        if (name := key(row)) is not None:
            counts[name] = counts.get(name, 0.0) + row.conflict_ratio * row.num_elements
    most = max(counts, key=lambda name: counts[name])
    return most, counts[most] / total
