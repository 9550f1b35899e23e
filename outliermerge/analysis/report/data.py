"""The data of a report's page, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.analysis.places import ModulePlace, find_places
from outliermerge.analysis.table import BINS, HALF_WIDTH, Group, Histogram, WeightStats

if TYPE_CHECKING:
    from outliermerge.analysis.compare import Comparison, PairStats

STATISTICS = {
    "std": "σ",
    "mean": "mean",
    "kept_ratio": "ratio kept by the filter, %",
    "skewness": "skewness, filtered",
    "kurtosis": "kurtosis, filtered",
    "skewness_before": "skewness, all",
    "kurtosis_before": "kurtosis, all",
    "outside_2_ratio": "beyond 2σ, %",
    "outside_3_ratio": "beyond 3σ, %",
    "outside_4_ratio": "beyond 4σ, %",
    "small_ratio": "small, %",
    "kurtosis_without_small": "kurtosis, without small",
    "zero_ratio": "zeros, %",
    "minimum": "minimum",
    "maximum": "maximum",
    "l1_norm": "L1 norm",
    "l2_norm": "L2 norm",
}
"""The columns that a page shows, by their names on the page."""


LEAST_SPAN = {"skewness": 1.0, "skewness_before": 1.0}
"""The least range of colours for a statistic, where it is not a share of the values."""

LEAST_SHARE = 0.25
"""The least range of colours for other statistics, as a share of the largest magnitude."""


@dataclass(frozen=True)
class Shown:
    """The statistics of a model's weights or task vector, with its title and role in the report.

    Attributes:
        title: the model's name on the page.
        role: `model`, or for a merge `output` or `task`.
        stats: the statistics of its tensors.
    """

    title: str
    role: str
    stats: WeightStats


@dataclass(frozen=True)
class Spot:
    """The place where a tensor is drawn.

    Attributes:
        part: the layers that it belongs to, numbers replaced by `*`; "" outside layers.
        layer: the number of its layer, such as `3` or `2.10`; "" outside layers.
        depth: the index of that layer among the part's layers, from 0; None outside layers.
        label: the type of module, without the part's name.
    """

    part: str
    layer: str
    depth: int | None
    label: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def colour_range(values: Sequence[float], column: str) -> tuple[float, float]:
    """Return the ends of a scale of colours that values are shown in.

    It is not so narrow that chance differences between values would look large.

    >>> colour_range([0.0198, 0.0202], "std")
    (0.0174..., 0.0225...)
    """
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    least = LEAST_SPAN.get(column, LEAST_SHARE * max(abs(low), abs(high)))
    room = max(0.0, least - (high - low)) / 2
    return low - room, high + room


def short_titles(models: Sequence[str]) -> list[str]:
    """Return the last parts of models' names, as many as make them different.

    >>> short_titles(["runs/a/model", "runs/b/model"])
    ['a/model', 'b/model']
    """
    for num_words in range(1, max(model.count("/") for model in models) + 2):
        titles = ["/".join(model.rstrip("/").split("/")[-num_words:]) for model in models]
        if len(set(titles)) == len(set(models)):
            break
    return titles


def find_spots(names: Sequence[str]) -> dict[str, Spot]:
    """Return the place where each tensor is drawn.

    >>> find_spots(["a.layers.7.up.weight", "a.layers.9.up.weight"])["a.layers.9.up.weight"]
    Spot(part='a.layers.*', layer='9', depth=1, label='up')
    """
    places = find_places(names)
    depths: dict[str, set[tuple[int, ...]]] = {}
    for place in places.values():
        if place.layer is not None:
            depths.setdefault(_part(place), set()).add(place.depth)
    order = {part: sorted(found) for part, found in depths.items()}
    spots = {}
    for name, place in places.items():
        if place.layer is None:
            spots[name] = Spot("", "", None, place.module)
            continue
        part = _part(place)
        spots[name] = Spot(
            part=part,
            layer=".".join(map(str, place.depth)),
            depth=order[part].index(place.depth),
            label=place.module[len(part) + 1 :],
        )
    return spots


def _part(place: ModulePlace) -> str:
    """Return the first parts of a module's name, as many as its layer's name has."""
    assert place.layer is not None
    return ".".join(place.module.split(".")[: place.layer.count(".") + 1])


def subject_payload(subject: Shown) -> dict[str, Any]:
    """Return statistics by column, and histograms without empty bins at the ends."""
    stats = subject.stats
    spots = find_spots([tensor.name for tensor in stats.tensors])
    places = [spots[tensor.name] for tensor in stats.tensors]
    columns: dict[str, list[Any]] = {
        "name": [tensor.name for tensor in stats.tensors],
        "module": [tensor.module for tensor in stats.tensors],
        "part": [spot.part for spot in places],
        "layer": [spot.layer for spot in places],
        "depth": [spot.depth for spot in places],
        "label": [spot.label for spot in places],
        "shape": [list(tensor.shape) for tensor in stats.tensors],
        "is_matrix": [tensor.is_matrix for tensor in stats.tensors],
        "form": [tensor.label for tensor in stats.tensors],
        "num_elements": [tensor.num_elements for tensor in stats.tensors],
        "num_non_finite": [tensor.num_non_finite for tensor in stats.tensors],
        "histogram": [_trimmed(tensor.histogram) for tensor in stats.tensors],
    }
    for column in STATISTICS:
        columns[column] = [getattr(tensor, column) for tensor in stats.tensors]
    return {
        "title": subject.title,
        "role": subject.role,
        "model": stats.model,
        "base": stats.base,
        "filter": stats.filter,
        "small": stats.small,
        "notes": list(stats.notes),
        "columns": columns,
        "groups": {
            "modules": [_group(group) for group in stats.modules],
            "layers": [_group(group) for group in stats.layers],
            "model": [_group(stats.whole) | {"name": subject.title}],
        },
    }


def _group(group: Group) -> dict[str, Any]:
    labels = ", ".join(f"{label} {number}" for label, number in group.labels.items())
    return group.as_dict() | {"labels": labels}


def _trimmed(histogram: Histogram | None) -> dict[str, Any] | None:
    if histogram is None:
        return None
    counts = histogram.counts
    filled = [number for number, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, -1)
    return {
        "first": first,
        "counts": list(counts[first : last + 1]),
        "below": histogram.num_below,
        "above": histogram.num_above,
    }


def drift_payload(
    comparison: Comparison, titles: Sequence[str], base: WeightStats | None
) -> dict[str, Any]:
    """Return the distance of a merge's output from each of its models, tensor by tensor.

    Args:
        comparison: the comparison of the output, which is its first model, with the merged models.
        titles: the names of the merged models on the page.
        base: the statistics of the base's weights.
    """
    norms = {tensor.name: tensor.l2_norm for tensor in base.tensors} if base else {}
    pairs: dict[str, list[PairStats]] = {}
    for pair in comparison.tensors:
        if pair.a == 0:
            pairs.setdefault(pair.name, []).append(pair)
    spots = find_spots(list(pairs))
    return {
        "has_base": comparison.base is not None,
        "models": list(titles),
        "tensors": [
            {
                "name": name,
                **spots[name].as_dict(),
                "base_norm": norms.get(name),
                "change_norm": of_models[0].norm_a,
                "model_norm": [pair.norm_b for pair in of_models],
                "distance": [pair.distance for pair in of_models],
                "cosine": [pair.cosine for pair in of_models],
            }
            for name, of_models in pairs.items()
        ],
    }


def payload(
    subjects: Sequence[Shown],
    *,
    t: float,
    base: WeightStats | None = None,
    merge: Mapping[str, Any] | None = None,
    drift: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return all data of a page; numbers that JSON does not know become None.

    Args:
        base: the statistics of the base's weights, whose norm is what changes are compared with.
    """
    found: dict[str, Any] = _known(
        {
            "t": t,
            "bins": BINS,
            "half_width": HALF_WIDTH,
            "statistics": STATISTICS,
            "least_span": LEAST_SPAN,
            "least_share": LEAST_SHARE,
            "base_norm": math.hypot(*(tensor.l2_norm for tensor in base.tensors)) if base else None,
            "subjects": [subject_payload(subject) for subject in subjects],
            "merge": merge,
            "drift": drift,
            "notes": list(notes),
        }
    )
    return found


def _known(value: Any) -> Any:
    """Return values rounded to nine digits, which is more than a screen can show."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(item) for item in value]
    return value
